"""IA3 on torch in C: the plain case is done, and everything else is left to torch, with the same results."""

from __future__ import annotations

import gc
import random
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import peftc
from peftc import _core
from peftc.hosts import torch_ia3, torch_scale
from peftc.hosts.torch_scale import ScaledRows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
#: dtypes of the activations and of the vector
PAIRS = [(dtype, dtype) for dtype in TOLERANCE] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Any) -> Any:
        return self.fc(x)


@pytest.fixture
def done(watched) -> list[bool]:
    """Whether each call of the fast ways did the work."""
    watched(torch_ia3, "scaled_linear")
    seen: list[bool] = watched(torch_ia3, "scale_rows")
    return seen


def adapted(feedforward: bool, dtype: Any = torch.float32, base: Any = None, names: tuple[str, ...] = ("a0",)) -> Model:
    torch.manual_seed(0)
    model = Model(base or nn.Linear(6, 5)).to(dtype)
    for name in names:
        config = peftc.IA3Config(target_modules=["fc"], feedforward_modules=["fc"] if feedforward else [])
        model.add_adapter(config, name)
        nn.init.normal_(model.fc.ia3_l[name], 1, 0.3)
    model.set_adapter(list(names))
    return model


def expected(model: Model, x: Any) -> Any:
    """In torch's operations, as PEFT has them."""
    layer = model.fc
    vectors = [layer.ia3_l[name].flatten() for name in layer.ia3_l]
    before = layer.is_feedforward
    for vector in vectors if before else []:
        x = (x.to(vector.dtype) * vector).to(x.dtype)
    result = layer.base_layer(x)
    for vector in [] if before else vectors:
        result = (result * vector).to(result.dtype)
    return result


def gradients(result: Any, leaves: list[Any]) -> list[Any]:
    weights = torch.cos(torch.arange(result.numel(), dtype=torch.float64)).reshape(result.shape)
    return list(torch.autograd.grad((result.double() * weights).sum(), leaves))


