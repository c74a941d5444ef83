"""Something to do as soon as a module is imported, by whoever does it."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if the module is there, else once it is. It is not imported for that."""
    if sys.modules.get(name) is not None:
        action()
    else:
        sys.meta_path.insert(0, _Waiting(name, action))


class _Waiting:
    """A finder that finds nothing itself: it adds a step to what the others find."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name, self._action = name, action

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        spec = next((spec for spec in found if spec is not None and spec.loader is not None), None)
        if spec is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self._action()

            loader.exec_module = exec_module
        return spec
