"""Adapters that PEFT has to make, in one model with peftc's own: switched, saved, merged and deleted alike."""

import copy
import pickle

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from their_mixin import PEFT, V5, OnCpu
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peftc

pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum("bti,eio->bto", x, self.weight) / 3


class Quantized(nn.Linear):
    """A layer that computes in a way of its own, as quantized ones do."""

    def forward(self, x):
        return nn.functional.linear(x, (self.weight * 16).round() / 16, self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.fc = nn.Linear(8, 8)
        self.up = nn.Linear(8, 8)
        self.quantized = Quantized(8, 8)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.fc(x)) + self.up(x) + self.quantized(x) + self.experts(x)
        return self.head(self.norm(x))


class OurNet(peftc.PeftAdapterMixin, Net):
    pass


class TheirNet(OnCpu, Net):
    pass


IDS = torch.arange(12).reshape(2, 6)

#: What PEFT makes: id → config. Values that do nothing at first are drawn by the tests.
FOREIGN = {
    "loha": lambda **k: peft.LoHaConfig(target_modules=["fc", "up"], r=2, init_weights=False, **k),
    "lokr": lambda **k: peft.LoKrConfig(target_modules=["fc", "up"], r=2, init_weights=False, **k),
    "vera": lambda **k: peft.VeraConfig(target_modules=["fc", "up"], r=4, save_projection=False, **k),
    "boft": lambda **k: peft.BOFTConfig(target_modules=["fc", "up"], boft_block_size=4, init_weights=False, **k),
    "oft": lambda **k: peft.OFTConfig(target_modules=["fc"], oft_block_size=4, init_weights=False, **k),
    "hra": lambda **k: peft.HRAConfig(target_modules=["fc"], r=2, init_weights=False, **k),
    "bone": lambda **k: peft.BoneConfig(target_modules=["fc"], r=4, init_weights=False, **k),
    "miss": lambda **k: peft.MissConfig(target_modules=["fc"], r=4, init_weights=False, **k),
    "c3a": lambda **k: peft.C3AConfig(target_modules=["fc"], block_size=4, init_weights=False, **k),
    "randlora": lambda **k: peft.RandLoraConfig(target_modules=["fc", "up"], r=2, save_projection=False, **k),
    "vblora": lambda **k: peft.VBLoRAConfig(target_modules=["fc", "up"], r=2, num_vectors=8, vector_length=4, **k),
    "fourierft": lambda **k: peft.FourierFTConfig(target_modules=["fc"], n_frequency=9, init_weights=True, **k),
    "shira": lambda **k: peft.ShiraConfig(target_modules=["fc"], r=2, init_weights=False, **k),
    "layer norm": lambda **k: peft.LNTuningConfig(target_modules=["norm"], **k),
    "quantized": lambda **k: peft.LoraConfig(
        target_modules=["quantized", "fc"], r=2, init_lora_weights=False, **k),
    "parameters": lambda **k: peft.LoraConfig(
        target_modules=["fc"], target_parameters=["experts.weight"], r=2, init_lora_weights=False, **k),
    "token rows": lambda **k: peft.LoraConfig(
        target_modules=["fc"], trainable_token_indices={"embed": [1, 4]}, r=2, init_lora_weights=False, **k),
    "tokens": lambda **k: peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[2, 5], init_weights=False, **k),
}  # fmt: skip


#: PEFT 0.21 injects no adapter whose layers share tensors of the tuner's.
SHARED = [
    name
    for name in ("vera", "randlora", "vblora")
    if getattr(PEFT_TYPE_TO_TUNER_MAPPING[FOREIGN[name]().peft_type], "uses_shared_state", False)
]
for one in SHARED:
    del FOREIGN[one]
if not hasattr(peft, "BoneConfig"):
    del FOREIGN["bone"]  # PEFT has MiSS in its place


def lora(**k):
    """What peftc makes."""
    return peft.LoraConfig(target_modules=["fc", "up", "embed"], r=3, init_lora_weights=False, **k)


