"""Adapters on torch models: peftc beside Transformers' mixin with PEFT, on two copies of one model."""

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from their_mixin import PEFT, OnCpu, freeze_counts
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import PeftAdapterMixin
from transformers.pytorch_utils import Conv1D

import peftc


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.up = nn.Linear(8, 12)
        self.mid = Conv1D(10, 12)
        self.down = nn.Linear(10, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        image = x.reshape(x.shape[0], 2, -1, 4)
        x = x + self.conv(image).mean(1).reshape(x.shape[0], -1, 4).repeat(1, 1, 2)[:, : x.shape[1]]
        return self.head(self.norm(self.down(torch.tanh(self.mid(torch.tanh(self.up(x)))))))


class Theirs(OnCpu, Body):
    device = torch.device("cpu")


class Ours(peftc.PeftAdapterMixin, Body):
    pass


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["up", "mid", "down"]),
    "pattern": lambda: peft.LoraConfig(r=4, target_modules="all-linear", rank_pattern={"up": 2}, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["up", "mid", "conv", "embed"], use_dora=True),
    "conv": lambda: peft.LoraConfig(r=2, target_modules=["conv", "embed"], init_lora_weights=False),
    "bias": lambda: peft.LoraConfig(r=2, target_modules=["up"], bias="all"),
    "bias_of_adapted": lambda: peft.LoraConfig(r=2, target_modules=["up", "mid"], bias="lora_only"),
    "lora_bias": lambda: peft.LoraConfig(r=2, target_modules=["up", "mid"], lora_bias=True),
    "head": lambda: peft.LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["up", "down", "conv"], feedforward_modules=["down"]),
    "ia3_linear": lambda: peft.IA3Config(target_modules=["up", "mid"], feedforward_modules=["up"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=["up", "mid"], total_step=10),
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", ["bias", "bias_of_adapted"])
@pytest.mark.parametrize("how", ["disabled", "another is active"])
def test_trained_biases_are_saved_while_not_in_effect(name, how):
    model = pair()[1]
    model.add_adapter(CONFIGS[name](), "one")
    model.up.base_layer.bias.data.fill_(3.0)
    if how == "disabled":
        model.disable_adapters()
    else:
        model.add_adapter(CONFIGS["lora"](), "two")
    assert not (model.up.base_layer.bias == 3.0).any()
    for given in (None, model.state_dict()):
        assert (model.get_adapter_state_dict("one", given)["up.base_layer.bias"] == 3.0).all()
    model.delete_adapter("one")
    assert not model.get_submodule("up").bias.requires_grad


def test_methods_nest_on_a_convolution():
    """PEFT has no such thing: IA³ scales the convolution's output, with LoRA's part if that is inside."""
    x = torch.randn(2, 2, 4, 4)
    for order in (("LORA", "IA3"), ("IA3", "LORA")):
        model = pair()[1]
        base = model.conv(x).detach()
        for method in order:
            cls = {"LORA": peftc.LoraConfig, "IA3": peftc.IA3Config}[method]
            model.add_adapter(
                cls(target_modules=["conv"], **({"r": 2} if method == "LORA" else {"feedforward_modules": []})), method
            )
        for path, parameter in model.conv.named_parameters():
            if "lora_" in path or "ia3_" in path:
                parameter.data.normal_()
        model.set_adapter("LORA")
        lora = model.conv(x).detach() - base
        model.set_adapter("IA3")
        scale = model.conv(x).detach() / base
        model.set_adapter(list(order))
        expected = (base + lora) * scale if order[0] == "LORA" else base * scale + lora
        torch.testing.assert_close(model.conv(x).detach(), expected, rtol=1e-4, atol=1e-4)
        assert set(model.get_adapter_state_dict("LORA")) == {"conv.lora_A.weight", "conv.lora_B.weight"}
        assert set(model.get_adapter_state_dict("IA3")) == {"conv.ia3_l"}


def test_base_embeddings_of_an_adapter_stand_in_while_it_is_active(tmp_path, caplog):
    config = LlamaConfig(vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ids = torch.arange(5)[None]
    with peftc.patch_transformers():
        model = LlamaForCausalLM(config).eval()
        before = model.model.embed_tokens.weight.clone()
        with torch.no_grad():
            base = model(ids).logits
        model.add_adapter(peftc.LoraConfig(r=2, target_modules=["embed_tokens"]))
        state = model.get_adapter_state_dict()
        key = "model.embed_tokens.base_layer.weight"
        assert torch.equal(state[key], before)
        config = model.peft_config["default"]
        model.load_adapter(None, "same", peft_config=config, adapter_state_dict=state)
        other = {name: tensor + 1 if name == key else tensor.clone() for name, tensor in state.items()}
        model.load_adapter(None, "other", peft_config=config, adapter_state_dict=other)
        assert not caplog.records

        def embeddings():
            return model.model.embed_tokens.weight

        assert torch.equal(embeddings(), before + 1) and not torch.allclose(model(ids).logits, base)
        with_other = model(ids).logits
        model.save_adapter(tmp_path, "other")
        model.disable_adapters()
        assert torch.equal(embeddings(), before) and torch.equal(model(ids).logits, base)
        model.enable_adapters()
        assert torch.equal(embeddings(), before + 1)
        for names, expected in ((["same"], before), (["same", "other"], before + 1), (["other", "same"], before + 1)):
            model.set_adapter(names)
            assert torch.equal(embeddings(), expected)
        model.set_adapter("same")
        assert torch.equal(model.get_adapter_state_dict("other")[key], before + 1)
        assert torch.equal(model.get_adapter_state_dict("same")[key], before)
        copied = copy.deepcopy(model)
        for one in (model, copied):
            one.set_adapter("other")
            assert torch.equal(one(ids).logits, with_other)
            one.merge_adapter()
            assert torch.allclose(one(ids).logits, with_other, atol=1e-6)
            one.delete_adapter(["other", "same", "default"])
            assert torch.equal(one.model.embed_tokens.weight, before) and torch.equal(one(ids).logits, base)
        model.load_adapter(str(tmp_path))
        assert torch.equal(model(ids).logits, with_other)
        with pytest.raises(ValueError, match=r"size mismatch for .*embed_tokens.base_layer.weight.*resize"):
            model.load_adapter(None, "bad", peft_config=config, adapter_state_dict={**state, key: torch.zeros(14, 8)})
        assert torch.equal(model(ids).logits, with_other)
    theirs = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(before)
    theirs.load_state_dict({n: p for n, p in copied.state_dict().items()})
    theirs.load_adapter(str(tmp_path))
    assert torch.allclose(theirs(ids).logits, with_other, atol=1e-6)


def pair(dtype=torch.float32):
    torch.manual_seed(0)
    theirs, ours = Theirs().to(dtype), Ours().to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def same_values(theirs, ours):
    """Give ours the values of theirs (fresh adapters draw other numbers), zero factors made different from zero."""
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not ("lora_" in name or "ia3_" in name or "modules_to_save" in name or parameter.requires_grad):
                continue
            if parameter.numel() and not parameter.any():
                parameter.normal_(std=0.3)
            mine[name].copy_(parameter)


def add_both(config, name="a", dtype=torch.float32):
    theirs, ours = pair(dtype)
    theirs.add_adapter(CONFIGS[config](), name)
    ours.add_adapter(CONFIGS[config](), name)
    freeze_counts(theirs)
    theirs.eval()
    ours.eval()
    same_values(theirs, ours)
    return theirs, ours


def flags(model):
    """requires_grad by name. PEFT's magnitudes of convolutions and embeddings do not follow what is active."""
    odd = ("conv.lora_magnitude", "embed.lora_magnitude")
    return {n: p.requires_grad for n, p in model.named_parameters() if not n.startswith(odd)}


def assert_same(theirs, ours, tolerance=1e-5):
    assert flags(theirs) == flags(ours)
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("config", CONFIGS)
def test_add(config):
    theirs, ours = add_both(config)
    assert list(dict(theirs.named_parameters())) == list(dict(ours.named_parameters()))
    assert set(theirs.state_dict()) == set(ours.state_dict())
    assert_same(theirs, ours)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients(config):
    theirs, ours = add_both(config)
    for model in (theirs, ours):
        model(IDS).square().sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad is None) == (mine[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ["lora", "ia3", "adalora"])
def test_dtypes(config, dtype):
    theirs, ours = add_both(config, dtype=dtype)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n or "ia3_" in n} == {dtype}
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-9 if dtype is torch.float64 else 0.05, atol=0.05)


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dict_and_file(config, tmp_path):
    theirs, ours = add_both(config)
    expected, state = theirs.get_adapter_state_dict(), ours.get_adapter_state_dict()
    if config == "bias_of_adapted" and PEFT < (0, 21):  # loses the trained biases
        assert set(state) - set(expected) == {"up.base_layer.bias", "mid.base_layer.bias"}
    else:
        assert set(state) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value)
    ours.save_adapter(tmp_path / "saved")
    _, again = pair()
    again.load_adapter(tmp_path / "saved")
    torch.testing.assert_close(again(IDS), ours(IDS))
    if config not in ("bias_of_adapted",):
        reader, _ = pair()
        reader.load_adapter(str(tmp_path / "saved"))
        reader.eval()
        torch.testing.assert_close(reader(IDS), ours(IDS), rtol=1e-5, atol=1e-5)
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert set(written) == {f"base_model.model.{key}" for key in state}


