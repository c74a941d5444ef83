"""A `PeftModel`'s adapters on disk: the folders and files that PEFT writes, each file atomically."""

import copy
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from .. import _core, _prepare
from .._attachment import check_config
from ..config import to_file_text
from ..hub import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME, AdapterFiles
from . import torch_files
from .torch_inject import attachment
from .torch_save import save_file
from .torch_state import PREFIX, get_state

_CONVERTIBLE = ("pissa", "corda", "olora", "true")


def save(
    model: Any,
    folder: str,
    safe_serialization: bool,
    selected_adapters: list[str] | None,
    save_embedding_layers: Any,
    is_main_process: bool,
    initial: str | None,
    state_dict: Any,
) -> None:
    """See `PeftModel.save_pretrained`."""
    if os.path.isfile(folder):
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    configs = model.peft_config
    names = list(configs) if selected_adapters is None else list(selected_adapters)
    if any(name not in configs for name in names):
        raise ValueError(
            "You passed an invalid `selected_adapters` arguments, current supported adapter names are"
            f" {list(configs)} - got {selected_adapters}."
        )
    base = model.get_base_model()
    for name in names:
        _check(attachment(base), name, configs[name])
    if is_main_process:
        os.makedirs(folder, exist_ok=True)
        model.create_or_update_model_card(folder)
    for name in names:
        config = configs[name]
        state = get_state(model, state_dict, name, False, save_embedding_layers)
        if not is_main_process:
            continue
        values = dict(config.to_dict())
        if initial is not None:
            state = _as_difference(state, config, initial)
            _double(values)
        target = folder if name == "default" else os.path.join(folder, name)
        os.makedirs(target, exist_ok=True)
        if safe_serialization:
            save_file(state, os.path.join(target, SAFETENSORS_NAME))
        else:
            _save_bin(state, os.path.join(target, BIN_NAME))
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = name_of(base)
        values["base_model_name_or_path"] = config.base_model_name_or_path
        values["inference_mode"] = True
        if config.task_type is None:
            kind = type(base)
            values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        if _prepare.method_of(config) == "ADALORA":
            values["rank_pattern"] = copy.deepcopy(config.rank_pattern)
        _core.config_write(os.path.join(target, CONFIG_NAME), to_file_text(values))


def name_of(base: Any) -> str | None:
    """What a config has as its base model's name. "" is what Transformers calls a model that was made from a config."""
    name: str | None = base.__dict__.get("name_or_path", None)
    # PEFT 0.17 writes "" into a config, PEFT 0.21 null; peftc writes what the one that is installed would.
    return name if name or (0,) < version_of_peft() < (0, 21) else None


@functools.cache
def version_of_peft() -> tuple[int, ...]:
    """(major, minor) of the PEFT that is installed; () without one."""
    try:
        major, minor, *_ = metadata.version("peft").split(".")
    except metadata.PackageNotFoundError:
        return ()
    return int(major), int(minor)


def _check(attached: Any, name: str, config: Any) -> None:
    """Refuse a config that was edited so that it describes another adapter.

    Not for AdaLora, whose rank_pattern is learned; and PEFT's recipe for `initial` sets init_lora_weights to True.
    """
    if _prepare.method_of(config) == "ADALORA":
        return
    if getattr(config, "init_lora_weights", None) is True:
        config = copy.copy(config)
        config.init_lora_weights = json.loads(attached.made_from[name])["init_lora_weights"]
    check_config(attached, name, config)


def _save_bin(state: dict[str, torch.Tensor], path: str) -> None:
    """torch.save, to a file beside the old one that then takes its place."""
    compact = {key: tensor.detach().clone() for key, tensor in state.items()}
    handle, temporary = tempfile.mkstemp(prefix=".peftc-", dir=os.path.dirname(os.path.abspath(path)))
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(compact, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


# -------------------------------------------- pissa and olora as LoRA on the whole base


def _as_difference(state: dict[str, torch.Tensor], config: Any, initial: str) -> dict[str, torch.Tensor]:
    """B A − B₀ A₀ as one sum of twice the rank: [B, −B₀] [A; A₀]."""
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    if not str(config.init_lora_weights).lower().startswith(_CONVERTIBLE):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA/CorDA/OLoRA adapter to a LoRA "
            "adapter",
            stacklevel=5,
        )
    file = AdapterFiles(initial).weights()
    named = {key if key.startswith(PREFIX) else PREFIX + key: key for key in torch_files.names_in(file)}
    values = torch_files.read(file, named.values())
    return difference(state, {key: values[stored] for key, stored in named.items()}, file)


def difference(state: Mapping[str, Any], first: Mapping[str, Any], origin: str) -> dict[str, torch.Tensor]:
    """The LoRA adapter of twice the rank that adds B A − B₀ A₀, from one that is trained and what it was at first.

    Raises:
        ValueError: `first`, which `origin` says where it is from, lacks a tensor.
    """
    result = {}
    for key, tensor in state.items():
        if ".lora_A" not in key and ".lora_B" not in key:
            continue
        if key not in first:
            raise ValueError(f"{origin} has no tensor {key}: it is not where this adapter started")
        start = first[key].to(tensor)
        result[key] = torch.cat([tensor, start], dim=0) if ".lora_A" in key else torch.cat([tensor, -start], dim=1)
    return result


def _double(values: dict[str, Any]) -> None:
    """The fields of the adapter that `_as_difference` makes."""
    values["init_lora_weights"] = True
    values["r"] *= 2
    values["lora_alpha"] *= 2**0.5 if values["use_rslora"] else 2
    for field in ("rank_pattern", "alpha_pattern"):
        values[field] = {key: 2 * value for key, value in (values[field] or {}).items()}
