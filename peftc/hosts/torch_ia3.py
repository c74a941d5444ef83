"""IA³ on torch layers (Liu et al. 2022): a learned vector scales a layer's output, or its input if it is feed-forward."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_compiling

from .. import _core
from .torch_layers import AdaptedLayer, transposed
from .torch_scale import scale_rows, scaled_linear
from .torch_stamps import ParameterDict, parameters, puts_of
from .torch_tree import kind_of


class IA3Layer(AdaptedLayer):
    """IA³ on nn.Linear and Conv1D (vectors (out, 1), or (1, in) for feed-forward) and Conv2d ((1, channels, 1, 1))."""

    method = "IA3"
    adapter_layer_names = ("ia3_l",)
    other_param_names = ("_feedforward",)
    first_containers = (("ia3_l", ParameterDict),)

    _feedforward: dict[str, bool]

    @property
    def is_feedforward(self) -> bool:
        """Whether the first adapter scales the input. Each adapter has its own answer."""
        return next(iter(self._feedforward.values()), False)

    @classmethod
    def plan_put(cls, layers: list[Any], name: str, tensors: Any, slots: list[Any], config: Any) -> Callable[[], None]:
        assert tensors.are("ia3_l")
        vectors = puts_of("ia3_l", name, parameters(*tensors.columns(1)))
        puts = (*vectors, (("_feedforward",), name, [slot[5] for slot in slots]))
        return functools.partial(_core.put_items, layers, puts)

    def _get_name(self) -> str:
        kind = kind_of(self.get_base_layer())
        return "Linear" if kind == "Conv1D" else kind

    def reset_ia3_parameters(self, adapter_name: str) -> None:
        """Ones for this layer's vector of an adapter, which then changes nothing."""
        if adapter_name in self.ia3_l:
            torch.nn.init.ones_(self.ia3_l[adapter_name])

    def _vector(self, name: str) -> torch.Tensor:
        """Shaped to multiply the layer's input or output."""
        vector = self._modules["ia3_l"]._parameters[name]
        return vector if vector.dim() > 2 else vector.flatten()

    def _scaled(self, x: torch.Tensor, live: tuple[str, ...], before: bool) -> torch.Tensor:
        """x times the vectors of the adapters that scale the layer's input, or its output."""
        if not is_compiling() and (scaled := scale_rows(self, x, live, before)) is not None:
            return scaled
        held = self._modules["ia3_l"]._parameters
        dtype = x.dtype
        for name in live:
            if name in held and self._feedforward[name] == before:
                vector = self._vector(name)
                x = ((x.to(vector.dtype) if before else x) * vector).to(dtype)
        return x

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        live = self._peftc.live
        if not args and not kwargs and not is_compiling() and (result := scaled_linear(self, x, live)) is not None:
            return result
        result = self._modules["base_layer"](self._scaled(x, live, True), *args, **kwargs)
        return self._scaled(result, live, False)

    _direct = scaled_linear

    def merge_into(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, plain: torch.Tensor
    ) -> tuple[Any, Any]:
        """The weight and bias with one adapter folded in; new tensors."""
        vector = self._modules["ia3_l"]._parameters[name]
        if weight.dim() > 2:
            base: Any = self.get_base_layer()
            if self._feedforward[name] and base.groups != 1:
                per_output = vector.view(base.groups, -1, 1, 1).repeat_interleave(weight.shape[0] // base.groups, dim=0)
                return weight * per_output.view(weight.shape[0], -1, 1, 1), bias
            scaled = weight * (vector if self._feedforward[name] else vector.transpose(0, 1))
        else:
            scaled = weight * (vector.T if transposed(self.get_base_layer()) else vector)
        if bias is not None and not self._feedforward[name]:
            bias = bias * vector.reshape(bias.shape)
        return scaled, bias


LAYERS: types.MappingProxyType[str, type[AdaptedLayer]] = types.MappingProxyType(
    {"Linear": IA3Layer, "Conv1D": IA3Layer, "Conv2d": IA3Layer}
)
