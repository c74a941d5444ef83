"""Base weights that travel with an adapter: embeddings that target_modules names."""

import contextlib
import warnings

import numpy as np
import pytest

import peftc

IDS = np.arange(7).reshape(1, 7)
SAYS = "Setting `save_embedding_layers` to `True`"


class Words(peftc.PeftAdapterMixin, peftc.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = peftc.nn.Embedding(7, 4)
        self.lm_head = peftc.nn.Linear(4, 7, bias=False)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        return self.lm_head(self.embed_tokens(ids))


def words(seed=0):
    peftc.manual_seed(seed)
    return Words().eval()


def config(*targets, **fields):
    return peftc.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **fields)


def test_an_adapter_keeps_the_embeddings_that_it_was_made_on(tmp_path):
    one, other = words(1), words(2)
    one.add_adapter(config("embed_tokens", "lm_head"))
    one.eval()
    with pytest.warns(UserWarning, match=SAYS + ".*embed_tokens and others"):
        one.save_adapter(tmp_path)
    before = np.array(other(IDS))
    other.load_adapter(tmp_path)
    np.testing.assert_array_equal(other(IDS), one(IDS))
    other.disable_adapters()
    np.testing.assert_array_equal(other(IDS), before)
    other.enable_adapters()
    other.merge_adapter()
    np.testing.assert_allclose(other(IDS), one(IDS), atol=1e-6)
    other.unmerge_adapter()
    other.delete_adapter("default")
    np.testing.assert_array_equal(other(IDS), before)


def test_only_the_active_one_stands_in():
    model = words()
    own = np.array(model.embed_tokens.weight)
    model.add_adapter(config("embed_tokens"), "first")
    model.add_adapter(config("embed_tokens"), "last")
    with pytest.warns(UserWarning, match=SAYS):
        model.get_adapter_state_dict("last")["embed_tokens.base_layer.weight"][...] = 0
    name = "embed_tokens.base_layer.weight"
    assert not np.asarray(dict(model.named_parameters())[name]).any()
    assert not dict(model.named_parameters())[name].requires_grad
    model.set_adapter("first")
    np.testing.assert_array_equal(dict(model.named_parameters())[name], own)
    assert list(model.state_dict()).count(name) == 1


def test_a_warning_that_is_an_error_writes_nothing(tmp_path):
    model = words()
    model.add_adapter(config("lm_head"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=SAYS):
            model.get_adapter_state_dict()
        with pytest.raises(UserWarning, match=SAYS):
            model.save_adapter(tmp_path / "folder")
    assert not list((tmp_path / "folder").glob("*"))


def test_a_warning_may_delete_the_adapter(tmp_path, monkeypatch):
    model = words()

    def show(*_args, **_options):
        if getattr(model, "peft_config", None):
            model.delete_adapter("default")

    for call in (model.get_adapter_state_dict, lambda: model.save_adapter(tmp_path)):
        model.add_adapter(config("lm_head"))
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", show)
            with contextlib.suppress(KeyError):
                call()
        assert not model._hf_peft_config_loaded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(dtype, tmp_path):
    model, again = words(1).to(dtype), words(1).to(dtype)
    model.add_adapter(config("embed_tokens"))
    model.eval()
    with pytest.warns(UserWarning, match=SAYS):
        model.save_adapter(tmp_path)
    again.load_adapter(tmp_path)
    np.testing.assert_array_equal(np.asarray(again(IDS)), np.asarray(model(IDS)))


@pytest.mark.parametrize("fields", [{"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, {}])
def test_what_is_replaced_or_not_adapted_has_no_copy(fields):
    model = words()
    model.add_adapter(
        peftc.LoraConfig(**{"target_modules": r"lm_hea[d]", "modules_to_save": ["embed_tokens"], **fields})
    )
    with pytest.warns(UserWarning, match=SAYS):
        state = model.get_adapter_state_dict()
    assert "embed_tokens.base_layer.weight" not in state
    assert list(state)[-1] == "lm_head.base_layer.weight"
