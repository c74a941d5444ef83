"""`hotswap` on torch models: a LoRA adapter gets another's weights in place."""

import copy
import warnings

import pytest
import torch
from torch import nn

import peftc

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.down = nn.Linear(8, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, ids):
        x = self.up(self.embed(ids))
        x = x + self.grouped(self.conv(x.view(-1, 2, 2, 2))).sum((1, 2, 3)).view(*x.shape[:-1], 1)
        x = x + self.line(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.volume(x.reshape(-1, 1, 2, 2, 2)).sum((1, 2, 3, 4)).view(*x.shape[:-1], 1)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.down(x))


ALL = ["embed", "up", "conv", "grouped", "line", "volume", "attention", "down"]
LINEAR = ["up", "down"]
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def model():
    torch.manual_seed(0)
    return Model().eval()


def adapter(seed, **fields):
    """(config, tensors) of an adapter that changes outputs."""
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **fields}
    torch.manual_seed(0)
    made = Model()
    made.add_adapter(peftc.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    state = made.get_adapter_state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator) * 0.3
        tensor.copy_(noise.abs() + 0.5 if "magnitude" in name else noise)
    return peftc.LoraConfig(**fields, inference_mode=True), {key: value.clone() for key, value in state.items()}


def load(on, name, which, **options):
    config, tensors = which
    on.load_adapter(None, name, peft_config=copy.deepcopy(config), adapter_state_dict=tensors, **options)


def run(on):
    with torch.no_grad():
        return on(IDS)


def alone(which):
    fresh = model()
    load(fresh, "one", which)
    return run(fresh)


