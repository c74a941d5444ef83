"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _core
from .optimizer import Optimizer


class SGD(Optimizer):
    """Gradient descent with momentum, as `torch.optim.SGD` computes it.

    Args:
        params: the parameters, or dicts with "params" and options of a group.
        lr: learning rate, ≥ 0.
        momentum: share of the last step that is taken again, ≥ 0.
        dampening: share of the gradient that momentum leaves out.
        weight_decay: times the parameter is added to its gradient, ≥ 0.
        nesterov: look ahead by the momentum; needs momentum > 0 and dampening 0.
        maximize: go up instead of down.

    Raises:
        ValueError: an option outside its range, or no parameters.
        TypeError: something that is no Parameter.
    """

    _arrays = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["momentum"] >= 0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}; it is at least 0")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _step_group(self, group: dict[str, Any]) -> None:
        items = []
        momentum = group["momentum"] != 0
        for parameter in self._with_state(group["params"]):
            state = self.state[parameter]
            buffer = state["momentum_buffer"] if momentum else None
            first = not state.get("started", False)
            state["step"] = int(state["step"]) + 1
            state["started"] = state.get("started", False) or momentum
            items.append((parameter, buffer, None, first))
        _core.sgd_step(
            items,
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
        )
