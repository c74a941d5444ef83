"""What every adapted layer of the torch host is: a module around its base layer, under PEFT's names.

What is active is one object per model, `Switch`, which all adapted layers share: switching adapters is assigning to it,
whatever the number of layers.  Layers are stamped from templates (torch_stamps.py), without torch's constructors and
without random initial values that something else overwrites.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .. import _core
from .torch_stamps import empty, registries_on_demand, stamp, template
from .torch_tree import kind_of
from .torch_watch import CALLS


class Switch:
    """Which adapters of a model are active. `live` is what a forward pass reads: the active names, or none."""

    __slots__ = ("active", "enabled", "live", "merged", "no_dropout", "rows")

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.live: tuple[str, ...] = ()
        #: while a batch is mixed: the adapter of each of its rows, "__base__" for none
        self.rows: Rows | None = None
        #: stands where a layer drops nothing; one for all layers: it has no state but its mode, which is the model's
        self.no_dropout: nn.Identity | None = None

    def update(self, **changes: Any) -> None:
        """Assign fields, then `live`: one assignment, so a layer sees the old names or the new ones."""
        for field, value in changes.items():
            setattr(self, field, value)
        # Rows have adapters of their own; layers that cannot mix have none of these, and are base layers then.
        self.live = self.active if self.enabled and not self.merged and self.rows is None else ()


def dropout_module(p: float, training: bool, switch: Switch) -> nn.Module:
    """PEFT's: Identity when nothing is dropped, else Dropout."""
    if p > 0.0:
        made = stamp(("dropout", p), lambda: nn.Dropout(p))
        made.__dict__["training"] = training
        return made
    if switch.no_dropout is None:
        switch.no_dropout = nn.Identity().train(training)
    return switch.no_dropout


def dropout_modules(p: float, layers: list[Any]) -> list[nn.Module] | nn.Module:
    """`dropout_module` for each of these layers of one model, or one for all."""
    if p > 0.0:
        return [dropout_module(p, layer.training, layer._peftc) for layer in layers]
    return dropout_module(p, layers[0].training, layers[0]._peftc)


def number_puts(layers: list[Any], name: str, slots: list[Any], config: Any) -> tuple[Any, ...]:
    """What `_core.put_items` puts of a low-rank adapter beside its tensors: rank, alpha, scaling, dropout."""
    _, _, ranks, alphas, scalings, *_ = map(list, zip(*slots, strict=True))
    return (
        (("r",), name, ranks),
        (("lora_alpha",), name, alphas),
        (("scaling",), name, scalings),
        (("_modules", "lora_dropout", "_modules"), name, dropout_modules(config.lora_dropout, layers)),
    )


_EXTENTS = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),
)


