"""What a checkpoint of a torch model's adapter holds beside the adapter, and reading it back into the adapter.

An adapter's folder is enough for LoRA and IA3.  Of an AdaLora in training it has only the singular values that are left,
while those that were dropped may still come back; a file of ours beside it has them all, and the averages of importance.
"""

import os
from typing import Any

import torch

from .. import _core
from .._adalora import masks_of
from ..hub import AdapterFiles
from . import torch_files
from .torch_save import save_file

_PREFIX = "base_model.model."
ADALORA_STATE = "adalora_state.safetensors"
_PARAMETER, _STATE = "parameter.", "state."


def write_training_state(model: Any, folder: str) -> None:
    """Write ADALORA_STATE to the folder of a checkpoint, if the model has an AdaLora adapter whose training has begun."""
    attached = model.__dict__.get("_peftc_attachment")
    for name, allocator in attached.allocators.items() if attached is not None else ():
        tensors = {f"{_STATE}{key}": torch.from_numpy(array) for key, array in allocator.state().items()}
        for key, tensor in attached.registry.state_dict(name).items():
            if key.rpartition(".")[2].startswith("lora_"):
                tensors[_PARAMETER + key] = tensor
        save_file(tensors, os.path.join(folder, ADALORA_STATE))


def read_into(model: Any, folder: str) -> None:
    """Give the first active adapter the values of the checkpoint in `folder`. Parameters stay the same objects.

    Raises:
        ValueError: the folder's tensors are not those of the adapter, by name or by shape. Nothing is changed then.
    """
    name = model.active_adapters()[0]
    attached = model._attached()
    state = attached.registry.state_dict(name)
    file = AdapterFiles(folder).weights()
    stored = {key.removeprefix(_PREFIX): key for key in torch_files.names_in(file)}
    odd = sorted(set(state) ^ set(stored))
    if odd:
        raise ValueError(f"{file} is not a checkpoint of adapter {name}: {odd[0]} is in only one of the two")
    read = torch_files.read(file, stored.values())
    values = {key: read[stored[key]] for key in state}
    arrays: dict[str, Any] | None = None
    extra = os.path.join(folder, ADALORA_STATE)
    if attached.registry.peft_type(name) == "ADALORA":
        if os.path.isfile(extra):
            more = torch_files.read(extra, [k for k in torch_files.names_in(extra) if k.startswith(_PARAMETER)])
            values.update((k.removeprefix(_PARAMETER), tensor) for k, tensor in more.items())
            with _core.safe_open(extra, framework="np") as opened:
                names = [key for key in opened.offset_keys() if key.startswith(_STATE)]
                arrays = {key.removeprefix(_STATE): opened.get_tensor(key) for key in names}
        else:
            arrays = _widen(values, state, name, folder)
    for key, tensor in state.items():
        if key not in values or values[key].shape != tensor.shape:
            have = list(values[key].shape) if key in values else "no values"
            raise ValueError(
                f"{file} is not a checkpoint of adapter {name}: {key} has shape {have}, the model needs "
                f"{list(tensor.shape)}"
            )
    if arrays is not None:
        model.load_adalora_state_dict(arrays)
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(values[key])


def _widen(values: dict[str, Any], state: dict[str, Any], name: str, folder: str) -> dict[str, Any] | None:
    """Put the singular values that a folder has where they were among all, the others zero. Returns the masks."""
    from ..config import PeftConfig

    masks = masks_of(PeftConfig.from_pretrained(folder), name)
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        if masks is None or module not in masks or values[key].shape == tensor.shape:
            continue
        kept = torch.tensor(masks[module])
        whole = torch.zeros_like(tensor)
        part = whole[:, kept] if parameter == "lora_B" else whole[kept]
        if len(kept) == tensor.shape[parameter == "lora_B"] and part.shape == values[key].shape:
            where = (slice(None), kept) if parameter == "lora_B" else kept
            whole[where] = values[key].to(tensor.dtype)
            values[key] = whole
    return None if masks is None else {f"{module}.mask": mask for module, mask in masks.items()}
