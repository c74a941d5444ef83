"""Turning gradients off."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import TYPE_CHECKING

from .. import _core

if TYPE_CHECKING:
    from typing_extensions import Self


class no_grad(ContextDecorator):
    """A context, or a decorator, in which forward passes of this thread save nothing, as in eval mode.

    Dropout is not changed: that is what `eval()` is for.
    """

    def __enter__(self) -> Self:
        _core.set_gradients(False)
        return self

    def __exit__(self, *exception: object) -> None:
        _core.set_gradients(True)
