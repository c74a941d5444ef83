"""Adapters from files into a `PeftModel`."""

from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from .. import _prepare
from .._sources import new_key, read_weights, renamed
from ..config import PeftConfig
from ..hub import CONFIG_NAME, DOWNLOAD_ARGUMENTS, AdapterFiles
from . import torch_files
from .torch_inject import attachment, prefix_of
from .torch_state import PREFIX


class _Files(AdapterFiles):
    """An adapter's files; what is not there is a ValueError that begins as PEFT's."""

    def config(self) -> str:
        try:
            return super().config()
        except (OSError, ValueError) as error:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{self.location}': {error}") from error

    def weights(self, prefer_bin: bool = False) -> str:
        try:
            return super().weights(prefer_bin)
        except (FileNotFoundError, ValueError) as error:
            place = self.location
            raise ValueError(
                f"Can't find weights for {place} in {place} or in the Hugging Face Hub. {error}"
            ) from error


def files_of(model_id: Any, kwargs: dict[str, Any]) -> tuple[AdapterFiles, bool]:
    """(where an adapter's files are, ignore_mismatched_sizes) from the options of a load."""
    options = {key: value for key, value in kwargs.items() if key in DOWNLOAD_ARGUMENTS}
    if kwargs.get("use_auth_token") is not None:
        options.setdefault("token", kwargs["use_auth_token"])
    return _Files(model_id, **options), bool(kwargs.get("ignore_mismatched_sizes", False))


def method_in(path: str) -> str:
    """The method that a config file names; LORA if it names none, about which reading the config says more."""
    return str(PeftConfig.from_json_file(path).get("peft_type") or "LORA")


def read(path: str, key_mapping: dict[str, str] | None) -> dict[str, Any]:
    """All tensors of a file under this model's names."""
    tensors = torch_files.read(path, torch_files.names_in(path))
    if key_mapping:
        tensors = {PREFIX + new_key(key, key_mapping): value for key, value in tensors.items()}
    return tensors


def load_new(model: Any, name: str, config: Any, label: str, path: str, key_mapping: dict[str, str] | None) -> Any:
    """Make adapter `name` with the tensors of the file `path`; returns what was missing and unexpected, as PEFT names it.

    Base parameters that the file brings (embeddings that were resized) go into the base model, as in PEFT.
    """
    source: Any = path
    if key_mapping:
        source = renamed(read_weights(path), key_mapping, attachment(model.base_model.model).host)
    model._with_heads(config)
    made = model.base_model.add(name, config, source=source, label=label)
    registry = attachment(model.base_model.model).registry
    full = {key: where or key for key, where, *_ in registry.tensors(name)} if made.missing else {}
    unexpected = made.unexpected
    if unexpected and not key_mapping:
        try:
            unexpected = _into_base(model, path, unexpected)
        except BaseException:
            model.base_model.delete_adapter(name)
            raise
    part = prefix_of(config)
    return _IncompatibleKeys(
        [PREFIX + full.get(key.removeprefix(PREFIX), key) for key in made.missing],
        [PREFIX + _prepare.name_in_model(key.removeprefix(PREFIX), name, part) for key in unexpected],
    )


def _into_base(model: Any, path: str, unexpected: list[str]) -> list[str]:
    """Give base parameters that a file brings (embeddings that were resized) their values; returns what is left."""
    own = {PREFIX + key: tensor for key, tensor in model.base_model.model.state_dict(keep_vars=True).items()}
    named = {key if key.startswith(PREFIX) else PREFIX + key: key for key in unexpected}
    known = {full: key for full, key in named.items() if full in own and ".base_layer." not in full}
    values = torch_files.read(path, known.values())
    for full, key in known.items():
        if values[key].shape != own[full].shape:
            raise RuntimeError(
                f"Error(s) in loading state_dict for {type(model).__name__}:\n\tsize mismatch for {full}: copying a "
                f"param with shape {values[key].shape} from checkpoint, the shape in current model is "
                f"{own[full].shape}."
            )
    with torch.no_grad():
        for full, key in known.items():
            own[full].copy_(values[key])
    return [key for full, key in named.items() if full not in known]


def read_again(model: Any, name: str, path: str, key_mapping: dict[str, str] | None) -> None:
    """A float32 adapter has the file's values, not those values rounded to the base layer's dtype."""
    registry = attachment(model.base_model.model).registry
    values = {key.removeprefix(PREFIX): value for key, value in read(path, key_mapping).items()}
    with torch.no_grad():
        for key, _, tensor, *_ in registry.tensors(name):
            if tensor.dtype is torch.float32 and key in values and values[key].shape == tensor.shape:
                tensor.copy_(values[key])
