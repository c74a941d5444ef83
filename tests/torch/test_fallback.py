"""Adapters that peftc has no code for, on models of Transformers: PEFT makes them. Beside ours: test_mixed.py."""

import subprocess
import sys

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraModel
from transformers import GPT2Config, GPT2LMHeadModel

import peftc

IDS = torch.arange(6)[None]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def patched():
    with peftc.patch_transformers():
        yield


def make(seed=0, extra=True):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)).eval()
    if extra:
        model.transformer.extra = torch.nn.Conv1d(4, 4, 1)
        model.transformer.attention = torch.nn.MultiheadAttention(8, 2)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.clone()


LOKR = peft.LoKrConfig
NEEDS_PEFT = {
    "lokr": lambda: LOKR(target_modules=["lm_head"], init_weights=False),
    "loha": lambda: peft.LoHaConfig(target_modules=["lm_head"], init_weights=False),
    "vera": lambda: peft.VeraConfig(target_modules=["c_fc"], save_projection=False),
    "layer norm": lambda: peft.LNTuningConfig(target_modules=["ln_1"]),
    "attention": lambda: peft.LoraConfig(
        target_modules=["attention", "c_fc"], trainable_token_indices={"wte": [1]}, init_lora_weights=False
    ),
    "parameters": lambda: peft.LoraConfig(target_modules=[], target_parameters=["lm_head.weight"]),
    "token rows": lambda: peft.LoraConfig(target_modules=["c_fc"], trainable_token_indices={"wte": [1]}),
}


def by_peft(model):
    return any(isinstance(m, BaseTunerLayer) and type(m).__module__.startswith("peft.") for m in model.modules())


def kinds(model):
    return [(name, type(module)) for name, module in model.named_modules()]


if getattr(VeraModel, "uses_shared_state", False):
    del NEEDS_PEFT["vera"]  # PEFT 0.21 injects no adapter whose layers share tensors of the tuner's


@pytest.mark.parametrize("config", NEEDS_PEFT.values(), ids=NEEDS_PEFT.keys())
def test_peft_makes_it(config):
    model = make()
    before = kinds(model)
    base = logits(model)
    model.add_adapter(config(), "one")
    assert by_peft(model) and model._hf_peft_config_loaded and model.active_adapters() == ["one"]
    adapted = logits(model)
    model.disable_adapters()
    assert torch.allclose(logits(model), base)
    model.enable_adapters()
    assert torch.allclose(logits(model), adapted)
    assert model.get_adapter_state_dict()
    model.delete_adapter("one")
    assert kinds(model) == before and torch.allclose(logits(model), base)
    # What peftc has code for is its own.
    model.add_adapter(peft.LoraConfig(target_modules=["c_fc"]), "two")
    assert not by_peft(model) and isinstance(model.transformer.h[0].mlp.c_fc, BaseTunerLayer)


def test_save_and_load(tmp_path):
    model = make(extra=False)
    model.add_adapter(NEEDS_PEFT["lokr"]())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = make(extra=False)
    again.load_adapter(str(tmp_path))
    assert by_peft(again) and torch.equal(logits(again), expected)
    assert again.active_adapters() == ["default"]


def test_configs_of_peftc_and_dicts(tmp_path):
    model = make()
    model.add_adapter(
        peftc.LoraConfig(target_modules=["extra"], trainable_token_indices={"wte": [1]}, init_lora_weights=False), "one"
    )
    model.add_adapter(peftc.LoraConfig(target_modules=["c_fc"]), adapter_name="two")
    assert by_peft(model) and isinstance(model.peft_config["one"], peft.LoraConfig)
    state = model.get_adapter_state_dict("one")
    model.set_adapter("one")
    again = make()
    fields = {"peft_type": "LORA", "target_modules": ["extra"], "trainable_token_indices": {"wte": [1]}}
    again.load_adapter(peft_config=fields, adapter_state_dict=state)
    assert by_peft(again) and torch.equal(logits(again), logits(model))


def test_what_peft_refuses_too_leaves_no_trace():
    model = make()
    model.requires_grad_(True)
    before, base = kinds(model), logits(model)
    for config in (
        peft.LoraConfig(target_modules=["c_fc", "ln_1"]),
        LOKR(target_modules=["c_fc", "wte"]),
        LOKR(target_modules=["nowhere"]),
        peft.PrefixTuningConfig(num_virtual_tokens=2),
    ):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            model.add_adapter(config)
        assert kinds(model) == before and torch.equal(logits(model), base)
        assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")
        assert all(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter(peft.LoraConfig(target_modules=["c_fc"]))
    assert not by_peft(model)


WITHOUT_PEFT = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
sys.modules["peft"] = None
import peftc, transformers
peftc.patch_transformers()
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
model.add_adapter(peftc.LoraConfig(target_modules=["c_fc"]), "ours")
model.delete_adapter("ours")
for config, state in (({"peft_type": "LOKR", "target_modules": ["c_fc"]}, {}), (peftc.LoraConfig(target_modules=["ln_1"]), None)):
    try:
        if state is None:
            model.add_adapter(config)
        else:
            model.load_adapter(peft_config=config, adapter_state_dict=state)
    except (NotImplementedError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_without_peft():
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    method, layer = done.stdout.splitlines()
    assert method.startswith("NotImplementedError") and "LOKR" in method and "pip install peft" in method
    assert (
        layer.startswith("ValueError") and "LayerNorm (transformer.h.0.ln_1)" in layer and "pip install peft" in layer
    )
