"""Checkpoints of `peftc.train`: folders that are whole or not there.

`step-000120/` has the adapter as PEFT saves it, and two files of ours: training.safetensors with every trained parameter,
the optimizer's arrays and what AdaLora remembers, and training.json with the rest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import _core

_NAME = re.compile(r"step-(\d{6,})")
ARRAYS, FACTS = "training.safetensors", "training.json"


class Checkpoints:
    """Those in one folder, of one training.

    Args:
        folder: made when the first is written.
        keep: how many of the last stay.
        settings: what the training's result depends on; another training's checkpoints are refused.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, settings: dict[str, Any]) -> None:
        self.folder, self.keep = Path(folder), keep
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))

    def _found(self) -> list[Path]:
        """The oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    # ------------------------------------------------------------------ writing

    def write(self, model: Any, parameters: Mapping[str, Any], optimizer: Any, result: Any, best: Any) -> None:
        """Write a checkpoint, then remove those that are too old."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".step-*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        final = self.folder / f"step-{result.steps:06d}"
        made = self.folder / f".{final.name}-{os.getpid()}"
        try:
            made.mkdir()
            _save_adapters(model, made)
            arrays, facts = _optimizer_state(optimizer.state_dict())
            arrays |= {f"parameter.{name}": p._raw for name, p in parameters.items()}
            arrays |= {f"best.{name}": value for name, value in best.weights.items()}
            arrays |= {f"best_adalora.{name}": value for name, value in best.adalora.items()}
            if _trains_adalora(model):
                arrays |= {f"adalora.{name}": value for name, value in model.adalora_state_dict().items()}
            _core.safetensors_save_file(arrays, made / ARRAYS, None)
            facts |= {
                "settings": self.settings,
                "steps": result.steps,
                "losses": result.losses,
                "learning_rates": result.learning_rates,
                "evaluations": result.evaluations,
                "stopped_early": result.stopped_early,
                "best": best.found,
                "misses": best.misses,
            }
            with open(made / FACTS, "w", encoding="utf-8") as file:
                json.dump(facts, file)
                file.flush()
                os.fsync(file.fileno())
            _sync(made)
            if final.exists():
                shutil.rmtree(final)
            os.replace(made, final)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        for old in self._found()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    # ------------------------------------------------------------------ reading

    def restore(
        self, model: Any, parameters: Mapping[str, Any], optimizer: Any, result: Any, best: Any, adalora: bool
    ) -> None:
        """Go back to the last checkpoint that can be read; do nothing if there is none.

        Raises:
            ValueError: it is of a training with other settings, which are named.
        """
        for path in reversed(self._found()):
            try:
                facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
                arrays = _core.safetensors_load_file(path / ARRAYS)
            except (OSError, ValueError, _core.SafetensorError) as error:
                warnings.warn(f"{path} cannot be read and is passed over: {error}", stacklevel=3)
                continue
            self._check(path, facts["settings"])
            self._fill(model, parameters, optimizer, result, best, facts, arrays, adalora)
            return

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        changed = sorted(name for name in {*settings, *self.settings} if settings.get(name) != self.settings.get(name))
        if changed:
            name = changed[0]
            raise ValueError(
                f"{path} is a checkpoint of a training with another {name}: {_short(settings.get(name))} there, "
                f"{_short(self.settings.get(name))} here. Use another folder, or resume=False to begin anew"
            )

    def _fill(
        self,
        model: Any,
        parameters: Mapping[str, Any],
        optimizer: Any,
        result: Any,
        best: Any,
        facts: dict[str, Any],
        arrays: dict[str, Any],
        adalora: bool,
    ) -> None:
        parts: dict[str, dict[str, Any]] = {}
        for key, array in arrays.items():
            kind, _, name = key.partition(".")
            parts.setdefault(kind, {})[name] = array
        for name, parameter in parameters.items():
            parameter._raw[...] = parts["parameter"][name]
        optimizer.load_state_dict(_optimizer_from(parts.get("optimizer", {}), facts))
        if adalora:
            model.load_adalora_state_dict(parts.get("adalora", {}))
        best.found, best.misses = facts["best"], facts["misses"]
        best.weights, best.adalora = parts.get("best", {}), parts.get("best_adalora", {})
        for name in ("steps", "losses", "learning_rates", "evaluations", "stopped_early"):
            setattr(result, name, facts[name])


def _trains_adalora(model: Any) -> bool:
    return bool(model._hf_peft_config_loaded) and bool(model._attached().allocators)


def _save_adapters(model: Any, folder: Path) -> None:
    """The active adapter; several each in a folder of its own."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return
    active = model.active_adapters()
    for name in active:
        model.save_adapter(folder if len(active) == 1 else folder / name, name)


def _optimizer_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its arrays by name, and everything else."""
    arrays: dict[str, Any] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for place, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                arrays[f"optimizer.{place}.{name}"] = value
            else:
                numbers.setdefault(str(place), {})[name] = value
    return arrays, {"optimizer": numbers, "param_groups": state["param_groups"]}


def _optimizer_from(arrays: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    state = {int(place): dict(values) for place, values in facts["optimizer"].items()}
    for key, array in arrays.items():
        place, _, name = key.partition(".")
        state.setdefault(int(place), {})[name] = array
    return {"state": state, "param_groups": facts["param_groups"]}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
