"""The base model back, with or without the adapters folded into its weights."""

from collections.abc import Sequence
from typing import Any

from .torch_registry import TorchRegistry
from .torch_wrappers import place_of


def unload(
    registry: TorchRegistry, merge: Sequence[str] | None = None, safe_merge: bool = False, progressbar: bool = False
) -> Any:
    """Take all layers and wrappers out of the registry's model; no adapter is left.

    Args:
        merge: fold these into the base weights, beside what is merged already; None: nothing more.
        safe_merge: refuse a result with NaN or infinity (ValueError); the model is as it was then.
        progressbar: show one over the layers that are merged.

    Modules and biases that the active adapter replaces stay in the base's place, as in PEFT.
    """
    if merge:
        registry.merge(merge, safe_merge, progressbar)
    model = registry.model
    heads = {path: wrapper.chosen() for name in registry.names() for path, wrapper in registry.saved_of(name)}
    registry.forget_originals()
    for name in registry.names():
        registry.take_out(name)
    for path, head in heads.items():
        parent, key = place_of(model, path)
        parent._modules[key] = head
    registry.clear()
    return model
