"""Transformers' Trainer on models with adapters of the mixin: resuming, and the best model at the end.

Such a model's checkpoints hold adapters; the Trainer looks for whole models in them unless the model is PEFT's
`PeftModel`.  Its two methods that read a checkpoint are wrapped, and the one that writes what training needs besides the
weights, when transformers.trainer is imported, not before: it takes seconds.
"""

import functools
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from ..hub import BIN_NAME, SAFETENSORS_NAME
from .torch_checkpoint import read_into, write_training_state

_MODULE = "transformers.trainer"


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


def _saving(theirs: Any) -> Any:
    @functools.wraps(theirs)
    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> Any:
        result = theirs(self, output_dir)
        if self.args.should_save:
            write_training_state(self.model, output_dir)
        return result

    return _save_optimizer_and_scheduler


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
        for name, wrap in (
            ("_load_from_checkpoint", _resuming),
            ("_load_best_model", _best),
            ("_save_optimizer_and_scheduler", _saving),
        ):
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
