"""Functions on arrays: activations, softmax, normalisation, attention, dropout, linear.

Inputs are float32, float64, float16 or bfloat16 arrays of any memory layout. float16 and bfloat16 are computed in
float32 and come back in their own dtype. Results are new arrays. Integer input is a TypeError.
"""

from __future__ import annotations

import numpy as np

from .. import _core

__all__ = [
    "attention",
    "dropout",
    "gelu",
    "layer_norm",
    "linear",
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
) -> np.ndarray:
    """Multi-head scaled dot-product attention: softmax(q·kᵀ·scale)·v for each head.

    q is (batch, queries, width), k and v (batch, keys, width); width is num_heads times the width of a head.
    mask is (batch, keys): keys where it is 0 are ignored; a row in which every key is masked attends to all equally.
    scale is 1/√(head width) if None.
    """
    return _core.attention(q, k, v, num_heads, mask, scale)
