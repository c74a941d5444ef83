"""PEFT's functions beside the mixin, under its names and signatures: they come here first, and torch with them.

Nothing of torch is imported before one of them is called; the work is done in `peftc.hosts.torch_*`.
"""
# ruff: noqa: UP007, UP045  (the annotations are those of the documented signatures)

from typing import TYPE_CHECKING, Any, Optional, TypeAlias, Union

from ._optional import require

if TYPE_CHECKING:
    from .hosts.torch_peft_model import PeftModel

    class torch:
        """The signatures name torch, which this file does without."""

        Tensor: TypeAlias = Any

        class nn:
            Module: TypeAlias = Any


def _require_torch(name: str) -> None:
    require(
        "torch", f"peftc.{name}, for torch models,", "; a model of peftc.nn has add_adapter and load_adapter itself"
    )


def get_peft_model(
    model: "torch.nn.Module",
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: Optional[str] = None,
    low_cpu_mem_usage: bool = False,
) -> "PeftModel":
    """A model with a fresh adapter to train, as `peft.get_peft_model` makes it, on peftc's engine.

    Args:
        model: any torch model. It is changed in place and is `result.base_model.model`.
        peft_config: a config of peftc or of PEFT. It is kept, not copied; base_model_name_or_path is set.
        adapter_name: "default" unless given.
        mixed: adapters of several methods in one model (`peft.PeftMixedModel`); PEFT makes it.
        autocast_adapter_dtype: adapters of a float16 or bfloat16 model are float32, for stable training.
        revision: revision of the base model, noted in the config.
        low_cpu_mem_usage: without effect; nothing is made twice.

    Returns:
        A `peftc.PeftModel`, or its subclass for the config's task_type. Where peftc has no code for the method or for a
        layer and peft is installed, what `peft.get_peft_model` returns.

    Raises:
        ImportError: torch is not installed.
        ValueError: no module matches the targets; a value that cannot work; a name with a dot.
        NotImplementedError: no code for it, and peft is not installed.
        TypeError: not a config, not a torch model.

    A refused call leaves the model as it was.
    """
    _require_torch("get_peft_model")
    from .hosts import torch_peft_model

    made: PeftModel = torch_peft_model.make(
        model, peft_config, adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage
    )
    return made


def inject_adapter_in_model(
    peft_config: Any,
    model: "torch.nn.Module",
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Optional[dict[str, "torch.Tensor"]] = None,
) -> "torch.nn.Module":
    """Put a fresh adapter into a torch model, in place and without a `PeftModel` around it, and activate it.

    Args:
        peft_config: a config of peftc or of PEFT. It is kept as `model.peft_config[adapter_name]`.
        model: any torch model. Several adapters can be put in one after the other; the last is active, together with
            active ones of the other family (LoRA and AdaLora; IA3).
        adapter_name: "default" unless given.
        low_cpu_mem_usage: without effect.
        state_dict: names from here say which modules get adapted, instead of the config's targets, with a warning where
            the two differ. Values are not read: `set_peft_model_state_dict` does that.

    Returns:
        The model.

    Raises:
        ImportError: torch is not installed.
        ValueError: the name is taken or has a dot; no module matches; a prompt method; a value that cannot work.
        NotImplementedError: no code for it, and peft is not installed.
        TypeError: not a config, not a torch model.
    """
    _require_torch("inject_adapter_in_model")
    from .hosts import torch_inject

    return torch_inject.inject(peft_config, model, adapter_name, state_dict, low_cpu_mem_usage)


def get_peft_model_state_dict(
    model: "torch.nn.Module",
    state_dict: Optional[dict[str, "torch.Tensor"]] = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Union[str, bool] = "auto",
) -> dict[str, "torch.Tensor"]:
    """The tensors of one adapter, named as in its file and without the adapter's name.

    Args:
        model: what `get_peft_model` or `inject_adapter_in_model` returned, or a model with adapters of the mixin; one
            of PEFT's goes to PEFT. Names of a `PeftModel` start with "base_model.model.".
        state_dict: take the tensors from here instead of from the model: a dict as `model.state_dict()` gives it.
        adapter_name: which adapter.
        unwrap_compiled: look inside a model from torch.compile.
        save_embedding_layers: True: the base weights of input and output embeddings too. "auto": if they are adapted, or
            if the vocabulary was resized. False: no.

    Returns:
        name → tensor, which shares memory with the adapter's parameter unless `state_dict` was given.

    Raises:
        ImportError: torch is not installed.
        KeyError: no adapter of that name.
    """
    _require_torch("get_peft_model_state_dict")
    from .hosts import torch_state

    return torch_state.get_state(model, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)


def set_peft_model_state_dict(
    model: "torch.nn.Module",
    peft_model_state_dict: dict[str, "torch.Tensor"],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Copy tensors named as in an adapter's file into an adapter that is there.

    Args:
        model: as for `get_peft_model_state_dict`.
        peft_model_state_dict: name → tensor, as `get_peft_model_state_dict` gives it. It is not changed.
        adapter_name: which adapter.
        ignore_mismatched_sizes: pass over tensors of another shape, with a warning.
        low_cpu_mem_usage: without effect: values are copied to where they stay, once.

    Returns:
        What torch's `load_state_dict` returns: missing_keys (every name of the model that got no value, those of the
        base model too) and unexpected_keys.

    Raises:
        ImportError: torch is not installed.
        KeyError: no adapter of that name; a tensor of modules_to_save is missing.
        RuntimeError: shapes differ; every one is named, and nothing is changed.
    """
    _require_torch("set_peft_model_state_dict")
    from .hosts import torch_state

    return torch_state.set_state(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes, low_cpu_mem_usage)
