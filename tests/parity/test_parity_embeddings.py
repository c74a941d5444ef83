"""Base weights of embeddings that target_modules names: PEFT saves them with the adapter, and so does peftc."""

import logging
import warnings

import numpy as np
import peft
import pytest
import torch
from features import close, randomise
from safetensors.numpy import load_file, save_file
from twins import Twins

import peftc

WEIGHTS = "adapter_model.safetensors"
ALREADY = "Setting `save_embedding_layers` to `True`"


def language_net(lib, *, head_bias=False, getters=True):
    """Words → one layer → scores of words, with Transformers' names and accessors."""

    class Body(lib.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = lib.Embedding(13, 8)
            self.q_proj = lib.Linear(8, 8)

        def forward(self, ids):
            return lib.tanh(self.q_proj(self.embed_tokens(ids)))

    class Net(*lib.mixins, lib.Module):
        def __init__(self):
            super().__init__()
            self.model = Body()
            self.lm_head = lib.Linear(8, 13, bias=head_bias)

        def forward(self, ids):
            return (self.lm_head(self.model(ids)),)

    class WithGetters(Net):
        def get_input_embeddings(self):
            return self.model.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

    return WithGetters() if getters else Net()


IDS = np.arange(13).reshape(1, 13)
TARGETS = {
    "input": ["embed_tokens"],
    "output": ["lm_head"],
    "both": ["embed_tokens", "lm_head", "q_proj"],
    "regex": r"model\.(embed_tokens|q_proj)",
    "regex that matches neither": r"model\.q_proj",
    "neither": ["q_proj"],
    "full name": ["model.embed_tokens"],  # PEFT looks for the bare names in a list
}


class Pair:
    def __init__(self, folder, fields, **shape):
        self.shape = shape
        self.twins = Twins(language_net, 6, **shape)
        self.ours = self.twins.ours
        self.fields = {"r": 4, "lora_alpha": 8, **fields}
        self.model = peft.get_peft_model(self.twins.theirs, peft.LoraConfig(**self.fields))
        randomise(self.model, "default")
        self.model.eval()
        self.folder = folder
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder)

    def fresh(self):
        return Twins(language_net, 6, **self.shape)

    def output(self, model=None):
        with torch.no_grad():
            return (model or self.model)(torch.from_numpy(IDS))[0].numpy()

    def check(self, model=None, rtol=1e-5):
        close(self.ours(IDS)[0], self.output(model), rtol)


@pytest.fixture
def reports(caplog):
    """What loads had to report about keys."""
    with caplog.at_level(logging.WARNING, "transformers.integrations.peft"):
        yield caplog


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"bias": "all"}], ids=["lora", "dora", "bias=all"])
@pytest.mark.parametrize("head_bias", [False, True])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_state_dict_and_folder(targets, head_bias, fields, tmp_path, reports):
    pair = Pair(tmp_path / "theirs", {"target_modules": targets, **fields}, head_bias=head_bias)
    pair.ours.load_adapter(tmp_path / "theirs")
    assert not reports.records
    pair.check()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = {
            key.removeprefix("base_model.model."): value.detach().numpy()
            for key, value in peft.get_peft_model_state_dict(pair.model).items()
        }
        theirs = sum(str(w.message).startswith(ALREADY) for w in caught)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = pair.ours.get_adapter_state_dict()
        ours = sum(str(w.message).startswith(ALREADY) for w in caught)
    assert ours == theirs
    assert list(state) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair.ours.save_adapter(tmp_path / "ours")
        assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
        pair.check(peft.PeftModel.from_pretrained(pair.fresh().theirs, tmp_path / "ours").eval())
        fresh = pair.fresh().ours
        fresh.add_adapter(peftc.LoraConfig(**pair.fields))
        assert list(fresh.get_adapter_state_dict()) == list(expected)


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head"], ["lm_head"]])
def test_other_base_weights_in_the_file(targets, tmp_path, reports):
    """A file from a base model with other embeddings: PEFT writes them into the base model; ours has them while the
    adapter is active, and the base model keeps its own."""
    pair = Pair(tmp_path / "saved", {"target_modules": targets}, head_bias=True)
    base = pair.fresh()
    before = np.array(base.ours(IDS)[0])
    state = load_file(tmp_path / "saved" / WEIGHTS)
    changed = {key: value * 1.25 if ".base_layer." in key else value for key, value in state.items()}
    assert any(not np.array_equal(state[key], changed[key]) for key in state)
    save_file(changed, tmp_path / "saved" / WEIGHTS, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(base.theirs, tmp_path / "saved").eval()

    ours = base.ours
    ours.load_adapter(tmp_path / "saved")
    assert not reports.records
    close(ours(IDS)[0], pair.output(theirs))
    own = dict(ours.named_parameters())
    np.testing.assert_array_equal(
        np.asarray(own["lm_head.base_layer.weight"]), changed["base_model.model.lm_head.base_layer.weight"]
    )
    ours.merge_adapter()
    close(ours(IDS)[0], pair.output(theirs))
    ours.unmerge_adapter()
    ours.disable_adapters()
    np.testing.assert_array_equal(ours(IDS)[0], before)
    ours.enable_adapters()
    with pytest.warns(UserWarning, match=ALREADY):
        ours.save_adapter(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "saved" / WEIGHTS).read_bytes()
    ours.delete_adapter("default")
    np.testing.assert_array_equal(ours(IDS)[0], before)
    assert all(".base_layer." not in name for name in ours.state_dict())


def test_without_the_base_weights(tmp_path, reports):
    """Files of older versions, or saved with save_embedding_layers=False: the base model's own, and no complaint."""
    pair = Pair(tmp_path, {"target_modules": ["embed_tokens", "lm_head"]})
    state = {key: value for key, value in load_file(tmp_path / WEIGHTS).items() if ".base_layer." not in key}
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    pair.ours.load_adapter(tmp_path)
    assert not reports.records
    pair.check()


def test_a_model_that_does_not_say_which_its_embeddings_are(tmp_path, reports):
    pair = Pair(tmp_path / "theirs", {"target_modules": ["embed_tokens", "q_proj"]})
    plain = Twins(language_net, 6, getters=False).ours
    plain.load_adapter(tmp_path / "theirs")
    assert not reports.records
    close(plain(IDS)[0], pair.output())
    with pytest.warns(UserWarning, match=ALREADY):
        plain.save_adapter(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    fresh = Twins(language_net, 6, getters=False).ours
    fresh.add_adapter(peftc.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    assert not [key for key in fresh.get_adapter_state_dict() if ".base_layer." in key]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_weights(init, tmp_path, reports):
    """The base weight in the file is what PEFT leaves of it; it is not subtracted from twice."""
    pair = Pair(tmp_path / "theirs", {"target_modules": ["lm_head"], "init_lora_weights": init})
    pair.ours.load_adapter(tmp_path / "theirs")
    assert not reports.records
    pair.check()
    with pytest.warns(UserWarning, match=ALREADY):
        pair.ours.save_adapter(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    fresh = pair.fresh().ours
    before = np.array(fresh(IDS)[0])
    fresh.add_adapter(peftc.LoraConfig(**pair.fields))
    fresh.eval()
    close(fresh(IDS)[0], before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        residual = fresh.get_adapter_state_dict()["lm_head.base_layer.weight"]
        close(residual, pair.model.base_model.model.lm_head.base_layer.weight.detach().numpy())
        fresh.save_adapter(tmp_path / "fresh")
        loaded = peft.PeftModel.from_pretrained(pair.fresh().theirs, tmp_path / "fresh").eval()
    close(before, pair.output(loaded))
