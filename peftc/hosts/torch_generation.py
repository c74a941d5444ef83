"""What Transformers 5 does otherwise than 4 with adapters: see generation.py."""

import copy
import dataclasses
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, Optional

from .. import _prepare
from .._optional import is_installed
from . import torch_files
from .generation import FOUR, Generation, adapter_logger
from .torch_tree import walk
from .torch_wrappers import inner, place_of

if TYPE_CHECKING:
    import torch
    from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

_PREFIX = "base_model.model."

#: Arguments of load_adapter that Transformers 4 has and 5 has not.
_EARLIER = ("revision", "token", "device_map", "max_memory", "offload_folder", "offload_index")


def installed() -> Generation:
    """The generation of the Transformers that is imported."""
    transformers = sys.modules.get("transformers")
    if transformers is None or int(transformers.__version__.partition(".")[0]) < 5:
        return FOUR
    return FIVE


def generation_of(model: Any) -> Generation:
    """That of the Transformers that the model is of; a model of none behaves as under Transformers 4."""
    theirs = sys.modules.get("transformers.modeling_utils")
    return installed() if theirs is not None and isinstance(model, theirs.PreTrainedModel) else FOUR


def load_adapter(
    self: Any,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: dict[str, Any] | None = None,
    adapter_state_dict: dict[str, "torch.Tensor"] | None = None,
    low_cpu_mem_usage: bool = False,
    is_trainable: bool = False,
    hotswap: bool | Literal["auto"] = "auto",
    local_files_only: bool = False,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Optional["LoadStateDictConfig"] = None,
    **kwargs: Any,
) -> "LoadStateDictInfo":
    """`peftc.PeftAdapterMixin.load_adapter` with the signature of Transformers 5.

    Args beyond those:
        load_config: how `from_pretrained` reads files: where they are, in which format, how tensors are renamed.
        **kwargs: fields of such a `LoadStateDictConfig`; and revision, token, device_map, max_memory, offload_folder and
            offload_index, which Transformers 4 has here.

    Returns:
        What was missing, unexpected and of the wrong size, by the names in the model, as `LoadStateDictInfo`.
    """
    from transformers.modeling_utils import LoadStateDictConfig

    from ..mixin import PeftAdapterMixin

    earlier = {key: kwargs.pop(key) for key in _EARLIER if key in kwargs}
    if kwargs:
        load_config = dataclasses.replace(load_config or LoadStateDictConfig(), **kwargs)
    info: LoadStateDictInfo = PeftAdapterMixin.load_adapter(
        self,
        peft_model_id,
        adapter_name,
        peft_config=peft_config,
        adapter_state_dict=adapter_state_dict,
        low_cpu_mem_usage=low_cpu_mem_usage,
        is_trainable=is_trainable,
        adapter_kwargs=adapter_kwargs,
        hotswap=hotswap,
        local_files_only=local_files_only,
        load_config=load_config,
        **earlier,
    )
    return info


