"""peftc.train with arguments and data that are odd, and in two threads at once."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from small_models import lora, net
from test_train import SETTINGS, adapted, data, plain, same, weights

import peftc

ROWS = data()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": -1},
        {"max_steps": None, "epochs": math.nan},
        {"max_steps": None, "epochs": -1},
        {"warmup": -1},
        {"warmup": math.nan},
        {"max_grad_norm": 0},
        {"max_grad_norm": math.nan},
        {"patience": 0, "eval_data": ROWS},
        {"eval_every": 0, "eval_data": ROWS},
        {"checkpoint_every": -1},
    ],
    ids=str,
)
def test_numbers_that_cannot_work(wrong):
    name = next(name for name in wrong if name != "max_steps" or wrong[name] is not None)
    with pytest.raises(ValueError, match=f"^{name} is "):
        peftc.train(adapted(), ROWS, **{**SETTINGS, **wrong})


def test_whole_numbers_and_evaluations():
    with pytest.raises(TypeError, match="batch_size is a float; it must be an integer"):
        peftc.train(adapted(), ROWS, **{**SETTINGS, "batch_size": 2.5})
    with pytest.raises(ValueError, match="need eval_data"):
        peftc.train(adapted(), ROWS, patience=2, **SETTINGS)
    with pytest.raises(ValueError, match="batch_size is 0"):
        peftc.evaluate(adapted(), ROWS, batch_size=0)


def test_evaluation_data_is_looked_at_before_the_first_step():
    def never(output, labels):
        raise AssertionError("a step was computed")

    for wrong, kind in (({"input_ids": [[1]]}, TypeError), ({**ROWS, "labels": []}, ValueError)):
        with pytest.raises(kind, match="eval_data"):
            peftc.train(adapted(), ROWS, eval_data=wrong, loss=never, **SETTINGS)
    values = {**ROWS, "labels": ROWS["labels"].astype(np.float32)}
    with pytest.raises(ValueError, match="best_by is 'accuracy', but labels of float32 are no classes"):
        peftc.train(adapted(), ROWS, eval_data=values, best_by="accuracy", loss=never, **SETTINGS)


def test_no_steps_change_nothing():
    model = adapted()
    before = weights(model)
    assert peftc.train(model, ROWS, **{**SETTINGS, "max_steps": 0}).steps == 0
    same(before, weights(model))


def test_labels_that_are_true_or_false_are_classes():
    one, other = adapted(), adapted()
    peftc.train(one, ROWS, **SETTINGS)
    peftc.train(other, {**ROWS, "labels": (ROWS["labels"] == 1).tolist()}, **SETTINGS)
    same(weights(one), weights(other))


def test_labels_that_cannot_work():
    with pytest.raises(TypeError, match="data has labels of <U1"):
        peftc.train(adapted(), {**ROWS, "labels": ["a"] * len(ROWS["labels"])}, **SETTINGS)
    with pytest.raises(ValueError, match=r"are values, of which the model gives \(8, 2\); classes are integers"):
        peftc.train(adapted(), {**ROWS, "labels": ROWS["labels"] / 2}, **SETTINGS)
    with pytest.raises(ValueError, match="data has no rows of more: it is a single int64"):
        peftc.train(adapted(), {**ROWS, "more": 3}, **SETTINGS)


def test_an_evaluation_that_is_not_finite_is_not_the_best():
    seen = []

    def loss(output, labels):
        value, gradient = peftc.training.default_loss(output, labels)
        if type(output.logits) is np.ndarray:  # an evaluation
            seen.append(value)
            return (math.nan if len(seen) in (1, 3) else value), gradient
        return value, gradient

    result = peftc.train(adapted(), ROWS, loss=loss, eval_data=ROWS, eval_every=3, **SETTINGS)
    losses = [e["loss"] for e in result.evaluations]
    assert [math.isnan(value) for value in losses] == [True, False, True, False]
    assert result.best["loss"] == min(losses[1], losses[3])


def test_parts_of_a_batch_with_labels_that_do_not_count():
    """A mean over the labels that count is not the mean of the parts' means."""
    ids = np.random.default_rng(0).integers(0, 11, (24, 4))
    labels = ids % 3
    labels[np.random.default_rng(1).random(labels.shape) < 0.6] = -100
    labels[0] = -100
    rows = {"ids": ids, "labels": labels}
    results = []
    for accumulate in (1, 8):
        peftc.manual_seed(0)
        model = net()
        model.add_adapter(lora())
        settings = {"max_steps": 9, "batch_size": 8, "progress": False, "optimizer": plain}
        losses = peftc.train(model, rows, accumulate=accumulate, **settings).losses
        results.append((losses, weights(model), model))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][name], rtol=1e-4, atol=1e-6)
    small, large = (peftc.evaluate(results[0][2], rows, batch_size=size) for size in (1, 24))
    assert small == pytest.approx(large)
    nothing = {**rows, "labels": np.full_like(labels, -100)}
    assert all(math.isnan(value) for value in peftc.evaluate(results[0][2], nothing).values())


def test_two_threads_train_as_one_does():
    """Each training has draws of its own, and leaves the process's sequence alone."""
    options = {**SETTINGS, "max_steps": 40}
    alone = []
    for seed in (1, 2):
        model = adapted("dropout")
        result = peftc.train(model, ROWS, seed=seed, **options)
        alone.append((result.losses, weights(model)))
    models = [adapted("dropout"), adapted("dropout")]
    together = [None, None]
    start = threading.Barrier(3)

    def run(i):
        start.wait()
        together[i] = peftc.train(models[i], ROWS, seed=i + 1, **options)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        peftc.nn.functional.dropout(np.ones(10, np.float32))  # a third thread draws, too
    for thread in threads:
        thread.join()
    for (losses, found), result, model in zip(alone, together, models):
        assert result.losses == losses
        same(found, weights(model))


def test_the_draws_of_the_process_go_on_after_a_training():
    def draw():
        return peftc.nn.functional.dropout(np.ones(64, np.float32))

    model = adapted("dropout")
    peftc.manual_seed(5)
    first, second = draw(), draw()
    peftc.manual_seed(5)
    assert (draw() == first).all()
    peftc.train(model, ROWS, **SETTINGS)
    assert (draw() == second).all()
    with pytest.raises(IndexError):
        peftc.train(model, {**ROWS, "labels": ROWS["labels"] + 7}, **SETTINGS)
    peftc.manual_seed(5)
    assert (draw() == first).all()
