"""Adapters that peftc has no code for: PEFT makes their layers, in the same model and under the same switch as ours.

What goes to PEFT: its other methods (LoHa, VeRA, BOFT, …), layers peftc does not know (quantized ones, …), and options of
LoRA such as target_parameters and trainable_token_indices.  While PEFT works it sees the model without peftc's layers;
afterwards those stand around PEFT's again, so that each layer of PEFT is around the plain layer that it was written for,
and each of ours around whatever is there.  Everything else is peftc's as for its own adapters: names, what is active,
modules_to_save, biases, state dicts and files.  A call that PEFT refuses leaves no trace.
"""

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .. import _prepare
from .._optional import is_installed
from . import torch_adalora, torch_dispatch, torch_files
from .torch_wrappers import around, inner, is_ours, is_pefts, places, take_out, taken_out, unwrap

#: What errors say that mean "peftc has no code for it", as opposed to "this cannot work".
_NO_CODE = (
    (NotImplementedError, re.compile(r"\bpeftc (has no code|can do)|something peftc can do")),
    (ValueError, re.compile(r"^Target module .* is not supported\. Currently")),
)

#: What errors say of a method that is no method of PEFT 0.17.
_UNKNOWN_METHOD = re.compile(r"""peft_type is ['"](\w+)['"], which is not a method""")

#: How errors begin that say that an adapter would adapt nothing.
_NO_MATCH = (
    "Target modules ",  # … not found in the base model
    "All modules were excluded.",
    "No `target_modules` passed",
    "No modules were targeted",
)

#: Options of LoRA that change the base model for good when PEFT handles them: deleting could not undo it.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")

_MODULE_FIELDS = frozenset(nn.Module().__dict__)
_PREFIX = "base_model.model."


# ------------------------------------------------------------------ may PEFT make it?


def check_elsewhere(refused: Exception) -> None:
    """Raise `refused`, unless it says that peftc has no code and PEFT is there to make the adapter.

    Without PEFT the error says that installing it is the remedy.
    """
    if _is_later_method(refused):
        return
    if not any(isinstance(refused, kind) and text.search(str(refused)) for kind, text in _NO_CODE):
        raise _as_theirs(refused)
    if not is_installed("peft"):
        raise type(refused)(
            f"{refused}. With the package peft installed, PEFT makes this adapter on a torch model: pip install peft"
        ) from refused


def _is_later_method(refused: Exception) -> bool:
    """Is it about a method that is none of PEFT 0.17's, and one of the PEFT's that is installed?"""
    found = _UNKNOWN_METHOD.search(str(refused)) if isinstance(refused, KeyError) else None
    if found is None or not is_installed("peft"):
        return False
    import peft

    return found[1] in peft.PeftType.__members__


def _as_theirs(refused: Exception) -> Exception:
    """The error as one of the class that later versions of PEFT have for it, if such a PEFT is imported."""
    error = getattr(sys.modules.get("peft.utils.error"), "NoMatchingPeftModuleError", None)
    if error is None or not str(refused).startswith(_NO_MATCH):
        return refused
    theirs: Exception = error(*refused.args)
    return theirs.with_traceback(refused.__traceback__)


def as_pefts(config: Any) -> Any:
    """The config as one of PEFT's: itself, or made from peftc's config or from a dict of fields."""
    import peft

    if isinstance(config, peft.PeftConfig):
        return config
    fields = dict(config) if isinstance(config, dict) else config.to_dict()
    make_config: Any = peft.PeftConfig.from_peft_type
    return make_config(**fields)


def read_config(folder: str) -> Any:
    """adapter_config.json of a folder, as PEFT reads it."""
    import peft

    return peft.PeftConfig.from_pretrained(folder)


# ----------------------------------------------------------- an adapter's share in PEFT's layers


def _containers(layer: Any) -> Iterator[tuple[str, Any]]:
    """(field, container by adapter name) of one of PEFT's layers: modules, parameters, buffers, plain values."""
    found = inner(layer)
    inside = found[1] if found is not None and found[0] is layer else ""
    for field, value in layer._modules.items():
        if field != inside and value is not None and hasattr(value, "keys"):
            yield field, value
    for field, value in layer.__dict__.items():
        if isinstance(value, dict) and field not in _MODULE_FIELDS and field != "kwargs":
            yield field, value


