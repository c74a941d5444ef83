"""peftc.train goes on from its own training alone: what is refused, what is passed over, and what may change."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from test_train import METHODS, SETTINGS, adapted, bert, data, same, weights

import peftc
from peftc.safetensors import load_file, save_file


def with_fields(method="lora", **fields):
    model = bert()
    config = deepcopy(METHODS[method])
    for name, value in fields.items():
        setattr(config, name, value)
    model.add_adapter(config)
    return model


def interrupted(folder, model=None, **options):
    """A training that went on to step 8 of 12, with a checkpoint at step 4 as well."""
    peftc.train(model or adapted(), data(), checkpoint=folder, checkpoint_every=4, keep=3, **{**SETTINGS, **options})
    for file in (folder / "step-000012").iterdir():
        file.unlink()
    (folder / "step-000012").rmdir()


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("lora", "r", 1),
        ("lora", "lora_alpha", 99),
        ("lora", "lora_dropout", 0.5),
        ("lora", "use_rslora", True),
        ("lora", "target_modules", ["query"]),
        ("adalora", "deltaT", 1),
        ("adalora", "beta1", 0.5),
        ("adalora", "orth_reg_weight", 0.1),
    ],
)
def test_another_adapter_is_refused(tmp_path, method, field, value):
    interrupted(tmp_path, adapted(method))
    model = with_fields(method, **{field: value})
    before = weights(model)
    with pytest.raises(ValueError, match=f"with another {field} of adapter default: .* there, .* here"):
        peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS)
    same(before, weights(model))


def test_another_base_model_and_another_optimizer_are_refused(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(ValueError, match="with another base model: .* there, .* here"):
        peftc.train(adapted(seed=5), data(), checkpoint=tmp_path, **SETTINGS)

    def other(parameters):
        return peftc.optim.AdamW(parameters, lr=1e-2, betas=(0.5, 0.9))

    with pytest.raises(
        ValueError, match=r"another betas of optimizer group 0: \[0.9, 0.999\] there, \[0.5, 0.9\] here"
    ):
        peftc.train(adapted(), data(), checkpoint=tmp_path, optimizer=other, **SETTINGS)


def test_what_only_looks_on_may_change(tmp_path):
    straight = adapted()
    peftc.train(straight, data(), **SETTINGS)
    interrupted(tmp_path)
    model = adapted()
    model.load_adapter(str(tmp_path / "step-000008"), "looked-at")  # another adapter, not active in the training
    model.set_adapter("default")
    result = peftc.train(
        model, data(), checkpoint=tmp_path, keep=5, checkpoint_every=1, eval_data=data(seed=2), restore_best=False,
        **SETTINGS,
    )  # fmt: skip
    assert result.resumed_at == 8
    found = weights(model)
    same(weights(straight), {name: found[name] for name in weights(straight)})


def test_more_patience_goes_on(tmp_path):
    stuck = {**data(), "labels": 1 - data()["labels"]}  # every evaluation is worse than the one before
    options = {**SETTINGS, "lr": 3e-2, "eval_data": stuck, "eval_every": 1, "checkpoint": tmp_path}
    first = peftc.train(adapted(), data(), patience=2, **options)
    assert first.stopped_early
    assert peftc.train(adapted(), data(), patience=2, **options).steps == first.steps
    more = peftc.train(adapted(), data(), patience=100, **options)
    assert more.steps == 12
    assert not more.stopped_early


def test_beginning_anew_replaces_what_is_there(tmp_path):
    interrupted(tmp_path)
    options = {**SETTINGS, "checkpoint": tmp_path, "checkpoint_every": 1}
    calls = []

    def dying(output, labels):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return peftc.training.default_loss(output, labels)

    with pytest.raises(KeyboardInterrupt):
        peftc.train(adapted(), data(), resume=False, loss=dying, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert peftc.train(adapted(), data(), **options).resumed_at == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', "null"])
def test_facts_that_are_damaged_are_passed_over(tmp_path, text):
    interrupted(tmp_path)
    (tmp_path / "step-000008" / "training.json").write_text(text)
    with pytest.warns(UserWarning, match="step-000008 cannot be read and is passed over"):
        assert peftc.train(adapted(), data(), checkpoint=tmp_path, **SETTINGS).resumed_at == 4


@pytest.mark.parametrize("damage", ["lacks", "has shape"])
def test_arrays_that_are_damaged_are_passed_over(tmp_path, damage):
    straight = adapted()
    peftc.train(straight, data(), **SETTINGS)
    interrupted(tmp_path)
    path = tmp_path / "step-000008" / "training.safetensors"
    arrays = {name: np.array(value) for name, value in load_file(path).items()}
    name = max(name for name in arrays if name.startswith("parameter."))
    if damage == "lacks":
        del arrays[name]
    else:
        arrays[name] = arrays[name][:1]
    save_file(arrays, path)
    model = adapted()
    with pytest.warns(UserWarning, match=f"step-000008 .* {damage} "):
        assert peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS).resumed_at == 4
    same(weights(straight), weights(model))


def test_numbers_of_numpy_are_settings(tmp_path):
    options = {**SETTINGS, "lr": np.float32(1e-2), "seed": np.int64(3)}
    peftc.train(adapted(), data(), checkpoint=tmp_path, **options)
    assert peftc.train(adapted(), data(), checkpoint=tmp_path, **options).resumed_at == 12


def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")

    def never(output, labels):
        raise AssertionError("a step was computed")

    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            peftc.train(adapted(), data(), checkpoint=place, loss=never, **SETTINGS)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    """Files may not grow beyond 4 KB after the second checkpoint: the writer gets an error in the middle of a file."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
        from test_train import SETTINGS, adapted, data
        import peftc
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        calls = []
        def loss(output, labels):
            calls.append(1)
            if len(calls) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return peftc.training.default_loss(output, labels)
        try:
            peftc.train(adapted(), data(), loss=loss, checkpoint={str(tmp_path)!r}, checkpoint_every=1, **SETTINGS)
        except OSError as error:
            sys.exit(error.errno)
        """
    )
    assert hasattr(signal, "SIGXFSZ")
    assert hasattr(resource, "RLIMIT_FSIZE")
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert ended.returncode == errno.EFBIG, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    assert json.loads((tmp_path / "step-000002" / "training.json").read_text())["steps"] == 2
    straight, model = adapted(), adapted()
    peftc.train(straight, data(), **SETTINGS)
    assert peftc.train(model, data(), checkpoint=tmp_path, **SETTINGS).resumed_at == 2
    same(weights(straight), weights(model))