def same(got: Any, want: Any, dtype: Any) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert torch.allclose(got / scale, want / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("dtype", "other"), PAIRS, ids=str)
def test_the_product_and_its_derivatives(dtype, other, seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n = rng.choice([1, 2, 7, 16, 17, 48, 100, 257, 513, 1100])
    lead = rng.choice([(), (1,), (3,), (4,), (5,), (2, 9), (67,), (300,), (0,), (3, 100)])
    whole = torch.randn(*lead, n + 3).to(dtype)
    x = whole[..., 1 : n + 1] if rng.random() < 0.5 else whole[..., :n].contiguous()
    x = x.detach().requires_grad_(rng.random() < 0.8)
    vector = (
        torch.randn(rng.choice([(n,), (n, 1), (1, n)]))
        .to(other)
        .requires_grad_(not x.requires_grad or rng.random() < 0.8)
    )
    weight = torch.randn(5, n).to(dtype) / n**0.5 if rng.random() < 0.4 else None
    bias = torch.randn(5).to(dtype) if weight is not None and rng.random() < 0.5 else None
    before = _core.get_num_threads()
    _core.set_num_threads(threads)
    try:
        result = ScaledRows.apply(x, vector, weight, bias)
        wide = [t.detach().double().requires_grad_() for t in (x, vector)]
        want = wide[0] * wide[1].flatten()
        if weight is not None:
            want = nn.functional.linear(want, weight.double(), None if bias is None else bias.double())
        elif dtype is other:
            assert torch.equal(result, x * vector.flatten())
        same(result.double(), want, dtype)
        leaves = [(t, w) for t, w in zip((x, vector), wide, strict=True) if t.requires_grad]
        got = gradients(result, [t for t, _ in leaves])
        for one, (leaf, _), true in zip(got, leaves, gradients(want, [w for _, w in leaves]), strict=True):
            assert one.dtype == leaf.dtype and one.shape == leaf.shape
            same(one.double(), true, dtype)
    finally:
        _core.set_num_threads(before)


def test_the_same_for_any_number_of_threads():
    x, vector = torch.randn(3000, 300, requires_grad=True), torch.randn(300, 1, requires_grad=True)
    results = []
    before = _core.get_num_threads()
    for n in (1, 2, 4):
        _core.set_num_threads(n)
        y = ScaledRows.apply(x, vector, None, None)
        results.append([y, *gradients(y, [x, vector])])
    _core.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("base", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6), (70, 6)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("feedforward", [False, True])
def test_the_plain_case(done, feedforward, dtype, shape, base, grad):
    made = {"linear": nn.Linear(6, 5), "no bias": nn.Linear(6, 5, bias=False), "conv1d": Conv1D(5, 6)}[base]
    model = adapted(feedforward, dtype, made)
    x = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
    kept = x.detach().clone()
    with torch.set_grad_enabled(grad):
        if base == "conv1d" and len(shape) == 1:
            shape = (1, 6)  # Conv1D wants a row
            x = x.detach()[None].requires_grad_()
        result, want = model.fc.forward(x), expected(model, x)
        assert done == ([True] if base != "conv1d" else [False, True, True])
        same(result, want, dtype)
        assert torch.equal(model(x), result)
        assert torch.equal(x.detach().reshape(kept.shape), kept)
    if grad:
        leaves = [x, model.fc.ia3_l["a0"]]
        for one, other in zip(gradients(result, leaves), gradients(want, leaves), strict=True):
            same(one, other, dtype)


@pytest.mark.parametrize("feedforward", [False, True])
def test_frozen_vectors_and_frozen_inputs(done, feedforward):
    model = adapted(feedforward)
    vector = model.fc.ia3_l["a0"]
    x = torch.randn(3, 6)
    model(x).sum().backward()
    assert vector.grad is not None and vector.grad.shape == vector.shape
    vector.requires_grad_(False)
    assert not model(x).requires_grad
    x.requires_grad_()
    same(torch.autograd.grad(model(x).sum(), x)[0], torch.autograd.grad(expected(model, x).sum(), x)[0], torch.float32)


@pytest.mark.parametrize(
    "what", ["trained", "trained bias", "hook", "own forward", "subclass", "two", "shape", "other dtype"]
)
@pytest.mark.parametrize("feedforward", [False, True])
def test_what_is_left_to_torch(feedforward, what):
    model = adapted(feedforward, names=("a0", "a1") if what == "two" else ("a0",))
    layer = model.fc
    x = torch.randn(2, 6, requires_grad=True)
    if what.startswith("trained"):
        getattr(layer.base_layer, "bias" if "bias" in what else "weight").requires_grad_()
    elif what == "hook":
        layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)
    elif what == "own forward":
        layer.base_layer.forward = lambda x: nn.functional.linear(x, layer.base_layer.weight) - 1
    elif what == "subclass":
        layer.base_layer = type("Own", (nn.Linear,), {})(6, 5)
    elif what == "shape":
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 7))
        return
    elif what == "other dtype":
        layer.ia3_l["a0"].data = layer.ia3_l["a0"].data.double()
    if not (what.startswith("trained") and not feedforward):  # autograd knows of the base layer's part then
        assert torch_scale.scaled_linear(layer, x, model.fc._peftc.live) is None
    leaves = [x, *layer.ia3_l.values(), *(p for p in layer.base_layer.parameters() if p.requires_grad)]
    result, want = model(x), expected(model, x)
    same(result, want, torch.float32)
    for one, other in zip(gradients(result, leaves), gradients(want, leaves), strict=True):
        same(one, other, torch.float32)


@pytest.mark.parametrize("feedforward", [False, True])
def test_whoever_watches_sees_the_operations(done, feedforward):
    model = adapted(feedforward)
    x = torch.randn(2, 6)
    want = expected(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model.fc.forward(x).float(), want, atol=5e-2)
    with torch.autograd.forward_ad.dual_level():
        assert torch.allclose(model.fc.forward(x), want, atol=1e-6)
    assert done.count(True) == 2  # what scales nothing
    assert torch.allclose(torch.vmap(model)(x), want, atol=1e-6)
    gradient = torch.func.grad(lambda x: model(x).sum())(x)
    assert torch.allclose(gradient, (want * 0 + 1) @ torch.autograd.functional.jacobian(model, x[0]), atol=1e-5)


@pytest.mark.parametrize("feedforward", [False, True])
def test_derivatives_of_derivatives(done, feedforward):
    model = adapted(feedforward, torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, model.fc.ia3_l["a0"]]

    def penalty(forward: Any) -> Any:
        first = torch.autograd.grad(forward(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), leaves)

    for one, other in zip(penalty(model.fc.forward), penalty(lambda x: expected(model, x)), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)
    assert done == [True]