@pytest.mark.parametrize("config", CONFIGS)
def test_disable_delete(config):
    _, plain = pair()
    _, ours = add_both(config)
    before = plain(IDS)
    with_adapter = ours(IDS)
    ours.disable_adapters()
    assert torch.equal(ours(IDS), before)
    ours.enable_adapters()
    assert torch.equal(ours(IDS), with_adapter)
    ours.delete_adapter("a")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(ours(IDS), before)
    assert not hasattr(ours, "peft_config") and not ours._hf_peft_config_loaded


@pytest.mark.parametrize("config", [c for c in CONFIGS if "bias" not in c])
def test_merge(config):
    _, ours = add_both(config)
    expected, weights = ours(IDS), copy.deepcopy(ours.state_dict())
    ours.merge_adapter()
    torch.testing.assert_close(ours(IDS), expected, rtol=1e-4, atol=1e-4)
    ours.unmerge_adapter()
    assert all(torch.equal(weights[k], v) for k, v in ours.state_dict().items())
    assert torch.equal(ours(IDS), expected)


@pytest.mark.parametrize("first", ["lora", "ia3_linear", "adalora", "dora"])  # PEFT nests no convolutions
@pytest.mark.parametrize("second", ["lora", "pattern", "ia3_linear", "conv"])
def test_two_adapters(first, second):
    theirs, ours = add_both(first)
    for model in (theirs, ours):
        model.add_adapter(CONFIGS[second](), "b")
        model.eval()
    same_values(theirs, ours)
    assert_same(theirs, ours)
    for names in (["a"], ["a", "b"], ["b", "a"], "b"):
        theirs.set_adapter(names)
        ours.set_adapter(names)
        assert ours.active_adapters() == ([names] if isinstance(names, str) else names)
        assert_same(theirs, ours)
    theirs.disable_adapters()
    ours.disable_adapters()
    assert_same(theirs, ours)
    theirs.enable_adapters()
    ours.enable_adapters()
    assert_same(theirs, ours)


