"""`train`: the whole of training an adapter on NumPy in one call, and `evaluate`.

Everything that a step depends on follows from the seed and the step's number: which rows it sees and what dropout drops.
So a run that goes on from a checkpoint ends with the same bits as one that was never stopped.
"""

from __future__ import annotations

import math
import operator
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from ._random import _mix

#: Rows are sorted by length within so many batches, so that little is spent on padding.
BATCHES_SORTED_TOGETHER = 16

Loss = Callable[[Any, Any], tuple[float, Any]]


@dataclass
class TrainingResult:
    """What a training was like. In a notebook it shows its losses as a chart."""

    #: optimizer steps done, over all runs that belong together
    steps: int = 0
    #: of each step, AdaLora's regularisation included
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    #: {"step", "loss", "accuracy"} each
    evaluations: list[dict[str, float]] = field(default_factory=list)
    #: the best of them, whose weights the model has now; None without evaluations or with restore_best=False
    best: dict[str, float] | None = None
    stopped_early: bool = False
    #: of this run
    seconds: float = 0.0
    #: the step that this run went on from
    resumed_at: int = 0

    def _repr_svg_(self) -> str:
        from ._chart import loss_chart

        return loss_chart(self.losses, self.evaluations)


def default_loss(output: Any, labels: np.ndarray) -> tuple[float, Any]:
    """Cross entropy of the logits for integer labels, the squared error for others."""
    from .nn import functional as F

    logits = getattr(output, "logits", output)
    if np.issubdtype(labels.dtype, np.integer):
        return F.cross_entropy(logits, labels)
    if logits.size != labels.size:
        raise ValueError(
            f"labels of {labels.dtype} and shape {labels.shape} are values, of which the model gives {logits.shape}; "
            "classes are integers"
        )
    return F.mse_loss(logits.reshape(labels.shape), labels)


