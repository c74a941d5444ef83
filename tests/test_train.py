"""peftc.train: what it learns, stopping and going on, checkpoints, and what it reports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import peftc
from peftc.models import BertForSequenceClassification, ModelConfig
from peftc.safetensors import load_file

ROWS, LENGTH, STEPS = 48, 9, 12
METHODS = {
    "lora": peftc.LoraConfig(target_modules=["query", "dense"], r=4, modules_to_save=["classifier"]),
    "dropout": peftc.LoraConfig(target_modules=["query"], r=4, lora_dropout=0.3, bias="lora_only"),
    "dora": peftc.LoraConfig(target_modules=["query", "value"], r=2, use_dora=True),
    "ia3": peftc.IA3Config(
        target_modules=["key", "intermediate.dense"], feedforward_modules=["intermediate.dense"], modules_to_save=["classifier"]
    ),
    "adalora": peftc.AdaLoraConfig(
        target_modules=["query", "value"], init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=STEPS,
        modules_to_save=["classifier"],
    ),
}  # fmt: skip


def bert(seed=0, dropout=0.1):
    peftc.manual_seed(seed)
    config = ModelConfig(
        model_type="bert",
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertForSequenceClassification(config)
    return model.eval()


def adapted(method="lora", **options):
    from copy import deepcopy

    model = bert(**options)
    model.add_adapter(deepcopy(METHODS[method]))
    return model


def data(rows=ROWS, seed=0):
    """A row's label is whether its first id is small."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 30, (rows, LENGTH))
    lengths = rng.integers(3, LENGTH + 1, rows)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    labels = (ids[:, 0] < 15).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


SETTINGS = {"max_steps": STEPS, "batch_size": 8, "lr": 1e-2, "progress": False}


def weights(model):
    return {name: np.array(p) for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name


def test_it_learns():
    model = adapted(dropout=0.0)
    before = peftc.evaluate(model, data(seed=5))
    result = peftc.train(
        model,
        data(rows=400),
        epochs=8,
        batch_size=16,
        lr=2e-2,
        eval_data=data(seed=5),
        best_by="accuracy",
        progress=False,
    )
    after = peftc.evaluate(model, data(seed=5))
    assert after["accuracy"] > max(0.85, before["accuracy"])
    assert after == {key: result.best[key] for key in after}, "the weights are not those of the best evaluation"
    assert result.steps == len(result.losses) == len(result.learning_rates) == 200
    assert [e["step"] for e in result.evaluations] == [25 * i for i in range(1, 9)]
    assert max(result.learning_rates) == 2e-2
    assert result.learning_rates[0] < 2e-3
    assert not model.training
    svg = result._repr_svg_()
    assert svg.startswith("<svg")
    assert svg.count("<circle") == 8


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    results = []
    for seed in (1, 1, 2):
        model = adapted("dropout")
        peftc.train(model, data(), seed=seed, **SETTINGS)
        results.append(weights(model))
    same(results[0], results[1])
    assert any((results[0][name] != results[2][name]).any() for name in results[0])


def test_parts_of_a_batch_add_up_to_it():
    results = []
    for accumulate in (1, 3, 8):
        model = adapted(dropout=0.0)
        losses = peftc.train(model, data(), accumulate=accumulate, optimizer=plain, **SETTINGS).losses
        results.append((losses, weights(model)))
    for losses, found in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5)
        for name, value in found.items():
            np.testing.assert_allclose(value, results[0][1][name], rtol=1e-4, atol=1e-6)


def plain(parameters):
    return peftc.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 5, 8, 11])
def test_going_on_gives_the_same_bits(tmp_path, method, stop):
    straight = adapted(method)
    whole = peftc.train(straight, data(), eval_data=data(seed=3), eval_every=3, **SETTINGS)

    class Stopped(Exception):
        pass

    def until(steps):
        left = [steps]

        def loss(output, labels):
            if left[0] == 0 and output.logits.__class__ is not np.ndarray:  # in a training step, not in an evaluation
                raise Stopped
            left[0] -= output.logits.__class__ is not np.ndarray
            return peftc.training.default_loss(output, labels)

        return loss

    options = {**SETTINGS, "eval_data": data(seed=3), "eval_every": 3, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Stopped):
        peftc.train(adapted(method), data(), loss=until(stop), **options)
    again = adapted(method, seed=9)  # its own first values do not matter
    copy_base(straight, again)
    peftc.manual_seed(77)
    result = peftc.train(again, data(), **options)
    assert result.resumed_at == stop
    assert (result.losses, result.evaluations, result.best) == (whole.losses, whole.evaluations, whole.best)
    same(weights(again), weights(straight))
    if method == "adalora":
        patterns = [m.peft_config["default"].rank_pattern for m in (again, straight)]
        assert [sum(sum(mask) for mask in p.values()) for p in patterns] == [2 * 4] * 2