class Five(Generation):
    """Transformers 5."""

    argument_decides = True
    dispatches = False
    loads_keep_flags = True

    def methods(self) -> dict[str, Any]:
        return {"load_adapter": load_adapter}

    def arguments_of_theirs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = dict(kwargs)
        earlier = {key: kwargs.pop(key) for key in _EARLIER if key in kwargs}
        place = {key: earlier[key] for key in ("revision", "token") if earlier.get(key) is not None}
        if place:
            kwargs["adapter_kwargs"] = {**place, **(kwargs.get("adapter_kwargs") or {})}
        return kwargs

    def check(self, model: Any, config: Any) -> None:
        """Experts that were modules in Transformers 4 are one parameter in 5, and PEFT rewrites their targets."""
        fused = _fused(model, config)
        if fused:
            raise NotImplementedError(
                f"peftc has no code for experts that Transformers 5 keeps in one parameter ({', '.join(sorted(fused))})"
            )

    def weights(self, model: Any, source: Any, name: str, config: Any, conversions: Any) -> Any:
        """Names that came from an older Transformers, or from the model without or with its head, are brought up to date.

        The names in a file are taken as they are where the model has such modules, unless `from_pretrained` was given
        renamings (`conversions`).
        """
        names = torch_files.names_in(source)
        if not all(isinstance(key, str) for key in names):
            return source  # the mixin says so
        modules = {path for path, _ in walk(model)}
        plain = {key: key.removeprefix(_PREFIX) for key in names}
        prefix = _prepare.key_prefix(_prepare.method_of(config))
        if not conversions:
            if all(_module_of(key, prefix) in modules for key in plain.values()):
                return source
            if _fused(model, config):
                return _with_fused_experts(model, config, name, torch_files.read(source, names))
            from transformers.conversion_mapping import get_model_conversion_mapping

            conversions = get_model_conversion_mapping(model)
        from transformers.core_model_loading import WeightRenaming

        renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        head = getattr(model, "base_model_prefix", "")
        mapping = {}
        for key, old in plain.items():
            renamed = _prepare.name_in_model(old, name, prefix)  # what the patterns were written for
            for one in renamings:
                renamed, _ = one.rename_source_key(renamed)
            new = _prepare.name_in_file(renamed, name, prefix)
            if _module_of(new, prefix) not in modules and _module_of(old, prefix) in modules:
                new = old
            if _module_of(new, prefix) not in modules and head:
                within = new.removeprefix(f"{head}.")
                other = within if within != new else f"{head}.{new}"
                new = other if _module_of(other, prefix) in modules else new
            mapping[key] = new
        if mapping == plain:
            return source
        return {mapping[key]: tensor for key, tensor in torch_files.read(source, names).items()}

    def report(
        self, model: Any, origin: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Any = ()
    ) -> "LoadStateDictInfo":
        from transformers import modeling_utils
        from transformers.utils import loading_report

        origin = None if origin == "state_dict" else origin
        found: dict[str, Any] = {
            "missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set(mismatched),
            "error_msgs": [], "conversion_errors": {}, "disk_offload_index": None,
        }  # fmt: skip
        since_5_1: Any = getattr(loading_report, "LoadStateDictInfo", None)
        kind: Any = since_5_1 or modeling_utils.LoadStateDictInfo
        info = kind(**{f.name: found.get(f.name, set()) for f in dataclasses.fields(kind)})
        how: dict[str, Any] = {"pretrained_model_name_or_path": origin, "ignore_mismatched_sizes": True}
        if since_5_1 is not None:
            loading_report.log_state_dict_report(model=model, loading_info=info, logger=adapter_logger(), **how)
        else:
            report: Any = loading_report.log_state_dict_report
            keys = {field: found[field] for field in ("missing_keys", "unexpected_keys", "mismatched_keys")}
            keys["mismatched_shapes"] = found["mismatched_keys"]
            config = modeling_utils.LoadStateDictConfig(**how)
            report(model=model, load_config=config, logger=adapter_logger(), **keys)
        return info

    def saved_modules_gone(self, model: Any, paths: Iterable[str]) -> None:
        """Where PEFT leaves its wrapper, emptied, code finds `module.modules_to_save` without the adapter: an attribute
        that is no module and in no state dict."""
        for path in paths:
            parent, key = place_of(model, path)
            module = parent._modules[key]
            if inner(module) is None:
                module.__dict__["modules_to_save"] = {}


def _module_of(key: str, prefix: str) -> str:
    """The module that a state-dict key belongs to: "a.b.lora_A.weight" → "a.b", "head.weight" → "head"."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.startswith(prefix) or part == "base_layer":
            return ".".join(parts[:i])
    return ".".join(parts[:-1])


def _fused(model: Any, config: Any) -> set[str]:
    """The parameters that PEFT puts in the place of this config's targets; experts that were modules in Transformers 4.

    Raises:
        ValueError: PEFT's, for targets of which only some have such a parameter.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if _prepare.method_of(config) != "LORA" or get_checkpoint_conversion_mapping(model_type) is None:
        return set()
    if not is_installed("peft"):
        return set()
    from .torch_peft import as_pefts

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # PEFT before 0.19: Transformers had it then
        from transformers.integrations import peft as theirs

        convert_peft_config_for_transformers = theirs.convert_peft_config_for_transformers

    converted: Any = copy.deepcopy(as_pefts(config))
    before = set(converted.target_parameters or ())
    convert_peft_config_for_transformers(converted, model, None)
    return set(converted.target_parameters or ()) - before


def _with_fused_experts(model: Any, config: Any, name: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """An adapter's tensors, one for each expert, as those of the parameter that has all experts.

    Raises:
        ImportError: PEFT is older than 0.19.
    """
    from .torch_peft import as_pefts

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:
        raise ImportError(
            "the adapter has experts that Transformers 5 keeps in one parameter; PEFT 0.19 or newer can put them together: "
            "pip install -U peft"
        ) from None

    converted: dict[str, Any] = convert_peft_adapter_state_dict_for_transformers(
        model, as_pefts(config), tensors, adapter_name=name
    )
    return converted


FIVE = Five()
