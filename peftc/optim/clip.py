"""Limits on gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .. import _core
from .._core import Parameter


def clip_grad_norm_(
    parameters: Parameter | Iterable[Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients together so that their norm, as of one vector, is at most max_norm.

    Args:
        parameters: those without a gradient do not count.
        max_norm: ≥ 0.
        norm_type: p of the p-norm; may be infinite.
        error_if_nonfinite: refuse a norm that is NaN or infinite; else the gradients become NaN, as in torch, and the
            optimizer's step refuses them.

    Returns:
        the norm before.

    Raises:
        RuntimeError: error_if_nonfinite and the norm is not finite; nothing is changed.
    """
    params = [parameters] if isinstance(parameters, Parameter) else list(parameters)
    norms = _core.gradient_norms(params, norm_type)
    if not norms:
        return 0.0
    if math.isinf(norm_type):
        total = float(np.max(norms))
    else:
        total = float(np.linalg.norm(norms, norm_type))
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped."
        )
    factor = max_norm / (total + 1e-6)
    if not factor >= 1:
        _core.scale_gradients(params, factor)
    return total


def clip_grad_value_(parameters: Parameter | Iterable[Parameter], clip_value: float) -> None:
    """Limit every element of every gradient to −clip_value … clip_value, in place."""
    params = [parameters] if isinstance(parameters, Parameter) else list(parameters)
    for parameter in params:
        gradient = parameter.grad
        if gradient is not None:
            np.clip(gradient, -clip_value, clip_value, out=gradient)