def evaluate(
    model: Any, data: Mapping[str, Any], *, batch_size: int = 64, loss: Loss | None = None
) -> dict[str, float]:
    """The mean loss over all rows, and for integer labels the share of rows that the model gets right.

    Args:
        model: of the NumPy host; it is in eval mode while this runs.
        data, loss: as for `train`.

    Returns:
        {"loss": …, "accuracy": …}; accuracy is NaN where labels are no classes.
    """
    _check_counts(batch_size=batch_size)
    arrays, labels = _checked(model, data)
    loss = loss or default_loss
    was_training = model.training
    model.eval()
    total, weights, right, counted = 0.0, 0, 0, 0
    try:
        lengths = _lengths(arrays)
        order = np.arange(len(labels)) if lengths is None else np.argsort(lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            output = model(**_batch(arrays, rows))
            weight = _weight(labels[rows], loss)
            if weight:
                total += loss(output, labels[rows])[0] * weight
                weights += weight
            logits = np.asarray(getattr(output, "logits", output))
            if np.issubdtype(labels.dtype, np.integer) and logits.shape[:-1] == labels[rows].shape:
                valid = labels[rows] >= 0
                right += int((logits.argmax(-1) == labels[rows])[valid].sum())
                counted += int(valid.sum())
    finally:
        model.train(was_training)
    return {"loss": total / weights if weights else math.nan, "accuracy": right / counted if counted else math.nan}


def train(
    model: Any,
    data: Mapping[str, Any],
    *,
    epochs: float = 3,
    max_steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    schedule: str = "linear",
    warmup: float = 0.1,
    max_grad_norm: float | None = 1.0,
    loss: Loss | None = None,
    optimizer: Callable[[list[Any]], Any] | None = None,
    eval_data: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    best_by: str = "loss",
    patience: int | None = None,
    restore_best: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool = True,
    seed: int = 0,
    group_by_length: bool = True,
    progress: bool | str = True,
) -> TrainingResult:
    """Train what requires gradients in a model of the NumPy host: the active adapter, usually.

        model.add_adapter(peftc.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier"]))
        peftc.train(model, {**tokenizer(texts), "labels": labels}, epochs=3)
        model.save_adapter("my-adapter")

    Args:
        model: see above. It is in train mode while this runs, and afterwards in the mode that it was in.
        data: name → array with one row per example. "labels" go to the loss, everything else to the model by name. With an
            "attention_mask" batches are cut to their longest row. Labels that are True or False are the classes 1 and 0.
        epochs: passes over the data; max_steps: optimizer steps instead. 0 does nothing.
        batch_size: rows of a step; accumulate: the number of parts that they are computed in, to save memory. The result is
            that of the whole batch, but for rounding and for what dropout draws.
        lr: the highest learning rate; schedule: "linear" or "cosine" down to 0, or "constant"; warmup: steps up to lr, or
            below 1 their share.
        max_grad_norm: gradients together are scaled down to this norm; None: they are not.
        loss: (model's output, labels of the rows) → (loss, its gradient), as the losses of `peftc.nn.functional` return it,
            a mean over rows. None: cross entropy of the logits for integer labels, else the squared error.
        optimizer: parameters → an optimizer of `peftc.optim`; None: AdamW with lr and weight_decay. Its own learning rates
            follow the schedule.
        eval_data: looked at every eval_every steps (None: after every epoch) and at the end.
        best_by: "loss" or "accuracy": what makes an evaluation the best one. At the end the model gets the weights of then
            (restore_best). patience: stop after so many evaluations without a better one.
        checkpoint: a folder for checkpoints: one every checkpoint_every steps (None: after every epoch) and at the end, of
            which the last `keep` stay. Each is a folder `step-…` with the adapter as PEFT has it, and what training needs to
            go on. It takes its name when it is whole: a run that is killed leaves the last one whole. With resume=True a run
            with the same settings, adapter, data and base model goes on from the last checkpoint, to exactly the same
            result; resume=False begins anew, and replaces what is there. What is evaluated, saved and shown, accumulate
            and the loss function may change.
        seed: of the order of rows and of dropout. Other threads may train and draw meanwhile: this training has its own draws.
        group_by_length: put rows of like length into one batch, which saves padding.
        progress: show a bar; a text is shown in front of it.

    Of an AdaLora adapter in training the importance and the budget are seen to (`update_and_allocate`), and its
    regularisation is part of the loss.

    Raises:
        TypeError: a model of another host, data that is no mapping, or labels that are no numbers.
        ValueError: nothing to train, arguments that cannot work, or a checkpoint of a training with other settings.
        FloatingPointError: the loss or a gradient is not finite. The text has the step and the tensor; weights are as after
            the last good step.
        OSError: a checkpoint cannot be written or read.
    """
    from . import optim
    from ._checkpoints import Checkpoints, adapter_settings, frozen_digest, optimizer_settings

    arrays, labels = _checked(model, data)
    seed = operator.index(seed)
    _check_counts(
        batch_size=batch_size,
        accumulate=accumulate,
        keep=keep,
        eval_every=eval_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
    )
    for name, number in {"epochs": epochs, "max_steps": max_steps, "warmup": warmup}.items():
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}; it must be a number of at least 0")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be more than 0, or None")
    if best_by not in ("loss", "accuracy"):
        raise ValueError(f"best_by is {best_by!r}; it is 'loss' or 'accuracy'")
    if eval_data is not None:
        _, eval_labels = _checked(model, eval_data, "eval_data")
        if best_by == "accuracy" and not np.issubdtype(eval_labels.dtype, np.integer):
            raise ValueError(f"best_by is 'accuracy', but labels of {eval_labels.dtype} are no classes; use 'loss'")
    elif patience is not None or eval_every is not None:
        raise ValueError("patience and eval_every need eval_data")
    per_epoch = math.ceil(len(labels) / batch_size)
    total = math.ceil(epochs * per_epoch if max_steps is None else max_steps)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "nothing in the model requires gradients: add an adapter with add_adapter, or load one with is_trainable=True"
        )
    if optimizer is None:
        steps = optim.AdamW(list(parameters.values()), lr=lr, weight_decay=weight_decay)
    else:
        steps = optimizer(list(parameters.values()))
    scheduler = _scheduler(schedule, steps, warmup, total)
    loss = loss or default_loss
    budget = _Budget.of(model, total)
    result = TrainingResult()
    best = _Best(best_by)
    lengths = _lengths(arrays) if group_by_length else None

    store = None
    if checkpoint is not None:
        settings = {
            **adapter_settings(model),
            "total": total,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "warmup": warmup,
            "max_grad_norm": max_grad_norm,
            "optimizer": type(steps).__name__,
            **optimizer_settings(steps),
            "seed": seed,
            "group_by_length": group_by_length,
            "parameters": sorted(parameters),
            "data": _digest({**arrays, "labels": labels}),
            "base model": frozen_digest(model, parameters),
        }
        store = Checkpoints(checkpoint, keep, settings)
        if resume:
            store.restore(model, parameters, steps, result, best, budget.adapter is not None)
            scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": result.steps})
            # More patience than then goes on.
            result.stopped_early &= patience is not None and best.misses >= patience

    from tqdm import tqdm

    begun = time.perf_counter()
    result.resumed_at = result.steps
    was_training = model.training
    model.train()
    bar = tqdm(
        total=total,
        initial=result.steps,
        unit="step",
        disable=progress is False,
        desc=progress if isinstance(progress, str) else None,
        dynamic_ncols=True,
    )
    order: np.ndarray | None = None
    try:
        while result.steps < total and not result.stopped_early:
            step = result.steps
            if order is None or step % per_epoch == 0:
                order = _order(seed, step // per_epoch, len(labels), batch_size, lengths)
            rows = order[step % per_epoch * batch_size :][:batch_size]
            _core.thread_seed(_mix(_mix(seed & 0xFFFFFFFFFFFFFFFF) ^ step))
            value = _gradients(model, arrays, labels, rows, accumulate, loss, step) + budget.regularisation()
            _check_gradients(parameters, step)
            if max_grad_norm is not None:
                optim.clip_grad_norm_(parameters.values(), max_grad_norm)
            rate = scheduler.get_last_lr()[0]
            steps.step()
            budget.allocate(step)
            model.zero_grad()
            scheduler.step()
            result.steps += 1
            result.losses.append(value)
            result.learning_rates.append(rate)
            bar.update()
            shown = {"loss": f"{np.mean(result.losses[-10:]):.3f}"}
            ends = result.steps == total
            if eval_data is not None and (ends or result.steps % (eval_every or per_epoch) == 0):
                found = {"step": result.steps, **evaluate(model, eval_data, loss=loss)}
                model.train()
                result.evaluations.append(found)
                if best.better(found):
                    best.take(found, parameters, budget.state())
                result.stopped_early = not ends and patience is not None and best.misses >= patience
            if result.evaluations:
                shown |= {
                    f"eval {k}": f"{v:.3f}"
                    for k, v in result.evaluations[-1].items()
                    if k != "step" and not math.isnan(v)
                }
            bar.set_postfix(shown, refresh=False)
            if store is not None and (
                ends or result.stopped_early or result.steps % (checkpoint_every or per_epoch) == 0
            ):
                store.write(model, parameters, steps, result, best)
    finally:
        bar.close()
        model.zero_grad()
        model.train(was_training)
        _core.thread_seed(None)
    if restore_best and best.found is not None:
        best.give_back(parameters)
        if budget.adapter is not None and best.adalora:
            model.load_adalora_state_dict(best.adalora)
        result.best = best.found
    result.seconds = time.perf_counter() - begun
    return result


# ----------------------------------------------------------------------- a step


def _gradients(
    model: Any, arrays: dict[str, Any], labels: Any, rows: Any, accumulate: int, loss: Loss, step: int
) -> float:
    """Add the gradients of the mean loss over `rows` to the parameters', in parts; returns that loss."""
    total, whole = 0.0, _weight(labels[rows], loss)
    for part in np.array_split(rows, accumulate):
        weight = _weight(labels[part], loss)
        if not weight and (whole or not len(part)):
            continue
        value, gradient = loss(model(**_batch(arrays, part)), labels[part])
        share = weight / whole if whole else 1
        total += value * share
        if not math.isfinite(value):
            raise FloatingPointError(
                f"step {step + 1}: the loss is {value}. Weights are as after step {step}; lower the learning rate, or look "
                f"at rows {part[:8].tolist()}… of the data"
            )
        try:
            model.backward(gradient if share == 1 else gradient * gradient.dtype.type(share))
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step + 1}: {error} Weights are as after step {step}.") from error
    return total


