"""Models that accelerate has spread over devices, memory and disk: put in place anew when the first adapter is loaded.

Transformers' mixin does so with `dispatch_model`, which cannot read weights that are on disk already, and would send the
adapter there with the layers around it.  Here accelerate sees the model without adapters: what is on disk and stays there
is read from where it is, what comes back is read once, and adapters stay in memory, on the device that their layer
computes on.  Where that fails, on a full disk for one, the model is as it was.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .torch_wrappers import inner, places, taken_out, unwrap


class Plan(NamedTuple):
    """Where the parts of a model are to be: module's name → device, "cpu" or "disk"; what is written goes to `folder`, and
    `stored` says where accelerate finds what is on disk already."""

    device_map: dict[str, Any]
    folder: Any
    stored: dict[str, Any]


def plan(model: Any, device_map: Any, max_memory: Any, folder: Any, index: Any) -> Plan | None:
    """What `load_adapter`'s arguments ask for; None for a model that is not on the CPU or on disk by accelerate.

    Args:
        device_map: "auto", "balanced", "balanced_low_0" or "sequential": accelerate's choice within max_memory; a device, or
            a dict of module's name → device: this; None: leave everything where it is.
        index: of what is on disk already, tensor's name → {"safetensors_file": path, "weight_name": its name there, "dtype":
            its dtype in the model}, or {"dtype": …, "shape": …} for a file NAME.dat in the folder.

    Raises:
        TypeError: an index that is no mapping.
        ValueError: something is to go to disk, and there is no folder for it; the index names a file that is not there.
    """
    now = getattr(model, "hf_device_map", None)
    if now is None or device_map is None or not {"cpu", "disk"} & {str(device) for device in now.values()}:
        return None
    if not isinstance(index or {}, Mapping):
        raise TypeError(f"offload_index is a dict of tensor's name → where it is on disk; got {index!r}")
    with taken_out(model):
        if isinstance(device_map, str):
            device_map = _choose(model, device_map, max_memory)
        elif not isinstance(device_map, Mapping):
            device_map = {"": device_map}
        found = Plan(dict(device_map), folder, dict(index or {}))
        where = {str(device) for device in now.values()}
        if where == {str(device) for device in found.device_map.values()} == {"cpu"}:
            return None  # quantised models refuse to be moved, even to where they are
        stored = _stored(model)
        to_disk = {name: tensor for name, tensor in model.named_parameters() if _place(found, name) == "disk"}
        for name in to_disk.keys() & found.stored.keys():
            _check_entry(name, found.stored[name], folder)
        for name, tensor in to_disk.items():
            if name not in stored and name not in found.stored and folder is None:
                raise ValueError(
                    f"device_map sends {name} ({list(tensor.shape)}) to disk: pass offload_folder, a folder to write it to, "
                    'or keep it in memory (device_map=None leaves everything where it is, max_memory={"cpu": …} allows more)'
                )
    return found


def _check_entry(name: str, entry: Any, folder: Any) -> None:
    """Raise ValueError unless an entry of offload_index leads to a file."""
    if not isinstance(entry, Mapping) or not ("safetensors_file" in entry or {"dtype", "shape"} <= set(entry)):
        raise ValueError(
            f"offload_index[{name!r}] is {entry!r}; it should be a dict with safetensors_file, or with dtype and shape"
        )
    path = entry.get("safetensors_file")
    if path is None:
        if folder is None:
            raise ValueError(f"offload_index has {name} in {name}.dat: pass offload_folder, the folder that it is in")
        path = os.path.join(folder, f"{name}.dat")
    if not os.path.isfile(path):
        raise ValueError(
            f"offload_index has {name} in {path}, which is not there: leave {name} out of offload_index, and it is written "
            "to offload_folder"
        )


def _choose(model: Any, strategy: str, max_memory: Any) -> dict[str, Any]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = getattr(model, "_no_split_modules", None)
    if strategy != "sequential":
        low_zero = strategy == "balanced_low_0"
        max_memory = get_balanced_memory(model, max_memory=max_memory, no_split_module_classes=whole, low_zero=low_zero)
    return dict(infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole))


def carry_out(model: Any, plan: Plan) -> None:
    """Put the model's parts where the plan says, and adapters where their layers compute.

    Raises:
        OSError: what goes to disk cannot be written there, or what comes back not be read.

    The model is as it was then, adapters apart, and so is the disk.
    """
    with taken_out(model):
        put_back = _snapshot(model)
    files: list[str] = []
    try:
        with taken_out(model):
            _move(model, plan, files)
        _follow(model)
    except BaseException:
        with taken_out(model):
            put_back()
        for file in files:
            with contextlib.suppress(OSError):
                os.remove(file)
        raise


def _move(model: Any, plan: Plan, files: list[str]) -> None:
    """`carry_out` on the tree without adapters; the files that it makes are listed as they come to be."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    stored = _stored(model)
    for module in model.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False):
                hook.original_devices = {}  # nothing is read before it is known where to
        remove_hook_from_module(module)
    for name in ("to", "cuda"):  # accelerate's, which warn
        model.__dict__.pop(name, None)
    index = dict(plan.stored)
    elsewhere = {str(device) for device in plan.device_map.values()} - {"cpu", "disk"}
    kept: dict[str, Any] = {}  # what hooks fetch: on disk, or in memory beside another device
    for names, parent, key, tensor in _tensors(model):
        target = _place(plan, names[0])
        if tensor.device.type == "meta" and target != "disk":
            source = next((name for name in names if name in stored), None)
            if source is None:
                continue  # nobody has it
            _replace(model, names, parent, key, stored[source])
        for name in names:
            if target == "disk" and name not in index:
                if tensor.device.type != "meta":
                    index[name] = _write(tensor.detach(), name, str(plan.folder), files)
                elif name in stored:
                    kept[name] = None
            elif target == "cpu" and elsewhere:
                kept[name] = parent._parameters.get(key, parent._buffers.get(key)).detach()
    dispatch_model(
        model,
        device_map=plan.device_map,
        state_dict=_Weights(kept, stored),  # any mapping does
        offload_dir=plan.folder,
        offload_index=index,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )


