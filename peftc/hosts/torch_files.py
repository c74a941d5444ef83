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


def read(source: Any, names: Iterable[str], *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """These tensors, in the dtype they are stored in: copies, unless source is a dict.

    mapped: the caller copies them at once, so those of a safetensors file need be no copies but may be the file's own pages.

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
        with open(source, "rb") as file:
            # Private and writable, as torch wants memory to be; it lives as long as a tensor over it.
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        for name, dtype, shape, offset, size in _core.safetensors_layout(data, source):
            if name in wanted:
                part = data[offset : offset + size]
                raw[name] = (dtype, shape, part if mapped and offset % 8 == 0 else bytearray(part))
    else:
        raw = {name: row for name, row in _core.torch_bin_raw(source).items() if name in wanted}
    tensors = {}
    for name, (dtype, shape, content) in raw.items():
        kind = FROM_NAME.get(dtype) or _INDICES.get(dtype)
        if kind is None:
            known = ", ".join([*FROM_NAME, *_INDICES])
            raise TypeError(f"{source}: tensor {name} has dtype {dtype}; those of adapters are {known}")
        memory = bytearray(content) if isinstance(content, bytes) else content
        flat = torch.frombuffer(memory, dtype=kind) if len(memory) else torch.empty(0, dtype=kind)
        tensors[name] = flat.reshape(shape)
    return tensors
