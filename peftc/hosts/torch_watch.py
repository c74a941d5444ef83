"""Who watches or rewrites torch's operations, or looks for the calls of modules: then they are torch's to do."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks


def _yes() -> bool:
    return True


def _ask(path: str) -> Callable[[], Any]:
    """The function of torch._C at this path. Where a torch does not have it, torch's own operations are right everywhere."""
    try:
        found: Callable[[], Any] = attrgetter(path)(torch._C)
    except AttributeError:
        return _yes
    return found


#: asked of whoever may watch or rewrite the operations of this thread: None, 0 or False if it does not
_WATCHERS = (
    _ask("_len_torch_function_stack"),
    _ask("_len_torch_dispatch_stack"),
    _ask("_is_any_autocast_enabled"),
    _ask("_functorch.peek_interpreter_stack"),
    _ask("_get_tracing_state"),
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
CALLS = ((_ask("_get_tracing_state"), _ask("_autograd._profiler_enabled")), _REGISTRIES, {"_current_level": -1})


def runs_eagerly() -> bool:
    """Does nothing watch or rewrite the operations of this thread?"""
    return not (
        torch.compiler.is_compiling()
        or any(watcher() for watcher in _WATCHERS)
        or any(_REGISTRIES)
        or getattr(forward_ad, "_current_level", 0) >= 0
    )