def copy_base(source, target):
    values = {name: p for name, p in source.named_parameters() if not p.requires_grad}
    for name, parameter in target.named_parameters():
        if name in values:
            parameter.data[...] = values[name].data


def test_a_finished_training_is_not_repeated(tmp_path):
    model = adapted()
    first = peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    found = weights(model)
    second = peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    assert second.resumed_at == second.steps == first.steps
    same(found, weights(model))
    third = peftc.train(model, data(), checkpoint=tmp_path, resume=False, **SETTINGS)
    assert third.resumed_at == 0


def test_checkpoints_are_adapters_and_few(tmp_path):
    model = adapted("adalora")
    peftc.train(model, data(), checkpoint=tmp_path, checkpoint_every=2, keep=3, restore_best=False, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000008", "step-000010", "step-000012"]
    loaded = bert()
    copy_base(model, loaded)
    loaded.load_adapter(str(tmp_path / "step-000012"))
    batch = {key: value for key, value in data().items() if key != "labels"}
    np.testing.assert_allclose(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-6)
    ranks = [
        len(v) for k, v in load_file(tmp_path / "step-000012" / "adapter_model.safetensors").items() if "lora_E" in k
    ]
    assert sum(ranks) == 8


def test_a_killed_run_leaves_the_last_checkpoint_whole(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        import test_train as t, peftc
        from peftc import _checkpoints
        files = [0]
        for module, name in ((os, "replace"), (os, "fsync")):
            def dying(*args, real=getattr(module, name)):
                files[0] += 1
                if files[0] == int(sys.argv[1]):
                    os._exit(9)
                return real(*args)
            setattr(module, name, dying)
        write = peftc._core.safetensors_save_file
        def half(tensors, path, metadata):
            write(tensors, path, metadata)
            files[0] += 1
            if files[0] == int(sys.argv[1]):
                os.truncate(path, 100)
                os._exit(9)
        peftc._core.safetensors_save_file = half
        t.peftc.train(t.adapted(), t.data(), checkpoint={str(tmp_path)!r}, checkpoint_every=1, **t.SETTINGS)
        """
    )
    straight = adapted()
    peftc.train(straight, data(), **SETTINGS)
    for death in (7, 8, 9, 10, 11):
        ended = subprocess.run([sys.executable, "-c", script, str(death)], check=False, capture_output=True, text=True)
        assert ended.returncode == 9, ended.stderr
        for path in tmp_path.glob("step-*"):
            json.loads((path / "training.json").read_text())
            load_file(path / "training.safetensors")
    model = adapted()
    result = peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    assert result.resumed_at >= 2
    same(weights(model), weights(straight))
    assert not list(tmp_path.glob(".step-*"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    model = adapted()
    peftc.train(model, data(), checkpoint=tmp_path, checkpoint_every=4, **SETTINGS)
    found = weights(model)
    (tmp_path / "step-000012" / "training.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="step-000012 cannot be read"):
        result = peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    assert result.resumed_at == 8
    same(found, weights(model))


@pytest.mark.parametrize(
    "changed", [{"lr": 2e-2}, {"batch_size": 4}, {"seed": 4}, {"max_steps": 20}, {"schedule": "cosine"}]
)
def test_other_settings_are_another_training(tmp_path, changed):
    model = adapted()
    peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    found = weights(model)
    name = next(iter(changed)).replace("max_steps", "total")
    with pytest.raises(ValueError, match=f"with another {name}: .* here"):
        peftc.train(model, data(), checkpoint=tmp_path, **{**SETTINGS, **changed})
    same(found, weights(model))
    with pytest.raises(ValueError, match="with another data"):
        peftc.train(model, data(seed=1), checkpoint=tmp_path, **SETTINGS)


def test_early_stopping():
    model = adapted()
    stuck = {**data(), "labels": np.random.default_rng(0).integers(0, 2, ROWS)}  # nothing to be learned
    result = peftc.train(
        model, data(), epochs=50, batch_size=8, lr=3e-2, eval_data=stuck, eval_every=2, patience=3, progress=False
    )
    assert result.stopped_early
    assert result.steps < 300
    assert result.best["loss"] == min(e["loss"] for e in result.evaluations)
    assert result.evaluations[-1]["step"] == result.best["step"] + 6
    assert peftc.evaluate(model, stuck)["loss"] == pytest.approx(result.best["loss"], abs=1e-6)


def test_losses_that_are_not_finite(tmp_path):
    model = adapted()
    calls = []

    def loss(output, labels):
        calls.append(weights(model))
        value, gradient = peftc.training.default_loss(output, labels)
        return (math.nan if len(calls) == 4 else value), gradient

    with pytest.raises(FloatingPointError, match="step 4: the loss is nan. Weights are as after step 3"):
        peftc.train(model, data(), loss=loss, **SETTINGS)
    same(calls[-1], weights(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("factor", "what"), [(math.inf, ""), (3e38, r"the gradient of \S+ has")])
def test_gradients_that_are_not_finite(factor, what):
    model = adapted()
    calls = []

    def loss(output, labels):
        calls.append(weights(model))
        value, gradient = peftc.training.default_loss(output, labels)
        return value, np.sign(gradient) * np.float32(factor) if len(calls) == 3 else gradient

    with pytest.raises(FloatingPointError, match=f"step 3: {what}.*Weights are as after step 2"):
        peftc.train(model, data(), loss=loss, **SETTINGS)
    same(calls[-1], weights(model))


def test_a_regression():
    model = adapted(dropout=0.0)
    values = data()["labels"].astype(np.float32)[:, None] * [1.0, -1.0]
    result = peftc.train(model, {**data(), "labels": values.astype(np.float32)}, **{**SETTINGS, "max_steps": 40})
    assert np.mean(result.losses[-5:]) < 0.6 * result.losses[0]
    assert math.isnan(peftc.evaluate(model, {**data(), "labels": values.astype(np.float32)})["accuracy"])


def test_a_model_of_ones_own():
    from small_models import lora, net

    model = net()
    model.add_adapter(lora())
    ids = np.random.default_rng(0).integers(0, 11, (20, 4))
    result = peftc.train(model, {"ids": ids, "labels": ids % 3}, epochs=30, batch_size=10, lr=3e-2, progress=False)
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_the_bar(capsys):
    peftc.train(adapted(), data(), **{**SETTINGS, "progress": "movies", "eval_data": data(seed=1)})
    shown = capsys.readouterr().err
    assert "movies: 100%" in shown
    assert "12/12" in shown
    assert "loss=" in shown
    assert "eval accuracy" in shown
    peftc.train(adapted(), data(), **SETTINGS)
    assert capsys.readouterr().err == ""


def test_an_adalora_schedule_that_does_not_fit():
    model = adapted("adalora")
    with pytest.warns(UserWarning, match="final ranks at step 9 .* and the training has 4 steps"):
        peftc.train(model, data(), **{**SETTINGS, "max_steps": 4})


def test_what_is_refused():
    model = bert()
    with pytest.raises(ValueError, match="add an adapter"):
        model.requires_grad_(False)
        peftc.train(model, data(), **SETTINGS)
    model = adapted()
    with pytest.raises(TypeError, match='"labels"'):
        peftc.train(model, {"input_ids": [[1]]}, **SETTINGS)
    with pytest.raises(ValueError, match="48 labels, but 47 rows of input_ids"):
        peftc.train(model, {**data(), "input_ids": data()["input_ids"][1:]}, **SETTINGS)
    with pytest.raises(TypeError, match="no model of the NumPy host"):
        peftc.train(object(), data(), **SETTINGS)
    for wrong in ({"batch_size": 0}, {"best_by": "f1"}, {"schedule": "step"}, {"keep": 0}, {"accumulate": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            peftc.train(model, data(), **{**SETTINGS, **wrong})