@pytest.mark.parametrize("config", CONFIGS)
def test_copies(config):
    _, ours = add_both(config)
    ours.add_adapter(peft.LoraConfig(r=3, target_modules=["up", "down"]), "b")
    ours.set_adapter("a")
    ours.eval()
    expected = ours(IDS)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert torch.equal(made(IDS), expected)
        made.set_adapter("b")
        assert torch.equal(ours(IDS), expected)
        made.delete_adapter(["a", "b"])
        assert torch.equal(ours(IDS), expected)
        assert not any("lora_" in n or "ia3_" in n for n, _ in made.named_parameters())


def test_replaced_tensors_reach_the_kernels():
    _, ours = add_both("lora")
    ours.up.lora_B["a"].weight.data = torch.zeros(12, 4)
    ours.down.lora_B["a"].weight = nn.Parameter(torch.zeros(8, 4))
    ours.mid.lora_B["a"].weight.data.zero_()
    _, plain = pair()
    torch.testing.assert_close(ours(IDS), plain(IDS))
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(IDS).dtype is torch.bfloat16


def test_refused_calls_change_nothing():
    _, ours = add_both("head")
    names, out = {n: p.requires_grad for n, p in ours.named_parameters()}, ours(IDS)
    bad = [
        (ValueError, lambda: ours.add_adapter(peft.LoraConfig(target_modules=["nowhere"]), "b")),
        (ValueError, lambda: ours.add_adapter(peft.LoraConfig(target_modules=["norm"]), "b")),
        (ValueError, lambda: ours.add_adapter(peft.LoraConfig(target_modules=["up"]), "a")),
        (ValueError, lambda: ours.add_adapter(peft.LoraConfig(target_modules=["up"], r=0), "b")),
        (TypeError, lambda: ours.add_adapter({"peft_type": "LORA"}, "b")),
        (ValueError, lambda: ours.set_adapter(["a", "b"])),
        (ValueError, lambda: ours.delete_adapter(["a", "b"])),
        (KeyError, lambda: ours.load_adapter(peft_config=CONFIGS["head"](), adapter_state_dict={}, adapter_name="b")),
    ]
    for error, call in bad:
        with pytest.raises(error):
            call()
        assert {n: p.requires_grad for n, p in ours.named_parameters()} == names
        assert torch.equal(ours(IDS), out)
        assert list(ours.peft_config) == ["a"]
    fresh = Ours()
    with pytest.raises(ValueError, match="nowhere"):
        fresh.add_adapter(peft.LoraConfig(target_modules=["nowhere"]))
    assert not fresh._hf_peft_config_loaded and not hasattr(fresh, "peft_config")


