"""The C core of peftc. Private: use the names that `peftc` exports."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> dict[str, Any]: ...

class SafetensorError(Exception): ...

def load_torch_bin(path: str | bytes | os.PathLike[str], /) -> dict[str, np.ndarray]:
    """Read the dict of tensors in a file of torch.save, without running anything in it."""

def parse_torch_bin(data: bytes | bytearray | memoryview, /) -> dict[str, np.ndarray]: ...
def torch_bin_raw(source: str | os.PathLike[str] | bytes | bytearray | memoryview, /) -> dict[
    str, tuple[str, tuple[int, ...], bytes]
]:
    """Name → (dtype in safetensors' names, shape, bytes in row-major order), from a path or from the content."""

class AdapterRegistry:
    """One model's modules, its adapters, and which of them are active."""

    def __init__(self) -> None: ...
    def bind(self, modules: Sequence[tuple[str, object]], output_embedding: str | None = None) -> None:
        """Append modules (dotted name, object) to the table; objects that are `Module`s learn their registry and index.
        Names that are already bound to the same object are skipped, so the call can be repeated as a model grows."""
    def add(self, name: str, config: str, *, label: str = "config", seed: int = 0, trainable: bool = True) -> None:
        """Plan, allocate and initialise a new adapter from a JSON config. It is listed but not active. All or nothing."""
    def load(
        self,
        name: str,
        config: str,
        source: str | dict[str, np.ndarray],
        *,
        label: str = "config",
        seed: int = 0,
        trainable: bool = False,
    ) -> tuple[list[str], list[str]]:
        """Plan, allocate and fill a new adapter from a weights file (.safetensors or .bin) or a dict of arrays.
        Returns (missing keys, unexpected keys). It is listed but not active. All or nothing."""
    def remove(self, name: str, /) -> None: ...
    def activate(self, names: Sequence[str], /) -> None:
        """Make exactly these adapters active, in this order. O(1) in modules and adapters. All or nothing."""
    def active(self) -> list[str]: ...
    def names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    enabled: bool
    version: int
    """Grows with every change of what is active."""
    def peft_type(self, name: str, /) -> str: ...
    def trainable(self, name: str, /) -> bool: ...
    def set_trainable(self, name: str, trainable: bool, /) -> None: ...
    def tensors(self, name: str, /) -> list[tuple[str, str, np.ndarray, bool, bool, str]]:
        """Per tensor: (state-dict key, name in the model, array view of the arena, in the state dict?, trainable?,
        module's dotted name)."""
    def state_dict(self, name: str, /) -> dict[str, np.ndarray]:
        """state-dict key → view of the arena."""
    def saved_modules(self, name: str, /) -> list[str]:
        """Dotted names of the modules that the adapter replaces (modules_to_save)."""
    def adapted_modules(self, name: str, /) -> list[str]: ...
    def save(self, name: str, path: str, /, prefix: str = "base_model.model.") -> None:
        """Write the adapter's state dict as safetensors straight from the arena, atomically, with PEFT's metadata."""
    def merge(self, names: Sequence[str] | None = None, safe_merge: bool = False) -> None: ...
    def unmerge(self) -> None: ...
    def merged(self) -> list[str]: ...
