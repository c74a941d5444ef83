"""The forward pass in one call: the plain case is done, and everything else is left to torch, with the same results."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn

import peftc
from peftc import _core
from peftc.hosts import torch_adalora, torch_lora, torch_lowrank
from peftc.hosts.torch_layers import Rows


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Any) -> Any:
        return self.fc(x)


@pytest.fixture
def done(monkeypatch, watched) -> list[bool]:
    """Whether each call of a fast way did the work: of the one with the base layer in it, and then of the one without."""
    # Calls come to `forward`, and with it to what is watched here: an assignment ends direct calls (test_direct_calls.py).
    monkeypatch.setattr(_core, "direct_calls", lambda *args: None)
    nn.Module.__call__ = nn.Module.__call__  # type: ignore[method-assign]
    for module in (torch_lora, torch_adalora):
        watched(module, "add_plain")
        seen: list[bool] = watched(module, "adapted_linear")
    return seen


def adapted(*configs: Any, dtype: Any = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype).eval()
    for i, config in enumerate(configs or [{}]):
        model.add_adapter(
            peft.LoraConfig(target_modules=["fc"], r=3, **{"init_lora_weights": False, **config}), f"a{i}"
        )
    model.set_adapter([f"a{i}" for i in range(len(configs) or 1)])
    return model


def expected(model: Model, x: Any) -> Any:
    """The sum in torch's operations, without the layer's own forward pass."""
    layer = model.fc
    result = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    for name in model.active_adapters():
        a, b = layer.lora_A[name], layer.lora_B[name]
        result = result + torch.nn.functional.linear(x @ a.weight.T, b.weight, b.bias) * layer.scaling[name]
        if name in layer._initial:
            first_a, first_b = layer._initial[name]
            result = result - (x @ first_a.T @ first_b.T) * layer.scaling[name]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6)], ids=str)
@pytest.mark.parametrize(
    "configs",
    [[{}], [{}, {"lora_alpha": 3}], [{"lora_bias": True}], [{"init_lora_weights": "pissa"}, {}]],
    ids=["one", "two", "bias", "pissa"],
)
def test_the_plain_case(done, dtype, shape, configs):
    if dtype is torch.float16 and configs[0].get("init_lora_weights") == "pissa":
        pytest.skip("PEFT refuses it")
    model = adapted(*configs, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        result = model(x)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        assert torch.allclose(result, expected(model, x), atol=tolerance, rtol=tolerance)
    assert done == [True] and result.dtype is dtype


@pytest.mark.parametrize("inputs", [False, True])
def test_one_adapter_that_is_trained(done, inputs):
    model = adapted()
    x = torch.randn(3, 6, requires_grad=inputs)
    result = model(x)
    assert done == [True]
    result.square().sum().backward()
    got = [model.fc.lora_A["a0"].weight.grad, model.fc.lora_B["a0"].weight.grad, x.grad]
    model.zero_grad()
    x.grad = None
    expected(model, x).square().sum().backward()
    want = [model.fc.lora_A["a0"].weight.grad, model.fc.lora_B["a0"].weight.grad, x.grad]
    for one, other in zip(got[: 2 + inputs], want, strict=False):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_not_on_this_layer_adds_nothing(done):
    model = adapted()
    x = torch.randn(2, 6)
    y = model.fc.base_layer(x)
    assert torch_lowrank.add_plain(model.fc, x, y, ("other",)) is y


def test_the_base_output_is_overwritten_only_where_nobody_else_has_it(done):
    model = adapted()
    x = torch.randn(2, 6)
    with torch.no_grad():
        y = model.fc.base_layer(x)
        assert torch_lowrank.add_plain(model.fc, x, y, ("a0",)) is y
        seen = []
        model.fc.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
        want = torch.nn.functional.linear(x, model.fc.base_layer.weight, model.fc.base_layer.bias)
        result = model(x)
        assert (
            done == [False, True]
            and torch.equal(seen[0], want)
            and torch.allclose(result, expected(model, x), atol=1e-6)
        )


def hook_on_a(model: Model) -> Any:
    seen: list[Any] = []
    model.fc.lora_A["a0"].register_forward_hook(lambda *args: seen.append(args))
    return lambda: len(seen) == 1


def hook_on_all(model: Model) -> Any:
    seen: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))

    def check() -> bool:
        handle.remove()
        return model.fc.lora_A["a0"] in seen

    return check


def half(model: Model) -> Any:
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    context.__enter__()

    def check() -> bool:
        context.__exit__(None, None, None)
        return True

    return check


def mode(model: Model) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    context = Watch()
    context.__enter__()

    def check() -> bool:
        context.__exit__(None, None, None)
        return len(seen) > 2

    return check


def dual(model: Model) -> Any:
    context = torch.autograd.forward_ad.dual_level()
    context.__enter__()

    def check() -> bool:
        context.__exit__(None, None, None)
        return True

    return check


@pytest.mark.parametrize("watch", [hook_on_a, hook_on_all, half, mode, dual], ids=lambda f: f.__name__)
def test_whoever_watches_sees_the_operations(done, watch):
    model = adapted()
    x = torch.randn(2, 6)
    with torch.no_grad():
        want = model(x)
        check = watch(model)
        try:
            result = model(x)
        finally:
            assert check()
        assert done == [True, False, False] and torch.allclose(result.float(), want, atol=5e-2)


@pytest.mark.parametrize(
    "what", ["dora", "dropout", "subclass", "two with grad", "other dtype", "strange input", "no factor"]
)
def test_everything_else_is_left_to_torch(done, what):
    model = adapted({"use_dora": what == "dora", "lora_dropout": 0.5 if what == "dropout" else 0.0})
    x = torch.randn(2, 6)
    layer = model.fc
    y = layer.base_layer(x).detach()
    if what == "dropout":
        layer.train()
    elif what == "two with grad":
        model.add_adapter(peft.LoraConfig(target_modules=["fc"], r=2), "a1")
    elif what == "subclass":
        layer.lora_A["a0"] = nn.Linear(6, 3, bias=False)
    elif what == "other dtype":
        x = x.double()
    elif what == "strange input":
        x = [1.0] * 6
    elif what == "no factor":
        del layer.lora_B["a0"]
    before = y.clone()
    with torch.set_grad_enabled(what == "two with grad"):
        assert torch_lowrank.add_plain(layer, x, y, ("a0", "a1")) is None
        assert torch_lowrank.adapted_linear(layer, x, ("a0", "a1")) is None
    assert torch.equal(y, before)


@pytest.mark.parametrize(
    "what", ["hook", "own forward", "subclass", "trained", "trained bias", "nothing here", "shape"]
)
def test_base_layers_that_are_called(what):
    model = adapted()
    layer, base, live = model.fc, model.fc.base_layer, ("a0",)
    x = torch.randn(2, 6)
    assert torch_lowrank.adapted_linear(layer, x, live) is not None
    if what == "hook":
        base.register_forward_pre_hook(lambda module, args: None)
    elif what == "own forward":
        base.forward = lambda x: x
    elif what == "subclass":
        layer.base_layer = type("Own", (nn.Linear,), {})(6, 5)
    elif what == "trained":
        base.weight.requires_grad_()
    elif what == "trained bias":
        base.bias.requires_grad_()
    elif what == "nothing here":
        live = ("other",)
    elif what == "shape":
        x = torch.randn(2, 7)
    assert torch_lowrank.adapted_linear(layer, x, live) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6), (40, 6)], ids=str)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_base_layer_and_the_adapter_are_one_node(done, method, dtype, shape):
    torch.manual_seed(0)
    model = Model().requires_grad_(False).to(dtype)
    if method == "lora":
        model.add_adapter(peft.LoraConfig(target_modules=["fc"], r=3, init_lora_weights=False))
        leaves = [model.fc.lora_A["default"].weight, model.fc.lora_B["default"].weight]
    else:
        model.add_adapter(peft.AdaLoraConfig(target_modules=["fc"], init_r=3, total_step=9))
        model.fc.lora_E["default"].data.normal_()
        leaves = [model.fc.lora_A["default"], model.fc.lora_B["default"], model.fc.lora_E["default"]]
    if dtype is torch.bfloat16:
        for leaf in leaves:
            leaf.data = leaf.data.to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = model(x)
    grad = torch.randn(y.shape).to(dtype)
    got = torch.autograd.grad(y, [x, *leaves], grad)
    assert done == [True]
    with torch.enable_grad():
        wide = [t.detach().double().requires_grad_() for t in (x, *leaves)]
        low = wide[0] @ wide[1].T
        if method == "adalora":
            low = low * wide[3].reshape(-1)
        scaling = model.fc.scaling["default"]
        if method == "adalora":
            scaling = scaling / (model.fc.ranknum["default"].item() + 1e-5)
        base = model.fc.base_layer
        want_y = nn.functional.linear(wide[0], base.weight.double(), base.bias.double()) + low @ wide[2].T * scaling
    want = torch.autograd.grad(want_y, wide, grad.double())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip((y, *got), (want_y, *want), strict=True):
        assert one.dtype is dtype and one.shape == other.shape
        scale = max([1.0, *other.abs().flatten().tolist()])
        assert torch.allclose(one.double() / scale, other / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 6), (5, 60, 6)], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_dropout_drops_what_torch_would(done, dtype, shape, frozen):
    model = adapted({"lora_dropout": 0.3}, dtype=dtype).train()
    model.fc.base_layer.requires_grad_(not frozen)
    a, b = model.fc.lora_A["a0"].weight, model.fc.lora_B["a0"].weight
    x = torch.randn(shape).to(dtype).requires_grad_()
    torch.manual_seed(5)
    y = model(x)
    after = torch.get_rng_state()
    grad = torch.randn(y.shape).to(dtype)
    got = (y, *torch.autograd.grad(y, [x, a, b], grad))
    assert done == ([True] if frozen else [False, True])
    torch.manual_seed(5)
    low = nn.functional.dropout(x, 0.3) @ a.T @ b.T
    assert torch.equal(after, torch.get_rng_state())
    want_y = model.fc.base_layer(x) + low * model.fc.scaling["a0"]
    want = (want_y, *torch.autograd.grad(want_y, [x, a, b], grad))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for one, other in zip(got, want, strict=True):
        assert one.dtype is dtype
        scale = max(1.0, other.abs().max().item())
        assert torch.allclose(one / scale, other / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    model = adapted({"lora_dropout": 0.5}).train()
    model.fc.lora_dropout["a0"].p = p
    x = torch.randn(4, 6)
    base = model.fc.base_layer(x)
    want = base if p else expected(model, x)
    assert torch.allclose(model(x), want, atol=1e-6)


def test_a_generator_of_another_kind_is_left_to_torch(monkeypatch):
    """Should a later torch draw differently, its own operations draw."""
    monkeypatch.setattr(torch_lowrank, "_draws_as_torch", lambda: False)
    model = adapted({"lora_dropout": 0.3}).train()
    x = torch.randn(100, 6)
    torch.manual_seed(5)
    y = model(x)
    monkeypatch.undo()
    torch.manual_seed(5)
    assert torch_lowrank._draws_as_torch()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_derivatives_of_derivatives(done, dropout):
    model = adapted({"lora_dropout": dropout}, dtype=torch.float64).train()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, model.fc.lora_A["a0"].weight, model.fc.lora_B["a0"].weight]
    model.fc.base_layer.requires_grad_(False)
    drop = model.fc.lora_dropout["a0"]

    def in_torch(x: Any) -> Any:
        base, a, b = model.fc.base_layer, *leaves[1:]
        return base(x) + drop(x) @ a.T @ b.T * model.fc.scaling["a0"]

    def penalty(forward: Any) -> Any:
        torch.manual_seed(7)
        first = torch.autograd.grad(forward(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    for one, other in zip(penalty(model), penalty(in_torch), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)
    assert done == [True]


def test_wrong_arguments():
    with pytest.raises(TypeError, match="a layer, x, y, and a tuple of names"):
        torch_lowrank.add_plain(1, 2, 3)
    with pytest.raises(TypeError, match="a layer, x, y, and a tuple of names"):
        torch_lowrank.add_plain(1, 2, 3, ["a0"])
    assert torch_lowrank.add_plain(1, 2, 3, ("a0",)) is None
    assert torch_lowrank.add_plain(nn.Module(), 2, 3, ("a0",)) is None
    for arguments in ((1, 2), (1, 2, ["a0"]), (1, 2, 3, ("a0",))):
        with pytest.raises(TypeError, match="a layer, x, and a tuple of names"):
            torch_lowrank.adapted_linear(*arguments)
    assert torch_lowrank.adapted_linear(1, 2, ("a0",)) is None
    watch: Any = ((), (), {})
    for arguments in ((), (1, 2, 3, 4, watch, *[print] * 5), (int, int, int, int, ((), []), *[print] * 5)):
        with pytest.raises(TypeError, match="four types, a tuple that says who watches"):
            _core.lowrank_adder(*arguments)
    for arguments in ((), (1, *[print] * 7), (((), (), []), *[print] * 7)):
        with pytest.raises(TypeError, match="a tuple that says who watches"):
            _core.lowrank_node(*arguments)
    forward, backward = _core.lowrank_node(watch, *[print] * 7)
    with pytest.raises(TypeError, match="9 inputs, got 0"):
        forward()
    with pytest.raises(TypeError, match="ctx and a gradient"):
        backward(1)


def test_what_a_watcher_raises_is_raised():
    def watcher() -> bool:
        raise OSError("no")

    watch: Any = ((watcher,), (), torch.autograd.forward_ad.__dict__)
    pieces: Any = (torch_lowrank.Linear, nn.Identity, nn.Dropout, nn.Linear, watch)
    add, linear, mixed_rows = _core.lowrank_adder(*pieces, torch.is_grad_enabled, torch.empty_like, print, print, print)
    model = adapted()
    x = torch.randn(2, 6)
    with torch.no_grad(), pytest.raises(OSError, match="no"):
        add(model.fc, x, model.fc.base_layer(x), ("a0",))
    with pytest.raises(OSError, match="no"):
        linear(model.fc, x, ("a0",))
    with pytest.raises(OSError, match="no"):
        mixed_rows(model.fc, x, (("a0", 0, 2),))


def test_no_reference_is_lost_or_kept():
    model = adapted({"lora_bias": True}, {"init_lora_weights": "pissa"})
    x = torch.randn(1, 6)
    layer = model.fc
    held = [layer.lora_A["a0"].weight, layer.lora_B["a0"].bias, layer._initial["a1"][0], x, model.fc.base_layer]
    with torch.no_grad():
        for _ in range(3):
            model(x)
        gc.collect()
        before = [sys.getrefcount(one) for one in held]
        for _ in range(100):
            model(x)
            model.fc(x, adapter_names=["a1"])
        assert [sys.getrefcount(one) for one in held] == before


def test_adapters_come_and_go_while_others_compute():
    model = adapted()
    x = torch.randn(64, 6)
    stop = threading.Event()
    failed: list[BaseException] = []

    def compute() -> None:
        with torch.no_grad():
            while not stop.is_set():
                try:
                    model(x)
                except Exception as error:  # noqa: BLE001  (whatever it is, the test shall say so)
                    failed.append(error)
                    return

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):
        model.add_adapter(peft.LoraConfig(target_modules=["fc"], r=3), f"b{i}")
        model.delete_adapter(f"b{i}")
        model.set_adapter("a0")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed


def mixed(model: Model, x: Any, names: list[str]) -> Any:
    """What `expected` is for each row with its own adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            rows.append(model.fc.base_layer(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(expected(model, x[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 6), (6, 2, 2, 6)], ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ["a0", "a1", "a2", "a0", "a1", "a2"],
        ["__base__", "a0", "a0", "__base__", "a2", "__base__"],
        ["__base__"] * 6,
        ["a1"] * 6,
    ],
    ids=["in turn", "with the base", "the base", "one"],
)
def test_rows_of_several_adapters(dtype, shape, names):
    half = dtype is torch.float16
    model = adapted({}, {"lora_bias": True}, {} if half else {"init_lora_weights": "pissa"}, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    parts = Rows(names).parts
    with torch.no_grad():
        want = mixed(model, x, names)
        result = torch_lowrank.mixed_linear(model.fc, x, parts)
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        assert torch.allclose(result, want, atol=tolerance, rtol=tolerance)
        assert torch.equal(model.fc(x, adapter_names=names), result)


def test_adapters_that_are_not_on_this_layer_leave_rows_to_the_base():
    model = adapted({})
    x = torch.randn(2, 6)
    with torch.no_grad():
        result = torch_lowrank.mixed_linear(model.fc, x, (("other", 0, 1), ("a0", 1, 2)))
        assert torch.equal(result[0], model.fc.base_layer(x)[0]) and torch.allclose(result[1], expected(model, x)[1])


@pytest.mark.parametrize("what", ["grad", "dora", "dropout", "hook", "hook on the base", "vector", "empty", "too many"])
def test_mixed_rows_that_are_left_to_torch(what):
    model = adapted({"use_dora": what == "dora", "lora_dropout": 0.5 if what == "dropout" else 0.0}, {})
    x = torch.randn({"vector": (6,), "empty": (0, 6)}.get(what, (2, 6)))
    parts = [("a0", 0, 1), ("a1", 1, 3 if what == "too many" else 2)]
    if what == "dropout":
        model.train()
    elif what == "hook":
        hook_on_a(model)
    elif what == "hook on the base":
        model.fc.base_layer.register_forward_hook(lambda *args: None)
    with torch.set_grad_enabled(what == "grad"):
        assert torch_lowrank.mixed_linear(model.fc, x, tuple(parts)) is None
        if what == "grad":
            model.fc(x, adapter_names=["a0", "a1"]).sum().backward()
            assert model.fc.lora_A["a0"].weight.grad is not None


@pytest.mark.parametrize("parts", [("a0",), (("a0", 0),), (("a0", "0", 1),), (("a0", 0, 1 << 70),)], ids=str)
def test_mixed_parts_that_are_none(parts):
    model = adapted({})
    with torch.no_grad(), pytest.raises((TypeError, OverflowError)):
        torch_lowrank.mixed_linear(model.fc, torch.randn(2, 6), parts)
    for bounds in ((-1, 1), (1, 0), (0, 3)):
        with torch.no_grad():
            assert torch_lowrank.mixed_linear(model.fc, torch.randn(2, 6), (("a0", *bounds),)) is None
    with pytest.raises(TypeError, match="mixed_linear"):
        torch_lowrank.mixed_linear(model.fc, torch.randn(2, 6), ["a0"])


WITHOUT = """
import peft
import torch
from torch.autograd import forward_ad
del torch._C._is_any_autocast_enabled, forward_ad._current_level
import peftc
from peftc import _core
from peftc.hosts.torch_watch import runs_eagerly

class Model(peftc.PeftAdapterMixin, torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(x)

model, x = Model(), torch.randn(3, 6)
base = model(x)
model.add_adapter(peft.LoraConfig(target_modules=["fc"], r=3, init_lora_weights=False))
made = model(x)
layer = model.fc
torch.testing.assert_close(made, base + x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 8 / 3)
made.sum().backward()
assert layer.lora_B["default"].weight.grad.abs().sum() > 0 and not runs_eagerly()
"""


def test_a_torch_without_what_is_asked():
    """Names of torch's that begin with an underscore may go: then its own operations do everything."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], check=True, timeout=240)
