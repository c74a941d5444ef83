"""What the optimizers share: groups of parameters, their state, and checks before a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import _core
from .._core import Parameter


class Optimizer:
    """Base class of the optimizers. A subclass has defaults, names of its state arrays and the step of one group.

    Attributes:
        param_groups: dicts with "params", a list, and the group's options ("lr", …), which may be changed at any time.
        state: parameter → dict of its state.
    """

    _arrays: tuple[str, ...] = ()  # names of the state arrays, in the order in which the core takes them

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Parameter, dict[str, Any]] = {}
        if isinstance(params, (Parameter, np.ndarray)):
            raise TypeError("params is an iterable of parameters or of dicts, got a single one")
        groups = list(params)
        if not groups:
            raise ValueError(
                "optimizer got an empty parameter list: nothing requires gradients (add an adapter, or load one with "
                "is_trainable=True)"
            )
        if not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with options of their own.

        Args:
            group: "params" and any options that differ from the optimizer's.

        Raises:
            TypeError: something that is no Parameter.
            ValueError: a parameter that another group has, or an option that cannot work.
        """
        params = group["params"]
        params = [params] if isinstance(params, Parameter) else list(params)
        for parameter in params:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"an optimizer changes Parameters, got {type(parameter).__name__}")
        known = {parameter for other in self.param_groups for parameter in other["params"]}
        if len(set(params)) != len(params) or known & set(params):
            raise ValueError("a parameter appears twice among the optimizer's parameters")
        full = {**self.defaults, **group, "params": params}
        self._check(full)
        self.param_groups.append(full)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters; with set_to_none=False they become zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad[...] = 0

    def step(self, closure: Any = None) -> Any:
        """Change every parameter that has a gradient, by its gradient.

        Args:
            closure: called first, if given; what it returns is returned.

        Raises:
            FloatingPointError: a gradient has NaN or infinity. The text names step and tensor; nothing was changed.
        """
        result = closure() if closure is not None else None
        for group in self.param_groups:
            self._check_gradients(group)
        for group in self.param_groups:
            self._step_group(group)
        return result

    # ---------------------------------------------------------------- state dicts

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on exactly as if nothing had happened: copies.

        "state" has the state by the parameter's place in the groups, "param_groups" the options with places for
        parameters.
        """
        places = {parameter: i for i, parameter in enumerate(self._all())}
        state = {
            places[parameter]: {
                name: value.copy() if isinstance(value, np.ndarray) else value for name, value in values.items()
            }
            for parameter, values in self.state.items()
        }
        groups = [
            {**group, "params": [places[parameter] for parameter in group["params"]]} for group in self.param_groups
        ]
        return {"state": dict(sorted(state.items())), "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. The parameters must be those of then, in the same order and groups.

        Raises:
            ValueError: other groups, or state of another shape; nothing is changed.
        """
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                "loaded state dict has other parameter groups: "
                f"{[len(group['params']) for group in groups]} parameters instead of "
                f"{[len(group['params']) for group in self.param_groups]}"
            )
        by_place = dict(zip((p for group in groups for p in group["params"]), self._all()))
        loaded: dict[Parameter, dict[str, Any]] = {}
        for place, values in state_dict["state"].items():
            parameter = by_place.get(place if place in by_place else _as_int(place))
            if parameter is None:
                raise ValueError(f"loaded state dict has state of parameter {place!r}, which no group has")
            for name, value in values.items():
                if name in self._arrays and np.shape(value) != parameter.shape:
                    raise ValueError(
                        f"loaded state dict: {name} of parameter {place!r} has shape {np.shape(value)}, the parameter "
                        f"{parameter.shape}"
                    )
            loaded[parameter] = dict(values)
        self.state = {}
        for group, saved in zip(self.param_groups, groups):
            group.update({name: value for name, value in saved.items() if name != "params"})
            known = [parameter for parameter in group["params"] if parameter in loaded]
            for parameter, arrays in zip(known, self._new_arrays(known)):
                values = loaded[parameter]
                for name, array in arrays.items():
                    if values.get(name) is not None:
                        array[...] = values[name]
                        values[name] = array
                self.state[parameter] = values

    # -------------------------------------------------------------------- inside

    def _all(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check(self, group: dict[str, Any]) -> None:
        """Refuse options that cannot work."""
        for name in ("lr", "weight_decay"):
            value = group[name]
            if not isinstance(value, (int, float, np.number)) or not 0 <= value < math.inf:
                raise ValueError(f"Invalid {name}: {value}; it is a finite number of at least 0")

    def _step_group(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _step_number(self) -> int:
        """The number of the step that comes, 1 for the first."""
        return 1 + max((int(values.get("step", 0)) for values in self.state.values()), default=0)

    def _check_gradients(self, group: dict[str, Any]) -> None:
        bad = _core.first_bad_gradient(group["params"])
        if bad < 0:
            return
        parameter = group["params"][bad]
        name = getattr(parameter, "name", None) or f"parameter {bad} of shape {parameter.shape}"
        raise FloatingPointError(
            f"step {self._step_number()}: the gradient of {name} is NaN or infinite. No parameter was changed; lower the "
            "learning rate, clip gradients (peftc.optim.clip_grad_norm_), or look at the data of this batch"
        )

    def _new_arrays(self, params: list[Parameter]) -> list[dict[str, np.ndarray]]:
        """Zeroed state arrays for each parameter, one block per name and dtype so that a step walks straight on."""
        if not self._arrays:
            return [{} for _ in params]
        counts: dict[Any, int] = {}
        for parameter in params:
            dtype = _state_dtype(parameter)
            counts[dtype] = counts.get(dtype, 0) + parameter.size
        blocks = {(name, dtype): np.zeros(count, dtype) for name in self._arrays for dtype, count in counts.items()}
        used: dict[Any, int] = {}
        made = []
        for parameter in params:
            dtype = _state_dtype(parameter)
            start = used.get(dtype, 0)
            used[dtype] = start + parameter.size
            made.append(
                {
                    name: blocks[name, dtype][start : start + parameter.size].reshape(parameter.shape)
                    for name in self._arrays
                }
            )
        return made

    def _with_state(self, params: list[Parameter]) -> list[Parameter]:
        """Those of `params` that have a gradient, after making the state that is missing."""
        ready = [parameter for parameter in params if parameter.grad is not None]
        fresh = [parameter for parameter in ready if parameter not in self.state]
        for parameter, arrays in zip(fresh, self._new_arrays(fresh)):
            self.state[parameter] = {"step": 0, **arrays}
        return ready

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {name}: {value}" for name, value in sorted(group.items()) if name != "params"]
        return "\n".join([*lines, ")"])


def _state_dtype(parameter: Parameter) -> Any:
    return np.float64 if parameter._dtype_name == "F64" else np.float32


def _as_int(place: Any) -> Any:
    """Places that went through JSON are text."""
    return int(place) if isinstance(place, str) and place.isdecimal() else place