def _write(tensor: torch.Tensor, name: str, folder: str, files: list[str]) -> dict[str, Any]:
    """Write a tensor where accelerate looks for it; returns what its index has of it.

    By itself accelerate maps a file without contents and fills that: on a full disk this is the end of the process (SIGBUS).
    """
    path = os.path.join(folder, f"{name}.dat")
    partial = f"{path}.partial"
    values = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    try:
        os.makedirs(folder, exist_ok=True)
        files.append(partial)
        with open(partial, "wb") as file:
            file.write(values if len(values) else b"\0")  # an empty file cannot be mapped
        if not os.path.exists(path):
            files.append(path)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: {name} ({len(values)} bytes) could not be written to disk, and nothing was moved; pass an "
            "offload_folder with more room, or keep more in memory (device_map, max_memory)",
            path,
        ) from error
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _snapshot(model: nn.Module) -> Callable[[], None]:
    """A function that puts the modules of a tree without adapters back into the state of now: tensors, hooks, methods."""
    objects: dict[int, Any] = {}
    dicts: dict[int, dict[Any, Any]] = {}
    for module in model.modules():
        for one in (module, *_hooks(module), getattr(module, "_hf_hook", None)):
            if one is not None:
                objects[id(one)] = one
                dicts[id(one.__dict__)] = one.__dict__
        for held in (module._parameters, module._buffers):
            dicts[id(held)] = held
    contents = [(one, dict(one)) for one in dicts.values()]
    values = [(t, t.data) for tensors in (model.parameters(), model.buffers()) for t in tensors]

    def put_back() -> None:
        for one, content in contents:
            one.clear()
            one.update(content)
        for tensor, data in values:
            if tensor.device != data.device or tensor.data_ptr() != data.data_ptr():  # moved as it is, by `model.to`
                tensor.data = data

    return put_back


def check_in_memory(path: str, module: nn.Module, why: str) -> None:
    """Raise ValueError if accelerate keeps the module's own weights elsewhere."""
    own = [*module._parameters.values(), *module._buffers.values()]
    if _hooks(module) and any(tensor is not None and tensor.device.type == "meta" for tensor in own):
        raise ValueError(
            f"the weights of {path} are not in memory (accelerate has offloaded them), and {why}: load the model with a "
            "device_map that keeps that layer in memory, or leave the layer out of target_modules"
        )