def _weight(labels: np.ndarray, loss: Loss) -> int:
    """What a mean over these rows counts as in the mean over more: cross entropy leaves out labels of -100."""
    if loss is default_loss and np.issubdtype(labels.dtype, np.integer):
        return int((labels != -100).sum())
    return len(labels)


def _check_gradients(parameters: dict[str, Any], step: int) -> None:
    """Before they are clipped, which would spread what is not a number to all of them."""
    bad = _core.first_bad_gradient(list(parameters.values()))
    if bad >= 0:
        raise FloatingPointError(
            f"step {step + 1}: the gradient of {list(parameters)[bad]} has NaN or infinity. Weights are as after step {step}; "
            "lower the learning rate, or look at the data of this step"
        )


def _scheduler(name: str, optimizer: Any, warmup: float, total: int) -> Any:
    from .optim import lr_scheduler

    known = {
        "linear": lambda n: lr_scheduler.get_linear_schedule_with_warmup(optimizer, n, total),
        "cosine": lambda n: lr_scheduler.get_cosine_schedule_with_warmup(optimizer, n, total),
        "constant": lambda n: lr_scheduler.get_constant_schedule_with_warmup(optimizer, n),
    }
    if name not in known:
        raise ValueError(f"schedule is {name!r}; known are {', '.join(known)}")
    return known[name](math.ceil(warmup * total) if warmup < 1 else int(warmup))


