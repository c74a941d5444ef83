"""Swapping a LoRA adapter of a torch model for another, in place: parameters stay the same objects.

For a model that torch.compile has compiled, nothing may change that the compiler looked at: shapes, and scalings, which
it takes for constants.  `make_room` prepares an adapter: its factors get rows and columns of zeros up to a rank, and its
scalings become tensors.  State dicts and files have the adapter without that room (`LoraLayer.own_part`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .generation import no_such_modules
from .torch_lora import RANK_AXIS, LoraLayer


def make_room(registry: Any, name: str, rank: int) -> None:
    """Prepare adapter `name` for `replace` by adapters up to this rank. Adapters of other methods are left alone.

    Raises:
        ValueError: the adapter's own rank is higher; nothing has changed.
    """
    adapter = registry._adapters[name]
    if adapter.method != "LORA" or adapter.part is not None:
        return
    for path, layer in adapter.named_layers():
        if layer.r[name] > rank:
            raise ValueError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger "
                f"({layer.r[name]}, at {path}). Call enable_peft_hotswap with the highest rank of all adapters"
            )
    for layer in adapter.layers:
        tensors = _tensors(layer, name)
        device = tensors[0][1]._parameters[tensors[0][2]].device
        precise = torch.float32 if device.type == "mps" else torch.float64
        layer.scaling[name] = torch.tensor(layer.scaling[name], dtype=precise, device=device)
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            continue  # the rows of a group lie together: there is no room between them
        layer.room[name] = rank
        for field, holder, key in tensors:
            if field in RANK_AXIS and key != "bias":
                parameter = holder._parameters[key]
                shape = list(parameter.shape)
                shape[RANK_AXIS[field]] = rank
                _grow(holder, field, parameter, parameter.data.new_zeros(shape), parameter.data)


def replace(registry: Any, name: str, make: Callable[[str], Any]) -> Any:
    """Give adapter `name` the values of the one that `make(other name)` makes; see `peftc.hosts.Host.replace`."""
    incoming = name
    while incoming in registry._adapters:
        incoming += "'"
    restore = registry.flags()
    made = make(incoming)
    try:
        old, new = registry._adapters[name], registry._adapters[incoming]
        swaps = _plan(old, new, name, incoming)
        registry.unmerge()
        with torch.no_grad():
            _carry_out(registry, old, new, swaps)
    finally:
        registry.remove(incoming)
        restore()
    return made


def _tensors(layer: LoraLayer, name: str) -> list[tuple[str, Any, str]]:
    """(field, module that holds it, key) of each parameter of an adapter on a layer."""
    found: list[tuple[str, Any, str]] = []
    for field in layer.adapter_layer_names:
        container = layer._modules.get(field)
        if container is None:
            continue
        child = container._modules.get(name)
        if child is not None:
            found += [(field, child, key) for key, value in child._parameters.items() if value is not None]
        elif name in container._parameters:
            found.append((field, container, name))
    return found


def _grow(holder: Any, field: str, parameter: Any, whole: torch.Tensor, values: torch.Tensor) -> None:
    """Let a parameter have the tensor `whole`, with `values` in its corner; the module's extents follow."""
    whole[tuple(slice(extent) for extent in values.shape)] = values
    parameter.data = whole
    convolution = isinstance(holder, nn.modules.conv._ConvNd)
    inner, outer = ("in_channels", "out_channels") if convolution else ("in_features", "out_features")
    if convolution or isinstance(holder, nn.Linear):
        groups = getattr(holder, "groups", 1)
        setattr(holder, *((outer, whole.shape[0]) if field == "lora_A" else (inner, whole.shape[1] * groups)))


