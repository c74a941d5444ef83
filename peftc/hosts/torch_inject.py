"""Adapters on a torch model that has no mixin: its registry, and how an adapter gets in."""

import re
import sys
import warnings
from typing import Any

from torch import nn

from .. import _prepare
from .._attachment import Attachment, MadeAdapter, make_adapter, stay_active
from .._sources import is_config
from .torch_peft import as_pefts
from .torch_registry import join_peft


def attachment(model: Any) -> Attachment:
    """The model's registry with its host and lock; made when first asked for.

    Raises:
        TypeError: not a torch model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, got {type(model).__name__}")
    found: Any = model.__dict__.get("_peftc_attachment")
    if found is None:
        found = model.__dict__.setdefault("_peftc_attachment", Attachment(model))
    found.host.serve(found.registry, model)
    return found  # type: ignore[no-any-return]  # from a module's __dict__


def has_adapters(model: Any) -> bool:
    """Has the model adapters of peftc?"""
    found = model.__dict__.get("_peftc_attachment")
    return found is not None and len(found.registry) > 0


def made_by_peft(model: Any) -> bool:
    """Has the model layers that PEFT made?"""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or has_adapters(model) or "peft_config" not in model.__dict__:
        return False
    layer: Any = tuners.BaseTunerLayer  # type: ignore[attr-defined]  # found at run time
    return any(isinstance(module, layer) for module in model.modules())


def prefix_of(config: Any) -> str:
    """How the names of the method's tensors begin."""
    return _prepare.key_prefix(_prepare.method_of(config))


def put(
    model: Any,
    name: str,
    config: Any,
    *,
    source: Any = None,
    label: str = "config",
    activate: bool = True,
    targets: str | None = None,
) -> MadeAdapter:
    """Make adapter `name`, fresh (source None) or from a file or dict, and remember its config in model.peft_config.

    Args:
        activate: it becomes active, and the active ones of its own family inactive. Otherwise what is active stays as it
            is, and so do all flags.
        targets: see `make_adapter`.
    """
    attached = attachment(model)
    with attached.lock:
        registry = attached.registry
        configs = model.__dict__.get("peft_config") if len(registry) else None
        configs = {} if configs is None else configs
        if name in registry.names():
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        flags = None if activate else registry.flags()
        made = make_adapter(attached, model, name, config, configs, label, source, targets=targets)
        if flags is None:
            try:
                kept = stay_active(registry, name)
                registry.activate([*kept, name])
            except BaseException:
                registry.remove(name)
                raise
            for other in kept:
                registry.set_trainable(other, False)
        else:
            registry.set_trainable(name, False)
            flags()
        for field, value in made.settled.items():
            setattr(made.config, field, value)
        model.peft_config = configs
        configs[name] = made.config
        attached.made_from[name] = made.text
        attached.host.adapters_changed(model, registry)
    return made


def new_name(adapter_name: Any, config: Any) -> str:
    """The adapter's name, checked. A name that PEFT's own readers would confuse gets the warning that it gives."""
    name = _prepare.check_name(adapter_name)
    prefix = prefix_of(config)
    if prefix and name in prefix:
        warnings.warn(
            f"Adapter name {name} should not be contained in the prefix {prefix}."
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=4,
        )
    return name


def check_config(config: Any) -> None:
    """Refuse what is no config. Raises TypeError."""
    if not is_config(config):
        raise TypeError(f"peft_config should be an instance of PeftConfig. Got {type(config)} instead.")


def inject(config: Any, model: Any, adapter_name: str, state_dict: Any, low_cpu_mem_usage: bool) -> Any:
    """See `peftc.inject_adapter_in_model`."""
    check_config(config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError("`create_and_replace` does not support prompt learning and adaption prompt yet.")
    if made_by_peft(model):
        import peft

        return peft.inject_adapter_in_model(
            as_pefts(config), model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict
        )
    join_peft()
    targets = None if state_dict is None else _targets_of(state_dict, prefix_of(config))
    made = put(model, _prepare.check_name(adapter_name), config, targets=targets)
    if targets is not None:
        _warn_if_targets_differ(model, adapter_name, made)
    return model


def _targets_of(state_dict: Any, prefix: str) -> str:
    """A pattern for exactly the modules that have tensors of the method in the state dict."""
    found = dict.fromkeys(key.rsplit(f".{prefix}", 1)[0] for key in state_dict if f".{prefix}" in key)
    names = [name.removeprefix("base_model.model.") for name in found]
    if not names:
        raise ValueError(f"the state_dict names no module to adapt: none of its keys has '.{prefix}' in it")
    return "|".join(re.escape(name) for name in names)


def _warn_if_targets_differ(model: Any, name: str, made: MadeAdapter) -> None:
    """Say where the modules from a state dict are not those that the config names."""
    import json

    from .._core import AdapterRegistry
    from .torch_tree import describe

    attached = attachment(model)
    adapted = set(attached.registry.adapted_modules(name))
    checker = AdapterRegistry()
    modules = attached.host.named_modules(model)
    checker.bind(describe(modules, False).rows, attached.host.output_embedding(model, modules))
    try:
        checker.add(name, json.dumps({**json.loads(made.text), "bias": "none"}))
        meant = set(checker.adapted_modules(name))
    except ValueError:  # the config's targets match nothing
        meant = set()
    text = ""
    if meant - adapted:
        text += f"The PEFT config contained these additional target modules: {sorted(meant - adapted)}. "
    if adapted - meant:
        text += f"The state_dict contained these additional target modules: {sorted(adapted - meant)}. "
    if text:
        warnings.warn(
            "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
            f"state_dict. This is not necessarily an issue and can be ignored if this was the intent. {text}",
            RuntimeWarning,
            stacklevel=5,
        )
