"""One batch whose rows belong to different adapters: `adapter_names=` of a forward pass or of generate()."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import torch_peft
from .torch_layers import Rows
from .torch_registry import TorchRegistry

BASE = "__base__"


@contextmanager
def rows(registry: TorchRegistry, training: bool, adapter_names: Any, num_beams: Any = None) -> Iterator[None]:
    """While this lasts, row i of a batch runs with adapter adapter_names[i], "__base__" being the base model.

    Args:
        training: is the model in training mode? That is refused.
        num_beams: of a beam search, which repeats each row of the decoder so often.

    Raises:
        ValueError: training mode, an unknown name, merged adapters, an adapter with DoRA or of IA³.
        TypeError: an adapter of AdaLora, or on an attention; adapter_names is no list, and there is a beam search.
    """
    if adapter_names is None:
        yield
        return
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    if beams > 1 and not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    names = list(adapter_names)
    _check(registry, set(names) - {BASE})
    switch = registry.switch
    if not switch.enabled:  # the base model, whatever the names
        yield
        return
    handles = _encoder_without_beams(registry.model, switch, names) if beams > 1 else []
    switch.update(rows=Rows([name for name in names for _ in range(beams)]))
    handles += _tell_pefts_layers(registry, switch)
    try:
        yield
    finally:
        switch.update(rows=None)
        for handle in handles:
            handle.remove()
        registry.follow()


def _check(registry: TorchRegistry, wanted: set[str]) -> None:
    known = set(registry.names())
    if wanted - known:
        names = ", ".join(sorted(wanted - known))
        raise ValueError(f"Trying to infer with non-existing adapter(s): {names}")
    if registry.merged():
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    for name in sorted(wanted):
        if registry.peft_type(name) == "ADALORA":
            base = type(registry.layers_of(name)[0][1].get_base_layer()).__name__
            raise TypeError(  # as it comes about in PEFT
                f"{base}.forward() got an unexpected keyword argument 'adapter_names': batches are mixed with adapters of "
                f"LoRA, and {name} is of AdaLora. Run its rows apart"
            )
        if registry.peft_type(name) != "LORA":
            raise ValueError(
                f"`adapter_names` mixes adapters of LoRA in a batch, and {name} is of {registry.peft_type(name)}: run its "
                "rows apart"
            )
        if any(layer.use_dora[name] for _, layer in registry.adapted_layers(name)):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")


def _encoder_without_beams(model: Any, switch: Any, names: list[str]) -> list[Any]:
    """The encoder of an encoder-decoder model sees each row once, before a beam search repeats them."""
    if not hasattr(model, "get_encoder") or not getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        return []
    encoder, once = model.get_encoder(), Rows(names)
    with_beams: list[Any] = []

    def before(module: Any, args: Any) -> None:
        with_beams.append(switch.rows)
        switch.rows = once

    def after(module: Any, args: Any, output: Any) -> None:
        switch.rows = with_beams.pop()

    return [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after, always_call=True)]


def _tell_pefts_layers(registry: TorchRegistry, switch: Any) -> list[Any]:
    """Layers that PEFT made take the names as an argument of each call."""
    parts = [part for part in map(registry.part, registry.names()) if part is not None]
    torch_peft.follow(parts, tuple(name for name, _ in switch.rows.groups if name != BASE))

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "adapter_names": switch.rows.names}

    wrappers = {id(wrapper): wrapper for part in parts for _, _, wrapper in part.wrappers}
    return [wrapper.register_forward_pre_hook(before, with_kwargs=True) for wrapper in wrappers.values()]