PAIRS = {
    "same ranks": ({}, {"lora_alpha": 3}),
    "lower": ({}, {"r": 2}),
    "higher": ({"r": 2}, {"r": 6, "lora_alpha": 1, "use_rslora": True}),
    "patterns": ({"rank_pattern": {"up": 2}}, {"rank_pattern": {"down": 6}, "alpha_pattern": {"up": 3}}),
    "fewer modules": ({}, {"target_modules": ["up", "conv"]}),
    "dora": (
        {"use_dora": True, "target_modules": ["embed", "up", "conv"]},
        {"use_dora": True, "target_modules": ["up", "embed"], "r": 2},
    ),
    "lora_bias": ({"lora_bias": True, "target_modules": LINEAR}, {"lora_bias": True, "target_modules": LINEAR, "r": 2}),
    "heads": ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"], "r": 2}),
    "biases": ({"bias": "all"}, {"bias": "all", "r": 2}),
    "pissa": ({"target_modules": LINEAR}, {"target_modules": LINEAR, "init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "with room"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_takes_turns(pair, prepared, tmp_path):
    first, second = adapter(1, **pair[0]), adapter(2, **pair[1])
    on = model()
    base = run(on)
    if prepared:
        on.enable_peft_hotswap(6)
    load(on, "one", first)
    torch.testing.assert_close(run(on), alone(first))
    parameters, shapes = dict(on.named_parameters()), {name: p.shape for name, p in on.named_parameters()}
    for which in (second, first, second):
        load(on, "one", which, hotswap=True)
        torch.testing.assert_close(run(on), alone(which))
        state = on.get_adapter_state_dict()
        assert state.keys() == which[1].keys()
        assert all(torch.equal(state[key], value) for key, value in which[1].items())
        given = on.get_adapter_state_dict(state_dict=on.state_dict())
        assert given.keys() == state.keys() and all(torch.equal(given[key], state[key]) for key in state)
    now = dict(on.named_parameters())
    assert now.keys() == parameters.keys() and all(now[name] is parameters[name] for name in now)
    if prepared:
        grouped = [name for name in shapes if name.startswith("grouped.")]
        assert {name: p.shape for name, p in now.items() if name not in grouped} == {
            name: shape for name, shape in shapes.items() if name not in grouped
        }
    assert not any(p.requires_grad for p in on.parameters())
    on.save_adapter(tmp_path)
    again = model()
    again.load_adapter(tmp_path)
    torch.testing.assert_close(run(again), alone(second))
    on.delete_adapter("one")
    assert torch.equal(run(on), base)
    assert set(on.state_dict()) == set(model().state_dict())


def test_the_others_stay_as_they_are():
    on = model()
    load(on, "one", adapter(1))
    on.add_adapter(peftc.LoraConfig(r=2, target_modules=LINEAR), "two")
    on.add_adapter(peftc.IA3Config(target_modules=["up"], feedforward_modules=[]), "ia3")
    on.set_adapter(["two", "ia3"])
    before = {name: (p.requires_grad, p.clone()) for name, p in on.named_parameters() if ".one" not in name}
    outputs = run(on)
    load(on, "one", adapter(2), hotswap=True)
    assert on.active_adapters() == ["two", "ia3"] and torch.equal(run(on), outputs)
    for name, p in on.named_parameters():
        if name in before:
            assert p.requires_grad == before[name][0] and torch.equal(p, before[name][1]), name
    load(on, "one", (peftc.LoraConfig(r=4, target_modules=ALL), adapter(2)[1]), hotswap=True)
    assert all(p.requires_grad for name, p in on.named_parameters() if ".one" in name)


REFUSED = {
    "more modules": (RuntimeError, "unexpected keys found: embed", {"target_modules": [*LINEAR, "embed"]}),
    "dora": (ValueError, "use_dora", {"use_dora": True, "target_modules": LINEAR}),
    "head": (ValueError, "modules_to_save", {"modules_to_save": ["head"], "target_modules": LINEAR}),
    "biases": (ValueError, "bias", {"bias": "lora_only", "target_modules": LINEAR}),
    "rank": (ValueError, "target_rank=6", {"r": 7, "target_modules": LINEAR}),
}


@pytest.mark.parametrize(("error", "text", "fields"), REFUSED.values(), ids=REFUSED)
def test_refused_changes_nothing(error, text, fields):
    on = model()
    on.enable_peft_hotswap(6)
    load(on, "one", adapter(1, target_modules=LINEAR))
    config = on.peft_config["one"]
    kinds = [(name, type(module)) for name, module in on.named_modules()]
    values = {name: p.clone() for name, p in on.named_parameters()}
    with pytest.raises(error, match=text):
        load(on, "one", adapter(2, **fields))
    assert on.peft_config == {"one": config} and on.peft_config["one"] is config
    assert [(name, type(module)) for name, module in on.named_modules()] == kinds
    assert all(torch.equal(p, values[name]) for name, p in on.named_parameters())


def test_no_room_for_a_higher_rank():
    on = model()
    on.enable_peft_hotswap(2)
    with pytest.raises(ValueError, match="pad the adapter to the target rank 2, but the original rank is larger"):
        load(on, "one", adapter(1))
    assert not on._hf_peft_config_loaded and not any("lora" in name for name in on.state_dict())
    on.enable_peft_hotswap(4)
    load(on, "one", adapter(1))


def test_room_stays_empty_in_training_and_copies():
    on = model()
    on.enable_peft_hotswap(6)
    config, tensors = adapter(1, target_modules=[*LINEAR, "embed"])
    config.inference_mode = False
    load(on, "one", (config, tensors))
    on = copy.deepcopy(on)
    plain = model()
    load(plain, "one", (config, tensors))
    for one in (on, plain):
        optimiser = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            one(IDS).square().mean().backward()
            optimiser.step()
    torch.testing.assert_close(run(on), run(plain))
    padded, expected = on.get_adapter_state_dict(), plain.get_adapter_state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(padded[key], value)
    assert not on.up.lora_A["one"].weight[4:].any() and not on.up.lora_B["one"].weight[:, 4:].any()
    on.merge_adapter()
    torch.testing.assert_close(run(on), run(plain))
    on.unmerge_adapter()
    torch.testing.assert_close(run(on), run(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scalings_keep_their_precision(dtype):
    config, tensors = adapter(1, r=3, lora_alpha=1, target_modules=LINEAR)
    results = []
    for prepared in (False, True):
        on = model().to(dtype)
        if prepared:
            on.enable_peft_hotswap(6)
        load(on, "one", (config, tensors))
        results.append(run(on))
    exact = {torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(*results, rtol=exact, atol=exact)


def test_a_compiled_model_is_not_compiled_again():
    first, second = adapter(1, target_modules=LINEAR), adapter(2, r=6, lora_alpha=5, target_modules=LINEAR)
    on = model()
    on.enable_peft_hotswap(6)
    load(on, "one", first)
    compiled = torch.compile(on, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(run(compiled), alone(first))
        for which in (second, first):
            load(on, "one", which)
            torch.testing.assert_close(run(compiled), alone(which))
    torch.compiler.reset()