class _Weights(Mapping[str, torch.Tensor]):
    """Name → tensor: some that are in memory, others read from where they are stored when they are asked for."""

    def __init__(self, names: dict[str, Any], stored: "_Stored") -> None:
        self._names, self._stored = names, stored

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor | None = self._names[name]
        return self._stored[name] if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Stored(dict[str, Any]):
    """Name of a tensor in the model → (where a hook finds it, its name there); subscripting reads it."""

    def __getitem__(self, name: str) -> Any:
        where, key = dict.__getitem__(self, name)
        return where[key]


def _stored(model: nn.Module) -> _Stored:
    """The tensors of a model without wrappers that hooks of accelerate bring in for a forward pass."""
    found = _Stored()
    for path, module in model.named_modules():
        for one in _hooks(module):
            if not getattr(one, "offload", False) or one.weights_map is None:
                continue
            inside = module.named_modules() if one.place_submodules else [("", module)]
            for below, owner in inside:
                for key in (*owner._parameters, *owner._buffers):
                    name = f"{below}.{key}" if below else key
                    if name in one.weights_map:
                        found[f"{path}.{name}" if path else name] = (one.weights_map, name)
    return found


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    found: tuple[Any, ...] = tuple(getattr(hook, "hooks", (hook,) if hook is not None else ()))
    return found


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy with all values in memory, and without hooks of accelerate: those fetch the original's weights."""
    hooks = {id(hook): hook for one in module.modules() if (hook := getattr(one, "_hf_hook", None)) is not None}
    made = copy.deepcopy(module, dict(hooks))
    if not hooks:
        return made
    from accelerate.hooks import ModelHook, remove_hook_from_module

    with taken_out(module):
        stored = _stored(module)
    where = next((one.execution_device for one in _hooks(module) if getattr(one, "execution_device", None)), "cpu")
    for one in made.modules():
        kept: Any = getattr(one, "_hf_hook", None)
        if kept is not None:
            one.__dict__["_hf_hook"] = ModelHook()  # the original's, which is the same, is not to be detached
            remove_hook_from_module(one)
    with taken_out(made):
        for names, parent, key, tensor in _tensors(made):
            source = next((name for name in names if name in stored), None)
            if tensor.device.type == "meta" and source is not None:
                _replace(made, names, parent, key, stored[source].to(where))
    return made


def _place(plan: Plan, name: str) -> str:
    """The device of a tensor: that of the longest module's name that begins its own."""
    while name not in plan.device_map:
        if not name:
            return "cpu"
        name = name.rpartition(".")[0]
    return str(plan.device_map[name])


def _tensors(model: nn.Module) -> list[tuple[list[str], Any, str, torch.Tensor]]:
    """(names, module, key, tensor) of each parameter and persistent buffer; several names if it is tied."""
    rows: dict[int, tuple[list[str], Any, str, torch.Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None or key in module._non_persistent_buffers_set:
                    continue
                row = rows.setdefault(id(tensor), ([], module, key, tensor))
                row[0].append(f"{path}.{key}" if path else key)
    return list(rows.values())


def _replace(model: nn.Module, names: list[str], parent: Any, key: str, value: torch.Tensor) -> None:
    """Put a value in the place of a tensor that has none, under all its names."""
    old = parent._parameters.get(key)
    if old is None:
        for name in names:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last] = value
        return
    fresh = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    for name in names:
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = fresh


def _follow(model: nn.Module) -> None:
    """Put adapters on the devices that their layers compute on."""
    for parent, key in places(model):
        top = parent._modules[key]
        base = unwrap(top)
        device = next((p.device for p in base.parameters() if p.device.type != "meta"), None)
        hook = getattr(base, "_hf_hook", None)
        if device is None or hook is not None:
            device = getattr(hook, "execution_device", None) or device
        while device is not None and (found := inner(top)) is not None:
            for field, child in top._modules.items():
                if child is not None and field not in (found[1], "token_adapter"):
                    child.to(device)
            top = found[0]._modules[found[1]]
