"""Checkpoint folders: safetensors files mapped read-only, and the way from their names to a model's parameters."""

from __future__ import annotations

import json
import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .._core import Parameter, SafetensorError, safetensors_layout

if TYPE_CHECKING:
    from .base import PreTrainedModel

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_STORAGE = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "BF16": np.uint16}


class Tensor(NamedTuple):
    """A tensor in a mapped file."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int
    mapping: mmap.mmap | bytes

    def parameter(self) -> Parameter:
        """A parameter over the mapping; the bytes are copied only where they are not aligned."""
        count = 1
        for extent in self.shape:
            count *= extent
        data = (
            np.frombuffer(self.mapping, _STORAGE[self.dtype], count, self.offset)
            if count
            else np.empty(0, _STORAGE[self.dtype])
        )
        return Parameter._from_raw(data.reshape(self.shape), self.dtype)


class Checkpoint:
    """Every float tensor of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no safetensors checkpoint.
        ValueError: its index cannot be used.
        SafetensorError: a file is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.tensors: dict[str, Tensor] = {}
        single, index = os.path.join(self.path, _FILE), os.path.join(self.path, _INDEX)
        if os.path.isfile(single):
            self._read(single, None)
        elif os.path.isfile(index):
            for file, names in _read_index(index).items():
                self._read(os.path.join(self.path, file), names)
        else:
            raise FileNotFoundError(
                f"{self.path} has neither {_FILE} nor {_INDEX}; other formats (pytorch_model.bin, …) are not read: "
                "save the model again with safe_serialization=True"
            )

    def _read(self, file: str, names: list[str] | None) -> None:
        mapping: mmap.mmap | bytes
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        found: dict[str, Tensor | None] = {}
        for name, dtype, shape, offset, _ in safetensors_layout(mapping, file):
            if dtype in _STORAGE:
                found[name] = Tensor(dtype, shape, offset, mapping)
            elif names is not None:
                found[name] = None  # a buffer of integers: known, and of no use here
        for name in found if names is None else names:
            if name not in found:
                raise SafetensorError(f"{file}: {_INDEX} says that tensor {name!r} is here, and it is not")
            tensor = found[name]
            if tensor is not None:
                self.tensors[name] = tensor

    def main_dtype(self) -> str:
        """The dtype that most of the weights are stored in: float32 for an empty checkpoint."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + 1
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"


def _read_index(index: str) -> dict[str, list[str]]:
    """file → names of its tensors."""
    try:
        with open(index, encoding="utf-8") as stream:
            weight_map = json.load(stream)["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    files: dict[str, list[str]] = {}
    for name, file in items:
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise ValueError(f"{index}: tensor {name!r} is in {file!r}, which is not a file of the same folder")
        files.setdefault(file, []).append(name)
    return files


def _logger() -> Any:
    import logging

    return logging.getLogger("peftc.models")


def _own_name(name: str) -> str:
    """The name that a tensor has today: old checkpoints call LayerNorm's weight gamma and its bias beta."""
    if name.endswith(".gamma"):
        return name[: -len("gamma")] + "weight"
    if name.endswith(".beta"):
        return name[: -len("beta")] + "bias"
    return name


def _place(model: PreTrainedModel, targets: dict[str, Parameter], checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the file → name in the model, with the base model's prefix added or taken away as needed."""
    prefix = model.base_model_prefix + "."
    names = {name: _own_name(name) for name in checkpoint.tensors}
    has_prefix = any(name.startswith(prefix) for name in names.values())
    wants_prefix = any(name.startswith(prefix) for name in targets)
    if has_prefix and not wants_prefix:
        return {name: own.removeprefix(prefix) for name, own in names.items()}
    if wants_prefix and not has_prefix:
        return {name: own if own in targets else prefix + own for name, own in names.items()}
    return names


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint, dtype: Any, ignore_mismatched_sizes: bool) -> None:
    """Give the model the checkpoint's weights, and report what does not fit.

    Raises:
        ValueError: nothing fits, or shapes differ.
    """
    targets = dict(model._plain_parameters())
    places = _place(model, targets, checkpoint)
    unexpected = [name for name, own in places.items() if own not in targets]
    found = {own: checkpoint.tensors[name] for name, own in places.items() if own in targets}
    missing = [name for name in targets if name not in found]
    kind = type(model).__name__
    if not found:
        raise ValueError(f"{checkpoint.path}: no tensor of this checkpoint belongs to a {kind}")
    wrong = [
        f"{name}: {found[name].shape} in the checkpoint, {targets[name].shape} in the model"
        for name in targets
        if name in found and found[name].shape != targets[name].shape
    ]
    if wrong and not ignore_mismatched_sizes:
        raise ValueError(
            f"{checkpoint.path}: shapes differ from those of this {kind}:\n  "
            + "\n  ".join(wrong)
            + "\nignore_mismatched_sizes=True draws these weights afresh"
        )
    for name, tensor in found.items():
        target = targets[name]
        if tensor.shape == target.shape:
            target._share(tensor.parameter())
            if dtype is not None:
                target._convert(dtype)
    fresh = missing + [line.partition(":")[0] for line in wrong]
    if unexpected:
        _logger().info("%s: not used by %s: %s", checkpoint.path, kind, sorted(unexpected))
    if fresh:
        _logger().warning(
            "Some weights of %s are not in the checkpoint %s and are newly initialized: %s. Train them before use.",
            kind,
            checkpoint.path,
            sorted(fresh),
        )