def test_instances_of_pefts_classes():
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    _, ours = add_both("head")
    assert isinstance(ours.up, BaseTunerLayer) and isinstance(ours.up, LoraLayer)
    assert isinstance(ours.head, ModulesToSaveWrapper)
    assert ours.head.weight is ours.head.modules_to_save["a"].weight


def test_trained_adalora_loads():
    """A learned rank_pattern, which Transformers' mixin cannot load."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = "tests/data/real/news"
    with open(f"{folder}/adapter_config.json") as file:
        assert json.load(file)["rank_pattern"]
    with peftc.patch_transformers():
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        model = BertForSequenceClassification(config)
        model.load_adapter(folder)
        assert model.active_adapters() == ["default"]


def test_patch_and_undo(tmp_path):
    from transformers import AutoModelForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    ids = torch.arange(6)[None]
    before = PeftAdapterMixin.add_adapter
    patch = peftc.patch_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False), "mine")
        assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("peftc.")
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again.load_adapter(str(tmp_path / "adapter"))
        torch.testing.assert_close(again(ids).logits, expected)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(whole(ids).logits, expected)
    finally:
        patch.undo()
    assert PeftAdapterMixin.add_adapter is before
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain.load_adapter(str(tmp_path / "adapter"))
    assert type(plain.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")
    torch.testing.assert_close(plain(ids).logits, expected)
    with peftc.patch_transformers():
        plain.disable_adapters()  # made by PEFT before: PEFT's own methods
    assert not torch.allclose(plain(ids).logits, expected)


def test_trainer_is_wrapped_whenever_it_is_imported():
    """Imported before, while or after the patch holds, in processes of their own: the module is imported once."""
    import subprocess
    import sys

    code = """
import sys, peftc
from {first}
patch = peftc.patch_transformers()
assert ("transformers.trainer" in sys.modules) == {early}
from transformers import Trainer
wrapped = (Trainer._load_from_checkpoint, Trainer._load_best_model)
assert all(hasattr(method, "__wrapped__") for method in wrapped)
patch.undo()
assert Trainer._load_from_checkpoint is wrapped[0].__wrapped__ and Trainer._load_best_model is wrapped[1].__wrapped__
patch = peftc.patch_transformers()
assert len([finder for finder in sys.meta_path if "peftc" in type(finder).__module__]) == 0
patch.undo()
"""
    for first, early in (("transformers import Trainer", True), ("transformers import PreTrainedModel", False)):
        run = [sys.executable, "-c", code.format(first=first, early=early)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_modes_of_one_model_are_its_own(tmp_path):
    """What is loaded to be trained is in train mode, on its model alone, until the model's mode is set."""
    _, source = add_both("lora")
    source.save_adapter(tmp_path)
    trained, other = (pair()[1].eval() for _ in range(2))
    trained.load_adapter(tmp_path, is_trainable=True)
    other.load_adapter(tmp_path)
    awake = {name for name, module in trained.named_modules() if module.training}
    assert awake and all("lora_" in name for name in awake)
    assert {name for name, _ in trained.named_modules() if name.endswith(".a")} <= awake
    assert not any(module.training for module in other.modules())
    copy.deepcopy(other).train()
    assert not any(module.training for module in other.modules())
    trained.load_adapter(tmp_path, "frozen")
    assert not any(module.training for module in trained.modules())


def test_adapters_are_drawn_in_any_mode_and_after_it():
    """What an inference mode makes, for one, can be written to there only."""
    from peftc.hosts import torch_host

    seeds = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        torch_host._NUMBERS.clear()
        with mode():
            Ours().add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"), "a")
        for _ in range(2):
            torch.manual_seed(3)
            seeds.append(torch_host.HOST.new_seed())
        with torch.inference_mode():
            torch.manual_seed(3)
            seeds.append(torch_host.HOST.new_seed())
    assert len(set(seeds)) == 1
    assert torch_host.HOST.new_seed() != seeds[0]


def test_a_device_context_does_not_matter():
    """Tensors are where their base layers are, whatever torch makes its own tensors on just then."""
    model, abstract = Ours(), Ours().to("meta")
    for one in (model, abstract):
        with torch.device("meta"):
            one.add_adapter(peft.LoraConfig(target_modules=["up", "mid"]))
    for one, kind in ((model, "cpu"), (abstract, "meta")):
        assert {p.device.type for name, p in one.named_parameters() if "lora" in name} == {kind}
    assert model.eval()(IDS).shape == (2, 4, 3)
