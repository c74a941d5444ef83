"""Named tensors of a weights file as torch tensors: what an adapter brings besides its method's own."""

import mmap
from collections.abc import Iterable
from typing import Any

import torch

from .. import _core
from .torch_tree import FROM_NAME

#: dtypes of indices, which some of PEFT's methods save
_INDICES = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


def names_in(source: Any) -> list[str]:
    """The names of the tensors in a file (a path) or a dict."""
    if not isinstance(source, str):
        return list(source)
    if source.endswith(".safetensors"):
        with _core.safe_open(source, "numpy") as file:
            return list(file.keys())
    return list(_core.torch_bin_raw(source))


def read(source: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copies of these tensors, in the dtype they are stored in.

    Raises:
        TypeError: a tensor that is neither floating point nor of indices.
    """
    wanted = set(names)
    if not wanted:
        return {}
    if not isinstance(source, str):
        return {name: torch.as_tensor(source[name]) for name in wanted}
    raw: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    if source.endswith(".safetensors"):
        with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for name, dtype, shape, offset, size in _core.safetensors_layout(data, source):
                if name in wanted:
                    raw[name] = (dtype, shape, data[offset : offset + size])
    else:
        raw = {name: row for name, row in _core.torch_bin_raw(source).items() if name in wanted}
    tensors = {}
    for name, (dtype, shape, content) in raw.items():
        kind = FROM_NAME.get(dtype) or _INDICES.get(dtype)
        if kind is None:
            known = ", ".join([*FROM_NAME, *_INDICES])
            raise TypeError(f"{source}: tensor {name} has dtype {dtype}; those of adapters are {known}")
        flat = torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0)
        tensors[name] = flat.reshape(shape)
    return tensors