every_kind = pytest.mark.parametrize("kind", FOREIGN)


def make(cls=OurNet, seed=0):
    torch.manual_seed(seed)
    return cls().eval()


def run(model):
    with torch.no_grad():
        return model(IDS).clone()


def kinds(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def state_of(model):
    """Everything of a model that a refused call must not change."""
    return (
        kinds(model),
        {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
        dict(getattr(model, "peft_config", {})),
        model._hf_peft_config_loaded,
        run(model),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one is other or one == other


def draw(model, name, seed=5):
    """Give an adapter's tensors values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.get_adapter_state_dict(name).values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)


def reference_of(kind, state):
    """The plain stack with this adapter alone: its outputs."""
    theirs = make(TheirNet)
    theirs.load_adapter(
        peft_config=FOREIGN[kind](inference_mode=True), adapter_state_dict=dict(state), adapter_name="x"
    )
    return theirs


@every_kind
def test_beside_adapters_of_peftc(kind):
    model = make()
    base = run(model)
    plain = kinds(model)
    model.add_adapter(lora(), "ours")
    draw(model, "ours")
    ours = run(model)
    model.add_adapter(FOREIGN[kind](), "other")
    draw(model, "other")
    other = run(model)
    assert model.active_adapters() == ["other"]
    assert any(isinstance(m, BaseTunerLayer) and type(m).__module__.startswith("peft.") for m in model.modules())
    assert not torch.allclose(other, base) and not torch.allclose(other, ours)

    model.set_adapter("ours")
    assert torch.equal(run(model), ours)
    model.set_adapter(["other", "ours"])
    assert model.active_adapters() == ["other", "ours"]
    both = run(model)
    assert not torch.allclose(both, other) and not torch.allclose(both, ours)
    model.set_adapter("other")
    assert torch.equal(run(model), other)
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()
    assert torch.equal(run(model), other)

    model.add_adapter(lora(), "third")
    model.set_adapter("other")
    assert torch.equal(run(model), other)
    model.delete_adapter("ours")
    assert torch.equal(run(model), other)
    model.delete_adapter(["other", "third"])
    assert kinds(model) == plain and torch.equal(run(model), base)
    assert not model._hf_peft_config_loaded


@every_kind
def test_state_dict_is_pefts(kind):
    torch.manual_seed(3)
    theirs = make(TheirNet)
    torch.manual_seed(4)
    theirs.add_adapter(FOREIGN[kind](), "x")
    if kind == "vblora":  # whose bank of vectors is not where PEFT looks for it
        expected = {k.replace(".x", ""): v for k, v in theirs.state_dict().items() if "vblora_logits" in k}
        expected["base_model.vblora_vector_bank"] = theirs.fc.vblora_vector_bank["x"]
    else:
        expected = theirs.get_adapter_state_dict("x")
    model = make()
    model.add_adapter(lora(), "x2")
    model.add_adapter(FOREIGN[kind](), "x")
    state = model.get_adapter_state_dict("x")
    assert set(state) == set(expected)
    assert all(state[key].shape == expected[key].shape and state[key].dtype == expected[key].dtype for key in state)
    trained = {name.replace(".base_layer", "") for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name.replace(".base_layer", "") for name, p in theirs.named_parameters() if p.requires_grad}


@every_kind
def test_saved_and_loaded(kind, tmp_path):
    """A folder of ours gives the same outputs under PEFT alone, and in a model with adapters of peftc."""
    model = make()
    model.add_adapter(lora(), "x2")
    model.add_adapter(FOREIGN[kind](), "x")
    draw(model, "x")
    expected = run(model)
    model.save_adapter(tmp_path, "x")
    theirs = make(TheirNet)
    theirs.load_adapter(str(tmp_path), adapter_name="x")
    if kind not in (
        "vblora",
        "layer norm",
    ):  # whose bank of vectors, and order of names, the mixin of Transformers loses
        assert torch.allclose(run(theirs), expected, atol=1e-6)
    again = make()
    again.add_adapter(lora(), "x")
    again.load_adapter(str(tmp_path), adapter_name="y")
    assert again.active_adapters() == (["x", "y"] if kind in OTHER_FAMILY else ["y"])
    again.set_adapter("y")
    assert torch.equal(run(again), expected)
    assert not again.training
    if kind == "parameters":  # PEFT has one such adapter in a model
        again.delete_adapter("y")
    again.load_adapter(str(tmp_path), adapter_name="z", is_trainable=True)
    again.set_adapter("z")
    state = again.get_adapter_state_dict("z")
    assert all(torch.equal(value, state[key]) for key, value in model.get_adapter_state_dict("x").items())


OTHER_FAMILY = set(FOREIGN) - {"quantized", "parameters", "token rows"}


@every_kind
def test_refused_leaves_no_trace(kind):
    model = make()
    model.add_adapter(lora(), "ours")
    model.add_adapter(FOREIGN[kind](), "first")
    state = dict(model.get_adapter_state_dict("first"))
    key = next(iter(state))
    state[key] = torch.zeros(2, 3, 4)
    model.set_adapter(["ours", "first"] if kind != "layer norm" else ["first"])
    before = state_of(model)
    one = kind == "parameters" and PEFT < (0, 21)  # later versions take several
    with pytest.raises(ValueError, match="only one LoRA adapter" if one else "size mismatch"):
        model.load_adapter(peft_config=FOREIGN[kind](), adapter_state_dict=state, adapter_name="second")
    assert same(state_of(model), before)
    if kind not in ("tokens", "parameters"):  # which have no other modules, and one adapter in a model
        config = FOREIGN[kind](modules_to_save=["head"])
        with pytest.raises(KeyError, match="head"):
            model.load_adapter(peft_config=config, adapter_state_dict={}, adapter_name="second")
        assert same(state_of(model), before)


REFUSED = {
    "not a layer for it": lambda: peft.LoHaConfig(target_modules=["fc", "norm"]),
    "nowhere": lambda: peft.LoKrConfig(target_modules=["nowhere"]),
    "other key": lambda: peft.VeraConfig(target_modules=["fc"], projection_prng_key=7, save_projection=False),
    "no such tokens": lambda: peft.LoraConfig(target_modules=["fc"], trainable_token_indices={"nowhere": [1]}),
    "second of parameters": lambda: peft.LoraConfig(target_parameters=["experts.weight"], target_modules=["fc"]),
    "dropout of parameters": lambda: peft.LoraConfig(target_parameters=["experts.weight"], lora_dropout=0.5),
    "pissa": lambda: peft.LoraConfig(target_modules=["quantized"], init_lora_weights="pissa"),
    "replication": lambda: peft.LoraConfig(target_modules=["fc"], layer_replication=[(0, 1)]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=2),
}


if V5:
    del REFUSED["second of parameters"]  # PEFT 0.21 takes several


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_what_peft_refuses_leaves_no_trace(config):
    model = make()
    model.add_adapter(lora(modules_to_save=["head"]), "ours")
    model.add_adapter(FOREIGN["lokr" if "vera" in SHARED else "vera"](), "vera")
    model.add_adapter(FOREIGN["parameters"](), "params")
    model.set_adapter(["ours", "vera"])
    before = state_of(model)
    with pytest.raises((ValueError, KeyError, NotImplementedError, TypeError)):
        model.add_adapter(config(), "second")
    assert same(state_of(model), before)
    for name in ("ours", "vera", "params"):
        model.set_adapter(name)
        run(model)


@every_kind
def test_merging_is_exact(kind):
    model = make()
    model.add_adapter(lora(), "ours")
    draw(model, "ours")
    model.add_adapter(FOREIGN[kind](), "other")
    draw(model, "other")
    for names in (["other"], ["ours", "other"]):
        model.set_adapter(names)
        expected, before = run(model), state_of(model)
        model.merge_adapter()
        if kind != "quantized":  # rounds what it is given
            assert torch.allclose(run(model), expected, atol=1e-5), names
        model.unmerge_adapter()
        assert same(state_of(model), before)


@every_kind
@pytest.mark.parametrize("order", [["ours", "other"], ["other", "ours"]])
def test_merging_one_after_the_other_is_exact(kind, order):
    model = make()
    for name, config in (("ours", lora()), ("other", FOREIGN[kind]())):
        model.add_adapter(config, name)
        draw(model, name)
    model.set_adapter(["ours", "other"])
    before = state_of(model)
    for name in order:
        model.merge_adapter([name])
    model.unmerge_adapter()
    assert same(state_of(model), before)


@every_kind
def test_survives_copies(kind):
    model = make()
    model.add_adapter(lora(), "ours")
    model.add_adapter(FOREIGN[kind](), "other")
    draw(model, "other")
    expected = run(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied), expected)
        copied.set_adapter("ours")
        copied.set_adapter("other")
        assert torch.equal(run(copied), expected)
        copied.delete_adapter(["ours", "other"])
        assert torch.equal(run(copied), run(make()))
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("kind", ["loha", "quantized", "token rows"])
def test_head_and_biases_of_an_adapter_that_peft_makes(kind, tmp_path):
    extra = {"modules_to_save": ["head"]} | ({"bias": "all"} if kind == "quantized" else {})
    model = make()
    base = run(model)
    model.add_adapter(lora(), "ours")
    model.add_adapter(FOREIGN[kind](**extra), "other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.modules_to_save.other.weight", "head.modules_to_save.other.bias"} <= trained
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS).square().sum().backward()
    optimizer.step()
    expected = run(model)
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()
    assert torch.equal(run(model), expected)
    model.save_adapter(tmp_path, "other")
    again = make()
    again.add_adapter(lora(), "ours")
    again.load_adapter(str(tmp_path), adapter_name="back")
    again.set_adapter("back")
    assert torch.equal(run(again), expected)
    model.delete_adapter("other")
    model.set_adapter([])
    assert torch.equal(run(model), base)


@pytest.mark.skipif("vera" in SHARED, reason="PEFT 0.21 does not inject VeRA")
def test_vera_twice():
    """Two adapters of VeRA: PEFT's layers keep the projections of the last one only."""
    model = make()
    model.add_adapter(FOREIGN["vera"](), "one")
    draw(model, "one", 1)
    one = run(model)
    model.add_adapter(FOREIGN["vera"](), "two")
    draw(model, "two", 2)
    two = run(model)
    assert not torch.allclose(one, two)
    model.set_adapter("one")
    assert torch.equal(run(model), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(run(model), two)


def test_order_given():
    model = make()
    model.add_adapter(FOREIGN["loha"](), "a")
    model.add_adapter(lora(), "b")
    model.add_adapter(peft.IA3Config(target_modules=["fc"], feedforward_modules=[]), "c")
    model.set_adapter(["b", "c", "a"])
    assert model.active_adapters() == ["b", "c", "a"]
    with pytest.raises(ValueError, match="could not be found: nobody"):
        model.set_adapter(["a", "nobody"])
    assert model.active_adapters() == ["b", "c", "a"]


def test_gpt2_patched():
    torch.manual_seed(0)
    with peftc.patch_transformers():
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)).eval()
        before = kinds(model)
        ids = torch.arange(6)[None]
        base = model(ids).logits
        model.add_adapter(peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False), "ours")
        model.add_adapter(
            peft.LoraConfig(
                target_modules=["c_attn"], trainable_token_indices={"wte": [1, 2]}, init_lora_weights=False
            ),
            "rows",
        )
        draw(model, "rows")
        assert {k for k in model.get_adapter_state_dict("rows") if "token" in k} == {
            "transformer.wte.token_adapter.trainable_tokens_delta"
        }
        assert not torch.allclose(model(ids).logits, base)
        model.set_adapter(["ours", "rows"])
        model.disable_adapters()
        assert torch.equal(model(ids).logits, base)
        model.delete_adapter(["ours", "rows"])
        assert kinds(model) == before and torch.equal(model(ids).logits, base)