class _Budget:
    """AdaLora's part of a training; nothing where no such adapter is trained."""

    def __init__(self, model: Any, adapter: str | None) -> None:
        self.model, self.adapter = model, adapter
        self.weight = 0.0 if adapter is None else model.peft_config[adapter].orth_reg_weight

    @classmethod
    def of(cls, model: Any, total: int) -> _Budget:
        from ._adalora import trained_adapter

        if not getattr(model, "_hf_peft_config_loaded", False):
            return cls(model, None)
        active = [n for n in model.active_adapters() if model._attached().registry.peft_type(n) == "ADALORA"]
        if not active or model.peft_config[active[-1]].inference_mode:
            return cls(model, None)
        adapter = trained_adapter(model, model._attached().registry)
        config = model.peft_config[adapter]
        if config.total_step - config.tfinal > total:
            warnings.warn(
                f"adapter {adapter} has its final ranks at step {config.total_step - config.tfinal} (total_step - tfinal), "
                f"and the training has {total} steps",
                stacklevel=3,
            )
        return cls(model, adapter)

    def regularisation(self) -> float:
        return self.model.orthogonality_loss() if self.weight else 0.0

    def allocate(self, step: int) -> None:
        if self.adapter is not None:
            self.model.update_and_allocate(step)

    def state(self) -> dict[str, Any]:
        return {} if self.adapter is None else self.model.adalora_state_dict()


