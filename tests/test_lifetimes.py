"""Who keeps what alive: models and registries are collected, memory of adapters goes with the last view of it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftc import _core, nn
from peftc._core import AdapterRegistry

LORA = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["a"], "modules_to_save": ["b"]})


class Model(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.b(self.a(x))


def bound(width: int = 16) -> Model:
    model = Model(width)
    AdapterRegistry().bind(list(model.named_modules()))
    return model


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_model_and_registry_are_collected() -> None:
    model = bound()
    model.registry.add("t", LORA)
    model.registry.activate(["t"])
    model(np.ones((2, 16), "float32"))
    model.registry.merge()
    parts: list[Any] = [model, model.registry, model.a, model.b.weight]
    alive = [weakref.ref(part) for part in parts]
    del model, parts
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_layer_in_a_cycle_of_its_own() -> None:
    layer = nn.Linear(4, 4)
    layer.itself = [layer]
    layer.weight.grad = np.ones((4, 4), "float32")
    alive = weakref.ref(layer), weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert alive[0]() is None and alive[1]() is None


def test_subclasses_of_the_c_types_are_collected() -> None:
    class Layer(nn.Linear):
        pass

    class Value(nn.Parameter):
        pass

    layer, value = Layer(2, 2), Value(np.ones(2, "float32"))
    alive = [weakref.ref(thing) for thing in (Layer, Value, layer, value)]
    del Layer, Value, layer, value
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_views_outlive_adapter_and_model() -> None:
    model = bound()
    model.registry.add("t", LORA)
    view = model.registry.state_dict("t")["a.lora_A.weight"]
    row = view[1]
    want = row.copy()
    model.registry.remove("t")
    alive = weakref.ref(model)
    del model, view
    gc.collect()
    assert alive() is None
    assert np.array_equal(row, want) and type(row.base.base).__name__ == "Arena"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(_core.build_info()["sanitized"], reason="freed memory is kept there")
def test_memory_does_not_grow() -> None:
    """Each round needs 24 MB and gives them back, whatever goes wrong on the way."""
    model, x = bound(1024), np.ones((4, 1024), "float32")
    model(x)
    good = {"a.lora_A.weight": np.ones((4, 1024), "float32"), "b.weight": np.ones((1024, 1024), "float32")}

    def round_trip() -> None:
        r = model.registry
        r.add("t", LORA)
        r.activate(["t"])
        model(x)
        r.merge()
        model(x)
        r.tensors("t")
        with pytest.raises(ValueError, match="exists"):
            r.add("t", LORA)
        with pytest.raises(KeyError):
            r.load("u", LORA, good)  # b.bias is missing
        with pytest.raises(ValueError, match="size mismatch"):
            r.load("u", LORA, {**good, "b.bias": x[0], "a.lora_A.weight": x[:3]})
        r.remove("t")
        gc.collect()

    for _ in range(3):
        round_trip()
    before = resident()
    for _ in range(12):
        round_trip()
    assert resident() - before < 16e6


def test_model_is_deleted_while_others_run_it() -> None:
    x = np.ones((64, 256), "float32")
    errors: list[BaseException] = []

    def work(model: Model) -> None:
        try:
            for _ in range(20):
                model(x)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    model = bound(256)
    model.registry.add("t", LORA)
    model.registry.activate(["t"])
    threads = [threading.Thread(target=work, args=(model,)) for _ in range(3)]
    alive = weakref.ref(model)
    for thread in threads:
        thread.start()
    for name in ("a", "b"):
        setattr(model, name, nn.Linear(256, 256))
    model.registry.remove("t")
    del model
    gc.collect()
    for thread in threads:
        thread.join()
    del threads, thread
    gc.collect()
    assert not errors and alive() is None


def test_weights_are_assigned_while_others_run() -> None:
    """Arrays, parameters, dtypes and draws change under forward passes: a result or a clean error, never foreign memory."""
    layer, x, stop = nn.Linear(128, 128), np.ones((32, 128), "float32"), threading.Event()
    unexpected: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                assert np.isfinite(layer(x)).all()
            except TypeError as error:
                if "give both the same dtype" not in str(error):
                    unexpected.append(error)
            except BaseException as error:  # noqa: BLE001
                unexpected.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(400):
        dtype = ("float32", "float64", "float16")[i % 3]
        layer.weight = nn.Parameter(np.ones((128, 128), dtype))
        layer.bias.data = np.ones(128, dtype)
        layer.weight._fill("normal", 0.0, 1.0)
        layer.bias._fill("uniform", -1.0, 1.0)
        layer.weight._convert("float64")
        layer.bias._convert("float64")
        layer.weight._copy_from(nn.Parameter(np.zeros((128, 128), dtype)))
    stop.set()
    for thread in threads:
        thread.join()
    assert not unexpected, unexpected[:3]


def test_exceptions_leave_the_forward_scope() -> None:
    """A failed, nested or generating forward pass does not keep the adapters that were active then."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, x: np.ndarray, fail: bool = False) -> np.ndarray:
            try:
                self.inner(np.ones((1, 3)))
            except ValueError:
                if fail:
                    raise
            return self.inner(x)

    model, x = Outer(), np.ones((1, 16), "float32")
    AdapterRegistry().bind(list(model.named_modules()))
    plain = model(x)
    r = model.registry
    config = json.loads(LORA) | {"init_lora_weights": False, "target_modules": ["inner.a"], "modules_to_save": None}
    r.add("t", json.dumps(config))
    r.activate(["t"])
    with pytest.raises(ValueError):
        model(x, fail=True)
    changed = model(x)
    r.activate([])
    assert np.array_equal(model(x), plain) and not np.array_equal(changed, plain)

    class Yields(Model):
        def forward(self, x: np.ndarray) -> Any:
            yield self.a(x)
            yield self.a(x)

    model = Yields()
    AdapterRegistry().bind(list(model.named_modules()))
    model.registry.add("t", json.dumps(config | {"target_modules": ["a"]}))
    running = model(x)
    first = next(running)
    model.registry.activate(["t"])
    assert not np.array_equal(first, next(running))


