"""Adapters that peftc has no code for, on models of Transformers: its own mixin makes them, with PEFT.

A model has peftc's adapters or PEFT's.  Which of them is settled when its first adapter comes, by what that one needs;
all later calls follow.  An adapter that PEFT cannot make either leaves the model as it was.
"""

import functools
import re
from typing import Any

from torch import nn

#: What errors say that mean "peftc has no code for it", as opposed to "this cannot work".
_NO_CODE = (
    (NotImplementedError, re.compile(r"\bpeftc (has no code|can do|cannot redo)|something peftc can do")),
    (ValueError, re.compile(r"^Target module .* is not supported\. Currently")),
)


def made_by_peft(model: Any) -> bool:
    """Does the model have adapters, and are they PEFT's?"""
    return bool(model._hf_peft_config_loaded) and model._peftc_attachment is None


def choose(ours: Any, theirs: Any) -> Any:
    """A method that is `theirs` on a model with PEFT's adapters, else `ours`."""

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (theirs if made_by_peft(self) else ours)(self, *args, **kwargs)

    return method


def choose_by_config(ours: Any, theirs: Any) -> Any:
    """`choose` for a method that makes an adapter: when peftc has no code for the first one, PEFT makes it."""

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if made_by_peft(self):
            args, kwargs = _as_pefts(args, kwargs)
            return theirs(self, *args, **kwargs)
        try:
            return ours(self, *args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            if not any(isinstance(error, kind) and text.search(str(error)) for kind, text in _NO_CODE):
                raise
            refused = error
        return _instead(self, refused, theirs, args, kwargs)

    return method


def choose_delete(ours: Any, theirs: Any) -> Any:
    """`choose` for delete_adapter: without adapters the model is the base model again, whoever made them."""

    @functools.wraps(ours)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not made_by_peft(self):
            return ours(self, *args, **kwargs)
        result = theirs(self, *args, **kwargs)
        if not self._hf_peft_config_loaded:
            _take_out_wrappers(self)
        return result

    return method


def _instead(model: Any, refused: Exception, theirs: Any, args: Any, kwargs: Any) -> Any:
    from importlib.util import find_spec

    if model._hf_peft_config_loaded:
        names = ", ".join(model.peft_config)
        raise type(refused)(
            f"{refused}. PEFT has code for it, but this model has adapters of peftc ({names}), and a model has either "
            "peftc's or PEFT's: delete those first, or load this adapter into a model of its own"
        ) from refused
    if find_spec("peft") is None:
        raise type(refused)(
            f"{refused}. With the package peft installed, PEFT makes this adapter on a model of Transformers: "
            "pip install peft"
        ) from refused
    model.__dict__.pop("_peftc_attachment", None)  # empty: what it is now, PEFT decides
    before = _Tree(model)
    args, kwargs = _as_pefts(args, kwargs)
    try:
        return theirs(model, *args, **kwargs)
    except BaseException:
        before.restore()
        raise


def _as_pefts(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments with PEFT's configs in the place of peftc's, which PEFT does not take; peft_config may be a dict."""
    import peft

    from ..config import PeftConfig

    def converted(value: Any) -> Any:
        return peft.PeftConfig.from_peft_type(**value.to_dict()) if isinstance(value, PeftConfig) else value

    named = {key: converted(value) for key, value in kwargs.items()}
    if isinstance(named.get("peft_config"), dict):
        named["peft_config"] = peft.PeftConfig.from_peft_type(**named["peft_config"])
    return tuple(map(converted, args)), named


class _Tree:
    """A model's modules, parameters and flags, to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._own = dict(model.__dict__)
        self._modules = [(m, dict(m._modules), dict(m._parameters), m.training) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        for module, children, parameters, training in self._modules:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
            module.training = training
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for name in set(self._model.__dict__) - set(self._own):
            del self._model.__dict__[name]
        self._model.__dict__.update(self._own)


def _take_out_wrappers(model: nn.Module) -> None:
    """Put the base layers back where PEFT leaves its wrappers, which hold no adapter any more."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            module: Any = child
            while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            if module is not child:
                parent._modules[key] = module
