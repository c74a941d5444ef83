"""Calls of adapted layers that skip nn.Module.__call__ and `forward`: only where nobody would see the difference."""

from __future__ import annotations

import copy
import gc
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn

import peftc
from peftc import _core
from peftc.hosts import torch_lora
from peftc.hosts.torch_watch import CALLS


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.embed = nn.Embedding(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, x: Any) -> Any:
        return self.conv(self.fc(self.embed(x)).mT).mT


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    made.add_adapter(peft.LoraConfig(target_modules=["fc", "embed", "conv"], r=3, init_lora_weights=False), "a")
    return made


IDS = torch.tensor([[0, 3, 5]])


def of_ours(call: Any) -> list[str]:
    """Functions of peftc in Python that ran during `call`."""
    seen: list[str] = []

    def note(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and "/peftc/hosts/" in frame.f_code.co_filename:
            seen.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def test_an_active_linear_layer_and_all_disabled_ones_are_called_directly(model):
    x = torch.randn(2, 6)
    with torch.no_grad():
        assert of_ours(lambda: model.fc(x)) == []
        assert "forward" in of_ours(lambda: model.embed(IDS))  # with an adapter on it
        usual = model(IDS)
        model.disable_adapters()
        assert of_ours(lambda: model(IDS)) == []
        bare = model(IDS)
        model.enable_adapters()
        assert torch.equal(model(IDS), usual) and not torch.equal(bare, usual)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("which", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("where", ["layer", "all"])
def test_hooks_are_called(model, which, where, enabled):
    if not enabled:
        model.disable_adapters()
    seen = []
    hook = lambda module, *args: seen.append(module)
    if where == "layer":
        handle = getattr(model.fc, f"register_{which}_hook")(hook)
    else:
        handle = getattr(nn.modules.module, f"register_module_{which}_hook")(hook)
    try:
        x = torch.randn(2, 6, requires_grad=True)
        model.fc(x).sum().backward()
        assert model.fc in seen
        handle.remove()
        seen.clear()
        model.fc(x).sum().backward()
        assert seen == []
    finally:
        handle.remove()


def test_a_forward_of_the_layers_own_is_called(model):
    model.fc.forward = lambda x: "its own"
    assert model.fc(torch.randn(2, 6)) == "its own"
    del model.fc.forward
    assert model.fc(torch.randn(2, 6)).shape == (2, 6)


@pytest.mark.parametrize("name", ["forward", "_call_impl"])
def test_what_is_patched_in_the_class_is_called(model, monkeypatch, name):
    x = torch.randn(2, 6)
    want = model.fc(x)
    monkeypatch.setattr(torch_lora.Linear, name, lambda self, x: "patched")
    assert model.fc(x) == "patched"
    monkeypatch.undo()
    assert torch.equal(model.fc(x), want) and of_ours(lambda: model.fc(x)) == []


@pytest.mark.parametrize("cls", [nn.Module, torch_lora.Linear])
def test_who_assigns_call_is_asked_until_it_is_taken_back(model, cls):
    x, plain = torch.randn(2, 6), nn.Module.__call__
    cls.__call__ = lambda self, *args: ("patched", type(self).__name__)
    try:
        assert model.fc(x) == ("patched", "Linear")
        _core.direct_calls(torch_lora.Linear, CALLS, None)
        assert model.fc(x) == ("patched", "Linear")
    finally:
        if cls is nn.Module:
            cls.__call__ = plain
        else:
            del cls.__call__
    assert model.fc(x).shape == (2, 6)
    model.add_adapter(peft.LoraConfig(target_modules=["fc"]), "b")
    assert model.fc(x).shape == (2, 6)
    Model().add_adapter(peft.LoraConfig(target_modules=["fc"]))  # new layers: calls are direct again
    with torch.no_grad():
        assert of_ours(lambda: model.fc(x)) == []


def test_the_attribute_is_torchs(model):
    assert type(model.fc).__call__ is nn.Module.__call__ and "__call__" not in vars(type(model.fc))
    assert model.fc.__call__.__func__ is nn.Module.__call__


def test_subclasses_are_called_as_ever(model):
    class Own(torch_lora.Linear):
        def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return "its own"

    class Called(torch_lora.Linear):
        def __call__(self, x: Any) -> Any:  # type: ignore[override]
            return "called"

    for cls, answer in ((Own, "its own"), (Called, "called")):
        layer = copy.copy(model.fc)
        layer.__class__ = cls
        assert layer(torch.randn(2, 6)) == answer


def test_more_arguments_and_none(model):
    x = torch.randn(2, 6)
    assert model.fc(x, adapter_names=["a", "__base__"]).shape == (2, 6)
    assert torch.equal(model.fc(x=x), model.fc(x))
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'x'"):
        model.fc()
    model.disable_adapters()
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'y'"):
        model.fc(x, y=1)


@pytest.mark.parametrize("enabled", [True, False])
def test_errors_are_the_base_layers(model, enabled):
    if not enabled:
        model.disable_adapters()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model.fc(torch.randn(2, 7))
    with pytest.raises(TypeError, match="must be Tensor, not str"):
        model.fc("x")
    del model.fc._modules["base_layer"]
    with pytest.raises(KeyError, match="base_layer"):
        model.fc(torch.randn(2, 6))


def test_compiled_calls_are_called(model):
    model.fc.compile(backend=lambda graph, inputs: lambda *args: (torch.full((2, 6), 7.0),))
    with torch.no_grad():
        assert torch.equal(model.fc(torch.randn(2, 6)), torch.full((2, 6), 7.0))


def test_traces_know_the_layers(model):
    x = torch.randn(2, 6)
    with torch.no_grad():
        want = model.fc(x)
        traced = torch.jit.trace(model.fc, x)
        assert torch.allclose(traced(x), want, atol=1e-6) and "base_layer" in dict(traced.named_children())
        graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))
        assert graph(x).shape == (2, 6)
        Model().add_adapter(peft.LoraConfig(target_modules=["fc"]))
        assert of_ours(lambda: model.fc(x)) == []
        with torch.autograd.profiler.profile():
            assert "forward" in of_ours(lambda: model.fc(x))


def test_a_call_keeps_nothing(model):
    x = torch.randn(2, 6)
    model.disable_adapters()
    with torch.no_grad():
        for _ in range(3):
            model.fc(x)
        gc.collect()
        before = [sys.getrefcount(thing) for thing in (x, model.fc, model.fc.base_layer, model.fc._peftc.live)]
        for _ in range(100):
            model.fc(x)
            with pytest.raises(TypeError):
                model.fc(1)
        gc.collect()
        assert [sys.getrefcount(t) for t in (x, model.fc, model.fc.base_layer, model.fc._peftc.live)] == before


@pytest.mark.parametrize(
    "args", [(), (int, CALLS, None), (object(), CALLS, None), (Model, (), None), (type("Own", (), {}), CALLS, None)]
)
def test_wrong_arguments(args):
    with pytest.raises(TypeError, match="direct_calls"):
        _core.direct_calls(*args)