class _Best:
    """The best evaluation so far, and a copy of the weights of then."""

    def __init__(self, by: str) -> None:
        self.by = by
        self.found: dict[str, float] | None = None
        self.weights: dict[str, Any] = {}
        self.adalora: dict[str, Any] = {}
        self.misses = 0

    def better(self, found: dict[str, float]) -> bool:
        sign = 1 if self.by == "loss" else -1
        best = math.nan if self.found is None else self.found[self.by]
        # The first one counts, and any number is better than none.
        good = (
            self.found is None or sign * found[self.by] < sign * best or math.isnan(best) > math.isnan(found[self.by])
        )
        self.misses = 0 if good else self.misses + 1
        return good

    def take(self, found: dict[str, float], parameters: dict[str, Any], adalora: dict[str, Any]) -> None:
        self.found = found
        self.weights = {name: np.array(p._raw) for name, p in parameters.items()}
        self.adalora = {name: np.array(value) for name, value in adalora.items()}

    def give_back(self, parameters: dict[str, Any]) -> None:
        for name, value in self.weights.items():
            parameters[name]._raw[...] = value


# ------------------------------------------------------------------------- data


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is None:
            continue
        if not hasattr(count, "__index__"):
            raise TypeError(f"{name} is a {type(count).__name__}; it must be an integer")
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1")


def _checked(model: Any, data: Mapping[str, Any], what: str = "data") -> tuple[dict[str, Any], np.ndarray]:
    """(arrays for the model, labels)"""
    if not isinstance(model, _core.Module):
        raise TypeError(
            f"a {type(model).__module__}.{type(model).__qualname__} is no model of the NumPy host (peftc.nn, peftc.models); "
            "torch models are trained with Transformers' Trainer or a loop of your own"
        )
    if not isinstance(data, Mapping) or "labels" not in data:
        raise TypeError(f'{what} is a mapping of name -> array with "labels" and what the model takes')
    arrays = {name: np.asarray(value) for name, value in data.items()}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{what} has no rows of {name}: it is a single {array.dtype}")
    labels = arrays.pop("labels")
    if not arrays or not len(labels):
        raise ValueError(f"{what} has no rows, or nothing for the model")
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"labels are numbers of classes, or values; {what} has labels of {labels.dtype}")
    if labels.dtype == bool:
        labels = labels.astype(np.int64)
    for name, array in arrays.items():
        if len(array) != len(labels):
            raise ValueError(f"{what} has {len(labels)} labels, but {len(array)} rows of {name}")
    return arrays, labels


def _lengths(arrays: dict[str, Any]) -> np.ndarray | None:
    mask = arrays.get("attention_mask")
    return None if mask is None else np.asarray(mask).astype(bool).sum(1)


def _batch(arrays: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Some rows, without the columns that none of them needs."""
    batch = {name: array[rows] for name, array in arrays.items()}
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        used = np.flatnonzero(mask.any(0))
        width = int(used[-1]) + 1 if len(used) else 1
        batch = {
            name: array[:, :width] if array.ndim >= 2 and array.shape[1] == mask.shape[1] else array
            for name, array in batch.items()
        }
    return batch


def _order(seed: int, epoch: int, count: int, batch_size: int, lengths: np.ndarray | None) -> np.ndarray:
    """The rows of an epoch in the order of its batches: the same for the same arguments, whatever was drawn before."""
    generator = np.random.default_rng([abs(seed), epoch])
    order = generator.permutation(count)
    if lengths is None:
        return order
    chunk = batch_size * BATCHES_SORTED_TOGETHER
    for start in range(0, count, chunk):
        part = order[start : start + chunk]
        order[start : start + chunk] = part[np.argsort(lengths[part], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    last = batches.pop() if count % batch_size else order[:0]  # the short one stays last
    return np.concatenate([*(batches[i] for i in generator.permutation(len(batches))), last])


def _digest(arrays: Mapping[str, Any]) -> str:
    import zlib

    sums = (
        f"{name}:{array.shape}:{zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}"
        for name, array in arrays.items()
    )
    return " ".join(sorted(sums))
