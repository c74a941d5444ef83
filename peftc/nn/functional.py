"""Functions on arrays: activations, softmax, normalisation, attention, dropout, linear, losses.

Inputs are float32, float64, float16 or bfloat16 arrays of any memory layout. float16 and bfloat16 are computed in
float32 and come back in their own dtype. Results are new arrays. Integer input is a TypeError.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from .tensor import gradient_of

__all__ = [
    "attention",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "gelu",
    "l1_loss",
    "layer_norm",
    "linear",
    "mse_loss",
    "relu",
    "silu",
    "softmax",
    "tanh",
]


def gelu(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    """x·Φ(x), elementwise; with approximate="tanh" the approximation that GPT-2 uses.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", arXiv:1606.08415.
    """
    if approximate == "none":
        return _core.gelu(x)
    if approximate == "tanh":
        return _core.gelu_tanh(x)
    raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")


def relu(x: np.ndarray) -> np.ndarray:
    """max(x, 0), elementwise."""
    return _core.relu(x)


def silu(x: np.ndarray) -> np.ndarray:
    """x·sigmoid(x), elementwise."""
    return _core.silu(x)


def tanh(x: np.ndarray) -> np.ndarray:
    """Hyperbolic tangent, elementwise."""
    return _core.tanh(x)


def softmax(x: np.ndarray, dim: int = -1) -> np.ndarray:
    """exp(x) / Σ exp(x) over axis `dim`, computed so that large values do not overflow."""
    if not isinstance(x, np.ndarray):
        x = np.asarray(x)
    if x.ndim == 0 or dim in (-1, x.ndim - 1):
        return _core.softmax(x)
    return np.moveaxis(_core.softmax(np.moveaxis(x, dim, -1)), -1, dim)


def dropout(x: np.ndarray, p: float = 0.5, training: bool = True) -> np.ndarray:
    """Each element zero with probability p, the others divided by 1 − p; x itself when not training or p is 0.

    Draws from the generator that `peftc.manual_seed` starts. Raises ValueError unless 0 ≤ p ≤ 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    return _core.dropout(x, p) if training and p > 0 else x


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x (..., in) · weightᵀ (weight is (out, in)) + bias (out,) → (..., out)."""
    return _core.linear(x, weight, bias)


def layer_norm(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    eps: float = 1e-5,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Normalise x + residual over the last axis to mean 0 and variance 1, times weight, plus bias.

    weight and bias are (width,), residual has x's shape; each may be None.
    """
    return _core.layer_norm(x, weight, bias, eps, residual)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    num_heads: int,
    mask: np.ndarray | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> np.ndarray:
    """Multi-head scaled dot-product attention: softmax(q·kᵀ·scale)·v for each head.

    q is (batch, queries, width), k and v (batch, keys, width); width is num_heads times the width of a head.
    mask is (batch, keys): keys where it is 0 are ignored; a row in which every key is masked attends to all equally.
    scale is 1/√(head width) if None. dropout_p is the probability that a weight is dropped; pass it in training only.
    """
    return _core.attention(q, k, v, num_heads, mask, scale, dropout_p)


# -------------------------------------------------------------------------- losses
# Each gives the loss as a float and its gradient with respect to the first argument, for `Module.backward`.


def cross_entropy(
    input: np.ndarray,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Cross entropy of logits and labels, as in torch.

    Args:
        input: logits (..., classes).
        target: labels (...), integers 0 … classes − 1.
        weight: (classes,), of each class; None: 1.
        ignore_index: a label that does not count.
        reduction: "mean" (over the weights of the labels that count) or "sum".
        label_smoothing: share of the target that is spread over all classes, 0 … 1.

    Returns:
        the loss and its gradient with respect to `input`, of input's shape. Without a label that counts the mean is NaN.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a label_smoothing outside 0 … 1.
        IndexError: a label that is no class.
        TypeError: labels that are not integers.
    """
    logits, labels = np.asarray(input), np.asarray(target)
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: logits of shape {logits.shape} and labels of shape {labels.shape} do not fit")
    if labels.dtype.kind not in "iu" and labels.size:
        raise TypeError(f"cross_entropy: labels must be integers, got an array of {labels.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be between 0 and 1, got {label_smoothing}")
    loss, gradient = _core.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        weight,
        ignore_index,
        label_smoothing,
        _is_mean("cross_entropy", reduction),
    )
    return loss, gradient_of(input, gradient.reshape(logits.shape))


def mse_loss(input: np.ndarray, target: Any, reduction: str = "mean") -> tuple[float, np.ndarray]:
    """(input − target)², averaged ("mean") or added up ("sum"), and its gradient. target has input's shape."""
    values, wanted = _pair("mse_loss", input, target)
    difference = values - wanted
    share = 1 / max(values.size, 1) if _is_mean("mse_loss", reduction) else 1.0
    loss = float(np.sum(np.square(difference, dtype=np.float64))) * share
    return loss, gradient_of(input, difference * values.dtype.type(2 * share))


def l1_loss(input: np.ndarray, target: Any, reduction: str = "mean") -> tuple[float, np.ndarray]:
    """|input − target|, averaged ("mean") or added up ("sum"), and its gradient. target has input's shape."""
    values, wanted = _pair("l1_loss", input, target)
    difference = values - wanted
    share = 1 / max(values.size, 1) if _is_mean("l1_loss", reduction) else 1.0
    loss = float(np.sum(np.abs(difference), dtype=np.float64)) * share
    return loss, gradient_of(input, np.sign(difference) * values.dtype.type(share))


def binary_cross_entropy_with_logits(
    input: np.ndarray, target: Any, reduction: str = "mean"
) -> tuple[float, np.ndarray]:
    """−(t·ln σ(x) + (1 − t)·ln(1 − σ(x))), averaged ("mean") or added up ("sum"), and its gradient.

    target has input's shape, values from 0 to 1.
    """
    values, wanted = _pair("binary_cross_entropy_with_logits", input, target)
    share = 1 / max(values.size, 1) if _is_mean("binary_cross_entropy_with_logits", reduction) else 1.0
    decay = np.exp(-np.abs(values))
    loss = float(np.sum(np.maximum(values, 0) - values * wanted + np.log1p(decay), dtype=np.float64)) * share
    sigmoid = np.where(values >= 0, 1, decay) / (1 + decay)
    return loss, gradient_of(input, ((sigmoid - wanted) * share).astype(values.dtype))


def _is_mean(name: str, reduction: str) -> bool:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction is 'mean' or 'sum', got {reduction!r}")
    return reduction == "mean"


def _pair(name: str, input: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one compute dtype and one shape."""
    values = np.asarray(input)
    if values.dtype != np.float64:
        values = values.astype(np.float32)
    wanted = np.asarray(target, values.dtype)
    if values.shape != wanted.shape:
        raise ValueError(f"{name}: the input has shape {values.shape} and the target {wanted.shape}")
    return values, wanted
