"""torch modules by the hundred: stamped from templates, without constructors, and without what stays empty.

A module keeps a dozen registries (of hooks, mostly) that are empty in nearly every adapter's modules.  The classes here
get each of them when something first asks for it; making a module is several times cheaper for that.
"""

from typing import Any

import torch
from torch import nn

from .. import _core

#: attribute → type, of a module's registries; children, parameters and buffers are not among them
_REGISTRIES: dict[str, Any] = {
    name: type(value)
    for name, value in nn.Module().__dict__.items()
    if isinstance(value, (dict, set)) and name not in ("_modules", "_parameters", "_buffers")
}


class _OnDemand:
    """A registry that is made when it is first looked at."""

    def __init__(self, name: str, make: Any) -> None:
        self._name, self._make = name, make
        self._none = make()

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        if torch.compiler.is_compiling():  # a graph has no room for a change of the module; it only reads
            return self._none
        return module.__dict__.setdefault(self._name, self._make())


def registries_on_demand(cls: Any) -> Any:
    """Class decorator: modules that are stamped from a template of this class lack empty registries."""
    for name, make in _REGISTRIES.items():
        setattr(cls, name, _OnDemand(name, make))
    return cls


class _Extent:
    """An extent of a factor, which is its weight's."""

    def __init__(self, axis: int) -> None:
        self._axis = axis

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        weight = module._parameters.get("weight")
        if weight is None:  # FSDP takes the parameter away, and puts a tensor in its place for calls
            weight = module.__dict__.get("weight")
        if weight is None:
            raise AttributeError("the extents of a factor are its weight's, which it lacks")
        return weight.shape[self._axis]


@registries_on_demand
class Linear(nn.Linear):
    """A factor of an adapter. All of them are made from one template: extents are the weight's."""

    in_features, out_features = _Extent(1), _Extent(0)


@registries_on_demand
class ModuleDict(nn.ModuleDict):
    """adapter name → module"""


@registries_on_demand
class ParameterDict(nn.ParameterDict):
    """adapter name → parameter"""


_TEMPLATES: dict[Any, nn.Module] = {}


def template(key: Any, make: Any) -> nn.Module:
    """The template called `key`: what `make()` gives, which is asked once."""
    found = _TEMPLATES.get(key)
    if found is None:
        with torch.device("meta"):
            found = make()
        for name in _REGISTRIES:
            if isinstance(getattr(type(found), name, None), _OnDemand) and not found.__dict__.get(name):
                found.__dict__.pop(name, None)
        _TEMPLATES[key] = found
    return found


def stamp(key: Any, make: Any) -> Any:
    """A new module like the template; far cheaper than a constructor, and without initial values."""
    return _core.module_like(template(key, make))


def empty(kind: Any, training: bool) -> nn.Module:
    """A template of an empty ModuleDict or ParameterDict."""
    return template((kind, training), lambda: kind().train(training))


def linears(parameters: list[nn.Parameter], training: list[bool]) -> list[Any]:
    """A Linear without bias over each parameter (out, in)."""
    by_mode = {mode: _linear(mode) for mode in set(training)}
    made = _core.modules_like([by_mode[mode] for mode in training])
    _core.put_items(made, ((("_parameters",), "weight", parameters),))
    return made


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> Any:
    """A Linear over a weight (out, in) and a bias (out,)."""
    made = _core.module_like(_linear(training))
    made._parameters.update(weight=weight, bias=bias)
    return made


def _linear(training: bool) -> nn.Module:
    return _TEMPLATES.get((Linear, training)) or template((Linear, training), lambda: _bare_linear().train(training))


def _bare_linear() -> Linear:
    made = Linear(1, 1, bias=False)
    del made.__dict__["in_features"], made.__dict__["out_features"]
    return made


def module_dict() -> nn.ModuleDict:
    made: nn.ModuleDict = stamp((ModuleDict, True), ModuleDict)
    return made


def parameter_dict() -> nn.ParameterDict:
    made: nn.ParameterDict = stamp((ParameterDict, True), ParameterDict)
    return made


def put_parameter(container: nn.ParameterDict, name: str, parameter: nn.Parameter) -> None:
    container._keys[name] = None
    container._parameters[name] = parameter


def puts_of(field: str, name: str, parameters: list[nn.Parameter]) -> tuple[Any, ...]:
    """What `_core.put_items` is to do for a `put_parameter` on the ParameterDict called `field` of each layer."""
    return (("_modules", field, "_keys"), name, None), (("_modules", field, "_parameters"), name, parameters)


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    """The tensor, which nobody else has, as a Parameter."""
    made: nn.Parameter = parameters([tensor])[0]
    return made


def parameters(tensors: list[torch.Tensor]) -> list[Any]:
    """These tensors, which nobody else has, as Parameters."""
    for tensor in tensors:
        tensor.__class__ = nn.Parameter  # as torch's own UninitializedParameter does; a copy would cost five times that
    return tensors
