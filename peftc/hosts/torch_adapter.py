"""One adapter on a torch model: the layers that it is in, and its tensors, put into them and taken out by the hundred."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import _core
from . import torch_peft
from .torch_layers import AdaptedLayer
from .torch_saved import SavedModule
from .torch_tree import FROM_NAME, home_of


class Adapter:
    """What is remembered of an adapter. Tensors are looked up in the layers: they may be replaced at any time."""

    def __init__(self, name: str, method: str) -> None:
        self.name, self.method = name, method
        self.trainable = False
        #: (module's name, layer) of each adapted layer, in the model's order
        self.layers: list[tuple[str, AdaptedLayer]] = []
        #: state-dict key, layer and parameter of each tensor in the state dict; three lists, for lists are few objects
        self._keys: tuple[list[str], list[AdaptedLayer], list[str]] = [], [], []
        #: (module's name, wrapper) of modules_to_save
        self.saved: list[tuple[str, SavedModule]] = []
        #: (state-dict key, base module, parameter's name, the values that are not in effect) of biases it trains
        self.biases: list[tuple[str, nn.Module, str, torch.Tensor]] = []
        #: (state-dict key, base module, parameter's name) of the base's own embeddings in the state dict, as in PEFT
        self.embeddings: list[tuple[str, nn.Module, str]] = []
        #: (base module, parameter's name) → values that its file has for that, where they are not the base's
        self.stand_ins: dict[tuple[nn.Module, str], torch.Tensor] = {}
        #: pissa and olora: what the file has for a base weight is what was left of it
        self.subtracts = False
        #: what PEFT holds of it, if PEFT made its layers
        self.part: torch_peft.Part | None = None

    def plan_put(self, tensors: dict[str, Any], slots: Sequence[Any], config: Any) -> list[Callable[[], None]]:
        """What is to be called to put tensors (module's name → parameter → tensor) into the layers, which `slots` describe one
        by one. Their values are not looked at."""
        plan = []
        by_class: dict[type[AdaptedLayer], list[Any]] = {}
        for (path, layer), slot in zip(self.layers, slots, strict=True):
            by_class.setdefault(type(layer), []).append((layer, tensors[path], slot))
        for cls, rows in by_class.items():
            layers, own, theirs = map(list, zip(*rows, strict=True))
            plan.append(cls.plan_put(layers, self.name, own, theirs, config))
        return plan

    def enlist(self, rows: Sequence[Any]) -> None:
        """Note where the tensors are that the core's layout has `rows` of, those inside a layer's base layer too."""
        layer_of = dict(self.layers)
        rows = [row for row in rows if row[6]]
        if all(cls.part is AdaptedLayer.part for cls in _classes(list(layer_of.values()))):
            self._keys = [row[0] for row in rows], [layer_of[row[1]] for row in rows], [row[2] for row in rows]
            return
        inside: dict[str, AdaptedLayer] = {}
        keys = []
        for key, path, parameter, *_ in rows:
            layer, below, own = layer_of[path].part(parameter)
            keys.append((key, layer, own))
            if below:
                inside[path + below] = layer
        self.set_rows(keys)
        self.layers += inside.items()

    def rows(self) -> Iterator[tuple[str, AdaptedLayer, str]]:
        """(state-dict key, layer, parameter) of each tensor in the state dict."""
        return zip(*self._keys, strict=True)

    def set_rows(self, rows: Iterable[tuple[str, AdaptedLayer, str]]) -> None:
        """Let `rows` be these."""
        rows = list(rows)
        self._keys = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def parameters(self) -> list[Any]:
        """Its trainable parameters in the adapted layers."""
        if self.part is not None:
            return self.part.tensors()
        layers = [layer for _, layer in self.layers]
        fields = dict.fromkeys(field for cls in _classes(layers) for field in cls.adapter_layer_names)
        return _core.parameters_of(layers, tuple(fields), self.name)

    def state(self) -> dict[str, torch.Tensor]:
        """state-dict key → parameter of what is in the adapted layers."""
        return {key: tensor_of(layer, parameter, self.name) for key, layer, parameter in self.rows()}

    def drop(self) -> list[tuple[str, AdaptedLayer]]:
        """Take everything of the adapter out of its layers; returns those of `layers` that hold no adapter now."""
        layers = [layer for _, layer in self.layers]
        classes = _classes(layers)
        holding = dict.fromkeys(field for cls in classes for field in cls.adapter_layer_names)
        other = dict.fromkeys(field for cls in classes for field in cls.other_param_names if field not in holding)
        later = dict.fromkeys(field for cls in classes for field in cls.later_containers)
        _, bare = _core.drop_adapter(layers, tuple(holding), tuple(other), tuple(later), self.name)
        return [self.layers[i] for i in bare]


def _classes(layers: list[AdaptedLayer]) -> dict[type[AdaptedLayer], None]:
    return dict.fromkeys(map(type, layers))


def tensor_of(layer: AdaptedLayer, parameter: str, name: str) -> Any:
    """An adapter's tensor in one layer by the name that the core has for it ("lora_A", "lora_B.bias")."""
    field, _, part = parameter.partition(".")
    container: Any = layer._modules[field]
    child = container._modules.get(name)
    whole = container._parameters[name] if child is None else child._parameters[part or "weight"]
    return layer.own_part(name, field, whole)


def tensors_by_module(arena: Any, rows: Any) -> dict[str, dict[str, torch.Tensor]]:
    """module's name → parameter → tensor over the arena, which may still be without its values.

    No tensor is a view of another as autograd sees it: each has a version of its own, so that writing to one parameter says
    nothing of the others.
    """
    memory = torch.from_numpy(arena) if arena.size else torch.empty(0, dtype=torch.uint8)
    alike: dict[Any, list[Any]] = {}
    for row in rows:
        alike.setdefault((row[2], row[3], row[4]), []).append(row)
    result: dict[str, dict[str, torch.Tensor]] = {row[1]: {} for row in rows}
    flat: dict[str, torch.Tensor] = {}
    for (parameter, dtype, shape), group in alike.items():
        whole = flat.get(dtype)
        if whole is None:
            kind = FROM_NAME[dtype]
            whole = flat[dtype] = memory[: memory.numel() // kind.itemsize * kind.itemsize].view(kind)
        for row, tensor in zip(group, _pieces(whole, shape, [row[5] for row in group]), strict=True):
            result[row[1]][parameter] = tensor
    return result


def to_their_homes(
    tensors: dict[str, dict[str, torch.Tensor]], modules: dict[str, Any], finish: Callable[[], None]
) -> None:
    """Where a layer is not in the CPU's memory, put copies on its device in the tensors' place, after a call of finish()."""
    for module, own in tensors.items():
        weight = modules[module]._parameters.get("weight")
        if weight is not None and weight.is_cpu:
            continue
        device = home_of(modules[module])
        if device.type != "cpu":
            finish()
            tensors[module] = {parameter: tensor.to(device) for parameter, tensor in own.items()}


def _pieces(whole: torch.Tensor, shape: tuple[int, ...], offsets: list[int]) -> Sequence[torch.Tensor]:
    """Tensors of one shape over a flat one, at these places (in bytes)."""
    first, count, strides = offsets[0] // whole.itemsize, len(offsets), _packed_strides(shape)
    rows = shape[0] if shape else 0
    size = rows * strides[0] * whole.itemsize if shape else 0
    if size and offsets == list(range(offsets[0], offsets[0] + count * size, size)):
        together = whole.as_strided((count * rows, *shape[1:]), strides, first)
        return together.unsafe_split(rows)
    made = []
    for offset in offsets:
        tensor = whole.new_empty(0)
        made.append(tensor.set_(whole.untyped_storage(), offset // whole.itemsize, shape, strides))
    return made


def _packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, strides = 1, []
    for extent in reversed(shape):
        strides.append(stride)
        stride *= max(extent, 1)
    return tuple(reversed(strides))
