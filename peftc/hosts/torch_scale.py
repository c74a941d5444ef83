"""Rows times a learned vector on torch tensors: in C where that is possible, in torch ops everywhere else.

When that is the case is as for low-rank sums: see torch_lowrank.py.
"""

from typing import Any

import torch
from torch import nn

from .. import _core
from .torch_watch import OPERATIONS


def _product(x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (x.to(vector.dtype) * vector.flatten()).to(x.dtype)


def _derivatives(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """What `ScaledRows.backward` answers, in torch ops, of which autograd can take derivatives once more."""
    x, vector, weight = ctx.saved_tensors
    need_x, need_vector, *_ = ctx.needs_input_grad
    through = grad if weight is None else grad @ weight
    along = None
    if need_vector:
        along = through.to(vector.dtype) * x.to(vector.dtype)
        along = along.reshape(-1, x.shape[-1]).sum(0).view(vector.shape)
    return _product(through, vector) if need_x else None, along, None, None


_forward, _backward = _core.scale_node(
    OPERATIONS,
    torch.is_grad_enabled,
    nn.functional.linear,
    torch.matmul,
    torch.empty_like,
    _product,
    _derivatives,
)


class ScaledRows(torch.autograd.Function):
    """x ∘ vector of (x, vector, None, None), or (x ∘ vector) Wᵀ + bias of (x, vector, W, bias), and its derivatives: both in
    one pass over x and the gradient.  Saves x, the vector and W; W and bias are constants to it."""

    forward = staticmethod(_forward)
    backward = staticmethod(_backward)


#: scaled_linear(layer, x, live), scale_rows(layer, x, live, before): the plain case in one call, or None; not to be called
#: while compiling
scaled_linear, scale_rows = _core.scale_adder(
    nn.Linear,
    OPERATIONS,
    torch.is_grad_enabled,
    torch.empty_like,
    nn.functional.linear,
    # as Function.apply calls it once it has looked for functorch, which is one of the watchers
    super(torch.autograd.Function, ScaledRows).apply,
)