def test_a_second_copy_of_the_extension() -> None:
    """Each has types of its own; neither takes the other's for its own."""
    spec = importlib.util.spec_from_file_location("peftc._core", _core.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.Linear is not _core.Linear
    layer, foreign = copy.Linear(4, 4), nn.Linear(4, 4)
    registry = copy.AdapterRegistry()
    registry.bind([("", copy.Module()), ("l", layer), ("f", foreign)])
    assert foreign.registry is None
    registry.add("t", json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["l"]}))
    registry.activate(["t"])
    assert layer.forward(np.ones((1, 4), "float32")).shape == (1, 4)
    with pytest.raises((TypeError, ValueError)):
        registry.add("u", json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["f"]}))
    alive = [weakref.ref(copy), weakref.ref(copy.Linear), weakref.ref(registry)]
    del copy, layer, registry, spec
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_another_thread_loads() -> None:
    """The child can change the registry that a thread of its parent was changing."""
    code = """
        import json, os, signal, threading, numpy as np
        from peftc import nn
        from peftc._core import AdapterRegistry
        layer, r = nn.Linear(2048, 2048), AdapterRegistry()
        r.bind([("", nn.Module()), ("l", layer)])
        config = json.dumps({"peft_type": "LORA", "r": 512, "target_modules": ["l"]})
        stop = threading.Event()
        def load():
            while not stop.is_set():
                r.add("t", config)
                r.remove("t")
        thread = threading.Thread(target=load)
        thread.start()
        for i in range(6):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                r.add("mine", config)
                r.activate(["mine"])
                layer(np.ones((2, 2048), "float32"))
                os._exit(0 if "mine" in r else 1)
            assert os.waitpid(child, 0)[1] == 0, i
        stop.set()
        thread.join()
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("work", ["forward", "load", "both"])
def test_fork_while_another_thread_works(work: str, tmp_path: Path) -> None:
    """Forward passes on several threads and loads of files go on while the process forks; the child can do both."""
    code = f"""
        import json, os, signal, sys, threading, numpy as np
        import peftc
        from peftc import nn
        from peftc._core import AdapterRegistry
        layer, r = nn.Linear(512, 512), AdapterRegistry()
        r.bind([("", nn.Module()), ("l", layer)])
        config = json.dumps({{"peft_type": "LORA", "r": 64, "target_modules": ["l"], "init_lora_weights": False}})
        file, x = {str(tmp_path / "adapter_model.safetensors")!r}, np.ones((256, 512), "float32")
        peftc.set_num_threads(2)
        r.add("first", config)
        r.save("first", file)
        r.activate(["first"])
        want = layer(x)
        stop, rounds, wrong = threading.Event(), [0, 0], []
        def forward():
            while not stop.is_set():
                if not np.array_equal(layer(x), want):
                    wrong.append("forward")
                rounds[0] += 1
        def load():
            while not stop.is_set():
                r.load("again", config, file)
                r.remove("again")
                rounds[1] += 1
        jobs = {{"forward": [forward], "load": [load], "both": [forward, load]}}[{work!r}]
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for i in range(8):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                good = np.array_equal(layer(x), want)
                r.load("mine", config, file)
                r.activate(["mine"])
                good = good and np.array_equal(layer(x), want)
                r.save("mine", file + str(i))
                r.remove("mine")
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0, i
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong and all(rounds[j] > 0 for j, job in enumerate((forward, load)) if job in jobs)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=True, timeout=300)
