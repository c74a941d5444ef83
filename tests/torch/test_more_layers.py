"""LoRA on Conv1d, Conv3d and nn.MultiheadAttention, against PEFT's own."""

import copy

import peft
import pytest
import torch
from their_mixin import PEFT, OnCpu
from torch import nn

import peftc

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self, groups=1, bias=True, batch_first=True) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
        self.room = nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1), bias=bias)
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        line = self.line(x[:, :4]).mean()
        room = self.room(x.reshape(len(x), 2, 2, 2, -1)).mean()
        mixed, weights = self.attention(x.mT, x.mT, self.fc(x.mT))
        return mixed * line + room, weights


class OurNet(peftc.PeftAdapterMixin, Net):
    pass


class TheirNet(OnCpu, Net):
    pass


TARGETS = ["line", "room", "attention"]


def pair(dtype=torch.float32, **options):
    models = []
    for cls in (TheirNet, OurNet):
        torch.manual_seed(0)
        models.append(cls(**options).eval().to(dtype))
    return models


def same(theirs, ours, atol=1e-6):
    for one, other in zip(theirs, ours, strict=True):
        assert torch.allclose(one, other, atol=atol, rtol=1e-5)


X = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "plain": {},
    "rs": {"use_rslora": True, "lora_alpha": 7},
    "dora": {"use_dora": True, "target_modules": ["line", "room"]},
    "lora bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["line", "room"]},
    "patterns": {"rank_pattern": {"attention": 2}, "alpha_pattern": {"line": 3}},
    "groups": {"r": 4, "target_modules": ["line"]},
}


def add(model, fields, name="a"):
    model.add_adapter(
        peft.LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": TARGETS, **fields}), name
    )


def names(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_like_peft(fields, tmp_path):
    theirs, ours = pair(groups=2 if fields.get("r") == 4 else 1)
    add(theirs, fields)
    add(ours, fields)
    assert names(ours) == names(theirs)
    state = {key: value.clone() for key, value in theirs.get_adapter_state_dict("a").items()}
    if "bias" not in fields:  # whose values are in the base layers
        assert set(ours.get_adapter_state_dict("a")) == set(state)
    ours.load_state_dict(theirs.state_dict())
    # Keys and flags
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    if PEFT >= (0, 21):  # does not train this one with bias="all"
        trained[0].discard("attention.base_layer.in_proj_bias")
    assert trained[0] == trained[1]
    same(theirs(X), ours(X))
    # Gradients: PEFT's attention replaces its parameters in a forward pass, so those are looked up again.
    for model in (theirs, ours):
        sum(y.square().sum() for y in model(X)).backward()
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name)
        if "lora_" in name and parameter.grad is not None:
            assert torch.allclose(mine.grad, parameter.grad, atol=1e-5), name
    theirs.disable_adapters()
    ours.disable_adapters()
    if "bias" not in fields:
        same(theirs(X), ours(X))
    ours.enable_adapters()
    # Files
    expected = ours(X)
    ours.save_adapter(tmp_path, "a")
    theirs, again = pair(groups=2 if fields.get("r") == 4 else 1)
    theirs.load_adapter(str(tmp_path))
    again.load_adapter(str(tmp_path))
    same(expected, again(X))
    if fields.get("bias") != "lora_only":
        same(expected, theirs(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    theirs, ours = pair(dtype)
    add(theirs, {})
    add(ours, {})
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        same(
            theirs(X.to(dtype)),
            ours(X.to(dtype)),
            {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype],
        )


def test_exact_and_merged():
    _, model = pair()
    base, keys = model(X), list(model.state_dict())
    before = {name: p.clone() for name, p in model.named_parameters()}
    add(model, {}, "a")
    add(model, {"r": 2}, "b")
    with torch.no_grad():
        a_and_b = None
        for order in (["a"], ["a", "b"]):
            model.set_adapter(order)
            a_and_b = model(X)
            model.merge_adapter()
            same(a_and_b, model(X), 1e-5)
            model.unmerge_adapter()
            same(a_and_b, model(X), 0)
    model.disable_adapters()
    same(base, model(X), 0)
    model.enable_adapters()
    model.delete_adapter("a")
    model.delete_adapter("b")
    assert list(model.state_dict()) == keys
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    same(base, model(X), 0)


def test_merged_like_peft():
    theirs, ours = pair()
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=TARGETS)
    add(ours, {})
    tuner = peft.get_peft_model(theirs, config)
    peft.set_peft_model_state_dict(
        tuner, {f"base_model.model.{k}": v for k, v in ours.get_adapter_state_dict("a").items()}
    )
    ours.merge_adapter()
    merged = tuner.merge_and_unload()
    for name, expected in merged.named_parameters():
        module, _, parameter = name.rpartition(".")
        layer = ours.get_submodule("attention.base_layer" if module.startswith("attention") else module)
        layer = layer.out_proj if "out_proj" in module else layer
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        assert torch.allclose(getattr(layer, parameter), expected, atol=1e-6), name


def test_attention_inside_an_encoder():
    """torch's encoder computes with an attention's weights itself in eval mode; PEFT's layer gives it the base's there."""
    torch.manual_seed(0)

    class Model(peftc.PeftAdapterMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

        def forward(self, x):
            return self.layer(x)

    model = Model().eval()
    x = X.mT
    with torch.no_grad():
        base = model(x)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["self_attn"], init_lora_weights=False), "a")
    slow = model(x)  # gradients are on
    with torch.no_grad():
        fast = model(x)
    assert torch.allclose(slow, fast, atol=1e-5) and not torch.allclose(fast, base, atol=1e-3)
    model.disable_adapters()
    with torch.no_grad():
        assert torch.equal(model(x), base)


def test_refused():
    _, model = pair()
    keys = list(model.state_dict())
    for fields, text in (
        ({"use_dora": True}, "MultiheadAttention does not support DoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' for (Conv1d|MultiheadAttention)"),
        ({"target_modules": ["attention", "out_proj"]}, "attention.out_proj"),
    ):
        with pytest.raises(ValueError, match=text):
            add(model, fields)
        assert list(model.state_dict()) == keys
    model.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    with pytest.raises(ValueError, match="Only same embed for query/key/value"):
        add(model, {})
    with pytest.raises(TypeError, match="mixed adapter batches"):
        _, other = pair()
        add(other, {})
        other.attention(X.mT, X.mT, X.mT, adapter_names=["a", "a", "a"])


def test_survives():
    _, model = pair()
    add(model, {})
    expected = model(X)
    same(expected, copy.deepcopy(model)(X), 0)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    same(expected, compiled(X), 1e-5)
