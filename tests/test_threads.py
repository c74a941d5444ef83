"""Adapters change on one thread while others run forward passes: each result is entirely old or entirely new."""

import threading

import numpy as np
import pytest
from small_models import IDS, lora, net, shake

import peftc

DEEP = {"layers": 12, "dim": 16, "hidden": 24}


def run(model, change, seconds, workers=3):
    """Call change() again and again while workers run the model; returns the set of distinct results (bytes)."""
    stop = threading.Event()
    results, errors = set(), []

    def work():
        try:
            while not stop.is_set():
                results.add(np.asarray(model(IDS)).tobytes())
        except BaseException as error:  # noqa: BLE001  (reported below)
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    changes = 0
    while not stop.is_set():
        change(changes)
        changes += 1
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert changes > 10
    return results


@pytest.fixture
def model():
    made = net(**DEEP)
    targets = ["query", "value", "up", "down", "embed", "head"]
    for i, name in enumerate("abc"):
        made.add_adapter(lora(targets, r=4, init_lora_weights=True), name)
        shake(made, name, i)
    made.add_adapter(lora(targets, modules_to_save=["subhead"], use_dora=False, bias="all"), "d")
    shake(made, "d", 9, 0.2)
    made.eval()
    peftc.set_num_threads(1)
    yield made
    peftc.set_num_threads(2)


def result(model, names):
    model.set_adapter(list(names))
    return np.asarray(model(IDS)).tobytes()


def test_set_adapter(model):
    states = ["a", "b", "c", "d", "ab", "ba", ""]
    allowed = {result(model, names) for names in states}
    seen = run(model, lambda i: model.set_adapter(list(states[i % len(states)])), 2.0)
    assert seen <= allowed
    assert len(seen) > 1


def test_disable_and_enable(model):
    allowed = {result(model, "a"), result(model, "")}
    model.set_adapter("a")
    seen = run(model, lambda i: model.disable_adapters() if i % 2 else model.enable_adapters(), 1.0)
    assert seen <= allowed


def test_load_and_delete(model, tmp_path):
    """Loading activates the new adapter; deleting it falls back. No memory of a deleted one is used."""
    for name in "abc":
        model.save_adapter(tmp_path / name, name)
    allowed = {result(model, names) for names in ("a", "b", "c", "d", "")}
    model.set_adapter("a")

    def change(i):
        name = f"new{i}"
        model.load_adapter(tmp_path / "abc"[i % 3], name)
        model.set_adapter("a")
        model.delete_adapter(name)

    assert run(model, change, 1.5) <= allowed


def test_merge_and_unmerge(model):
    model.set_adapter("a")
    plain = np.asarray(model(IDS)).tobytes()
    model.merge_adapter()
    allowed = {plain, np.asarray(model(IDS)).tobytes()}
    model.unmerge_adapter()
    seen = run(model, lambda i: model.unmerge_adapter() if i % 2 else model.merge_adapter(), 1.0)
    assert seen <= allowed


def test_loads_on_several_threads(tmp_path):
    """Every one of many concurrent loads is there afterwards, whole."""
    made = net()
    made.add_adapter(lora(), "x")
    shake(made, "x")
    made.save_adapter(tmp_path, "x")
    wanted = made.get_adapter_state_dict("x")
    model = net()
    errors = []

    def load(first):
        try:
            for i in range(first, first + 10):
                model.load_adapter(tmp_path, f"n{i}")
        except BaseException as error:  # noqa: BLE001  (reported below)
            errors.append(error)

    threads = [threading.Thread(target=load, args=(10 * t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(model.peft_config) == sorted(f"n{i}" for i in range(40))
    assert len(model.active_adapters()) == 1
    for name in model.peft_config:
        for key, value in model.get_adapter_state_dict(name).items():
            np.testing.assert_array_equal(value, wanted[key])
    model.delete_adapter(list(model.peft_config))
    assert not model._hf_peft_config_loaded


def test_same_name_on_two_threads():
    """Exactly one of two racing adds of one name wins; the other is refused."""
    model = net()
    outcome = []
    barrier = threading.Barrier(4)

    def add():
        barrier.wait()
        try:
            model.add_adapter(lora(), "same")
            outcome.append("in")
        except ValueError as error:
            outcome.append(str(error))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcome.count("in") == 1 and len(outcome) == 4
