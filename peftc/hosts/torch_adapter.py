"""One adapter on a torch model: the layers that it is in, and its tensors, put into them and taken out by the hundred."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, compress, pairwise
from typing import Any

import numpy as np
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
        #: the names of the modules that it adapts and their layers, in the model's order; `set_layers` sets both
        self.paths: list[str] = []
        self.layers: list[AdaptedLayer] = []
        self._classes: list[type[AdaptedLayer]] = []
        self._fields: tuple[str, ...] = ()
        #: what the modules do that it adapts, as torch_tree's kind_of says
        self.kinds: set[str] = set()
        #: state-dict key, layer and parameter of each tensor in the state dict; three lists, for lists are few objects.
        #: Until somebody asks for the layers, there are the names of their modules
        self._keys: tuple[list[str], list[Any], list[str]] = [], [], []
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

    def set_layers(self, paths: list[str], layers: list[Any]) -> None:
        self.paths, self.layers = paths, layers
        self._classes = list(dict.fromkeys(map(type, layers)))
        self._fields = tuple(dict.fromkeys(field for cls in self._classes for field in cls.adapter_layer_names))

    def named_layers(self) -> list[tuple[str, AdaptedLayer]]:
        """(module's name, layer) of each adapted layer."""
        return list(zip(self.paths, self.layers, strict=True))

    def plan_put(self, own: "Tensors", slots: Sequence[Any], config: Any) -> list[Callable[[], None]]:
        """What is to be called to put tensors into the layers, which `slots` describe one by one. Their values are not looked
        at."""
        if len(self._classes) == 1:
            return [self._classes[0].plan_put(self.layers, self.name, own, list(slots), config)]
        plan = []
        for cls in self._classes:
            where = [i for i, layer in enumerate(self.layers) if type(layer) is cls]
            layers, theirs = [self.layers[i] for i in where], [slots[i] for i in where]
            plan.append(cls.plan_put(layers, self.name, own.of_slots(where), theirs, config))
        return plan

    def enlist(self, keys: list[str], modules: list[str], parameters: list[str], saved: list[bool]) -> None:
        """Note where the tensors are that the core's layout lists, those inside a layer's base layer too."""
        if not all(saved):
            keys, modules, parameters = (list(compress(column, saved)) for column in (keys, modules, parameters))
        if all(cls.part is AdaptedLayer.part for cls in self._classes):
            self._keys = keys, modules, parameters
            return
        layer_of = dict(self.named_layers())
        inside: dict[str, AdaptedLayer] = {}
        rows = []
        for key, path, parameter in zip(keys, modules, parameters, strict=True):
            layer, below, own = layer_of[path].part(parameter)
            rows.append((key, layer, own))
            if below:
                inside[path + below] = layer
        self.set_rows(rows)
        self.set_layers([*self.paths, *inside], [*self.layers, *inside.values()])

    def rows(self) -> Iterator[tuple[str, AdaptedLayer, str]]:
        """(state-dict key, layer, parameter) of each tensor in the state dict."""
        keys, layers, parameters = self._keys
        if layers and isinstance(layers[0], str):
            layer_of = dict(self.named_layers())
            self._keys = keys, [layer_of[module] for module in layers], parameters
        return zip(*self._keys, strict=True)

    def set_rows(self, rows: Iterable[tuple[str, AdaptedLayer, str]]) -> None:
        """Let `rows` be these."""
        rows = list(rows)
        self._keys = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]

    def parameters(self) -> list[Any]:
        """Its trainable parameters in the adapted layers."""
        if self.part is not None:
            return self.part.tensors()
        return _core.parameters_of(self.layers, self._fields, self.name)

    def state(self) -> dict[str, torch.Tensor]:
        """state-dict key → parameter of what is in the adapted layers."""
        return {key: tensor_of(layer, parameter, self.name) for key, layer, parameter in self.rows()}

    def drop(self) -> list[tuple[str, AdaptedLayer]]:
        """Take everything of the adapter out of its layers; returns those of `layers` that hold no adapter now."""
        other = tuple(dict.fromkeys(f for cls in self._classes for f in cls.other_param_names if f not in self._fields))
        later = tuple(dict.fromkeys(field for cls in self._classes for field in cls.later_containers))
        bare = _core.drop_adapter(self.layers, self._fields, other, later, self.name)
        return [(self.paths[i], self.layers[i]) for i in bare]


