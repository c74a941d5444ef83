"""The tensors of one adapter out of a torch model and into it, under the names of its file."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from .. import _prepare
from . import torch_adalora
from .torch_inject import attachment, has_adapters, prefix_of
from .torch_tree import walk
from .torch_wrappers import unwrap

PREFIX = "base_model.model."
_NO_EMBEDDINGS = "Could not identify embedding layer(s) because the model is not a 🤗 transformers model."


def home_of(model: Any) -> tuple[Any, str]:
    """(the model that the adapters are on, what its names start with when they are asked of `model`)."""
    from .torch_peft_model import PeftModel
    from .torch_tuner import Tuner

    if isinstance(model, PeftModel):
        return model.base_model.model, PREFIX
    if isinstance(model, Tuner):
        return model.model, "model."
    return model, ""


# ------------------------------------------------------------------------------ out


def get_state(
    model: Any, state_dict: Any, adapter_name: str, unwrap_compiled: bool, save_embedding_layers: Any
) -> dict[str, torch.Tensor]:
    """See `peftc.get_peft_model_state_dict`."""
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    home, prefix = home_of(model)
    if not has_adapters(home):
        return _peft(model).get_peft_model_state_dict(  # type: ignore[no-any-return]  # PEFT's answer
            model,
            state_dict=state_dict,
            adapter_name=adapter_name,
            unwrap_compiled=unwrap_compiled,
            save_embedding_layers=save_embedding_layers,
        )
    registry = attachment(home).registry
    config = home.peft_config[adapter_name]
    if state_dict is None:
        state = registry.state_dict(adapter_name)
    else:
        state = registry.state_from(adapter_name, state_dict, prefix)
    allocator = attachment(home).allocators.get(adapter_name)
    if allocator is not None and allocator.masks is not None:
        # As in PEFT, names in the config lose the adapter's name here: save_pretrained writes the config next.
        config.rank_pattern = allocator.pattern(with_adapter=False)
        state = allocator.resized(state)
    ends = _embedding_keys(home, state, config, save_embedding_layers)
    for key, tensor in ends.items():
        state[key] = tensor
    return {prefix + key: tensor for key, tensor in state.items()}


def _embedding_keys(home: Any, state: dict[str, torch.Tensor], config: Any, wanted: Any) -> dict[str, torch.Tensor]:
    """The base weights of the embeddings that go along; those of adapted ones are in `state`, and leave it on False."""
    adapted = [key for key in state if ".base_layer." in f".{key}" and not key.endswith("bias")]
    if wanted == "auto":
        if adapted:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=4
            )
            return {}
        if not _was_resized(home, config):
            return {}
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
            stacklevel=4,
        )
    elif not wanted:
        for key in adapted:
            del state[key]
        return {}
    elif adapted:
        return {}
    if not hasattr(home, "get_input_embeddings"):
        warnings.warn(_NO_EMBEDDINGS, stacklevel=4)
        return {}
    ends = [unwrap(end) for end in (home.get_input_embeddings(), home.get_output_embeddings()) if end is not None]
    return {
        f"{path}.{field}": parameter.detach()
        for path, module in walk(home)
        if any(module is end for end in ends)
        for field, parameter in module._parameters.items()
        if parameter is not None
    }


def _was_resized(home: Any, config: Any) -> bool:
    """Has the model another vocabulary than the checkpoint that it was loaded from? Only what is on this machine is read."""
    name = getattr(config, "base_model_name_or_path", None)
    mine: Any = getattr(home, "config", None)
    size = getattr(mine, "vocab_size", None)
    if not name or not size or not hasattr(type(mine), "from_pretrained"):
        return False
    try:
        return bool(type(mine).from_pretrained(name, local_files_only=True).vocab_size != size)
    except (OSError, ValueError, AttributeError):
        return False


# ----------------------------------------------------------------------------- into


def set_state(model: Any, given: Any, adapter_name: str, ignore_mismatched_sizes: bool, low_cpu_mem_usage: bool) -> Any:
    """See `peftc.set_peft_model_state_dict`."""
    home, prefix = home_of(model)
    if not has_adapters(home):
        return _peft(model).set_peft_model_state_dict(
            model,
            given,
            adapter_name=adapter_name,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    registry = attachment(home).registry
    config = home.peft_config[adapter_name]
    values = {key.removeprefix(prefix): value for key, value in given.items()}
    rows = registry.tensors(adapter_name)
    for path in registry.saved_modules(adapter_name):
        for key, _, _, _, _, module in rows:
            if module == path and key not in values:
                raise KeyError(prefix + key)
    targets = {key: (full, tensor) for key, full, tensor, *_ in rows}
    if _prepare.method_of(config) == "ADALORA" and config.rank_pattern:
        if torch_adalora.take_ranks(registry.layers_of(adapter_name), adapter_name, values):
            attachment(home).allocators.pop(adapter_name, None)
        targets = {key: (full, tensor) for key, full, tensor, *_ in registry.tensors(adapter_name)}
    own = home.state_dict(keep_vars=True)
    plan: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    unexpected: list[str] = []
    for key, value in values.items():
        full, tensor = targets.get(key, ("", None))
        if tensor is None:
            full = _prepare.name_in_model(key, adapter_name, prefix_of(config))
            tensor = own.get(full)
        if tensor is None:
            unexpected.append(prefix + full)
        else:
            plan[full or key] = (tensor, value)
    plan = _fitting(model, prefix, plan, ignore_mismatched_sizes)
    with torch.no_grad():
        for tensor, value in plan.values():
            tensor.copy_(value)
    missing = [prefix + key for key in own if key not in plan]
    return _IncompatibleKeys(missing, unexpected)


def _fitting(model: nn.Module, prefix: str, plan: dict[str, Any], ignore: bool) -> dict[str, Any]:
    """The pairs whose shapes agree. Others raise, all of them named, or are passed over with a warning."""
    odd = {key: pair for key, pair in plan.items() if pair[0].shape != pair[1].shape}
    if not odd:
        return plan
    if not ignore:
        lines = "\n\t".join(
            f"size mismatch for {prefix}{key}: copying a param with shape {value.shape} from checkpoint, the shape in "
            f"current model is {tensor.shape}."
            for key, (tensor, value) in odd.items()
        )
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t{lines}")
    lines = "\n".join(
        f"- {prefix}{key}: found shape {value.shape} in the checkpoint and {tensor.shape} in the model instantiated"
        for key, (tensor, value) in odd.items()
    )
    warnings.warn(
        f"Some weights of {type(model).__name__} were not initialized from the model checkpoint and are being ignored "
        f"because you passed `ignore_mismatched_sizes=True`: {lines}.",
        stacklevel=4,
    )
    return {key: pair for key, pair in plan.items() if key not in odd}


def _peft(model: Any) -> Any:
    """PEFT, for a model whose adapters are PEFT's."""
    if getattr(model, "peft_config", None) is None:
        raise ValueError("the model has no adapter: it has no `peft_config`")
    import peft

    return peft
