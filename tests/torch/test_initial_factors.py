"""pissa and olora: state dicts of an adapter and of a whole model, into models that have never seen them."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from torch import nn

import peftc

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

INITS = pytest.mark.parametrize("init", ["pissa", "olora"])
BATCH = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        torch.manual_seed(seed)
        self.lin0, self.lin1 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


class Mixed(peftc.PeftAdapterMixin, Net):
    pass


def config(library, init, **more):
    return library.LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=init, **more)


def made(library, init, seed=1, **more):
    return library.get_peft_model(Net(seed), config(library, init, **more)).eval()


def train(model, seed=5):
    """As training would: values away from where they began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def out(model):
    with torch.no_grad():
        return model(BATCH)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------- an adapter's own tensors


@INITS
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapters_state_dict_into_a_fresh_model(init, rslora):
    more = {"use_rslora": rslora}
    trained = train(made(peft, init, **more))
    state = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(trained).items()}
    plain = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    want = out(trained)

    def wrapped(library):
        model = made(library, init, **more)
        library.set_peft_model_state_dict(model, dict(state))
        return model

    def injected(library):
        model = Net().eval()
        library.inject_adapter_in_model(config(library, init, **more), model)
        library.set_peft_model_state_dict(model, dict(plain))
        return model

    for make in (wrapped, injected):
        close(out(make(peft)), want)
        close(out(make(peftc)), want)
    model = Mixed()
    model.load_adapter(adapter_state_dict=plain, peft_config=config(peftc, init, **more))
    close(out(model), want)
    model.delete_adapter("default")
    close(out(model), out(Net().eval()))


@INITS
def test_one_after_another(init):
    """PEFT takes the second one's initial product out of what the first one has left of the base weights."""
    trained = train(made(peft, init))
    state, want = peft.get_peft_model_state_dict(trained), out(trained)
    model = made(peftc, init)
    model.add_adapter("other", config(peftc, init))
    peftc.set_peft_model_state_dict(model, state, adapter_name="other")
    model.set_adapter("other")
    close(out(model), want)


# ------------------------------------------------------------------- the whole model's


@INITS
def test_a_models_state_dict_into_another_base(init):
    trained = train(made(peftc, init))
    state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    assert {key.rpartition(".lora_")[2] for key in state if ".lora_" in key} == {
        "A.default.weight", "B.default.weight", "initial_A.default", "initial_B.default",
    }  # fmt: skip
    assert [name for name, _ in trained.named_parameters() if "initial" in name] == []
    for fresh in (made(peftc, init, seed=2), made(peftc, True, seed=2)):
        result = fresh.load_state_dict(state)
        assert not result.missing_keys and not result.unexpected_keys
        close(out(fresh), out(trained))
        close(out(fresh.unload()), out(Net().eval()))


@INITS
def test_through_a_file(init):
    trained = train(made(peftc, init))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = made(peftc, init, seed=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    close(out(fresh), out(trained))
    with torch.no_grad():  # nothing is shared with what was loaded
        for tensor in trained.state_dict().values():
            tensor.zero_()
    assert out(fresh).abs().max() > 0.01


@INITS
def test_pefts_state_dict_of_a_model(init):
    trained = train(made(peft, init))
    state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    fresh = made(peftc, init, seed=2)
    result = fresh.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    close(out(fresh), out(trained))
    assert not [key for key in fresh.state_dict() if "initial" in key]
    with pytest.raises(RuntimeError, match="Unexpected key.*lora_initial_A"):  # not with a wrong result
        made(peft, init).load_state_dict(train(made(peftc, init)).state_dict())


@INITS
def test_what_lacks_base_weights_or_factors_changes_no_initial_ones(init):
    trained = train(made(peftc, init))
    state = trained.state_dict()
    fresh = made(peftc, init)
    fresh.load_state_dict({key: tensor for key, tensor in state.items() if ".lora_" in key}, strict=False)
    close(out(fresh), out(trained))
    fresh = made(peftc, init)
    no_initial = {key: t for key, t in state.items() if ".lora_" in key and "initial" not in key}
    fresh.load_state_dict(no_initial, strict=False)
    close(out(fresh), out(trained))
    fresh.load_state_dict({key: tensor for key, tensor in state.items() if ".base_layer." in key}, strict=False)
    close(out(fresh), out(trained))


def test_broken_ones_are_refused():
    state = dict(train(made(peftc, "pissa")).state_dict())
    key = "base_model.model.lin0.lora_initial_B.default"
    for bad in (
        {name: tensor for name, tensor in state.items() if name != key},
        {**state, key: torch.zeros(3, 3)},
    ):
        with pytest.raises(RuntimeError, match="lora_initial_A.default, .*both are needed"):
            made(peftc, "pissa").load_state_dict(bad)
    with pytest.raises(RuntimeError, match="Unexpected key"):  # of an adapter that is not there
        made(peftc, "pissa").load_state_dict({**state, key.replace("default", "nobody"): state[key]})


@INITS
def test_several_adapters_and_dtypes(init):
    model = made(peftc, init)
    model.add_adapter("other", config(peftc, init))
    model.add_adapter("plain", config(peftc, True))
    train(model)
    names = ("default", "other", "plain")
    state = copy.deepcopy(model.state_dict())
    fresh = made(peftc, init, seed=2).double()
    for name in names[1:]:
        fresh.add_adapter(name, config(peftc, True))
    fresh.load_state_dict(state)
    for name in names:
        for one in (model, fresh):
            one.base_model.set_adapter([name])
        with torch.no_grad():
            close(fresh(BATCH.double()).float(), out(model))


def test_deleting_leaves_nothing():
    model = Mixed()
    before = list(model.state_dict())
    model.add_adapter(config(peftc, "pissa"))
    assert any("initial" in key for key in model.state_dict())
    model.delete_adapter("default")
    assert list(model.state_dict()) == before
