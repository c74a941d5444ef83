"""Who watches or rewrites torch's operations, or looks for the calls of modules: then they are torch's to do."""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks

_C: Any = torch._C

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

#: for the functions in C, which ask the same as `runs_eagerly`
OPERATIONS = (_WATCHERS, _REGISTRIES, forward_ad.__dict__)

#: of calls of modules: torch.jit.trace names their scopes, and torch.profiler finds their frames
CALLS = ((_C._get_tracing_state, _C._autograd._profiler_enabled), _REGISTRIES, {"_current_level": -1})


def runs_eagerly() -> bool:
    """Does nothing watch or rewrite the operations of this thread?"""
    return not (
        torch.compiler.is_compiling()
        or any(watcher() for watcher in _WATCHERS)
        or any(_REGISTRIES)
        or forward_ad._current_level >= 0
    )
