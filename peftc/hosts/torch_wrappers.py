"""What stands around a module of a model: adapted layers and saved modules, of peftc and of PEFT.

One place knows how to look through them (`inner`, `unwrap`), how to find the place of a module by its name (`place`), and
how to take a wrapper out again (`take_out`).  A class of peftc says in `_peftc_inner` where it keeps what it is around;
PEFT's classes are told by their bases.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def lasts(cls: type) -> bool:
    """Is the class one of its module's, which may be remembered? Classes that are made for a module (parametrized ones, those of
    torch.fx) would keep that alive."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found is cls


#: class → attributes that lead from a wrapper to what it is around; () for a module that is no wrapper. Filled as classes
#: are met: a look-up by class is what makes walking a large model cheap.
leads: dict[type, tuple[str, ...]] = {}

#: PEFT's wrappers by the name of their base class; the most special first.
_PEFT_LEADS = (
    ("TrainableTokensWrapper", ("token_adapter", "base_layer")),
    ("AuxiliaryTrainingWrapper", ("original_module",)),
    ("BaseTunerLayer", ("base_layer",)),
)


def leads_of(cls: type) -> tuple[str, ...]:
    """What `leads` has, or gets if the class `lasts`, of a class."""
    own = getattr(cls, "_peftc_inner", None)
    found: tuple[str, ...] = (own,) if own is not None else ()
    if own is None:
        bases = {base.__name__ for base in cls.__mro__ if base.__module__.startswith("peft.")}
        found = next((ways for name, ways in _PEFT_LEADS if name in bases), ())
    if lasts(cls):
        leads[cls] = found
    return found


def inner(module: Any) -> tuple[Any, str] | None:
    """(holder, key) such that holder._modules[key] is what `module` is around; None if it is no wrapper."""
    cls = type(module)
    ways = leads.get(cls)
    if ways is None:
        ways = leads_of(cls)
    if not ways:
        return None
    for name in ways[:-1]:
        module = module._modules[name]
    return module, ways[-1]


def unwrap(module: Any) -> Any:
    """The module as it was before any adapter."""
    while (found := inner(module)) is not None:
        module = found[0]._modules[found[1]]
    return module


def is_ours(module: Any) -> bool:
    """Is it a wrapper of peftc's?"""
    return getattr(type(module), "_peftc_inner", None) is not None


def is_pefts(module: Any) -> bool:
    """Is it a wrapper of PEFT's?"""
    return inner(module) is not None and not is_ours(module)


def place_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """(parent, key) such that parent._modules[key] is the module called `path` with all that is around it."""
    *above, key = path.split(".")
    parent: Any = model
    for part in above:
        parent = unwrap(parent._modules[part])
    return parent, key


def around(parent: Any, key: str) -> Iterator[tuple[Any, str, Any]]:
    """(holder, key, wrapper) of each wrapper at a place, the outermost first."""
    while (found := inner(parent._modules[key])) is not None:
        yield parent, key, parent._modules[key]
        parent, key = found


def place(parent: Any, key: str) -> tuple[Any, str]:
    """(holder, key) such that holder._modules[key] is the outermost adapted layer at a place of the model.

    Inside a saved module that is the original's place: what an adapter trains of its own is not adapted.
    """
    while (found := inner(parent._modules[key])) is not None and found[1] == "original_module":
        parent, key = found
    return parent, key


def take_out(model: nn.Module, path: str, wrapper: nn.Module) -> None:
    """Put what `wrapper` is around in its place. A tree that somebody else has changed is left alone."""
    for holder, key, module in around(*place_of(model, path)):
        if module is wrapper:
            inside = inner(module)
            assert inside is not None
            holder._modules[key] = inside[0]._modules[inside[1]]
            return


def places(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(parent, key) of every wrapped module in the tree that runs: copies that adapters train are not looked into."""
    seen: set[int] = set()
    stack: list[Any] = [unwrap(model)]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for key, child in module._modules.items():
            if child is None:
                continue
            if inner(child) is not None:
                yield module, key
            stack.append(unwrap(child))


def is_wrapper(module: Any) -> bool:
    """Is it around another module?"""
    return inner(module) is not None


@contextmanager
def taken_out(model: nn.Module, which: Callable[[Any], bool] = is_wrapper) -> Iterator[None]:
    """The tree without its wrappers, or without the outer ones that `which` says yes to; afterwards they stand around
    whatever is in their places then."""
    kept = []
    for parent, key in list(places(model)):
        top = parent._modules[key]
        if not which(top):
            continue
        inside = inner(top)
        while inside is not None and which(inside[0]._modules[inside[1]]):
            inside = inner(inside[0]._modules[inside[1]])
        assert inside is not None
        kept.append((parent, key, top, inside))
    for parent, key, _, (holder, slot) in kept:
        parent._modules[key] = holder._modules[slot]
    try:
        yield
    finally:
        for parent, key, top, (holder, slot) in kept:
            holder._modules[slot] = parent._modules[key]
            parent._modules[key] = top