def tensor_of(layer: AdaptedLayer, parameter: str, name: str) -> Any:
    """An adapter's tensor in one layer by the name that the core has for it ("lora_A", "lora_B.bias")."""
    field, _, part = parameter.partition(".")
    container: Any = layer._modules[field]
    child = container._modules.get(name)
    whole = container._parameters[name] if child is None else child._parameters[part or "weight"]
    return layer.own_part(name, field, whole)


class Tensors:
    """An adapter's tensors, slot after slot.

    They lie in one block, but each has a storage of its own over its part of that, and a version of its own: what writes a
    state dict takes tensors with one storage for one tensor under several names, and keeps one of them.
    """

    def __init__(self, tensors: list[torch.Tensor], parameters: list[str], counts: list[int]) -> None:
        self._tensors, self._parameters, self._counts = tensors, parameters, counts

    @classmethod
    def over(cls, arena: Any, groups: Any, parameters: list[str], slots: Sequence[Any]) -> "Tensors":
        """Over the core's arena, which may still be without its values."""
        tensors: Any = _core.tensors_over(arena, groups, len(parameters))
        if tensors is None:
            tensors = [None] * len(parameters)
            for _, dtype, shape, offsets, indices in groups:
                for index, tensor in zip(indices, _pieces(arena, FROM_NAME[dtype], shape, offsets), strict=True):
                    tensors[index] = tensor
        return cls(tensors, parameters, [slot[6] for slot in slots])

    def are(self, *parameters: str) -> bool:
        """Has every slot these parameters, in this order, and no other?"""
        width, count = len(parameters), len(self._counts)
        return self._counts == [width] * count and self._parameters == list(parameters) * count

    def columns(self, width: int) -> list[list[torch.Tensor]]:
        """For each parameter its tensors, slot by slot, where every slot has the same, `width` of them."""
        return [self._tensors[i::width] for i in range(width)]

    def by_slot(self) -> list[dict[str, torch.Tensor]]:
        """parameter → tensor of each slot."""
        return [
            dict(zip(self._parameters[begin:end], self._tensors[begin:end], strict=True))
            for begin, end in self._spans()
        ]

    def of_slots(self, which: Sequence[int]) -> "Tensors":
        """Those of some of the slots."""
        spans = self._spans()
        return Tensors(
            [tensor for i in which for tensor in self._tensors[slice(*spans[i])]],
            [parameter for i in which for parameter in self._parameters[slice(*spans[i])]],
            [self._counts[i] for i in which],
        )

    def send_home(self, bases: Sequence[Any], elsewhere: Mapping[int, Any], finish: Callable[[], None]) -> None:
        """Where a slot's base layer is not in the CPU's memory, take copies on its device instead, after a call of finish().

        elsewhere: id → module, of modules that may be such.
        """
        spans = self._spans()
        for i, base in enumerate(bases):
            if id(base) not in elsewhere:
                continue
            device = home_of(base)
            if device.type != "cpu":
                finish()
                begin, end = spans[i]
                self._tensors[begin:end] = [tensor.to(device) for tensor in self._tensors[begin:end]]

    def _spans(self) -> list[tuple[int, int]]:
        return list(pairwise(accumulate(self._counts, initial=0)))


def _pieces(arena: Any, kind: torch.dtype, shape: tuple[int, ...], offsets: list[int]) -> list[torch.Tensor]:
    """Tensors of one shape over the arena's memory, at these places (in bytes)."""
    array: Any = np.dtype(np.uint16) if kind is torch.bfloat16 else np.dtype(str(kind).removeprefix("torch."))
    first, count, size = offsets[0], len(offsets), math.prod(shape) * array.itemsize
    if size and offsets == list(range(first, first + count * size, size)):
        whole = arena[first : first + count * size].view(array).reshape(count, *shape)
        made = list(map(torch.from_numpy, whole))
    else:
        made = [torch.from_numpy(arena[at : at + size].view(array).reshape(shape)) for at in offsets]
    if kind is torch.bfloat16:  # `data` is no view
        return [tensor.view(kind).data for tensor in made]
    return made
