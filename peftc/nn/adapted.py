"""Names and parameters of a module whose model has adapters: what PEFT would call them.

The registry knows the adapters' tensors and their names in the model; here they are put beside the base parameters,
whose names change where an adapter wraps the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from .._core import AdapterRegistry, Parameter

if TYPE_CHECKING:
    from .module import Module


class AdapterParameter(Parameter):
    """A tensor of an adapter, a view of the adapter's memory.

    Attributes:
        requires_grad: whether it is to be trained: the tensor is one that is, and its adapter is trainable and active.
            It cannot be set; `set_adapter` and the like decide. `disable_adapters` makes it false; what is set, added
            or loaded for training after that has it true, although it has no effect before `enable_adapters`.
        adapter: the adapter's name.
        name: its name in the model.
    """

    __slots__ = ("_learns", "_registry", "adapter", "name")

    _registry: AdapterRegistry
    _learns: bool
    adapter: str
    name: str

    @property
    def requires_grad(self) -> bool:
        registry = self._registry
        return (
            self._learns
            and self.adapter in registry.active()
            and self.adapter in registry
            and registry.trainable(self.adapter)
        )

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        raise AttributeError(
            f"requires_grad of a tensor of adapter {self.adapter!r} follows from the adapter: it is true while the adapter is "
            "trainable and active (set_adapter, enable_adapters, load_adapter(is_trainable=True))"
        )


# An optimizer that holds a parameter finds the same object again; nothing here keeps a deleted adapter's memory.
_parameters: WeakKeyDictionary[AdapterRegistry, WeakValueDictionary[str, AdapterParameter]] = WeakKeyDictionary()


def _parameter(registry: AdapterRegistry, adapter: str, name: str, array: Any, learns: bool) -> AdapterParameter:
    known = _parameters.setdefault(registry, WeakValueDictionary())
    found = known.get(name)
    if found is not None and found.adapter == adapter and _address(found._raw) == _address(array):
        return found
    made = AdapterParameter(array)
    made._attach(registry, adapter)
    made._registry, made.adapter, made._learns, made.name = registry, adapter, learns, name
    known[name] = made
    return made


def _address(array: Any) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


#: An adapter's copies of base parameters, by what follows the module's name.
_STAND_INS = frozenset({"bias", "base_layer.bias", "base_layer.weight"})


class _Naming:
    """How a model's adapters rename its base parameters, and which tensors they bring to which module."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.wrapped: set[str] = set()  # modules whose own parameters are under .base_layer
        self.replaced: set[str] = set()  # modules whose whole subtree is under .original_module
        self.added: dict[str, list[tuple[str, str, Any, bool]]] = {}  # module → (name, adapter, array, learns)
        active = set(registry.active()) if registry.enabled else set()
        for adapter in registry.names():
            self.wrapped.update(registry.adapted_modules(adapter))
            marker = f".modules_to_save.{adapter}."
            for _, name, array, _, learns, module in registry.tensors(adapter):
                before, found, _ = name.partition(marker)
                if found:
                    self.replaced.add(before)
                elif name.endswith((".bias", ".weight")) and name.removeprefix(f"{module}.") in _STAND_INS:
                    if adapter not in active:
                        continue  # the base model's own stands in for it
                    module = "\0" + module
                self.added.setdefault(module, []).append((name, adapter, array, learns))

    def base_name(self, module: str, parameter: str) -> str:
        """The name of a base parameter."""
        parts = module.split(".") if module else []
        for end in range(len(parts), 0, -1):
            path = ".".join(parts[:end])
            if path in self.replaced:
                return ".".join([path, "original_module", *parts[end:], parameter])
        if module in self.wrapped:
            return f"{module}.base_layer.{parameter}" if module else f"base_layer.{parameter}"
        return f"{module}.{parameter}" if module else parameter


def named_parameters(root: Module, recurse: bool, state: bool = False) -> Iterator[tuple[str, Any]]:
    """(name relative to root, parameter) of the tree under root, adapters included.

    With state, tensors that are not parameters in the sense of training are included (AdaLora's ranks), too.
    """
    registry = root.registry
    if registry is None or not len(registry):
        yield from root._plain_parameters(recurse)
        return
    naming = _Naming(registry)
    top = root._bound_name or ""
    cut = len(top) + 1 if top else 0
    modules = root.named_modules(remove_duplicate=False) if recurse else [("", root)]
    for path, module in modules:
        full = ".".join(filter(None, (top, path)))
        biases = {name: row for row in naming.added.get("\0" + full, ()) for name in [row[0]]}
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = naming.base_name(full, own)
            row = biases.get(name)
            yield name[cut:], parameter if row is None else _parameter(registry, row[1], *_ordered(row))
        for row in naming.added.get(full, ()):
            yield row[0][cut:], _parameter(registry, row[1], *_ordered(row))


def _ordered(row: tuple[str, str, Any, bool]) -> tuple[str, Any, bool]:
    return row[0], row[2], row[3]


def named_tensors(root: Module) -> Iterator[tuple[str, Any]]:
    """(name, array) of the tree under root, adapters included."""
    for name, parameter in named_parameters(root, True, state=True):
        yield name, parameter.data
