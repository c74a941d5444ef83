"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import _core
from .optimizer import Optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.

    Args:
        params: the parameters, or dicts with "params" and options of a group.
        lr: learning rate, ≥ 0.
        betas: decay rates of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second average, ≥ 0.
        weight_decay: share of lr by which parameters shrink per step, ≥ 0.
        maximize: go up instead of down.

    The averages of float16 and bfloat16 parameters are kept in float32.

    Raises:
        ValueError: an option outside its range, or no parameters.
        TypeError: something that is no Parameter.
    """

    _arrays = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}; it is at least 0 and below 1")
        if not group["eps"] >= 0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}; it is at least 0")

    def _step_group(self, group: dict[str, Any]) -> None:
        by_step: dict[int, list[Any]] = {}
        for parameter in self._with_state(group["params"]):
            state = self.state[parameter]
            state["step"] = int(state["step"]) + 1
            by_step.setdefault(state["step"], []).append((parameter, state["exp_avg"], state["exp_avg_sq"], False))
        for step, items in by_step.items():
            _core.adamw_step(
                items,
                group["lr"],
                group["betas"][0],
                group["betas"][1],
                group["eps"],
                group["weight_decay"],
                step,
                group["maximize"],
            )
