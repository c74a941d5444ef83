"""Torch tensors to a safetensors file, atomically."""

import os
import tempfile
from typing import Any

import torch

from .. import _core


def save_file(tensors: dict[str, torch.Tensor], path: str) -> None:
    """Write tensors with PEFT's metadata; the bytes are those of safetensors' own writer.

    The file appears whole or not at all: it is written beside its place, flushed to disk, and renamed.

    Raises:
        TypeError: a bfloat16 tensor, when neither the package safetensors nor ml_dtypes is installed.
        OSError: the file cannot be written.
    """
    compact = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if all(tensor.dtype is not torch.bfloat16 for tensor in compact.values()):
        _core.safetensors_save_file({name: t.numpy() for name, t in compact.items()}, path, {"format": "pt"})
        return
    try:
        from safetensors.torch import save_file as official
    except ImportError:
        arrays = {name: _as_array(tensor) for name, tensor in compact.items()}
        _core.safetensors_save_file(arrays, path, {"format": "pt"})
        return
    # The official writer wants each tensor to have a storage of its own, which what callers give need not have.
    separate = {name: tensor.clone() for name, tensor in compact.items()}
    handle, temporary = tempfile.mkstemp(prefix=".peftc-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        os.close(handle)
        official(separate, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _as_array(tensor: torch.Tensor) -> Any:
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            "bfloat16 tensors are written with the package safetensors or ml_dtypes; install one of them"
        ) from None
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
