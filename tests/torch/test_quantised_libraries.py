"""Adapters on layers of the real quantisation libraries, where one is installed: the same as Transformers + PEFT, and merging is
exact to take back. None of them is a dependency; the paths that they need have stand-ins in test_quantised.py."""

import copy
import types

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftc

IDS = torch.arange(12).reshape(2, 6) + 3
QUANTISED = ("q_proj", "o_proj", "down_proj")  # the others stay plain layers

pytestmark = pytest.mark.filterwarnings("ignore")


def bitsandbytes_8bit(layer):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def bitsandbytes_4bit(layer):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4", module=made)
    return made.to("cpu")


def torchao_int8(layer):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def hqq_4bit(layer):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def quanto_int8(layer):
    quanto = pytest.importorskip("optimum.quanto")
    made = quanto.QLinear.from_module(layer, weights=quanto.qint8)
    made.freeze()
    return made


LIBRARIES = [bitsandbytes_8bit, bitsandbytes_4bit, torchao_int8, hqq_4bit, quanto_int8]


def make(quantise):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if key in QUANTISED:
                setattr(parent, key, quantise(child))
    # what Transformers leaves on a model that it quantises, and PEFT asks for
    model.is_loaded_in_8bit = quantise is bitsandbytes_8bit
    model.is_loaded_in_4bit = quantise is bitsandbytes_4bit
    if quantise is torchao_int8:
        model.hf_quantizer = types.SimpleNamespace(quantization_config=Int8())
    return model.eval()


class Int8:
    quant_method = "torchao"

    def get_apply_tensor_subclass(self):
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


TARGETS = [*QUANTISED, "v_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, init_lora_weights=False),
    "all": lambda: peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=TARGETS, total_step=9, init_lora_weights=False),
}


def run(make_model, config):
    """What there is to see of an adapter's life, or the error that it ends with."""
    model = make_model()
    seen = {"base": logits(model)}
    try:
        model.add_adapter(config, "one")
    except (ValueError, NotImplementedError) as error:
        return {type(error).__name__: torch.tensor(0.0)}
    torch.manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and ".one" in name:
            nn.init.normal_(parameter, std=0.1)
    seen["added"] = logits(model.eval())
    seen |= {f"state {key}": value.clone() for key, value in model.get_adapter_state_dict().items()}
    model.state_dict()  # after a pass in eval mode bitsandbytes' 4-bit layers need this before a backward pass on a CPU
    try:
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        seen |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    except RuntimeError:  # of quanto's layers, with AdaLora
        seen["no gradients"] = torch.tensor(0.0)
    model.eval().disable_adapters()
    seen["disabled"] = logits(model)
    model.enable_adapters()
    if config.peft_type == "LORA":
        model.add_adapter(peft.LoraConfig(target_modules=["k_proj"]), "two")
        model.set_adapter(["one", "two"])
        seen["both"] = logits(model.eval())
    return seen


@pytest.mark.parametrize("quantise", LIBRARIES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_as_transformers_with_peft(quantise, config):
    theirs = run(lambda: make(quantise), config())
    with peftc.patch_transformers():
        ours = run(lambda: make(quantise), config())
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], atol=1e-5), key


@pytest.mark.parametrize("quantise", LIBRARIES, ids=lambda one: one.__name__)
def test_merging_is_right_and_taken_back_exactly(quantise):
    model = make(quantise)
    base = logits(model)
    adapted = peftc.get_peft_model(model, CONFIGS["lora"]()).eval()
    before = logits(adapted)
    change = (before - base).abs().max()
    again = logits(adapted)
    adapted.merge_adapter()
    merged = logits(adapted)
    if quantise is not quanto_int8:  # into whose copies PEFT merges
        assert (merged - before).abs().max() < change / 2  # rounded anew
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted), again)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    plain = adapted.merge_and_unload()
    assert torch.equal(logits(plain), merged)
    assert type(plain.model.layers[0].self_attn.q_proj) is type(make(quantise).model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize("quantise", LIBRARIES, ids=lambda one: one.__name__)
def test_files_and_base_layers(quantise, tmp_path):
    with peftc.patch_transformers():
        model = make(quantise)
        kinds = [(name, type(module)) for name, module in model.named_modules()]
        model.add_adapter(CONFIGS["lora"]())
        expected = logits(model)
        model.__dict__.pop("hf_quantizer", None)  # ours is too plain for this
        model.save_pretrained(tmp_path)
        other = make(quantise)
        other.load_adapter(str(tmp_path))
        assert torch.allclose(logits(other), expected, atol=1e-5)
        model.delete_adapter("default")
        assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    theirs = peft.PeftModel.from_pretrained(make(quantise), tmp_path)
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    ours = peftc.PeftModel.from_pretrained(make(quantise), tmp_path)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("bits", [8, 4])
def test_through_from_pretrained(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    make(copy.copy).save_pretrained(tmp_path / "model")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)

    def load():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    with peftc.patch_transformers():
        model = peft.prepare_model_for_kbit_training(load())
        model.add_adapter(CONFIGS["all"]())
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        expected = logits(model.eval())
        model.save_pretrained(tmp_path / "adapter")
        other = load()
        other.load_adapter(str(tmp_path / "adapter"))
        assert torch.allclose(logits(other), expected, atol=0.05)  # bitsandbytes computes in two ways on a CPU
