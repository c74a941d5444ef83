"""Every allocation of the core fails once: MemoryError, nothing has changed, nothing is lost (sanitized build only)."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bin_files
import numpy as np
import pytest

from peftc import _core, nn
from peftc._core import AdapterRegistry

pytestmark = pytest.mark.skipif(not _core.build_info()["test_hooks"], reason="needs a build with PEFTC_SANITIZE=1")

LORA = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["a", "c"], "modules_to_save": ["b"], "bias": "all"})
DORA = json.dumps(
    {"peft_type": "LORA", "r": 2, "target_modules": ["a", "c"], "use_dora": True, "rank_pattern": {"a": 3}}
)
IA3 = json.dumps({"peft_type": "IA3", "target_modules": ["a", "c"], "feedforward_modules": ["c"]})
ADALORA = json.dumps({"peft_type": "ADALORA", "target_modules": "(a|b)", "total_step": 10})
CONFIGS = {"lora": LORA, "dora": DORA, "ia3": IA3, "adalora": ADALORA}


class Model(nn.Module):
    def __init__(self, dtype: str = "float16") -> None:
        super().__init__()
        self.a = nn.Linear(6, 8, dtype=dtype)
        self.b = nn.Linear(8, 8, dtype=dtype)
        self.c = nn.Conv2d(1, 2, 3, padding=1, dtype=dtype)
        self.eval()

    def forward(self, x: np.ndarray) -> np.ndarray:
        y = self.b(self.a(x))
        return self.c(y.reshape(1, *y.shape))


@pytest.fixture
def model() -> Model:
    model = Model()
    AdapterRegistry().bind(list(model.named_modules()))
    for name, config in CONFIGS.items():
        model.registry.add(name, config)
    model.registry.activate(["lora", "ia3"])
    model(np.ones((4, 6), "float32"))  # draws the weights
    return model


def each_failure(call: Callable[[], Any], state: Callable[[], Any], undo: Callable[[], Any] = lambda: None) -> int:
    """Let allocation 1, 2, … of call() fail until it gets through; the number of failures."""
    call()  # what is made once and kept
    undo()
    gc.collect()
    before, live = state(), _core._live_allocations()
    for n in range(1, 2000):
        _core._fail_allocation(n)
        try:
            call()
        except MemoryError:
            failed = True
        else:
            failed = False
        finally:
            reached = _core._allocation_failed()
            _core._fail_allocation(0)
        if not reached:
            assert not failed
            return n - 1
        if not failed:
            undo()  # it could do without
        assert state() == before
        if _core._live_allocations() != live:
            gc.collect()
        assert _core._live_allocations() == live, f"allocation {n}"
    raise AssertionError("no end")


def contents(registry: AdapterRegistry) -> Any:
    values = {name: {k: v.tobytes() for k, v in registry.state_dict(name).items()} for name in registry.names()}
    return registry.names(), registry.active(), registry.enabled, registry.merged(), values


@pytest.mark.parametrize("method", CONFIGS)
def test_add(model: Model, method: str) -> None:
    r = model.registry
    assert each_failure(lambda: r.add("new", CONFIGS[method]), lambda: contents(r), lambda: r.remove("new")) > 5


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("source", ["dict", "safetensors", "bin", "legacy bin"])
def test_load(model: Model, method: str, source: str, tmp_path: Path) -> None:
    r = model.registry
    tensors = {k: v.astype("float32") for k, v in r.state_dict(method).items()}
    weights: Any = tensors
    if source == "safetensors":
        weights = str(tmp_path / "adapter_model.safetensors")
        r.save(method, weights)
    elif source != "dict":
        weights = str(tmp_path / "adapter_model.bin")
        views = {k: np.asfortranarray(v) for k, v in tensors.items()}  # gathered from their storages
        Path(weights).write_bytes(bin_files.save(views, as_zip=source == "bin"))
    assert (
        each_failure(lambda: r.load("new", CONFIGS[method], weights), lambda: contents(r), lambda: r.remove("new")) > 5
    )


class Others(nn.Module):
    """What a text model has beside linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Conv1D(6, 6)
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.eval()

    def forward(self, ids: np.ndarray) -> np.ndarray:
        x = self.mix(self.embed(ids))
        return self.image(np.expand_dims(x, 1))


