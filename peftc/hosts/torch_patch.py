"""peftc under every Transformers model: the methods of its PeftAdapterMixin, replaced by ours while the patch holds."""

import functools
from typing import TYPE_CHECKING, Any

from .._optional import require
from ..mixin import PeftAdapterMixin

if TYPE_CHECKING:
    from typing_extensions import Self

    from .torch_trainer import TrainerPatch

_MISSING = object()


class Patch:
    """What `patch_transformers` returns: `undo()` takes it back; also a context manager."""

    def __init__(self, target: type, replaced: dict[str, Any], trainer: "TrainerPatch") -> None:
        self._target, self._replaced, self._trainer = target, replaced, trainer

    def undo(self) -> None:
        """Give Transformers its own methods back. Models that have peftc's adapters keep them. Twice does nothing."""
        for name, value in self._replaced.items():
            if value is _MISSING:
                delattr(self._target, name)
            else:
                setattr(self._target, name, value)
        self._replaced = {}
        self._trainer.undo()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def patch_transformers() -> Patch:
    """Put peftc under every model of Transformers, those that exist already too.

    Returns a handle: `.undo()`, or use it in a `with` statement. A second patch on top of the first is undone first.

    Models that have adapters of PEFT's from before go on with Transformers' own methods. The Trainer resumes from
    checkpoints of adapters and loads the best of them at the end.

    Raises:
        ImportError: transformers or torch is not installed.
    """
    for package in ("torch", "transformers"):
        require(package, "peftc.patch_transformers")
    import transformers.integrations.peft as theirs

    from .torch_generation import installed
    from .torch_registry import join_peft
    from .torch_trainer import TrainerPatch

    target = theirs.PeftAdapterMixin
    replaced: dict[str, Any] = {}
    methods = {**vars(PeftAdapterMixin), **installed().methods()}
    for name, ours in methods.items():
        if name.startswith("__") or name == "_hf_peft_config_loaded":
            continue
        before = vars(target).get(name, _MISSING)
        replaced[name] = before
        if before is not _MISSING and callable(ours) and not name.startswith("_"):
            ours = _choose(ours, before)
        setattr(target, name, ours)
    join_peft()
    return Patch(target, replaced, TrainerPatch())


def _choose(ours: Any, theirs: Any) -> Any:
    """A method that is `theirs` on a model that PEFT put its adapters on before the patch, else `ours`."""

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._hf_peft_config_loaded and self._peftc_attachment is None:
            from .torch_generation import installed

            return theirs(self, *args, **installed().arguments_of_theirs(kwargs))
        return ours(self, *args, **kwargs)

    return method
