"""The low-rank sum of linear layers on torch tensors: in C where that is possible, in torch ops everywhere else.

C reads the tensors' memory, so it runs only where nothing else wants to see the operations: plain CPU tensors of one
dtype, in eager mode.  torch.compile, torch.export, autocast, vmap, forward-mode differentiation, other devices and
tensor subclasses take the torch ops, with the same result to rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import _core
from .torch_stamps import Linear
from .torch_watch import OPERATIONS, runs_eagerly

#: (A module, B module, dropout module, scaling, adapter name) of each adapter that applies
Term = tuple[Any, Any, Any, float, str]


def _untouched(module: Any) -> bool:
    """Is the module what peftc made: no hooks, no parametrization, no subclass?"""
    return (
        type(module) is Linear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def add_lowrank(layer: Any, x: torch.Tensor, result: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """result + Σ scaling · B(A(dropout(x))), x (…, in), result (…, out); `result` may be overwritten."""
    if not torch.compiler.is_compiling() and type(x) is torch.Tensor and x.device.type == "cpu" and runs_eagerly():
        added = _in_c(layer, x, result, terms)
        if added is not None:
            return added
    for a, b, dropout, scaling, name in terms:
        weight = a.weight
        given = x if x.dtype == weight.dtype else x.to(weight.dtype)
        given = dropout(given)
        result = result + b(a(given)) * scaling
        if name in layer._initial:
            first_a, first_b = layer._initial[name]
            result = result - (given @ first_a.T @ first_b.T) * scaling
    return result


def _in_c(layer: Any, x: torch.Tensor, result: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor | None:
    rows: list[Any] = []
    wants_grad = x.requires_grad or result.requires_grad
    for a, b, dropout, scaling, name in terms:
        if not (_untouched(a) and _untouched(b)) or (dropout.training and type(dropout) is not nn.Identity):
            return None
        down, up, bias = a._parameters.get("weight"), b._parameters.get("weight"), b._parameters["bias"]
        if down is None or up is None:
            return None
        scaling = float(scaling)  # a tensor, for torch.compile, in an adapter that can be swapped
        wants_grad = wants_grad or down.requires_grad or up.requires_grad
        if bias is not None and bias.requires_grad:
            return None
        rows.append((down, up, scaling, None, bias))
        if name in layer._initial:
            first_a, first_b = layer._initial[name]
            rows.append((first_a, first_b, -scaling, None, None))
    if wants_grad and torch.is_grad_enabled():
        return _with_grad(x, result, rows)
    own = torch.empty_like(result)  # what can be overwritten has been, in `add_plain`
    return own if _core.lowrank_forward(x, result, own, tuple(rows)) else None


def _with_grad(x: torch.Tensor, result: torch.Tensor, rows: list[Any]) -> torch.Tensor | None:
    if x.dtype != result.dtype or any(down.dtype != x.dtype for down, *_ in rows):
        return None
    for down, up, scaling, _, bias in rows:
        if bias is not None:
            return None
        result = LowRank.apply(x, result, None, None, down, up, None, scaling, None)
    return result


def _sum(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, e: Any, scaling: float) -> torch.Tensor:
    """y + scaling · ((x Aᵀ) ∘ E) Bᵀ in torch ops."""
    low = x @ a.T
    return y + (low if e is None else low * e.reshape(-1)) @ b.T * scaling


def _derivatives(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """What `LowRank.backward` answers, in torch ops, of which autograd can take derivatives once more."""
    x, weight, a, b, e, noise, _ = ctx.saved_tensors
    need_x, need_y, _, _, need_a, need_b, need_e, *_ = ctx.needs_input_grad
    given = x if noise is None else x * noise
    flat_g, flat_x = grad.reshape(-1, grad.shape[-1]), given.reshape(-1, x.shape[-1])
    through, low = flat_g @ b * ctx.scaling, flat_x @ a.T
    weighted, kept = (through, low) if e is None else (through * e.reshape(-1), low * e.reshape(-1))
    dx = None
    if need_x:
        dx = (weighted @ a).view(x.shape)
        if noise is not None:
            dx = dx * noise
        if weight is not None:
            dx = dx + (flat_g @ weight).view(x.shape)
    return (
        dx,
        grad if need_y else None,
        None,
        None,
        weighted.T @ flat_x if need_a else None,
        flat_g.T @ kept * ctx.scaling if need_b else None,
        (through * low).sum(0).view(e.shape) if need_e else None,
        None,
        None,
    )


_forward, _backward = _core.lowrank_node(
    OPERATIONS,
    torch.is_grad_enabled,
    nn.functional.linear,
    torch.matmul,
    functools.partial(torch.empty, dtype=torch.float32),
    torch.empty_like,
    _sum,
    _derivatives,
)


class LowRank(torch.autograd.Function):
    """y + scaling · (((x ∘ noise) Aᵀ) ∘ E) Bᵀ of (x, y, W, bias, A, B, E, scaling, noise), and its derivatives; with
    x Wᵀ + bias for y if that is None: one node for an adapted layer, which adds to the base layer's output, and to its
    part of the derivative of x, where they lie.  Saves x, A, B, E, the noise and the sums with A; W and bias are constants
    to it."""

    forward = staticmethod(_forward)
    backward = staticmethod(_backward)


#: From so many numbers on our draws are faster than torch's, with what it takes to get at the generator.
_MANY = 256


def _draw(state: torch.Tensor, keep: float, value: float, out: torch.Tensor) -> bool:
    return _core.dropout_noise(state.numpy(), keep, value, out)


@functools.cache
def _draws_as_torch() -> bool:
    """Do we know how this torch draws random numbers: the same values, and the same state afterwards?"""
    generator = torch.Generator().manual_seed(1)
    torch.empty(5).bernoulli_(0.5, generator=generator)
    state = generator.get_state()
    theirs, ours = torch.empty(1000), torch.empty(1000)
    theirs.bernoulli_(0.7, generator=generator)
    return _draw(state, 0.7, 1.0, ours) and torch.equal(theirs, ours) and torch.equal(state, generator.get_state())


@functools.lru_cache(64)
def _kept_value(dtype: torch.dtype, p: float) -> float:
    """What torch's dropout multiplies with what it keeps."""
    return torch.ones((), dtype=dtype).div_(1 - p).item()


def _noise(x: torch.Tensor, p: Any) -> torch.Tensor | None:
    """What F.dropout multiplies x with, from the same random numbers; torch draws them one at a time, we in vectors."""
    if type(p) is not float or not 0 < p < 1 or not x.is_contiguous():
        return None
    noise = torch.empty_like(x)
    if x.numel() >= _MANY and _draws_as_torch():
        state = torch.default_generator.get_state()
        if _draw(state, 1 - p, _kept_value(x.dtype, p), noise):
            torch.default_generator.set_state(state)
            return noise
    return noise.bernoulli_(1 - p).div_(1 - p)


#: add_plain(layer, x, y, live), adapted_linear(layer, x, live), mixed_linear(layer, x, parts): the plain case in one call, or
#: None; not to be called while compiling
add_plain, adapted_linear, mixed_linear = _core.lowrank_adder(
    Linear,
    nn.Identity,
    nn.Dropout,
    nn.Linear,
    OPERATIONS,
    torch.is_grad_enabled,
    torch.empty_like,
    nn.functional.linear,
    _noise,
    # as Function.apply calls it once it has looked for functorch, which is one of the watchers
    super(torch.autograd.Function, LowRank).apply,
)