@registries_on_demand
class AdaptedLayer(nn.Module):
    """A base layer with the adapters of one method on it. PEFT's `BaseTunerLayer` counts instances as its own."""

    #: containers of adapter tensors, by adapter name: what requires_grad is set on
    adapter_layer_names: tuple[str, ...] = ()
    #: other dicts by adapter name
    other_param_names: tuple[str, ...] = ()
    #: peft_type of its adapters
    method = ""
    #: what PEFT's layers print before the name of their class
    printed_before = ""
    #: parameters of the base layer that merging replaces
    weight_name, bias_name = "weight", "bias"
    #: is the input cast to the dtype of an adapter's tensors? PEFT's helper disable_input_dtype_casting turns it off
    cast_input_dtype_enabled = True
    #: may one of its adapters be in train mode while the layer is not?
    _awake = False
    #: (layer, x, live) → what `forward` would answer, or None; a function in C, which calls of layers go to at once
    _direct: Any = None
    _peftc: Switch
    _peftc_inner = "base_layer"  # see torch_wrappers

    #: containers that every layer of the class has, in the order of PEFT's parameters; others come when asked for
    first_containers: tuple[tuple[str, type[nn.Module]], ...] = ()
    later_containers: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def around(cls, bases: Sequence[nn.Module], switch: Switch) -> list[Any]:
        """Layers without adapters around `bases`."""
        _core.direct_calls(cls, CALLS, cls._direct)
        by_mode = [template((cls, mode), lambda m=mode: cls._template(m)) for mode in (False, True)]
        layers = _core.trees_like([by_mode[base.training] for base in bases])
        _core.put_items(layers, ((("_modules",), "base_layer", list(bases)), ((), "_peftc", switch)))
        return layers

    @classmethod
    def plan_put(cls, layers: list[Any], name: str, tensors: Any, slots: list[Any], config: Any) -> Callable[[], None]:
        """A function that puts an adapter on many layers, as `put` does; what it takes is made here.

        tensors: the layers' `Tensors` (torch_adapter.py).
        """

        def put() -> None:
            for layer, own, slot in zip(layers, tensors.by_slot(), slots, strict=True):
                layer.put(name, own, slot, config)

        return put

    def put(self, name: str, tensors: dict[str, torch.Tensor], slot: Any, config: Any) -> None:
        """Take an adapter's tensors (by parameter: "lora_A", …) in; nothing is copied.

        slot: (module, adapts, rank, alpha, scaling, feedforward, tensors) of the core's plan.
        """
        raise NotImplementedError

    @classmethod
    def _template(cls, training: bool) -> "AdaptedLayer":
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = training
        layer._modules["base_layer"] = None  # the first, as in PEFT's layers
        for field, kind in cls.first_containers:
            layer._modules[field] = empty(kind, training)
        for field in cls.other_param_names:
            if field not in dict(cls.first_containers):
                layer.__dict__[field] = {}
        return layer

    def __getattr__(self, name: str) -> Any:
        make = type(self).later_containers.get(name)
        if make is not None and "_modules" in self.__dict__ and name not in self._modules:
            child = self._modules[name] = make()
            child.__dict__["training"] = self.training
        if name in ("in_features", "out_features") and "_modules" in self.__dict__:
            extents = self._extents(self.get_base_layer())
            if extents is not None:
                return extents[name == "out_features"]
        return super().__getattr__(name)

    def _extents(self, base: Any) -> tuple[int, int] | None:
        """in_features and out_features, which PEFT's layers have; None if the base layer has nothing of the kind."""
        theirs = base.__dict__
        return next(((theirs[one], theirs[other]) for one, other in _EXTENTS if one in theirs), None)

    # ---------------------------------------------------------------- adapters

    def adapters(self) -> list[str]:
        """Names of the adapters on this layer, in the order they came."""
        names: dict[str, None] = {}
        for field in self.adapter_layer_names:
            names.update(dict.fromkeys(_names(self._modules.get(field))))
        return list(names)

    def _get_available_adapters(self) -> set[str]:
        """What PEFT asks for in `get_layer_status`."""
        return set(self.adapters())

    def part(self, name: str) -> "tuple[AdaptedLayer, str, str]":
        """(layer that holds the parameter `name`, its path below this one's, the parameter's name there)."""
        return self, "", name

    def own_part(self, name: str, field: str, tensor: Any) -> Any:
        """The part of a parameter that is the adapter's; there may be room in it (torch_hotswap.py)."""
        return tensor

    def train_adapter(self, name: str) -> None:
        """Put one adapter's modules in train mode, whatever the model's: Transformers promises it of a trainable load."""
        self._awake = True
        for field in (*self.adapter_layer_names, *self.other_param_names):
            container = self._modules.get(field)
            if container is not None:
                container.training = True
                if name in container._modules:
                    container._modules[name].train()

    # -------------------------------------------------- what PEFT's layers have

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer."""
        layer: Any = self
        while True:
            children = layer._modules
            layer = children.get("base_layer") or children.get("token_adapter")
            if layer is None:
                raise AttributeError("this layer has lost its base layer")
            if "base_layer" not in layer._modules and "token_adapter" not in layer._modules:
                return layer

    @property
    def weight(self) -> torch.Tensor:
        return self.get_base_layer().weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.get_base_layer().bias

    @property
    def disable_adapters(self) -> bool:
        return not self._peftc.enabled

    @property
    def active_adapters(self) -> list[str]:
        return list(self._peftc.active)

    @property
    def active_adapter(self) -> list[str]:
        return list(self._peftc.active)

    @property
    def merged_adapters(self) -> list[str]:
        mine = set(self.adapters())
        return [name for name in self._peftc.merged if name in mine]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def fan_in_fan_out(self) -> bool:
        """Is the base weight stored (in, out)?"""
        return transposed(self.get_base_layer())

    @property
    def is_target_conv_1d_layer(self) -> bool:
        return kind_of(self.get_base_layer()) == "Conv1D"

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """May PEFT's `convert_to_lora` make LoRA of an adapter here? As in PEFT, of what LoRA adds to a linear layer."""
        return False

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let this layer's tensors of these adapters have gradients, or not."""
        wanted = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for field in self.adapter_layer_names:
            container: Any = self._modules.get(field)
            for name in wanted.intersection(_names(container)):
                container[name].requires_grad_(requires_grad)

    def _models_own(self, call: str) -> NotImplementedError:
        return NotImplementedError(
            f"a layer of peftc cannot do that alone: which adapters there are, are active and are merged is the model's "
            f"state. Call {call} of the model"
        )

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("set_adapter")

    def enable_adapters(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("enable_adapters or disable_adapters")

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("delete_adapter")

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("add_adapter")

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("merge_adapter")

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        raise self._models_own("unmerge_adapter")

    def _live(self) -> list[str]:
        """Adapters that apply to this layer now, in order."""
        mine = self._modules[self.adapter_layer_names[0]]
        held = mine._modules or mine._parameters
        return [name for name in self._peftc.live if name in held]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the weight's own layout."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.printed_before}{super().__repr__()}"


class Rows:
    """The adapters of the rows of a mixed batch: `groups` has (name, where its rows are) for each of them, `parts` (name, begin,
    end) of neighbours with the same."""

    __slots__ = ("groups", "names", "parts")

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        starts = [i for i, name in enumerate(self.names) if i == 0 or name != self.names[i - 1]]
        self.parts = tuple((self.names[i], i, end) for i, end in pairwise([*starts, len(self.names)]))
        self.groups: list[tuple[str, slice | torch.Tensor]] = []
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            # Rows in one piece are a view, whose result can be written in place.
            together = rows[-1] - rows[0] + 1 == len(rows)
            self.groups.append((name, slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows)))

    def check(self, batch: Any) -> None:
        """Refuse a batch that has not as many rows. Raises ValueError."""
        if len(batch) != len(self.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(self.names)} and {len(batch)} respectively."
            )


def _names(container: Any) -> list[str]:
    if container is None:
        return []
    return [*container._modules, *container._parameters]


def transposed(module: nn.Module) -> bool:
    """Does the layer store its weight as (in, out)? GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