OTHERS = {
    "embedding": {"target_modules": ["embed"], "use_dora": False},
    "embedding, dora": {"target_modules": ["embed"], "use_dora": True},
    "conv1d": {"target_modules": ["mix"], "fan_in_fan_out": True, "use_rslora": True},
    "conv1d, dora": {"target_modules": ["mix"], "fan_in_fan_out": True, "use_dora": True},
    "conv2d": {"target_modules": ["image"]},
    "conv2d, dora": {"target_modules": ["image"], "use_dora": True},
    "pissa": {"target_modules": ["mix"], "fan_in_fan_out": True, "init_lora_weights": "pissa"},
    "pissa, iterations": {"target_modules": ["mix"], "fan_in_fan_out": True, "init_lora_weights": "pissa_niter_2"},
    "olora": {"target_modules": ["mix"], "fan_in_fan_out": True, "init_lora_weights": "olora"},
    "orthogonal": {"target_modules": ["mix"], "fan_in_fan_out": True, "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["mix"], "fan_in_fan_out": True, "init_lora_weights": "gaussian"},
    "lora_bias": {"target_modules": ["mix", "image"], "fan_in_fan_out": True, "lora_bias": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_starts(name: str) -> None:
    """Adding, running, merging, unmerging and reading an adapter of each kind of layer and of each start."""
    model, ids = Others(), np.array([[1, 2, 3], [4, 5, 6]])
    r = AdapterRegistry()
    r.bind(list(model.named_modules()))
    config = json.dumps({"peft_type": "LORA", "r": 2, **OTHERS[name]})
    plain = model(ids)
    weights = lambda: [p.data.tobytes() for p in model.parameters()]
    whole = weights()

    def state() -> Any:
        return contents(r), weights()

    assert each_failure(lambda: r.add("new", config), state, lambda: r.remove("new")) > 5
    r.activate(["new"])
    want = model(ids)
    each_failure(lambda: model(ids), lambda: np.array_equal(model(ids), want))
    assert each_failure(r.merge, state, r.unmerge) > 1
    r.unmerge()
    r.remove("new")
    assert weights() == whole and np.array_equal(model(ids), plain)


def test_bin_files(tmp_path: Path) -> None:
    base = np.arange(24, dtype="float32").reshape(4, 6)
    state = {"a": base, "t": base.T, "s": base[::2, 1:], "d": {"h": np.ones(5, "float16"), "n": [1, ("x", None)]}}
    path = tmp_path / "x.bin"
    for as_zip in (True, False):
        for protocol in (2, 4):
            data = bin_files.save(state, protocol, as_zip)
            path.write_bytes(data)
            assert each_failure(lambda data=data: _core.parse_torch_bin(data), lambda: None) > 10
            assert each_failure(lambda: _core.load_torch_bin(str(path)), lambda: None) > 10
            assert each_failure(lambda: _core.torch_bin_raw(str(path)), lambda: None) > 10


def test_patterns() -> None:
    for pattern in ("(a|b)*c{2,4}", r".*\.(query|value)", r"(?P<x>[a-z]+)_(?P=x)", r"(?i:É|é)+?$"):
        for match in (_core.pattern_fullmatch, _core.pattern_match_suffix, _core.pattern_search):
            calls = each_failure(lambda m=match, p=pattern: m(p, "layer.0.value"), lambda: None)
            assert calls > 2, (pattern, match)


@pytest.mark.parametrize(("pieces", "least"), [(False, 4), (True, 12)])
def test_bind(pieces: bool, least: int) -> None:
    """All modules in one call, for which room is made once, and one by one, for which it grows."""
    others = [Model() for _ in range(40)]
    modules = [(f"x{i}{'.' * bool(name)}{name}", m) for i, o in enumerate(others) for name, m in o.named_modules()]
    failures = 0
    for n in range(1, 2000):
        r = AdapterRegistry()
        _core._fail_allocation(n)
        try:
            for part in [[one] for one in modules] if pieces else [modules]:
                r.bind(part)
        except MemoryError:
            failures += 1
        finally:
            reached = _core._allocation_failed()
            _core._fail_allocation(0)
        r.bind(modules)  # goes on where it stopped
        assert [m._bound_name for _, m in modules] == [name for name, _ in modules]
        if not reached:
            break
    assert failures >= least


def test_activate_and_enable(model: Model) -> None:
    r = model.registry
    state = lambda: (r.active(), r.enabled)
    assert each_failure(lambda: r.activate(["dora"]), state, lambda: r.activate(["lora", "ia3"])) == 1
    assert each_failure(lambda: setattr(r, "enabled", False), state, lambda: setattr(r, "enabled", True)) == 1


def test_remove(model: Model) -> None:
    r = model.registry
    for n in (1, 2):
        _core._fail_allocation(n)
        try:
            r.remove("lora")
        except MemoryError:
            assert n == 1
            assert r.names() == list(CONFIGS) and r.active() == ["lora", "ia3"]
        finally:
            _core._fail_allocation(0)
    assert r.names() == ["dora", "ia3", "adalora"] and r.active() == ["ia3"]


@pytest.mark.parametrize("safe", [False, True])
def test_merge(model: Model, safe: bool) -> None:
    r = model.registry
    r.activate(["dora", "adalora"])
    assert each_failure(lambda: r.merge(safe_merge=safe), lambda: contents(r), r.unmerge) > 5


def test_unmerge(model: Model) -> None:
    r = model.registry
    r.activate(["dora"])
    r.merge()
    assert each_failure(r.unmerge, r.merged, r.merge) == 1


@pytest.mark.parametrize("active", [[], ["lora"], ["dora"], ["ia3"], ["adalora"], ["lora", "dora", "ia3", "adalora"]])
def test_forward(model: Model, active: list[str]) -> None:
    model.registry.activate(active)
    x = np.ones((4, 6), "float32")
    want = model(x)
    each_failure(lambda: model(x), lambda: np.array_equal(model(x), want))


def test_state_dict_and_save(model: Model, tmp_path: Path) -> None:
    r, path = model.registry, tmp_path / "adapter_model.safetensors"
    assert each_failure(lambda: r.state_dict("lora"), lambda: r.names()) > 0
    assert each_failure(lambda: r.tensors("lora"), lambda: r.names()) > 0
    each_failure(lambda: r.layout("lora"), lambda: r.names())
    assert each_failure(lambda: r.save("lora", str(path)), lambda: sorted(p.name for p in tmp_path.iterdir())) > 2


def test_files(tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    tensors = {f"t{i}": np.full((i, 3), i, "float32") for i in range(20)}
    save = lambda: _core.safetensors_save_file(tensors, path, {"format": "pt"})
    assert each_failure(save, lambda: sorted(p.name for p in tmp_path.iterdir())) > 2
    assert each_failure(lambda: _core.safetensors_load_file(path), lambda: None) > 2
    assert each_failure(lambda: _core.safetensors_load(Path(path).read_bytes()), lambda: None) > 2
    assert each_failure(lambda: _core.safetensors_save(tensors, None), lambda: None) > 0
    assert each_failure(lambda: _core.config_check(LORA), lambda: None) > 5
    assert each_failure(lambda: _core.json_canonical(LORA), lambda: None) > 2
    assert each_failure(lambda: _core.json_loads(LORA), lambda: None) > 2
    assert each_failure(lambda: _core.pattern_search("(a|b)*c{2,4}", "abcc"), lambda: None) > 2


@pytest.mark.parametrize("names", [["lora", "ia3"], ["dora"], ["adalora"]])
def test_a_step_of_training(model: Model, names: list[str]) -> None:
    from peftc import optim

    model.registry.activate(names)
    for name in names:
        model.registry.set_trainable(name, True)
    model.train()
    x = np.ones((4, 6), "float32")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    def step() -> None:
        y = model(x)
        model.backward(np.ones_like(y), y)
        optimizer.step()

    def weights() -> list[bytes]:
        return [p.data.tobytes() for p in parameters]

    assert each_failure(step, weights, optimizer.zero_grad) > 10


# ------------------------------------------------------- filled while something else is done


class Wide(nn.Module):
    """So many and so large layers that an adapter with wait=False is filled in another thread."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(20):
            setattr(self, f"fc{i}", nn.Linear(96, 96))
        self.eval()

    def forward(self, x: np.ndarray) -> np.ndarray:
        for i in range(20):
            x = getattr(self, f"fc{i}")(x)
        return x


WIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "olora": {"init_lora_weights": "olora"},
    "pissa, iterations": {"init_lora_weights": "pissa_niter_1"},
}


def wide(name: str) -> str:
    config = {"peft_type": "LORA", "r": 40, "target_modules": "fc.*", **WIDE[name]}
    return json.dumps(config)


@pytest.fixture
def two_threads() -> Any:
    before = _core.get_num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


@pytest.fixture
def wide_model() -> Wide:
    model = Wide()
    model(np.ones((1, 96), "float32"))
    AdapterRegistry().bind(list(model.named_modules()))
    model.registry.add("old", wide("plain"), seed=1)
    return model


def sources(registry: AdapterRegistry, config: str, folder: Path) -> dict[str, Any]:
    """None for a fresh adapter; and the weights of one in every form."""
    registry.add("one", config, seed=2)
    tensors = registry.state_dict("one")
    same, half = str(folder / "same.safetensors"), str(folder / "half.safetensors")
    registry.save("one", same)
    _core.safetensors_save_file({k: v.astype("float16") for k, v in tensors.items()}, half, {"format": "pt"})
    (folder / "a.bin").write_bytes(bin_files.save(tensors))
    kept = {k: v.copy() for k, v in tensors.items()}
    registry.remove("one")
    return {"fresh": None, "file": same, "another dtype": half, "bin": str(folder / "a.bin"), "dict": kept}


def begin(registry: AdapterRegistry, config: str, source: Any) -> None:
    if source is None:
        registry.add("new", config, seed=2, wait=False)
    else:
        registry.load("new", config, source, seed=2, wait=False)


SOURCES = pytest.mark.parametrize("source", ["fresh", "file", "another dtype", "bin", "dict"])


@pytest.mark.usefixtures("two_threads")
@SOURCES
@pytest.mark.parametrize("name", ["plain", "dora"])
def test_no_thread_to_fill_in(wide_model: Wide, name: str, source: str, tmp_path: Path) -> None:
    """The values are there all the same, and the same ones."""
    r, config = wide_model.registry, wide(name)
    given = sources(r, config, tmp_path)[source]
    begin(r, config, given)
    r.finish()
    want = {k: v.copy() for k, v in r.state_dict("new").items()}
    r.remove("new")
    before = contents(r)
    gc.collect()
    live, wanted = _core._live_allocations(), _core._no_threads(True)
    try:
        begin(r, config, given)
        r.finish()
    finally:
        found_none = _core._no_threads(False) - wanted
    assert found_none == (source != "bin")  # which one thread reads
    got = r.state_dict("new")
    assert all(np.array_equal(got[k], want[k]) for k in want)
    del got
    r.remove("new")
    gc.collect()
    assert contents(r) == before and _core._live_allocations() == live


@pytest.mark.usefixtures("two_threads")
@SOURCES
@pytest.mark.parametrize("none", [False, True], ids=["thread", "no thread"])
def test_no_memory_before_it_is_filled(wide_model: Wide, none: bool, source: str, tmp_path: Path) -> None:
    """Each allocation of the calling thread fails, until the adapter has its values."""
    r, config = wide_model.registry, wide("dora")
    given = sources(r, config, tmp_path)[source]

    def make() -> None:
        begin(r, config, given)
        r.finish()

    _core._no_threads(none)
    try:
        assert each_failure(make, lambda: contents(r), lambda: r.remove("new")) > 5
    finally:
        _core._no_threads(False)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", WIDE)
def test_no_memory_in_the_other_thread(wide_model: Wide, name: str) -> None:
    """Its allocations fail one after the other: finish() says so, the adapter is gone, and the next attempt succeeds."""
    r, config = wide_model.registry, wide(name)
    begin(r, config, None)
    r.finish()
    r.remove("new")
    gc.collect()
    before, live, failures = contents(r), _core._live_allocations(), 0
    for n in (1, 2, 3, 7, 20, 50):
        _core._fail_allocation_elsewhere(n)
        try:
            begin(r, config, None)
            for _ in range(2000):
                if _core._allocation_failed():
                    break
                time.sleep(0.00002)  # let it go first
            try:
                r.finish()
            except MemoryError:
                failures += 1
                assert _core._allocation_failed() and r.names() == ["old"]
            else:
                assert not _core._allocation_failed()
                r.remove("new")
        finally:
            _core._fail_allocation_elsewhere(0)
        gc.collect()
        assert contents(r) == before and _core._live_allocations() == live
    assert (failures > 0) == (name != "plain")
    begin(r, config, None)
    r.finish()
    assert r.names() == ["old", "new"]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("how", ["remove", "another", "forget"])
def test_failed_and_never_asked_for(wide_model: Wide, how: str) -> None:
    """What went wrong in the other thread is said by the next call that makes an adapter, or goes with the adapter."""
    r, config = wide_model.registry, wide("dora")
    gc.collect()
    live = _core._live_allocations()
    _core._fail_allocation_elsewhere(1)
    try:
        begin(r, config, None)
        for _ in range(2000):
            if _core._allocation_failed():
                break
            time.sleep(0.001)
        assert _core._allocation_failed()
        if how == "forget":
            del r
            wide_model.__dict__.clear()
        elif how == "remove":
            r.remove("new")  # nobody wants to know
            r.add("new", config, wait=False)
            r.remove("new")
        else:
            with pytest.raises(MemoryError):
                r.add("third", config)
    finally:
        _core._fail_allocation_elsewhere(0)
    gc.collect()
    if how != "forget":
        assert r.names() == ["old"]
        assert _core._live_allocations() == live
