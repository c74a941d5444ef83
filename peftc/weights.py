"""Adapter weights from a folder or a file, whatever of PEFT's two formats they are in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import _core

if TYPE_CHECKING:
    import numpy as np

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"


def find_adapter_weights(path: str | os.PathLike[str]) -> str:
    """The file that holds an adapter's weights.

    Args:
        path: An adapter folder, in which `adapter_model.safetensors` is preferred to `adapter_model.bin` as in PEFT;
            or the file itself.

    Raises:
        FileNotFoundError: `path` does not exist, or is a folder with neither file; the message says what is there.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"adapter weights not found: '{path}' does not exist")
        return path
    for name in (SAFETENSORS_NAME, BIN_NAME):
        file = os.path.join(path, name)
        if os.path.exists(file):
            return file
    there = sorted(os.listdir(path))
    listing = ", ".join(there[:8]) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
    raise FileNotFoundError(
        f"adapter model file not found in '{path}': it needs {SAFETENSORS_NAME} or {BIN_NAME}, "
        f"and holds {listing or 'nothing'}"
    )


def load_adapter_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the tensors of an adapter as arrays, without running anything that a file contains.

    Args:
        path: An adapter folder, in which `adapter_model.safetensors` is preferred to `adapter_model.bin` as in PEFT;
            or a file of either format. A file named `*.safetensors` is read as one, every other as a file of
            `torch.save`.

    Returns:
        Tensor name → array, in the file's order. The arrays are C-contiguous, writable and share no memory.
        bfloat16 and float8 tensors need the package `ml_dtypes`.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds neither of the two.
        peftc.safetensors.SafetensorError: A safetensors file is malformed.
        pickle.UnpicklingError: A `.bin` file is malformed, or asks for anything other than tensors. The message names
            what it asked for. `docs/torch-bin.md` lists the rules.
        TypeError: NumPy has no type for a tensor, and `ml_dtypes` is not installed.
    """
    file = find_adapter_weights(path)
    if file.endswith(".safetensors"):
        from .safetensors import load_file

        return load_file(file)
    return _core.load_torch_bin(file)
