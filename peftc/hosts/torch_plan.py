"""What an adapter will change in a torch model: its layers, the copies, biases and embeddings that go with it.

Everything is made on the side; nothing here changes the model.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import _core
from . import torch_adalora, torch_attention, torch_dispatch, torch_ia3, torch_lora
from .torch_adapter import Adapter
from .torch_layers import Switch
from .torch_saved import copy_of
from .torch_tree import kind_of
from .torch_wrappers import leads, place, unwrap

_LAYERS: dict[str, Any] = {
    "LORA": {**torch_lora.LAYERS, "MultiheadAttention": torch_attention.MultiheadAttention},
    "ADALORA": torch_adalora.LAYERS,
    "IA3": torch_ia3.LAYERS,
}
_EMBEDDINGS = ("embed_tokens", "lm_head")

#: (dotted name, module) of each module
Modules = list[tuple[str, Any]]


def plan_layers(
    adapter: Adapter, paths: list[str], modules: dict[str, Any], switch: Switch
) -> list[tuple[Any, str, Any]]:
    """Give the adapter the layers for the modules with these names; (parent, key, layer) for each layer that is new."""
    parents, keys, tops = _core.find_places(modules, paths)
    bases = [modules[path] for path in paths]
    if set(map(type, bases)) == {nn.Linear}:
        kinds = ["Linear"] * len(paths)
    else:
        kinds = [_kind_of_slot(path, base, paths) for path, base in zip(paths, bases, strict=True)]
    known = _LAYERS[adapter.method]
    classes = [known[kind] for kind in kinds]
    for i, top in enumerate(tops) if tops != bases else ():
        if leads.get(type(top)) != ():
            parents[i], keys[i] = place(parents[i], keys[i])
            tops[i] = parents[i]._modules[keys[i]]
    new: dict[Any, list[int]] = {}
    for i, cls in enumerate(classes):
        if type(tops[i]) is not cls:
            new.setdefault(cls, []).append(i)
    splices: list[tuple[Any, str, Any]] = []
    for cls, where in new.items():
        made = cls.around([tops[i] for i in where], switch)
        for i, layer in zip(where, made, strict=True):
            tops[i] = layer
            splices.append((parents[i], keys[i], layer))
    adapter.set_layers(paths, tops)
    adapter.kinds = set(kinds)
    return splices


def _kind_of_slot(path: str, module: Any, paths: list[str]) -> str:
    """What a module that is to be adapted does; paths has the names of all that are. Raises ValueError for one inside another."""
    kind = kind_of(module)
    if kind == "MultiheadAttention" and f"{path}.out_proj" in paths:
        raise ValueError(
            f"{path}.out_proj is adapted with {path} already: leave it out of target_modules (its own forward pass "
            "is never called)"
        )
    return kind


def plan_saved(modules: Modules, wanted: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """(module's name, its copy) for each module that modules_to_save names."""
    wanted = list(wanted)
    if not wanted:
        return []
    return [
        (path, copy_of(module))
        for path, module in modules
        if path and any(path == name or path.endswith(f".{name}") for name in wanted)
    ]


def plan_biases(modules: Modules, bias: str, adapted: set[str], saved: list[str]) -> list[Any]:
    """(state-dict key, module, parameter's name, its values for the adapter) of each bias that it trains.

    Args:
        bias: "all" or "lora_only".
        adapted: names of the modules that are adapted.
        saved: names of those in modules_to_save, which have biases of their own.
    """
    rows: list[Any] = []
    inside = {path for path, module in modules if isinstance(module, nn.MultiheadAttention)} & adapted
    adapted = adapted | {f"{path}.out_proj" for path in inside}
    for path, module in modules:
        if any(path == root or path.startswith(f"{root}.") for root in saved):
            continue
        for field, parameter in module._parameters.items():
            if parameter is None or "bias" not in field:
                continue
            if bias == "lora_only" and (path not in adapted or field != "bias"):
                continue
            key = f"{path}.base_layer.{field}" if path in adapted else f"{path}.{field}"
            for root in inside:  # what is inside an adapted layer is called so, too
                if path.startswith(f"{root}."):
                    key = f"{root}.base_layer{key.removeprefix(root)}"
            torch_dispatch.check_in_memory(path, module, f"bias={bias!r} trains the biases there")
            rows.append((key, module, field, parameter.detach().clone()))
    return rows


def plan_embeddings(
    model: Any, targets: Any, adapted: list[str], modules: dict[str, Any]
) -> list[tuple[str, nn.Module, str]]:
    """(state-dict key, module, parameter's name) of base weights that PEFT saves along: those of adapted embeddings, if
    target_modules has one of their usual names."""
    get = getattr(model, "get_input_embeddings", None)
    named = targets if not isinstance(targets, str) else [path.rpartition(".")[2] for path in adapted]
    if get is None or not any(name in (named or ()) for name in _EMBEDDINGS):
        return []
    ends = [unwrap(end) for end in (get(), model.get_output_embeddings()) if end is not None]
    return [
        (f"{path}.base_layer.{field}", modules[path], field)
        for path in adapted
        if any(modules[path] is end for end in ends)
        for field, parameter in modules[path]._parameters.items()
        if parameter is not None
    ]
