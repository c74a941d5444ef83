"""The layers: torch's arguments, weight layouts and default initialisation over C types.

`layer.weight` and `layer.bias` are `Parameter`s; assigning an array replaces the values. A forward pass takes float32,
float64, float16 or bfloat16 input of any memory layout and gives its dtype back; with float64 input or weights it
computes, and answers, in float64, otherwise it computes in float32 whatever the weights are stored in.
Fresh weights are drawn when first used, from the generator that `peftc.manual_seed` starts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from .module import Module


class _Layer(Module):
    """What the layers share: how they are copied and pickled."""

    _native: type  # the C type, whose __init__ makes the parameters

    def _constructor(self) -> dict[str, Any]:
        """The arguments that make a layer like this one."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["constructor"] = self._constructor()
        state["parameters"] = dict(self._parameters)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self)._native.__init__(self, **state["constructor"])  # type: ignore[misc]  # a layer type
        for name, parameter in state["parameters"].items():
            if parameter is not None or getattr(self, name) is not None:
                setattr(self, name, parameter)
        super().__setstate__(state)


class Linear(_core.Linear, _Layer):
    """y = x·weightᵀ + bias. weight (out_features, in_features), bias (out_features,).

    Args:
        in_features: width of the input, ≥ 0.
        out_features: width of the output, ≥ 0.
        bias: whether to have one.
        dtype: "float32" (default), "float64", "float16" or "bfloat16": what the weights are stored in.
    """

    _native = _core.Linear

    def _constructor(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "dtype": self.weight._dtype_name,
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Conv1D(_core.Conv1D, _Layer):
    """GPT-2's linear layer: y = x·weight + bias. weight (nx, nf), bias (nf,).

    Args:
        nf: width of the output.
        nx: width of the input.
        dtype: as for `Linear`.
    """

    _native = _core.Conv1D

    def _constructor(self) -> dict[str, Any]:
        return {"nf": self.nf, "nx": self.nx, "dtype": self.weight._dtype_name}

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class Conv2d(_core.Conv2d, _Layer):
    """2-D convolution (cross-correlation) of (batch, in_channels, height, width).

    weight (out_channels, in_channels / groups, kernel height, kernel width), bias (out_channels,).

    Args:
        in_channels, out_channels: multiples of groups.
        kernel_size, stride, dilation: an int or a pair (height, width).
        padding: an int, a pair, "valid" (none) or "same" (stride 1, odd kernel).
        groups: channels are mixed only inside their group.
        bias: whether to have one.
        dtype: as for `Linear`.
    """

    _native = _core.Conv2d

    def _constructor(self) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        shape = {name: getattr(self, name) for name in names}
        return {**shape, "bias": self.bias is not None, "dtype": self.weight._dtype_name}

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if self.bias is not None else text + ", bias=False"


class Embedding(_core.Embedding, _Layer):
    """Rows of a table by integer id. weight (num_embeddings, embedding_dim).

    Args:
        num_embeddings: rows of the table.
        embedding_dim: width of a row.
        padding_idx: a row that starts as zeros (counted from the end when negative), or None.
        dtype: as for `Linear`; the output is float32, or float64 for a float64 table.
    """

    _native = _core.Embedding

    def _constructor(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "dtype": self.weight._dtype_name,
        }

    def extra_repr(self) -> str:
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


class LayerNorm(_core.LayerNorm, _Layer):
    """Normalise the last axis to mean 0 and variance 1, times weight, plus bias; both (normalized_shape,).

    Args:
        normalized_shape: width of the last axis: an int or a tuple of one.
        eps: added to the variance.
        elementwise_affine: whether to have a weight and a bias.
        bias: whether to have a bias beside the weight.
        dtype: as for `Linear`.

    A call takes an optional second argument, a residual that is added to the input first.
    """

    _native = _core.LayerNorm

    def _constructor(self) -> dict[str, Any]:
        return _norm_constructor(self) | {"bias": self.bias is not None}

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={affine}, bias={self.bias is not None}"


class RMSNorm(_core.RMSNorm, _Layer):
    """x / √(mean(x²) + eps) over the last axis, times weight (normalized_shape,).

    Args:
        normalized_shape: width of the last axis: an int or a tuple of one.
        eps: added to the mean square; None means the smallest step of the input's dtype at 1.
        elementwise_affine: whether to have a weight.
        dtype: as for `Linear`.
    """

    _native = _core.RMSNorm

    def _constructor(self) -> dict[str, Any]:
        return _norm_constructor(self)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"


def _norm_constructor(layer: Any) -> dict[str, Any]:
    return {
        "normalized_shape": layer.normalized_shape,
        "eps": layer.eps,
        "elementwise_affine": layer.weight is not None,
        "dtype": None if layer.weight is None else layer.weight._dtype_name,
    }


class Dropout(Module):
    """Zero each element with probability p in training, and scale the others by 1 / (1 − p); nothing in eval mode.

    Raises ValueError unless 0 ≤ p ≤ 1.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
        self.p = p

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _core.dropout(x, self.p) if self.training and self.p > 0 else x

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Identity(Module):
    """Gives its input back; arguments are accepted and ignored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x
