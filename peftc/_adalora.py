"""AdaLora's training beside the gradient step: which singular values are important, and which are left (Zhang et al. 2023).

The numbers are computed in C on arrays (`methods/adalora_budget.c`), the same for every host.  Here is what is remembered
between steps, and how the learned ranks reach the config and the files.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import _core

#: of one module, as float32 or float64 arrays: (parameter, gradient or None) of lora_A (r, in), lora_B (out, r), lora_E (r, 1)
Triplets = tuple[tuple[Any, Any], tuple[Any, Any], tuple[Any, Any]]

PARAMETERS = ("lora_A", "lora_B", "lora_E")


def trained_adapter(model: Any, registry: Any) -> str:
    """The AdaLora adapter of `model` that is being trained.

    Raises:
        ValueError: there is none.
    """
    names: list[str] = [
        name
        for name in registry.names()
        if registry.peft_type(name) == "ADALORA" and not model.peft_config[name].inference_mode
    ]
    active = [name for name in registry.active() if name in names]
    if not names:
        raise ValueError(
            "no AdaLora adapter is being trained: add one with add_adapter(AdaLoraConfig(…)), or load one with "
            "is_trainable=True"
        )
    return (active or names)[-1]


def masks_of(config: Any, adapter: str) -> dict[str, list[bool]] | None:
    """config.rank_pattern by module name: which of init_r singular values are kept. None when nothing was allocated yet.

    A plain rank in the pattern counts as that many at the front. Names may end in the adapter's, as they do in training,
    or not, as in files.
    """
    pattern = getattr(config, "rank_pattern", None)
    if not pattern:
        return None
    masks = {}
    for key, kept in pattern.items():
        module = key.removesuffix(f".{adapter}").removesuffix(".lora_E").removeprefix("base_model.model.")
        if isinstance(kept, int) and not isinstance(kept, bool):
            kept = [position < kept for position in range(config.init_r)]
        masks[module] = [bool(value) for value in np.asarray(kept).reshape(-1)]
    return masks


class RankAllocator:
    """Averages of importance and the masks of one AdaLora adapter.

    Args:
        ranks: module name → how many triplets its tensors have.
        config: the adapter's; with a rank_pattern, the tensors have those triplets that it keeps.
    """

    def __init__(self, adapter: str, ranks: Mapping[str, int], config: Any) -> None:
        for field in ("beta1", "beta2"):
            if not 0 < getattr(config, field) < 1:
                raise ValueError(
                    f"{field} of adapter {adapter} is {getattr(config, field)!r}; it must lie between 0 and 1"
                )
        self.adapter = adapter
        self.ranks = dict(ranks)
        #: has the loss had the orthogonality term, or has it been said that it has not?
        self.regularised = False
        #: module → parameter → (sensitivity, uncertainty)
        self.averages: dict[str, dict[str, tuple[Any, Any]]] = {}
        #: module → which of init_r triplets are kept; None before the first allocation
        self.masks = masks_of(config, adapter)
        #: module → which of init_r triplets its tensors have, where that is not all of them
        self.held: dict[str, list[int]] = {}
        for module, mask in (self.masks or {}).items():
            if module in self.ranks and self.ranks[module] != len(mask):
                self.held[module] = [position for position, kept in enumerate(mask) if kept]

    # ----------------------------------------------------------------- a step

    def step(self, triplets: Mapping[str, Triplets], step: int, config: Any) -> dict[str, list[bool]] | None:
        """Take in the gradients of a step. Returns module → mask of its tensors' triplets where some are to be zeroed.

        Raises:
            ValueError: no gradients; or the ranks were to be final by now and were never allocated.
        """
        end = config.total_step - config.tfinal
        if step > end:
            if self.masks is None:
                raise ValueError(
                    f"step {step} of adapter {self.adapter} comes after the ranks were to be final (total_step - tfinal = "
                    f"{end}), but none were allocated: call update_and_allocate at every step, or give the config the "
                    "rank_pattern that was found before"
                )
            return {module: self._local(module) for module in self.ranks if module in self.masks}
        self._check_regularised(config)
        if step < end:
            self._take_in(triplets, step, config)
        initial = sum(self.ranks.values())
        budget, allocate = _core.adalora_budget(
            step,
            config.tinit,
            config.tfinal,
            config.total_step,
            config.deltaT,
            initial,
            config.target_r * len(self.ranks),
        )
        if not allocate and step != end:
            return None
        local = self._allocate(triplets, budget)
        if self.masks is None:
            self.masks = {}
        for module, mask in local.items():
            whole = [False] * config.init_r
            for position, kept in zip(self.held.get(module, range(config.init_r)), mask, strict=True):
                whole[position] = kept
            self.masks[module] = whole
        if step == end:
            self.averages = {}
        return local

    def _check_regularised(self, config: Any) -> None:
        if not self.regularised and config.orth_reg_weight > 0 and config.task_type is None:
            warnings.warn(
                f"adapter {self.adapter} trains without its orthogonality term (orth_reg_weight={config.orth_reg_weight}): "
                "as in PEFT it is part of the model's own loss only if the config has a task_type. Add "
                "model.orthogonality_loss() to the loss, or set orth_reg_weight=0",
                stacklevel=4,
            )
        self.regularised = True

    def _local(self, module: str) -> list[bool]:
        """The mask as the module's tensors have triplets."""
        mask = (self.masks or {})[module]
        return [mask[position] for position in self.held[module]] if module in self.held else mask

    def _take_in(self, triplets: Mapping[str, Triplets], step: int, config: Any) -> None:
        rows, names = [], []
        for module, tensors in triplets.items():
            if module not in self.averages:
                self.averages[module] = {
                    name: (np.zeros_like(value), np.zeros_like(value))
                    for name, (value, _) in zip(PARAMETERS, tensors, strict=True)
                }
            for name, (value, grad) in zip(PARAMETERS, tensors, strict=True):
                rows.append((value, grad, *self.averages[module][name]))
                names.append(f"{module}.{name}")
        if rows and all(grad is None for _, grad, *_ in rows):
            raise ValueError(
                f"no parameter of adapter {self.adapter} has a gradient at step {step}: call update_and_allocate after "
                "the backward pass and before zero_grad"
            )
        bad = _core.adalora_update(rows, config.beta1, config.beta2)
        if bad is not None:
            warnings.warn(
                f"step {step}: the gradient of {names[bad]} is not finite, so AdaLora's averages of importance stay as "
                "they were",
                RuntimeWarning,
                stacklevel=5,
            )

    def _allocate(self, triplets: Mapping[str, Triplets], budget: int) -> dict[str, list[bool]]:
        scores = {}
        for module, ((a, _), _, _) in triplets.items():
            seen = self.averages.get(module)
            scores[module] = (
                np.zeros(len(a)) if seen is None else _core.adalora_scores(*(seen[name] for name in PARAMETERS))
            )
        least = _core.adalora_threshold(np.concatenate(list(scores.values())), budget)
        # "not at most" rather than "more than": what is not a number stays
        return {module: (~(values <= least)).tolist() for module, values in scores.items()}

    # ------------------------------------------------------ config, files, state

    def pattern(self, *, with_adapter: bool) -> dict[str, list[bool]] | None:
        """The masks as config.rank_pattern has them: with the adapter's name in training, without in files."""
        if self.masks is None:
            return None
        tail = f".lora_E.{self.adapter}" if with_adapter else ".lora_E"
        return {module + tail: list(mask) for module, mask in self.masks.items()}

    def resized(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict of the adapter with the kept triplets only; tensors that lose none are passed on as they are."""
        result = dict(state)
        for module in self.masks or ():
            if module not in self.ranks:
                continue
            mask = self._local(module)
            for name in PARAMETERS:
                tensor = result.get(f"{module}.{name}")
                if tensor is not None and not all(mask):
                    result[f"{module}.{name}"] = tensor[:, mask] if name == "lora_B" else tensor[mask]
        return result

    def state(self) -> dict[str, Any]:
        """Averages and masks as named arrays, for a checkpoint."""
        arrays: dict[str, Any] = {}
        for module, tensors in self.averages.items():
            for name, (sensitivity, uncertainty) in tensors.items():
                arrays[f"{module}.{name}.sensitivity"] = sensitivity
                arrays[f"{module}.{name}.uncertainty"] = uncertainty
        for module, mask in (self.masks or {}).items():
            arrays[f"{module}.mask"] = np.array(mask, dtype=bool)
        return arrays

    def set_state(self, arrays: Mapping[str, Any]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: an array that belongs to no module of this adapter.
        """
        averages: dict[str, dict[str, list[Any]]] = {}
        masks = {}
        for key, array in arrays.items():
            rest, _, what = key.rpartition(".")
            module, _, name = rest.rpartition(".")
            if what == "mask" and rest in self.ranks:
                masks[rest] = np.asarray(array).astype(bool).tolist()
            elif what in ("sensitivity", "uncertainty") and module in self.ranks and name in PARAMETERS:
                pair = averages.setdefault(module, {}).setdefault(name, [None, None])
                pair[what == "uncertainty"] = np.array(array)
            else:
                raise ValueError(f"{key} is not part of the training state of adapter {self.adapter}")
        self.averages = {m: {name: (pair[0], pair[1]) for name, pair in of.items()} for m, of in averages.items()}
        self.masks = masks or None


class AdaLoraCallback:
    """For Transformers' Trainer: calls `model.update_and_allocate` at every step, at the moment it has to be.

        trainer.add_callback(peftc.AdaLoraCallback())

    total_step of the config should be the number of optimizer steps that the training has.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """After the optimizer's step, before zero_grad; steps count from 0 there."""
        model.update_and_allocate(state.global_step)

    def __getattr__(self, event: str) -> Any:
        # Not a subclass of TrainerCallback: that would import transformers. The other events are nothing to us.
        if event.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(event)
