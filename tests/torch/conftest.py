"""Shared by the tests with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch uses one thread: the models of tests are tiny, threads would cost more than they bring."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[bool]]:
    """A function (module, name) that lets calls of module.name note whether they did the work; the list is one for all."""
    seen: list[bool] = []

    def watch(module: Any, name: str) -> list[bool]:
        fast = getattr(module, name)

        def call(*args: Any) -> Any:
            result = fast(*args)
            seen.append(result is not None)
            return result

        monkeypatch.setattr(module, name, call)
        return seen

    return watch