def _core_of(wrapper: Any) -> Any:
    """Where a wrapper of PEFT's keeps its adapters: itself, or the layer inside that knows about tokens."""
    return wrapper._modules.get("token_adapter", wrapper)


def _holds(wrapper: Any, name: str) -> bool:
    return any(name in container for _, container in _containers(_core_of(wrapper)))


class _Original:
    """The base layer of one of PEFT's layers as it is before PEFT merges into it.

    Quantised layers keep more than parameters: scales in attributes, of their own, of an object that they compute with and
    of the weight. Some are replaced as a whole.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        found = inner(wrapper)
        assert found is not None
        self._place = found
        self._inside = found[0]._modules[found[1]]
        modules = list(unwrap(wrapper).modules())
        self._modules = [(m, dict(m._parameters)) for m in modules]
        self._parameters = [(p, p.data) for m in modules for p in m.parameters(recurse=False)]
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module in modules:
            own = {k: v for k, v in module.__dict__.items() if k[0] != "_" and k != "training" and not callable(v)}
            self._attributes.append((module.__dict__, own))
            self._keep(own.values())
        for parameter, _ in self._parameters:
            self._attributes.append((parameter.__dict__, dict(parameter.__dict__)))
            self._keep(parameter.__dict__.values())

    def _keep(self, values: Iterable[Any]) -> None:
        """Keep what objects consist of that a module or a parameter holds."""
        for one in values:
            if hasattr(one, "__dict__") and not callable(one) and not isinstance(one, (torch.Tensor, type)):
                self._attributes.append((one.__dict__, dict(one.__dict__)))

    def lend_copies(self) -> None:
        """Let the parameters be copies, for code that writes into them."""
        for parameter, _ in self._parameters:
            parameter.data = parameter.data.clone()

    def put_back(self) -> None:
        layer = _core_of(self._wrapper)
        if layer.merged_adapters:
            with torch.no_grad():
                layer.unmerge()
        holder, key = self._place
        holder._modules[key] = self._inside
        for module, parameters in self._modules:
            for name in parameters:
                module.__dict__.pop(name, None)
            module._parameters.clear()
            module._parameters.update(parameters)
        for parameter, data in self._parameters:
            parameter.data = data.to(parameter)  # the model may have another dtype or device by now
        for attributes, values in self._attributes:
            attributes.update(values)


class Part:
    """What PEFT holds of one adapter: its entries in the layers of PEFT's on the model."""

    def __init__(self, name: str, method: str, save_projection: bool = False) -> None:
        self.name, self.method, self.save_projection = name, method, save_projection
        #: (module's name, the same as in PEFT's state-dict keys, wrapper), in the model's order
        self.wrappers: list[tuple[str, str, Any]] = []
        #: while merged: the base layers before, in the order of merging
        self.originals: list[_Original] = []

    def find(self, model: nn.Module) -> None:
        """Look for the adapter's entries in the tree.

        A name below a layer that the adapter has itself contains "base_layer.", as in PEFT's files; wrappers of other
        adapters leave no trace in names.
        """
        seen: set[int] = set()
        stack: list[tuple[Any, str, str]] = [(unwrap(model), "", "")]
        while stack:
            module, path, key = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            children = []
            for part, child in module._modules.items():
                if child is None:
                    continue
                below, named = f"{path}.{part}" if path else part, f"{key}.{part}" if key else part
                for _, _, wrapper in around(module, part):
                    if is_pefts(wrapper) and _holds(wrapper, self.name):
                        self.wrappers.append((below, named, wrapper))
                        named += ".base_layer"
                children.append((unwrap(child), below, named))
            stack += children[::-1]

    def layers(self) -> list[tuple[str, Any]]:
        """(module's name, layer of PEFT's), in the model's order."""
        return [(path, _core_of(wrapper)) for path, _, wrapper in self.wrappers]

    def modules(self) -> list[str]:
        return list(dict.fromkeys(path for path, _, _ in self.wrappers))

    def _prefix(self) -> str:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as PREFIXES

        return next(prefix for kind, prefix in PREFIXES.items() if kind.value == self.method)

    def _entries(self) -> Iterator[tuple[str, Any, str, Any]]:
        """(name in keys, layer, field, entry) of what belongs to the adapter's state."""
        prefix = self._prefix()
        for _, key, wrapper in self.wrappers:
            layer = _core_of(wrapper)
            tokens = layer is not wrapper
            if getattr(layer, "tied_adapter", None) is not None:
                continue  # its tensors are another layer's
            named = f"{key}.token_adapter" if tokens else key
            wanted = "trainable_tokens_delta" if tokens else prefix
            for field, container in _containers(layer):
                if self.name in container and field.startswith(wanted):
                    yield named, layer, field, container[self.name]

    def rows(self) -> list[tuple[str, str, Any]]:
        """(state-dict key, name below the layer's with the adapter's, tensor) of each tensor that PEFT saves."""
        rows: list[tuple[str, str, Any]] = []
        for key, layer, field, entry in self._entries():
            if isinstance(entry, nn.Module):
                for part, tensor in entry.state_dict(keep_vars=True).items():
                    short = "" if field == "lora_magnitude_vector" and part == "weight" else f".{part}"
                    rows.append((f"{key}.{field}{short}", f"{field}.{self.name}.{part}", tensor))
            elif isinstance(entry, torch.Tensor) and not self._is_shared(layer, field):
                rows.append((f"{key}.{field}", f"{field}.{self.name}", entry))
        if self.wrappers:
            rows += self._shared_rows(_core_of(self.wrappers[0][2]))
        return rows

    def full_rows(self, where: dict[int, str]) -> list[tuple[str, str, Any, bool, bool, str]]:
        """`TorchRegistry.tensors` of the adapter. where: id of a module → its name in the model"""
        holders = {id(tensor): layer for layer, tensor in self._owned()}
        rows: list[tuple[str, str, Any, bool, bool, str]] = []
        for key, below, tensor in self.rows():
            layer = holders.get(id(tensor))
            full = f"{where[id(layer)]}.{below}" if layer is not None else ""
            rows.append((key, full, tensor, True, True, key))
        return rows

    def _owned(self) -> Iterator[tuple[Any, Any]]:
        """(layer, tensor) of every tensor; the first layer counts for one that several share."""
        for _, _, wrapper in reversed(self.wrappers):
            layer = _core_of(wrapper)
            for _, container in _containers(layer):
                if self.name not in container:
                    continue
                entry = container[self.name]
                if isinstance(entry, nn.Module):
                    for tensor in (*entry.parameters(), *entry.buffers()):
                        yield layer, tensor
                elif isinstance(entry, torch.Tensor):
                    yield layer, entry

    def _is_shared(self, layer: Any, field: str) -> bool:
        """Does the tensor belong to all layers together, or to no file?"""
        container = layer._modules.get(field)
        hidden = container is not None and self.name in getattr(container, "_non_persistent_buffers_set", ())
        return hidden or field == "vblora_vector_bank"

    def _shared_rows(self, layer: Any) -> list[tuple[str, str, Any]]:
        fields = ["vblora_vector_bank", *(("vera_A", "vera_B") if self.save_projection else ())]
        held = dict(_containers(layer))
        return [
            (f"base_model.{field}", f"{field}.{self.name}", held[field][self.name])
            for field in fields
            if field in held and self.name in held[field]
        ]

    def tensors(self) -> list[nn.Parameter]:
        """What the adapter trains."""
        found: dict[int, nn.Parameter] = {}
        for _, _, _, entry in self._entries():
            parameters = entry.parameters() if isinstance(entry, nn.Module) else (entry,)
            found.update({id(p): p for p in parameters if isinstance(p, nn.Parameter) and p.is_floating_point()})
        return list(found.values())

    def train(self, mode: bool | None = None) -> None:
        """Put the adapter's own modules (dropout and the like) in a mode; None: that of the layer they are around."""
        for _, _, wrapper in self.wrappers:
            base = unwrap(wrapper).training
            if mode is None:
                wrapper.training = _core_of(wrapper).training = base
            for _, container in _containers(_core_of(wrapper)):
                if isinstance(container, nn.Module):
                    container.training = base
                if self.name in container and isinstance(container[self.name], nn.Module):
                    container[self.name].train(base if mode is None else mode)

    # ---------------------------------------------------------------- merging

    def merge(self, safe_merge: bool) -> None:
        """Fold the adapter into copies of the base weights, by PEFT's own code.

        Raises:
            NotImplementedError: PEFT has no code for it, or not on this layer.
        """
        for path, _, wrapper in self.wrappers:
            base = unwrap(wrapper)
            torch_dispatch.check_in_memory(path, base, "merging changes them")
            original = _Original(wrapper)
            self.originals.append(original)
            base.state_dict()  # bitsandbytes orders weights anew to compute on a CPU, and puts them in order for this alone
            original.lend_copies()
            try:
                with torch.no_grad():  # else the graph that PEFT 0.21's OFT leaves behind keeps its parameters for good
                    _core_of(wrapper).merge(safe_merge=safe_merge, adapter_names=[self.name])
            except NotImplementedError as error:
                if str(error):
                    raise
                raise NotImplementedError(
                    f"PEFT cannot merge adapters of {self.method} into {path} ({type(base).__name__}): keep "
                    f"{self.name} unmerged"
                ) from error

    def unmerge(self) -> None:
        """Give the base layers what `merge` took, bit for bit."""
        for original in reversed(self.originals):
            original.put_back()
        self.originals.clear()

    # --------------------------------------------------------------- deleting

    def drop(self, model: nn.Module) -> None:
        """Take the adapter out of PEFT's layers, and those that have no other out of the model."""
        for _, _, wrapper in self.wrappers:
            if hasattr(wrapper, "_restore_weights"):  # of attention: parameters that a forward pass has replaced
                wrapper._restore_weights()
        for path, _, wrapper in reversed(self.wrappers):
            _drop(wrapper, self.name)
            if not any(len(container) for _, container in _adapter_containers(wrapper)):
                take_out(model, path, wrapper)


