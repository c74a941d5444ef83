"""Transformers' Trainer on models with adapters of the mixin: resuming, and the best model at the end.

Such a model's checkpoints hold adapters; the Trainer looks for whole models in them unless the model is PEFT's
`PeftModel`.  Its two methods that read a checkpoint are wrapped when transformers.trainer is imported, not before:
it takes seconds.
"""

import functools
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import torch

from ..hub import BIN_NAME, SAFETENSORS_NAME, AdapterFiles
from . import torch_files

_MODULE = "transformers.trainer"
_PREFIX = "base_model.model."


def read_into(model: Any, folder: str) -> None:
    """Give the first active adapter the values of the checkpoint in `folder`. Parameters stay the same objects.

    Raises:
        ValueError: the folder's tensors are not those of the adapter, by name or by shape. Nothing is changed then.
    """
    name = model.active_adapters()[0]
    state = model.get_adapter_state_dict(name)
    file = AdapterFiles(folder).weights()
    stored = {key.removeprefix(_PREFIX): key for key in torch_files.names_in(file)}
    odd = sorted(set(state) ^ set(stored))
    if odd:
        raise ValueError(f"{file} is not a checkpoint of adapter {name}: {odd[0]} is in only one of the two")
    values = torch_files.read(file, stored.values())
    for key, tensor in state.items():
        if values[stored[key]].shape != tensor.shape:
            raise ValueError(
                f"{file} is not a checkpoint of adapter {name}: {key} has shape {list(values[stored[key]].shape)}, the "
                f"model needs {list(tensor.shape)}"
            )
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(values[stored[key]])


def _has_adapters(trainer: Any, model: Any, folder: Any) -> bool:
    """Does the mixin's model meet a checkpoint of an adapter, in a Trainer that keeps no shards of its own?"""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or not getattr(model, "_hf_peft_config_loaded", False):
        return False
    return any(os.path.isfile(os.path.join(folder, name)) for name in (SAFETENSORS_NAME, BIN_NAME))


def _resuming(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
        target = self.model if model is None else model
        if not _has_adapters(self, target, resume_from_checkpoint):
            return theirs(self, resume_from_checkpoint, model)
        return read_into(target, resume_from_checkpoint)

    return _load_from_checkpoint


def _best(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def _load_best_model(self: Any) -> Any:
        folder = self.state.best_model_checkpoint
        return read_into(self.model, folder) if _has_adapters(self, self.model, folder) else theirs(self)

    return _load_best_model


class TrainerPatch:
    """Wraps the Trainer's methods now, or as soon as its module is imported. `undo()` takes it back."""

    def __init__(self) -> None:
        self._replaced: dict[str, Any] = {}
        self._trainer: Any = None
        if _MODULE in sys.modules:
            self._apply(sys.modules[_MODULE])
        else:
            sys.meta_path.insert(0, self)

    def _apply(self, module: Any) -> None:
        self._trainer = module.Trainer
        for name, wrap in (("_load_from_checkpoint", _resuming), ("_load_best_model", _best)):
            self._replaced[name] = vars(self._trainer)[name]
            setattr(self._trainer, name, wrap(self._replaced[name]))

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The importer's question. The answer for the Trainer's module is what the others say, with our step after it."""
        if name != _MODULE:
            return None
        self._stop_waiting()
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next((spec for spec in found if spec is not None and spec.loader is not None), None)
        if spec is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self._apply(module)

            loader.exec_module = exec_module
        return spec

    def _stop_waiting(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def undo(self) -> None:
        self._stop_waiting()
        for name, method in self._replaced.items():
            setattr(self._trainer, name, method)
        self._replaced = {}
