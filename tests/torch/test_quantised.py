"""Adapters on quantised base layers: PEFT makes them. Stand-ins for the libraries here; the libraries: test_quantised_libraries.py."""

import os
import subprocess
import sys
import types

import peft
import pytest
import torch
from packed_weights import Packed
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc
from peftc.hosts import torch_dispatch

IDS = torch.arange(12).reshape(2, 6) + 3
LATER = {"ROAD": "RoadConfig", "DELORA": "DeloraConfig"}  # no methods of PEFT 0.17

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def patched():
    with peftc.patch_transformers():
        yield


class QuantisedLinear(nn.Linear):
    """A Linear with a forward pass of its own, which reads what is in no parameter, as bitsandbytes' do."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)
        self.weight = nn.Parameter(like.weight.data * 2, requires_grad=False)
        self.weight.scale = 1.0
        self.state = types.SimpleNamespace(scale=0.5)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight.scale, self.bias) * self.state.scale


class MergingLora(peft.tuners.lora.Linear):
    """Merges as PEFT does into quantised layers: the base layer and all that it computes with are replaced."""

    def merge(self, safe_merge=False, adapter_names=None):
        base = self.get_base_layer()
        made = QuantisedLinear(base)
        made.weight = nn.Parameter(base.weight * base.state.scale + self.get_delta_weight(adapter_names[0]), False)
        made.weight.scale, made.state.scale = 1.0, 1.0
        base.state.scale = base.weight.scale = None
        self.base_layer = made
        self.merged_adapters += adapter_names

    def unmerge(self):
        self.merged_adapters.clear()


class NoMerge(peft.tuners.lora.Linear):
    def merge(self, safe_merge=False, adapter_names=None):
        raise NotImplementedError


def make(quantised=("q_proj", "down_proj")):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)).eval()
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if key in quantised:
                setattr(parent, key, QuantisedLinear(child))
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def lora(targets=("q_proj", "v_proj"), **more):
    return peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **more)


def custom(layer):
    config = lora()
    config._register_custom_module({QuantisedLinear: layer})
    return config


def is_pefts(layer):
    return type(layer).__module__.startswith("peft.")


def test_all_linear_means_quantised_layers_too():
    model = make()
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    block = model.model.layers[0]
    linears = [*(getattr(block.self_attn, f"{x}_proj") for x in "qkvo"), block.mlp.up_proj, block.mlp.down_proj]
    assert all(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in linears)
    assert "lm_head" not in model.peft_config["default"].target_modules


def test_mixed_layers_beside_a_native_adapter():
    model, base = make(), logits(make())
    model.add_adapter(lora(), "both")
    assert is_pefts(model.model.layers[0].self_attn.q_proj)
    one = logits(model)
    model.add_adapter(lora(["v_proj"]), "native")
    assert not is_pefts(model.model.layers[0].self_attn.v_proj)
    model.set_adapter("both")
    assert torch.equal(logits(model), one)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.delete_adapter(["both", "native"])
    assert torch.equal(logits(model), base) and type(model.model.layers[0].self_attn.q_proj) is QuantisedLinear


def test_unmerging_gives_everything_back():
    model = peftc.get_peft_model(make(), custom(MergingLora)).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base, weight = layer.base_layer, layer.base_layer.weight
    before = logits(model)
    model.merge_adapter()
    assert layer.base_layer is not base and base.state.scale is None
    assert torch.allclose(logits(model), before, atol=1e-5)
    model.unmerge_adapter()
    assert layer.base_layer is base and base.weight is weight and base.state.scale == 0.5 and weight.scale == 1.0
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), before, atol=1e-5)
    assert type(merged.model.layers[0].self_attn.q_proj) is QuantisedLinear


def test_a_merge_that_peft_cannot_do_names_the_layer():
    model = peftc.get_peft_model(make(), custom(NoMerge)).eval()
    before = logits(model)
    with pytest.raises(
        NotImplementedError, match=r"LORA into model.layers.0.self_attn.q_proj \(QuantisedLinear\): keep"
    ):
        model.merge_adapter()
    assert torch.equal(logits(model), before)
    assert type(model.unload().model.layers[0].self_attn.q_proj) is QuantisedLinear


def adalora(**more):
    fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "orth_reg_weight": 0.5}
    return peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{**fields, **more})


def train(model, steps=7):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(1, steps):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def test_adalora_trains_and_its_ranks_are_loaded(tmp_path):
    with peftc.patch_transformers():
        ours = peftc.get_peft_model(make(), adalora())
    theirs = peft.get_peft_model(make(), adalora())
    assert is_pefts(ours.base_model.model.model.layers[0].self_attn.v_proj)
    assert torch.allclose(train(ours), train(theirs), atol=1e-5)
    pattern = ours.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == sum(map(sum, theirs.peft_config["default"].rank_pattern.values())) == 8
    ours.eval().save_pretrained(tmp_path)
    again = peftc.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(logits(again), logits(ours), atol=1e-5)
    mixin = make()
    mixin.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(mixin), logits(again))
    with pytest.raises(
        TypeError, match=r"QuantisedLinear.forward\(\) got an unexpected keyword argument 'adapter_names'"
    ):
        again(input_ids=IDS, adapter_names=["default", "__base__"])


def test_adalora_of_a_file_with_other_sizes_is_refused(tmp_path):
    model = peftc.get_peft_model(make(), adalora())
    train(model)
    model.save_pretrained(tmp_path)
    state = peftc.get_peft_model_state_dict(model)
    bad = {key: value[:, :3] if key.endswith("q_proj.lora_A") else value for key, value in state.items()}
    other = make()
    names = [name for name, _ in other.named_parameters()]
    with pytest.raises(ValueError, match="size mismatch"):
        other.load_adapter(peft_config=model.peft_config["default"], adapter_state_dict=bad)
    assert [name for name, _ in other.named_parameters()] == names


def test_a_model_that_cannot_be_moved_is_not(tmp_path, monkeypatch):
    model = make()
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    other = make()
    other.hf_device_map = {"": torch.device("cpu")}
    monkeypatch.setattr(type(other), "to", lambda *_: pytest.fail("moved"))
    assert torch_dispatch.plan(other, "auto", None, None, None) is None
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), expected)


def test_numbers_that_are_packed_in_bytes_are_counted():
    class Params4bit(nn.Parameter):
        pass

    model = make(quantised=())
    model.model.norm.packed = Params4bit(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = peftc.get_peft_model(model, lora(["v_proj"]))
    trained, all_of_them = adapted.get_nb_trainable_parameters()
    assert all_of_them == total + trained + 10
    assert (trained, all_of_them) == peft.PeftModel.get_nb_trainable_parameters(adapted)


def packed():
    model = make(quantised=())
    for block in model.model.layers:
        block.self_attn.q_proj.weight = nn.Parameter(Packed(block.self_attn.q_proj.weight.detach()), False)
    return model


def test_packed_weights_are_pefts():
    model, plain = packed(), make(quantised=())
    base = logits(model)
    for one in (plain, model):
        torch.manual_seed(3)
        one.add_adapter(lora())
    assert is_pefts(model.model.layers[0].self_attn.q_proj) and not is_pefts(plain.model.layers[0].self_attn.q_proj)
    state = {key: value.clone() for key, value in plain.get_adapter_state_dict().items()}
    model.delete_adapter("default")
    model.load_adapter(peft_config=lora(), adapter_state_dict=state)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    model.add_adapter(lora(["v_proj"]))  # a plain layer in the same model
    assert not is_pefts(model.model.layers[0].self_attn.v_proj)


WITHOUT_PEFT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
sys.modules["peft"] = None
import peftc, torch
from packed_weights import Packed
from torch import nn

class Linear4bit(nn.Linear):
    def forward(self, x):
        return super().forward(x)

class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.quantised, self.packed, self.plain = Linear4bit(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.packed.weight = nn.Parameter(Packed(torch.ones(4, 4)), requires_grad=False)

model = Model()
names = [name for name, _ in model.named_parameters()]
for make in (peftc.LoraConfig, lambda target_modules: peftc.IA3Config(target_modules=target_modules, feedforward_modules=[])):
    for target in ("quantised", "packed"):
        try:
            model.add_adapter(make(target_modules=[target, "plain"]))
        except ValueError as error:
            print(error)
    assert [name for name, _ in model.named_parameters()] == names
model.add_adapter(peftc.LoraConfig(target_modules=["plain"]))
"""


def test_without_peft_the_error_names_layer_and_remedy():
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ["PYTHONPATH"]])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 4
    for line, what in zip(lines, ["Linear4bit (quantised)", "Linear of Packed (packed)"] * 2, strict=True):
        assert line.startswith(f"Target module {what} is not supported.") and line.endswith("pip install peft")


@pytest.mark.parametrize("method", LATER)
def test_methods_that_are_younger_than_the_reference(method, tmp_path):
    if not hasattr(peft, LATER[method]):
        with pytest.raises(KeyError, match="not a method"):
            make().load_adapter(peft_config={"peft_type": method, "target_modules": ["v_proj"]}, adapter_state_dict={})
        return
    sizes = {"group_size": 4} if method == "ROAD" else {}
    model = make()
    model.add_adapter(lora(["v_proj"]), "native")
    native = logits(model)
    model.add_adapter(getattr(peft, LATER[method])(target_modules=["v_proj"], **sizes), "later")
    for name, parameter in model.named_parameters():
        if "later" in name and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("native")
    assert torch.equal(logits(model), native)
    again = make()
    again.load_adapter(str(tmp_path))
    assert torch.allclose(logits(again), adapted, atol=1e-5)
