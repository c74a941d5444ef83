"""The low-rank sum of linear layers on torch tensors: in C where that is possible, in torch ops everywhere else.

C reads the tensors' memory, so it runs only where nothing else wants to see the operations: plain CPU tensors of one
dtype, in eager mode.  torch.compile, torch.export, autocast, vmap, forward-mode differentiation, other devices and
tensor subclasses take the torch ops, with the same result to rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

from .. import _core
from .torch_stamps import Linear

_C: Any = torch._C

#: (A module, B module, dropout module, scaling, adapter name) of each adapter that applies
Term = tuple[Any, Any, Any, float, str]


#: asked of whoever may watch or rewrite the operations of this thread: None, 0 or False if it does not
_WATCHERS = (
    _C._len_torch_function_stack,
    _C._len_torch_dispatch_stack,
    _C._is_any_autocast_enabled,
    _C._functorch.peek_interpreter_stack,
    _C._get_tracing_state,
)

#: hooks on all modules
_REGISTRIES = (
    hooks._global_forward_hooks,
    hooks._global_forward_pre_hooks,
    hooks._global_backward_hooks,
    hooks._global_backward_pre_hooks,
)


def runs_eagerly() -> bool:
    """Does nothing watch or rewrite the operations of this thread?"""
    return not (
        torch.compiler.is_compiling()
        or any(watcher() for watcher in _WATCHERS)
        or any(_REGISTRIES)
        or forward_ad._current_level >= 0
    )


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


def fresh(layer: Any) -> bool:
    """Is the base output nobody else's, so that it can be overwritten?"""
    base = layer._modules["base_layer"]
    return type(base) is nn.Linear and not base._forward_hooks and not _C._has_torch_function_unary(base.weight)


def _with_grad(x: torch.Tensor, result: torch.Tensor, rows: list[Any]) -> torch.Tensor | None:
    if x.dtype != result.dtype or any(down.dtype != x.dtype for down, *_ in rows):
        return None
    for down, up, scaling, _, bias in rows:
        if bias is not None:
            return None
        result = LowRank.apply(x, result, down, up, scaling)
    return result


class LowRank(torch.autograd.Function):
    """y + scaling · (x Aᵀ) Bᵀ with its derivatives, both in C. Saves x, A and B; x Aᵀ is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, down: Any, up: Any, scaling: float) -> Any:
        ctx.save_for_backward(x, down, up)
        ctx.scaling = scaling
        out = torch.empty_like(y)
        if not _core.lowrank_forward(x, y, out, ((down, up, scaling, None, None),)):
            out = torch.addmm(
                y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]) @ down.T, up.T, alpha=scaling
            ).view(y.shape)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, down, up = ctx.saved_tensors
        need_x, need_y, need_down, need_up, _ = ctx.needs_input_grad
        scaling = ctx.scaling
        if not torch.is_grad_enabled() and runs_eagerly():
            grad_c = grad.contiguous()
            dx, d_down, d_up = (
                torch.empty_like(of, memory_format=torch.contiguous_format) if need else None
                for of, need in ((x, need_x), (down, need_down), (up, need_up))
            )
            if _core.lowrank_backward(grad_c, x, down, up, None, scaling, dx, d_down, d_up, None):
                return dx, grad if need_y else None, d_down, d_up, None
        flat_g, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        through = flat_g @ up * scaling
        dx = (through @ down).view(x.shape) if need_x else None
        d_down = through.T @ flat_x if need_down else None
        d_up = flat_g.T @ (flat_x @ down.T) * scaling if need_up else None
        return dx, grad if need_y else None, d_down, d_up, None


#: the plain case in one call: (layer, x, result, names) → the sum, or None; not to be called while compiling
add_plain = _core.lowrank_adder(
    Linear,
    nn.Identity,
    (nn.Linear,),
    _WATCHERS,
    _REGISTRIES,
    forward_ad.__dict__,
    torch.is_grad_enabled,
    torch.empty_like,
    LowRank.apply,
)
