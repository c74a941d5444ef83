"""Checkpoints of `peftc.train`: folders that are whole or not there.

`step-000120/` has the adapter as PEFT saves it, and two files of ours: training.safetensors with every trained parameter,
the optimizer's arrays and what AdaLora remembers, and training.json with the rest.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .config import as_peftc_json

_NAME = re.compile(r"step-(\d{6,})")
ARRAYS, FACTS = "training.safetensors", "training.json"
_FACTS = (
    "settings", "steps", "losses", "learning_rates", "evaluations", "stopped_early", "best", "misses", "optimizer",
    "param_groups",
)  # fmt: skip
#: Fields of configs that a training, loading or the machine changes, and those whose order says nothing.
_CHANGING = ("rank_pattern", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping")
_SETS = ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save")
_END = 256  # numbers


class _OtherTraining(Exception):
    """A checkpoint of a training with other settings."""


class Checkpoints:
    """Those in one folder, of one training.

    Args:
        folder: made if there is none.
        keep: how many of the last stay.
        settings: what the training's result depends on; another training's checkpoints are refused.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int, settings: dict[str, Any]) -> None:
        self.folder, self.keep = Path(folder), keep
        self.settings: dict[str, Any] = json.loads(_json(settings))
        # Now rather than after an epoch: a place that cannot be written to.
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "checkpoints cannot be written there", str(self.folder))

    def _found(self) -> list[Path]:
        """The oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    # ------------------------------------------------------------------ writing

    def write(self, model: Any, parameters: Mapping[str, Any], optimizer: Any, result: Any, best: Any) -> None:
        """Write a checkpoint, then remove those that are too old, and those of later steps: of a training before this."""
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
                file.write(_json(facts))
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
        found = self._found()
        kept = found[: found.index(final) + 1][-self.keep :]
        for other in found:
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

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
                _check_whole(facts)
                self._check_settings(path, facts["settings"])
                _check_shapes(arrays, parameters)
            except _OtherTraining as error:
                raise ValueError(str(error)) from None
            except (OSError, ValueError, _core.SafetensorError) as error:
                warnings.warn(f"{path} cannot be read and is passed over: {error}", stacklevel=3)
                continue
            self._fill(model, parameters, optimizer, result, best, facts, arrays, adalora)
            return

    def _check_settings(self, path: Path, settings: dict[str, Any]) -> None:
        # In the order of ours: what an adapter is comes before what follows from it.
        changed = [name for name in {**self.settings, **settings} if settings.get(name) != self.settings.get(name)]
        if changed:
            name = changed[0]
            raise _OtherTraining(
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
        optimizer.load_state_dict(_optimizer_from(parts.get("optimizer", {}), facts))
        for name, parameter in parameters.items():
            parameter._raw[...] = parts["parameter"][name]
        if adalora:
            model.load_adalora_state_dict(parts.get("adalora", {}))
        best.found, best.misses = facts["best"], facts["misses"]
        best.weights, best.adalora = parts.get("best", {}), parts.get("best_adalora", {})
        for name in ("steps", "losses", "learning_rates", "evaluations", "stopped_early"):
            setattr(result, name, facts[name])


def adapter_settings(model: Any) -> dict[str, Any]:
    """What the configs of the active adapters say, without what training or the place of the files changes."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return {}
    settings = {}
    for name in model.active_adapters():
        for field, value in json.loads(as_peftc_json(model.peft_config[name])).items():
            if field not in _CHANGING:
                settings[f"{field} of adapter {name}"] = sorted(value) if field in _SETS and value else value
    return settings


def optimizer_settings(optimizer: Any) -> dict[str, Any]:
    """Options of the groups. Their learning rates follow the schedule: "initial_lr" is the setting."""
    return {
        f"{name} of optimizer group {i}": len(value) if name == "params" else value
        for i, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "lr"
    }


def frozen_digest(model: Any, trained: Mapping[str, Any]) -> str:
    """Tells base models apart by the ends of every frozen parameter that takes part: all of them would be a long read."""
    adapters = set(model.peft_config) if getattr(model, "_hf_peft_config_loaded", False) else set()
    digest = 0
    for name, parameter in model.named_parameters():
        # Adapters that are not trained here may come and go; what modules_to_save stands in for is not used.
        if name in trained or not {*adapters, "original_module"}.isdisjoint(name.split(".")):
            continue
        values = parameter._raw.reshape(-1)
        for part in (values[:_END], values[-_END:]):
            digest = zlib.crc32(np.ascontiguousarray(part).tobytes(), digest)
    return f"{digest:08x}"


def _check_whole(facts: Any) -> None:
    missing = [name for name in _FACTS if name not in facts] if isinstance(facts, dict) else [*_FACTS]
    if missing or not isinstance(facts["settings"], dict):
        raise ValueError(f"{FACTS} lacks {', '.join(missing) or 'its settings'}")


def _check_shapes(arrays: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for name, parameter in parameters.items():
        array = arrays.get(f"parameter.{name}")
        if array is None or array.shape != parameter.shape:
            what = "lacks" if array is None else f"has shape {array.shape} instead of {parameter.shape} for"
            raise ValueError(f"{ARRAYS} {what} {name}")


def _json(values: Mapping[str, Any]) -> str:
    """NumPy's numbers, which options often are, as numbers."""
    return json.dumps(values, default=lambda value: value.item() if isinstance(value, np.generic) else repr(value))


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