@pytest.mark.parametrize("feedforward", [False, True])
def test_checkpointing_and_hooks_on_what_is_saved(feedforward):
    model = adapted(feedforward)
    x = torch.randn(3, 6, requires_grad=True)
    leaves = [x, model.fc.ia3_l["a0"]]
    want = gradients(model(x), leaves)
    moved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t.clone(), lambda t: t):
        hooked = gradients(model(x), leaves)
    assert moved
    again = gradients(checkpoint(model, x, use_reentrant=False), leaves)
    for one, other, third in zip(want, hooked, again, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


def test_an_adapter_that_is_not_on_this_layer_changes_nothing():
    model = adapted(False)
    x = torch.randn(2, 6)
    assert torch_scale.scale_rows(model.fc, x, ("other",), False) is x
    assert torch_scale.scale_rows(model.fc, x, ("a0",), True) is x
    assert torch_scale.scaled_linear(model.fc, x, ("other",)) is None


def test_wrong_arguments():
    for arguments in ((1, 2), (1, 2, ["a0"]), (1, 2, 3)):
        with pytest.raises(TypeError, match="a layer, x, and a tuple of names"):
            torch_scale.scaled_linear(*arguments)
    for arguments in ((1, 2, ("a0",)), (1, 2, ["a0"], True)):
        with pytest.raises(TypeError, match="a tuple of names, and a truth value"):
            torch_scale.scale_rows(*arguments)
    assert torch_scale.scaled_linear(1, 2, ("a0",)) is None
    assert torch_scale.scaled_linear(adapted(False).fc, [1.0] * 6, ("a0",)) is None
    assert torch_scale.scale_rows(adapted(False).fc, [1.0] * 5, ("a0",), False) is None
    watch: Any = ((), (), {})
    for arguments in ((), (1, watch, *[print] * 4), (int, ((), []), *[print] * 4)):
        with pytest.raises(TypeError, match="a type, a tuple that says who watches"):
            _core.scale_adder(*arguments)
    for arguments in ((), (1, *[print] * 6)):
        with pytest.raises(TypeError, match="a tuple that says who watches, and six functions"):
            _core.scale_node(*arguments)
    forward, backward = _core.scale_node(watch, *[print] * 6)
    with pytest.raises(TypeError, match="4 inputs, got 0"):
        forward()
    with pytest.raises(TypeError, match="ctx and a gradient"):
        backward(1)


@pytest.mark.parametrize("feedforward", [False, True])
def test_what_a_watcher_or_torch_raises_is_raised(feedforward):
    def refuse(*args: Any) -> Any:
        raise OSError("no")

    layer = adapted(feedforward).fc
    x = torch.randn(2, 6, requires_grad=True)
    loud: Any = ((refuse,), (), torch.autograd.forward_ad.__dict__)
    quiet: Any = ((), (), torch.autograd.forward_ad.__dict__)
    pieces = [torch.is_grad_enabled, torch.empty_like, nn.functional.linear, refuse]
    wholes = [_core.scale_adder(nn.Linear, watch, *pieces)[0] for watch in (loud, quiet)]
    wholes.append(_core.scale_adder(nn.Linear, quiet, refuse, *pieces[1:])[0])
    wholes.append(_core.scale_adder(nn.Linear, quiet, *pieces[:2], refuse, torch_scale.ScaledRows.apply)[0])
    for whole in wholes[: 3 + (not feedforward)]:
        with pytest.raises(OSError, match="no"):
            whole(layer, x, ("a0",))
    with torch.no_grad(), pytest.raises(OSError, match="no"):
        _core.scale_adder(nn.Linear, quiet, pieces[0], refuse, *pieces[2:])[1](
            layer, x[:, :5], ("a0",), feedforward
        ) or refuse()


def test_no_reference_is_lost_or_kept():
    for feedforward in (False, True):
        model = adapted(feedforward)
        x = torch.randn(4, 6, requires_grad=True)
        held = [model.fc.ia3_l["a0"], x, model.fc.base_layer, model.fc.base_layer.weight, model.fc.base_layer.bias]

        def run() -> None:
            torch.autograd.grad(model(x).sum(), [x, model.fc.ia3_l["a0"]])  # noqa: B023
            with torch.no_grad():
                model(x)  # noqa: B023

        for _ in range(3):
            run()
        gc.collect()
        before = [sys.getrefcount(one) for one in held]
        for _ in range(100):
            run()
        assert [sys.getrefcount(one) for one in held] == before