def _adapter_containers(wrapper: Any) -> Iterator[tuple[str, Any]]:
    layer = _core_of(wrapper)
    return ((field, value) for field, value in _containers(layer) if field in layer.adapter_layer_names)


def _drop(wrapper: Any, name: str) -> None:
    for _, container in _containers(_core_of(wrapper)):
        if name in container:
            del container[name]
    if isinstance(getattr(wrapper, "_adapters", None), set):
        wrapper._adapters.discard(name)


def follow(parts: Iterable[Part], live: tuple[str, ...]) -> None:
    """Make PEFT's layers run the adapters that are live, in this order, and no others."""
    wrappers = {id(wrapper): wrapper for part in parts for _, _, wrapper in part.wrappers}
    for wrapper in wrappers.values():
        layer = _core_of(wrapper)
        # A merged layer runs its base; it would unmerge itself if it were disabled or had nothing active.
        here = list(layer.merged_adapters) or [name for name in live if _holds(wrapper, name)]
        for one in {id(wrapper): wrapper, id(layer): layer}.values():
            one._active_adapter = here
            one._disable_adapters = not here


# ------------------------------------------------------------------------ making one


class _Tree:
    """A model's modules, parameters and flags, to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = dict(model.__dict__)
        self._modules = [
            (m, dict(m._modules), dict(m._parameters), dict(m._buffers), m.training) for m in model.modules()
        ]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        for module, children, parameters, buffers, training in self._modules:
            held: Any
            before: Any
            for held, before in (
                (module._modules, children),
                (module._parameters, parameters),
                (module._buffers, buffers),
            ):
                held.clear()
                held.update(before)
            module.training = training
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for name in set(self._model.__dict__) - set(self._own):
            del self._model.__dict__[name]
        self._model.__dict__.update(self._own)

    def put_back_lost(self) -> None:
        """Entries of other adapters in containers that PEFT replaced by new ones (VeRA's projections)."""
        for module, children, _, _, _ in self._modules:
            before: Any
            now: Any
            for field, before in children.items():
                now = module._modules.get(field)
                if now is before or not (hasattr(before, "keys") and hasattr(now, "keys")) or inner(module) is None:
                    continue
                for name in before:
                    if name not in now:
                        now[name] = before[name]


def _inject(model: Any, config: Any, name: str, siblings: dict[str, Any]) -> None:
    """Let PEFT put the adapter's layers into the model. It is to know the other adapters of the method, and no others."""
    from peft import inject_adapter_in_model

    had = "peft_config" in model.__dict__
    before = model.__dict__.pop("peft_config", None)
    if siblings:
        model.peft_config = dict(siblings)
    try:
        inject_adapter_in_model(config, model, name)
    finally:
        model.__dict__.pop("peft_config", None)
        if had:
            model.peft_config = before


def _check_base_stays(config: Any) -> None:
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise NotImplementedError(
            f'init_lora_weights="{init}" of an adapter that PEFT makes would change the base weights for good; use '
            "another value, or leave out what only PEFT can do (target_parameters, trainable_token_indices, …)"
        )
    if getattr(config, "layer_replication", None):
        raise NotImplementedError(
            "layer_replication changes the model for good, which no delete could undo; repeat the layers yourself before "
            "adding adapters, or use PEFT's get_peft_model"
        )


def make(
    registry: Any, name: str, config: Any, instead: dict[str, Any], source: Any, label: str, trainable: bool
) -> tuple[Any, dict[str, Any], list[str], list[str]]:
    """Make adapter `name` with PEFT, fresh (source None) or filled from a file or dict, listed but not active.

    instead: fields that stand in for the config's. Returns (PEFT's config of it, the fields that PEFT would have changed in
    it, missing names, unexpected names).

    Raises:
        ImportError and whatever PEFT raises; ValueError, KeyError for tensors that do not fit. The model is unchanged then.
    """
    model = registry.model
    config = as_pefts(config)
    _check_base_stays(config)
    method = _prepare.method_of(config)
    worked = copy.copy(config)  # PEFT settles targets in it
    if hasattr(worked, "bias"):
        worked.bias = "none"  # biases are seen to here, as for peftc's own adapters
    worked.__dict__.update(instead)
    given = dict(worked.__dict__)
    siblings = {
        other: model.peft_config[other]
        for other in registry.names()
        if registry.part(other) is not None and registry.peft_type(other) == method
    }
    tree = _Tree(model)
    try:
        with taken_out(model, is_ours):
            _inject(model, worked, name, siblings)
            for parent, key in list(places(model)):
                if type(parent._modules[key]).__name__ == "ModulesToSaveWrapper":  # peftc has its own
                    parent._modules[key] = parent._modules[key].original_module
        tree.put_back_lost()
        part = Part(name, method, bool(getattr(config, "save_projection", False)))
        part.find(model)
        for path, _, wrapper in part.wrappers:
            torch_dispatch.check_in_memory(path, unwrap(wrapper), "PEFT puts an adapter where they are")
        part.train()
        if getattr(config, "save_only_topk_weights", False):
            raise NotImplementedError(
                "save_only_topk_weights=True stores other tensors than the model has; set it to False"
            )
        missing, unexpected = registry.take(part, config, source, label, trainable)
    except BaseException:
        for parent, key in places(
            model
        ):  # layers that were there have it in plain dicts as well, which are not in the tree
            for _, _, wrapper in around(parent, key):
                if is_pefts(wrapper):
                    _drop(wrapper, name)
        tree.restore()
        registry.follow()
        raise
    registry.follow()
    settled = {
        field: value for field, value in worked.__dict__.items() if field not in given or value is not given[field]
    }
    return config, settled, missing, unexpected


def fill(part: Part, source: Any) -> tuple[list[str], list[str]]:
    """Copy the tensors of a file or dict into the adapter's; returns (missing, unexpected) names.

    Raises:
        ValueError: a shape that differs.
    """
    given = {name.removeprefix(_PREFIX): name for name in torch_files.names_in(source)}
    targets = {key: tensor for key, _, tensor in part.rows()}
    found = {key: name for key, name in given.items() if key in targets}
    values = torch_files.read(source, found.values(), mapped=True)
    origin = source if isinstance(source, str) else "state_dict"
    if part.method == "ADALORA":
        layers = [(key, _core_of(wrapper)) for _, key, wrapper in part.wrappers]
        if torch_adalora.take_ranks(layers, part.name, {key: values[name] for key, name in found.items()}):
            targets = {key: tensor for key, _, tensor in part.rows()}
    for key, name in found.items():
        target, value = targets[key], values[name]
        if target.shape != value.shape:
            raise ValueError(
                f"size mismatch for {name}: {origin} has shape {list(value.shape)}, the model needs {list(target.shape)}"
            )
    with torch.no_grad():
        for key, name in found.items():
            targets[key].copy_(values[name])
    return [key for key in targets if key not in given], [name for key, name in given.items() if key not in targets]
