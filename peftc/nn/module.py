"""`Module`: a tree of layers with dotted names, and the containers.

Assigning a module or a `Parameter` to an attribute makes it a child, in the order of assignment, as in torch; there is
no registration beside the attribute itself.

While adapters are attached, names of tensors are those that PEFT gives the same model (`query.base_layer.weight`,
`query.lora_A.default.weight`, `classifier.original_module.weight`); without adapters they are the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _core
from .._core import Parameter
from . import adapted
from . import tensor as _tensor  # noqa: F401  (tells the core what recorded arrays are)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Module", "ModuleDict", "ModuleList", "Parameter", "Sequential"]


class IncompatibleKeys(NamedTuple):
    """What `Module.load_state_dict` found: names that the state dict lacks, and names that the module does not know."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Module(_core.Module):
    """Base class of everything that has a forward pass. Subclasses define `forward`; calls go to it.

    Attributes:
        training: whether dropout applies; `train()` and `eval()` set it on the whole tree. True at first.
        registry: the AdapterRegistry of the model this belongs to, or None (read-only).
    """

    # ---------------------------------------------------------------- the tree

    @property
    def _parameters(self) -> dict[str, Parameter | None]:
        """This module's own parameters, by attribute name. Layers have their own version."""
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Parameter)}

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(attribute name, module) of the direct children, each module once."""
        seen = set()
        for name, value in self.__dict__.items():
            if isinstance(value, Module) and value not in seen:
                seen.add(value)
                yield name, value

    def children(self) -> Iterator[Module]:
        """The direct children."""
        for _, child in self.named_children():
            yield child

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of the whole tree, this module first under `prefix`, parents before children.

        Args:
            memo: modules to leave out; those found are added.
            prefix: goes before every name.
            remove_duplicate: list a module that sits in several places once.
        """
        if memo is None:
            memo = set()
        if remove_duplicate:
            if self in memo:
                return
            memo.add(self)
        yield prefix, self
        start = prefix + "." if prefix else ""
        for name, child in self.__dict__.items():
            if isinstance(child, Module):
                yield from child.named_modules(memo, start + name, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """Every module of the tree, this one first."""
        for _, module in self.named_modules():
            yield module

    def get_submodule(self, target: str) -> Module:
        """The module with this dotted name; "" is this one. AttributeError names the part that is not there."""
        module: Module = self
        walked = ""
        for part in target.split(".") if target else ():
            child = module.__dict__.get(part)
            if not isinstance(child, Module):
                where = walked or type(self).__name__
                raise AttributeError(f"{where} has no submodule {part!r} (looking for {target!r})")
            module = child
            walked = f"{walked}.{part}" if walked else part
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The parameter with this dotted name, as `named_parameters` lists it; AttributeError if there is none."""
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name == target:
                return parameter
        raise AttributeError(f"{type(self).__name__} has no parameter {target!r}")

    # -------------------------------------------------------------- parameters

    def _plain_parameters(self, recurse: bool = True) -> Iterator[tuple[str, Parameter]]:
        """(name without regard to adapters, parameter), once per name."""
        modules = self.named_modules(remove_duplicate=False) if recurse else (("", self),)
        for path, module in modules:
            start = path + "." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield start + name, parameter

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """(dotted name, parameter) of the tree: each module's own, then its adapters', then its children's.

        An adapter's parameter requires gradients while its adapter is trainable, active and enabled; that is not a
        setting of its own.

        Args:
            prefix: goes before every name.
            recurse: False for this module's own parameters alone.
            remove_duplicate: list a parameter that sits in several places once.
        """
        start = prefix + "." if prefix else ""
        seen: set[Parameter] = set()
        for name, parameter in adapted.named_parameters(self, recurse):
            if remove_duplicate:
                if parameter in seen:
                    continue
                seen.add(parameter)
            yield start + name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters of the tree, each once."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of elements of all parameters, or of those that require gradients; shared ones count once."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not only_trainable)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set requires_grad of every base parameter. Those of adapters follow from what is active."""
        for _, parameter in self._plain_parameters():
            parameter.requires_grad = requires_grad
        return self

    def backward(self, gradient: Any, output: Any = None) -> None:
        """Send the gradient of a loss back through the last call of this module, made in train mode.

        Every parameter that requires gradients and had a part in the result gets its gradient added to `.grad`. What the
        forward pass saved is given back, so that each call can be gone through once. After an exception from below (out
        of memory), gradients may have been added in part: call `zero_grad()`.

        Args:
            gradient: of the loss with respect to a result of the call, as the losses of `peftc.nn.functional` give it,
                or any array of the result's shape. A tuple when the loss depends on several results.
            output: that result (a tuple likewise), where `gradient` does not come from a loss of peftc and the call gave
                several of its shape or was not the last.

        Raises:
            RuntimeError: there was no call, it was in eval mode, nothing in it is trainable, or its gradient was taken
                already.
            ValueError: `gradient` has a shape that no result has, or that several have.
            FloatingPointError: `gradient` has NaN or infinity; nothing is changed.
        """
        if not isinstance(gradient, tuple):
            _core.backward((_start(self, gradient, output),), (gradient,))
            return
        outputs = output if isinstance(output, tuple) else (output,) * len(gradient)
        if len(outputs) != len(gradient):
            raise ValueError(f"{type(self).__name__}.backward: {len(gradient)} gradients for {len(outputs)} results")
        starts = tuple(_start(self, one, of) for one, of in zip(gradient, outputs))
        _core.backward(starts, gradient)

    def zero_grad(self) -> None:
        """Forget every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def apply(self, fn: Callable[[Module], None]) -> Self:
        """Call fn on every module of the tree, children before parents."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Turn dropout on (or off) in the whole tree."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Turn dropout off in the whole tree."""
        return self.train(False)

    def to(self, dtype: Any) -> Self:
        """Store every base parameter in another float dtype ("float32", "float64", "float16", "bfloat16"), in place.

        Adapters keep theirs.
        """
        for _, parameter in self._plain_parameters():
            parameter._convert(dtype)
        return self

    def float(self) -> Self:
        """to("float32")"""
        return self.to("float32")

    def double(self) -> Self:
        """to("float64")"""
        return self.to("float64")

    def half(self) -> Self:
        """to("float16")"""
        return self.to("float16")

    def bfloat16(self) -> Self:
        """to("bfloat16")"""
        return self.to("bfloat16")

    # -------------------------------------------------------------- state dicts

    def state_dict(self, prefix: str = "") -> dict[str, np.ndarray]:
        """name → array of everything that the module computes with, in the order of `named_parameters`.

        The arrays share memory with the module. bfloat16 weights need ml_dtypes to be shown as arrays; without it
        they raise TypeError.
        """
        return {prefix + name: array for name, array in adapted.named_tensors(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Copy values from a state dict, converting to each parameter's dtype.

        Weights that are mapped read-only from a file get memory of their own. Either all values are taken or, when it
        raises, none.

        Args:
            state_dict: name → array, under the names of `state_dict()`.
            strict: whether names that are missing or unexpected are an error.

        Raises:
            RuntimeError: names (when strict) or shapes do not fit; the text lists every one.
            TypeError: not a mapping, or a value that is not a float array.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state_dict is a mapping of name → array, got {type(state_dict).__name__}")
        targets = dict(adapted.named_parameters(self, True, state=True))
        missing = [name for name in targets if name not in state_dict]
        unexpected = [name for name in state_dict if name not in targets]
        problems = []
        if strict and unexpected:
            problems.append("Unexpected key(s) in state_dict: " + ", ".join(f'"{name}"' for name in unexpected) + ". ")
        if strict and missing:
            problems.append("Missing key(s) in state_dict: " + ", ".join(f'"{name}"' for name in missing) + ". ")
        values = {}
        for name, target in targets.items():
            if name not in state_dict:
                continue
            value = state_dict[name]
            shape = tuple(np.shape(value))
            if shape != target.shape:
                problems.append(
                    f"size mismatch for {name}: copying a param with shape {shape} from checkpoint, the shape in current "
                    f"model is {target.shape}."
                )
                continue
            values[name] = value if isinstance(value, Parameter) else Parameter(value)
        if problems:
            listed = "\n\t".join(problems)
            raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t{listed}")
        for name, value in values.items():
            targets[name]._copy_from(value)
        return IncompatibleKeys(missing, unexpected)

    # --------------------------------------------------- copying and pickling

    def __getstate__(self) -> dict[str, Any]:
        registry = self.registry
        if registry is not None and len(registry):
            raise TypeError(
                f"a {type(self).__name__} with adapters attached ({', '.join(registry.names())}) cannot be copied or "
                "pickled: write them with save_adapter and delete them, then load them into the copy"
            )
        attributes = {name: value for name, value in self.__dict__.items() if name != "_peftc_attachment"}
        return {"attributes": attributes, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state["attributes"])
        self.training = state["training"]

    # ------------------------------------------------------------------ showing

    def extra_repr(self) -> str:
        """What the module's line shows between its parentheses."""
        return ""

    def __repr__(self) -> str:
        extra = self.extra_repr()
        children = [f"({name}): " + repr(child).replace("\n", "\n  ") for name, child in self._repr_children()]
        name = type(self).__name__
        if not children:
            return f"{name}({extra})"
        lines = ([extra] if extra else []) + children
        return f"{name}(\n  " + "\n  ".join(lines) + "\n)"

    def _repr_children(self) -> Iterable[tuple[str, Module]]:
        return ((name, child) for name, child in self.__dict__.items() if isinstance(child, Module))


def _start(module: Module, gradient: Any, output: Any) -> Any:
    """The node that a gradient belongs to."""
    name = type(module).__name__
    if output is not None:
        node = getattr(output, "_node", None)
        if node is None:
            raise RuntimeError(
                f"{name}.backward: output was not computed in train mode from anything that is trainable"
            )
        return node
    node = getattr(gradient, "_node", None)
    if node is not None:
        return node
    nodes = module._outputs
    if isinstance(nodes, int):
        raise RuntimeError(f"{name}.backward without a forward pass: call the model first")
    if nodes is None:
        raise RuntimeError(
            f"{name}.backward after a call in eval mode (or under no_grad), which saves nothing: call {name}.train() before "
            "the forward pass"
        )
    if not nodes:
        raise RuntimeError(
            f"{name}.backward: nothing in the last call is trainable; add an adapter, load one with is_trainable=True, or "
            "set requires_grad of parameters"
        )
    shape = np.shape(gradient)
    fitting = [candidate for candidate in nodes if candidate.shape == shape]
    if not fitting:
        shapes = ", ".join(str(candidate.shape) for candidate in nodes)
        raise ValueError(f"{name}.backward: the gradient has shape {shape}, and the results of the last call {shapes}")
    if len(fitting) > 1:
        raise ValueError(
            f"{name}.backward: {len(fitting)} results of the last call have the shape {shape}; say which one the gradient "
            "belongs to: backward(gradient, output)"
        )
    return fitting[0]


class _Indexed(Module):
    """Children named "0", "1", …."""

    def _index(self, index: int) -> str:
        position = index.__index__()
        count = len(self)
        if not -count <= position < count:
            raise IndexError(f"index {position} is out of range for a {type(self).__name__} of {count} modules")
        return str(position % count)

    def _modules(self) -> list[Module]:
        return [value for value in self.__dict__.values() if isinstance(value, Module)]

    def append(self, module: Module) -> Self:
        """Add a module at the end; returns the container."""
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__} holds modules, got {type(module).__name__}")
        setattr(self, str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add several modules at the end; returns the container."""
        for module in modules:
            self.append(module)
        return self

    def __len__(self) -> int:
        return len(self._modules())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules())

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            picked = self._modules()[index]
            return Sequential(*picked) if isinstance(self, Sequential) else ModuleList(picked)
        return self.__dict__[self._index(index)]

    def __setitem__(self, index: int, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__} holds modules, got {type(module).__name__}")
        setattr(self, self._index(index), module)


class ModuleList(_Indexed):
    """A list of modules that are children under their index; it has no forward pass of its own."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)


class Sequential(_Indexed):
    """Modules called one after the other, each with the result of the one before."""

    def __init__(self, *modules: Module) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                setattr(self, name, module)
        else:
            self.extend(modules)

    def _index(self, index: int) -> str:
        names = [name for name, value in self.__dict__.items() if isinstance(value, Module)]
        try:
            return names[index]
        except IndexError:
            raise IndexError(f"index {index} is out of range for a Sequential of {len(names)} modules") from None

    def forward(self, x: Any) -> Any:
        for module in self._modules():
            x = module(x)
        return x


class ModuleDict(Module):
    """Modules under names of one's own; it has no forward pass of its own."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        self.update(modules or {})

    def update(self, modules: Mapping[str, Module]) -> None:
        """Add or replace several."""
        for name, module in modules.items():
            self[name] = module

    def __setitem__(self, name: str, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"a ModuleDict holds modules, got {type(module).__name__}")
        if not isinstance(name, str) or not name or "." in name or hasattr(type(self), name):
            raise KeyError(f"{name!r} cannot name a module: it must be a non-empty str without dots that is no method")
        setattr(self, name, module)

    def __getitem__(self, name: str) -> Module:
        module = self.__dict__.get(name)
        if not isinstance(module, Module):
            raise KeyError(name)
        return module

    def __delitem__(self, name: str) -> None:
        self[name]
        delattr(self, name)

    def __len__(self) -> int:
        return len(self.keys())

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def keys(self) -> list[str]:
        """The names, in order."""
        return [name for name, value in self.__dict__.items() if isinstance(value, Module)]

    def values(self) -> list[Module]:
        """The modules, in order."""
        return [self[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Module]]:
        """(name, module), in order."""
        return [(name, self[name]) for name in self.keys()]
