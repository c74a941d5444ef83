"""Models that are PEFT's altogether: prompt methods and others for which peftc has no class of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .torch_inject import has_adapters, made_by_peft
from .torch_peft import _Tree, check_elsewhere
from .torch_tuner import TUNERS


def goes_to_peft(model: Any, method: str, mixed: bool = False) -> bool:
    """Does PEFT make the `PeftModel` for an adapter of the method?

    Raises:
        NotImplementedError: it would, but it is not installed, or the model has adapters of peftc.
    """
    if made_by_peft(model):
        return True
    if method in TUNERS and not mixed:
        return False
    what = "mixed=True (PEFT's PeftMixedModel)" if mixed else f"a PeftModel of the method {method}"
    refused = NotImplementedError(f"peftc has no code for {what}; it has for {', '.join(TUNERS)}")
    check_elsewhere(refused)
    if has_adapters(model):
        names = ", ".join(model.peft_config)
        raise NotImplementedError(
            f"{refused}. PEFT has, but this model has adapters of peftc ({names}): delete those first, use a model of its "
            "own, or peftc.inject_adapter_in_model, which puts adapters of any method beside others"
        )
    return True


@contextmanager
def put_back_if_refused(model: Any) -> Iterator[None]:
    """What PEFT refuses leaves the model as it was."""
    model.__dict__.pop("_peftc_attachment", None)  # empty
    before = _Tree(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
