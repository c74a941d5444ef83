"""safetensors files as NumPy arrays, with the functions of `safetensors.numpy`.

The reader is at least as strict as the official one and maps nothing; the writer is atomic, gives the official
writer's bytes, and writes the values that an array shows whatever its memory layout. docs/file-formats.md has the
rules and the few differences.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from peftc._core import (
    SafetensorError,
    safe_open,
    safetensors_load,
    safetensors_load_file,
    safetensors_save,
    safetensors_save_file,
)

__all__ = ["SafetensorError", "load", "load_file", "safe_open", "save", "save_file"]


def load_file(
    filename: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, backend: str = "mmap"
) -> dict[str, np.ndarray]:
    """Read every tensor of a file into new, writable arrays, in the order of their data.

    `backend` ("mmap" or "pread") is accepted for compatibility; the file is always read with pread and never mapped.
    BF16 and F8 tensors need the package ml_dtypes.

    Raises:
        OSError: the file cannot be opened or read (FileNotFoundError and so on).
        SafetensorError: its content is wrong; the text names the file, the tensor and the reason.
        TypeError: NumPy has no dtype for a tensor.
        MemoryError: the arrays do not fit.
    """
    if backend not in ("mmap", "pread"):
        raise SafetensorError(f'backend {backend!r} is invalid (expected "mmap" or "pread")')
    return safetensors_load_file(filename)


def load(data: bytes) -> dict[str, np.ndarray]:
    """Read every tensor of a file's bytes (any contiguous buffer) into new, writable arrays.

    Raises as `load_file` does, apart from OSError.
    """
    return safetensors_load(data)


def save_file(
    tensor_dict: Mapping[str, np.ndarray],
    filename: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays to a file, atomically: whatever happens, `filename` is either the old file or the whole new one.

    Arrays may have any strides and byte order. A new file gets the mode that the umask leaves; one that is replaced
    keeps its mode, and a symbolic link keeps pointing to the file, which is replaced. `metadata` keeps its order.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        SafetensorError: an array or a name that the format cannot hold.
        TypeError: not a dict of str -> numpy.ndarray, or metadata that is not str -> str.
    """
    safetensors_save_file(tensor_dict, filename, metadata)


def save(tensor_dict: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes that `save_file` would write.

    Raises as `save_file` does, apart from OSError.
    """
    return safetensors_save(tensor_dict, metadata)