def _plan(old: Any, new: Any, name: str, incoming: str) -> list[Any]:
    """(parameter to change, its field and holder, values) of all tensors; raises if the two adapters do not fit."""
    if old.part is not None or new.part is not None:
        raise ValueError(
            f"adapter {name} and the one to take its place need PEFT's layers, and peftc swaps adapters of its own layers "
            "alone: delete the adapter and load the other one"
        )
    mine = dict(old.named_layers())
    theirs = dict(new.named_layers())
    extra = theirs.keys() - mine.keys()
    if extra:
        raise RuntimeError(no_such_modules(name, extra))
    for what, a, b in (
        ("modules_to_save", [path for path, _ in old.saved], [path for path, _ in new.saved]),
        ("bias", [row[0] for row in old.biases], [row[0] for row in new.biases]),
    ):
        if a != b:
            raise ValueError(
                f"Configs are incompatible: for {what}, {a} != {b}. Delete adapter {name} and load the other one"
            )
    swaps = []
    for path, other_layer in theirs.items():
        layer = mine[path]  # another one, if a layer of another method lies between
        have, come = _tensors(layer, name), _tensors(other_layer, incoming)
        a, b = ([(field, key) for field, holder, key in rows if holder is not None] for rows in (have, come))
        if [field for field, *_ in a] != [field for field, *_ in b] or len(a) != len(b):
            raise ValueError(
                f"Configs are incompatible at {path}: adapter {name} has {_kinds(a)} and the other one {_kinds(b)} "
                f"(use_dora, lora_bias). Delete adapter {name} and load the other one"
            )
        room = layer.room.get(name)
        if room is not None and other_layer.r[incoming] > room:
            raise ValueError(
                f"the new adapter has rank {other_layer.r[incoming]} at {path}, and enable_peft_hotswap was called with "
                f"target_rank={room}: call it with the highest rank of all adapters"
            )
        swaps += [(layer, *one, other[1]._parameters[other[2]]) for one, other in zip(have, come, strict=True)]
    return swaps


def _kinds(rows: list[tuple[str, str]]) -> str:
    return ", ".join(f"{field}.bias" if key == "bias" else field for field, key in rows)


def _carry_out(registry: Any, old: Any, new: Any, swaps: list[Any]) -> None:
    """What follows does not fail."""
    name, incoming = old.name, new.name
    for layer, field, holder, key, values in swaps:
        parameter = holder._parameters[key]
        if parameter.shape == values.shape:
            parameter.copy_(values)
        elif name in layer.room:
            parameter.zero_()
            parameter[tuple(slice(extent) for extent in values.shape)] = values
        else:
            _grow(holder, field, parameter, torch.empty_like(values), values)
    theirs, mine = dict(new.named_layers()), dict(old.named_layers())
    for path, layer in old.named_layers():
        if path in theirs:
            _take_numbers(layer, name, theirs[path], incoming)
        else:  # the new adapter leaves this layer alone
            _silence(layer, name)
    for (_, module, field, other), (_, _, _, values) in zip(old.biases, new.biases, strict=True):
        (module._parameters[field] if registry._biases_of == name else other).copy_(values)
    for (_, wrapper), _ in zip(old.saved, new.saved, strict=True):
        wrapper.copies()[name].load_state_dict(wrapper.copies()[incoming].state_dict())
    own = {id(layer): mine[path] for path, layer in theirs.items()}
    old.set_rows((key, own[id(layer)], parameter) for key, layer, parameter in new.rows())
    old.embeddings = new.embeddings


def _take_numbers(layer: LoraLayer, name: str, other: LoraLayer, incoming: str) -> None:
    for field in ("r", "lora_alpha", "lora_bias", "use_dora"):
        getattr(layer, field)[name] = getattr(other, field)[incoming]
    scaling, value = layer.scaling[name], other.scaling[incoming]
    if isinstance(scaling, torch.Tensor):
        scaling.fill_(value)
    else:
        layer.scaling[name] = value
    layer._initial.pop(name, None)
    if incoming in other._initial:
        layer._initial[name] = other._initial[incoming]
    dropouts, dropout = layer._modules["lora_dropout"]._modules, other._modules["lora_dropout"]._modules[incoming]
    if getattr(dropouts[name], "p", 0.0) != getattr(dropout, "p", 0.0):
        dropouts[name] = dropout


def _silence(layer: LoraLayer, name: str) -> None:
    """Let an adapter add nothing here: B is zero, and DoRA's magnitude is that of the weight."""
    layer._initial.pop(name, None)
    for field, holder, key in _tensors(layer, name):
        if field in ("lora_B", "lora_embedding_B"):
            holder._parameters[key].zero_()
        elif field == "lora_magnitude_vector":
            norm = layer._norm(layer.weight, layer._product(name), 0.0)
            holder._parameters[key].copy_(norm.reshape(holder._parameters[key].shape))
