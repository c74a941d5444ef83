"""peftc under every Transformers model: the methods of its PeftAdapterMixin, replaced by ours while the patch holds."""

import functools
from typing import TYPE_CHECKING, Any

from ..mixin import PeftAdapterMixin

if TYPE_CHECKING:
    from typing_extensions import Self

_MISSING = object()


class Patch:
    """What `patch_transformers` returns: `undo()` takes it back; also a context manager."""

    def __init__(self, target: type, replaced: dict[str, Any]) -> None:
        self._target, self._replaced = target, replaced

    def undo(self) -> None:
        """Give Transformers its own methods back. Models that have peftc's adapters keep them. Twice does nothing."""
        for name, value in self._replaced.items():
            if value is _MISSING:
                delattr(self._target, name)
            else:
                setattr(self._target, name, value)
        self._replaced = {}

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _choose(ours: Any, theirs: Any) -> Any:
    """Ours, but theirs on a model whose adapters PEFT made before the patch."""

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        made_by_peft = self._hf_peft_config_loaded and self._peftc_attachment is None
        return (theirs if made_by_peft else ours)(self, *args, **kwargs)

    return method


def patch_transformers() -> Patch:
    """Put peftc under every model of Transformers, those that exist already too.

    Returns a handle: `.undo()`, or use it in a `with` statement. A second patch on top of the first is undone first.

    Raises:
        ImportError: transformers or torch is not installed.
    """
    import transformers.integrations.peft as theirs

    from .torch_registry import join_peft

    target = theirs.PeftAdapterMixin
    replaced: dict[str, Any] = {}
    for name, ours in vars(PeftAdapterMixin).items():
        if name.startswith("__") or name == "_hf_peft_config_loaded":
            continue
        before = vars(target).get(name, _MISSING)
        replaced[name] = before
        public = callable(ours) and not name.startswith("_")
        setattr(target, name, _choose(ours, before) if public and before is not _MISSING else ours)
    join_peft()
    return Patch(target, replaced)
