"""What Transformers' own tests/peft_integration/test_peft_integration.py checks, under its names and in our words: that
file is in no package.  test_transformers_suite.py runs this in processes of its own, offline, on the repositories of
standin_hub.py: once with Transformers and PEFT as they are, once with peftc put under Transformers.

`isinstance` here is always against PEFT's own classes."""

import contextlib
import gc
import os

import pytest
import torch
import transformers
from huggingface_hub import hf_hub_download
from packaging.version import Version
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from standin_hub import ADAPTER, BASE, MIXTRAL, REVISIONS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

V5 = Version(transformers.__version__) >= Version("5.0")
LOGGER = logging.get_logger("transformers.integrations.peft")
IDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])

pytestmark = pytest.mark.filterwarnings("ignore")
both = pytest.mark.parametrize("auto", [AutoModelForCausalLM, OPTForCausalLM], ids=["Auto", "OPT"])
later = pytest.mark.skipif(not V5, reason="came to Transformers after this version")


def quantised(test):
    ready = torch.cuda.is_available() and transformers.utils.is_bitsandbytes_available()
    return pytest.mark.skipif(not ready, reason="needs an accelerator and bitsandbytes")(test)


def adapted(model):
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits.clone()


def far(a, b, tolerance=1e-6):
    return not torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def generates(model):
    return model.generate(input_ids=IDS, max_new_tokens=4).shape[1] > IDS.shape[1]


def lora(**changes):
    return LoraConfig(init_lora_weights=False, **changes)


def adapter_tensors():
    return torch.load(hf_hub_download(ADAPTER, "adapter_model.bin"), weights_only=True)


# ------------------------------------------------------------- from_pretrained, save_pretrained


@both
def test_peft_from_pretrained(auto):
    how = {"use_safetensors": False} if V5 else {}
    with CaptureLogger(LOGGER) as log:
        model = auto.from_pretrained(ADAPTER, **how)
    assert "unexpected keys" not in log.out and "missing keys" not in log.out
    assert "UNEXPECTED" not in log.out and "MISSING" not in log.out
    assert adapted(model) and model._hf_peft_config_loaded
    assert generates(model)
    assert far(logits(model), logits(auto.from_pretrained(BASE)))


@both
def test_peft_state_dict(auto):
    state = auto.from_pretrained(ADAPTER, revision="refs/pr/2").get_adapter_state_dict()
    assert state and all("lora" in key for key in state)
    saved = {key.removeprefix("base_model.model."): value for key, value in adapter_tensors().items()}
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[key], saved[key]) for key in saved)


@both
def test_peft_save_pretrained(auto, tmp_path):
    model = auto.from_pretrained(ADAPTER, revision="refs/pr/2")
    expected = logits(model)
    formats = {"safetensors": {}} if V5 else {"safetensors": {}, "bin": {"safe_serialization": False}}
    for suffix, how in formats.items():
        model.save_pretrained(tmp_path / suffix, **how)
        written = {path.name for path in (tmp_path / suffix).iterdir()}
        assert {f"adapter_model.{suffix}", "adapter_config.json"} <= written
        assert not written & {"config.json", "pytorch_model.bin", "model.safetensors"}
        again = auto.from_pretrained(tmp_path / suffix)
        assert adapted(again)
        assert torch.equal(logits(again), expected)


def test_peft_from_pretrained_hub_kwargs():
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(REVISIONS)
    expected = logits(AutoModelForCausalLM.from_pretrained(ADAPTER))
    for how in ({"revision": "test"}, {"revision": "main", "subfolder": "test_subfolder"}):
        for auto in (AutoModelForCausalLM, OPTForCausalLM):
            model = auto.from_pretrained(REVISIONS, adapter_kwargs=dict(how))
            assert adapted(model)
            assert torch.equal(logits(model), expected)


@both
def test_peft_add_adapter_from_pretrained(auto, tmp_path):
    model = auto.from_pretrained(BASE)
    model.add_adapter(lora())
    assert adapted(model)
    model.save_pretrained(tmp_path)
    assert adapted(auto.from_pretrained(tmp_path))


@quantised
def test_peft_from_pretrained_kwargs():
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(ADAPTER, device_map="auto", quantization_config=config)
    assert type(model.model.decoder.layers[0].self_attn.v_proj).__name__ == "Linear8bitLt"
    assert model.hf_device_map is not None
    model.generate(input_ids=IDS.to(model.device))


@quantised
@pytest.mark.parametrize("bits", [4, 8])
def test_peft_save_quantized(bits, tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(ADAPTER, device_map="auto", quantization_config=config)
    layer = "Linear8bitLt" if bits == 8 else "Linear4bit"
    assert type(model.model.decoder.layers[0].self_attn.v_proj).__name__ == layer
    model.save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= written
    assert not written & {"pytorch_model.bin", "model.safetensors"}


@pytest.mark.parametrize("classes", [AutoModelForCausalLM, OPTForCausalLM], ids=["Auto", "OPT"])
@quantised
def test_peft_save_quantized_regression(classes, tmp_path):
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    classes.from_pretrained(ADAPTER, device_map="auto", quantization_config=config).save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in written and "model.safetensors" not in written


# ------------------------------------------------------------- add, set, disable, delete


@both
def test_peft_add_adapter(auto):
    model = auto.from_pretrained(BASE)
    model.add_adapter(lora())
    assert adapted(model) and generates(model)


@both
def test_peft_enable_disable_adapters(auto):
    model = auto.from_pretrained(BASE)
    base = logits(model)
    model.add_adapter(lora())
    before = logits(model)
    model.disable_adapters()
    disabled = logits(model)
    model.enable_adapters()
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)
    assert far(before, disabled, 1e-12)
    assert torch.equal(disabled, base)


@both
def test_peft_add_multi_adapter(auto, tmp_path):
    model = auto.from_pretrained(BASE)
    base = logits(model)
    config = lora()
    model.add_adapter(config)
    one = logits(model)
    model.add_adapter(config, adapter_name="adapter-2")
    two = logits(model)
    assert adapted(model) and generates(model)
    for name in ("default", "adapter-2"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        if hasattr(transformers.PreTrainedModel, "active_adapter"):
            assert model.active_adapter() == name
    assert far(one, two) and far(base, two)
    model.set_adapter(["adapter-2", "default"])
    assert model.active_adapters() == ["adapter-2", "default"]
    if hasattr(transformers.PreTrainedModel, "active_adapter"):
        assert model.active_adapter() == "adapter-2"
    mixed = logits(model)
    assert far(one, mixed) and far(two, mixed)
    with pytest.raises(ValueError):  # several active adapters have no one file
        model.save_pretrained(tmp_path)


@both
def test_delete_adapter(auto):
    model = auto.from_pretrained(BASE)
    first, second = lora(), lora()

    def add(*which):
        for name, config in zip(("adapter_1", "adapter_2"), (first, second), strict=True):
            if name in which:
                model.add_adapter(config, adapter_name=name)

    def names():
        return list(getattr(model, "peft_config", {}))

    add("adapter_1", "adapter_2")
    assert names() == ["adapter_1", "adapter_2"]
    model.delete_adapter("adapter_1")
    assert names() == ["adapter_2"]
    model.delete_adapter("adapter_2")
    assert not hasattr(model, "peft_config") and not model._hf_peft_config_loaded

    add("adapter_1", "adapter_2")
    model.delete_adapter(["adapter_1", "adapter_2"])
    assert not hasattr(model, "peft_config") and not model._hf_peft_config_loaded
    with pytest.raises(ValueError, match=r"No adapter loaded\. Please load an adapter first\."):
        model.delete_adapter("nonexistent")

    add("adapter_1")
    for absent in ("nonexistent", ["adapter_1", "nonexistent"]):
        with pytest.raises(ValueError, match=r"The following adapter\(s\) are not present"):
            model.delete_adapter(absent)
    add("adapter_2")
    model.delete_adapter([])
    assert names() == ["adapter_1", "adapter_2"]
    model.delete_adapter(["adapter_1", "adapter_1"])
    assert names() == ["adapter_2"]


@later
def test_delete_adapter_with_modules_to_save():
    """Transformers 5 finds the wrapper of PEFT there afterwards, empty."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.add_adapter(lora(modules_to_save=["lm_head"]), adapter_name="adapter_1")
    assert list(model.peft_config) == ["adapter_1"]
    assert not isinstance(model.lm_head, torch.nn.Linear)
    assert "adapter_1" in model.lm_head.modules_to_save
    model.delete_adapter("adapter_1")
    assert not hasattr(model, "peft_config")
    left = model.lm_head.modules_to_save if V5 else getattr(model.lm_head, "modules_to_save", ())
    assert "adapter_1" not in left and not left


# ------------------------------------------------------------- training


@both
def test_peft_add_adapter_modules_to_save(auto):
    model = auto.from_pretrained(BASE)
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    assert adapted(model)
    name, wrapper = next(item for item in model.named_modules() if isinstance(item[1], ModulesToSaveWrapper))
    assert "lm_head" in name
    assert wrapper.modules_to_save.default.weight.requires_grad
    assert "lm_head.weight" in model.get_adapter_state_dict()
    model(IDS).logits.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@both
def test_peft_add_adapter_training_gradient_checkpointing(auto):
    model = auto.from_pretrained(BASE)
    model.add_adapter(lora())
    assert adapted(model)
    assert not model.get_input_embeddings()(IDS).requires_grad
    model.gradient_checkpointing_enable()
    assert model.get_input_embeddings()(IDS).requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora" in name.lower())
    model(IDS).logits.mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name.lower() and p.grad is not None for name, p in trained.items())


@both
def test_peft_load_adapter_training_inference_mode_true(auto, tmp_path):
    source = auto.from_pretrained(ADAPTER)
    source.save_pretrained(tmp_path)
    model = auto.from_pretrained(source.config._name_or_path)
    model.load_adapter(tmp_path)
    assert not any(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == []


@both
def test_peft_load_adapter_training_inference_mode_false(auto, tmp_path):
    source = auto.from_pretrained(ADAPTER, **({"use_safetensors": False} if V5 else {}))
    source.save_pretrained(tmp_path)
    model = auto.from_pretrained(source.config._name_or_path)
    model.load_adapter(tmp_path, is_trainable=True)
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    assert any("lora_" in name for name in leaves)
    for name, module in leaves.items():
        assert module.training == ("lora_" in name), name
        assert all(p.requires_grad == ("lora_" in name) for p in module.parameters()), name


class Lines(torch.utils.data.Dataset):
    """Lines of text, labelled even and odd."""

    def __init__(self, tokenizer):
        lines = os.__doc__.splitlines()
        coded = tokenizer(lines, max_length=128, truncation=True, padding="max_length")
        self.rows = [
            {**{name: torch.tensor(coded[name][i]) for name in ("input_ids", "attention_mask")}, "labels": i % 2}
            for i in range(len(lines))
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("method", ["lora", "prefix-tuning"])
def test_prefix_tuning_trainer_load_best_model_at_end_error(method, tmp_path):
    """The Trainer brings a PeftModel's best LoRA back; of prompt methods it says why it cannot."""
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left", model_type="opt")
    configs = {
        "lora": LoraConfig(task_type=TaskType.SEQ_CLS),
        "prefix-tuning": PrefixTuningConfig(task_type=TaskType.SEQ_CLS, prefix_projection=True, num_virtual_tokens=10),
    }
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2)
    base.config.pad_token_id = tokenizer.pad_token_id
    rows = Lines(tokenizer)
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, report_to="none",
    )  # fmt: skip
    trainer = Trainer(get_peft_model(base, configs[method]), arguments, train_dataset=rows, eval_dataset=rows)
    refused = pytest.raises(RuntimeError, match="When using prompt learning PEFT methods such as PREFIX_TUNING")
    with refused if method == "prefix-tuning" else contextlib.nullcontext():
        trainer.train()


# ------------------------------------------------------------- pipelines


def test_peft_pipeline():
    ours, base = pipeline("text-generation", ADAPTER), pipeline("text-generation", BASE)
    assert len(list(ours.model.parameters())) > len(list(base.model.parameters()))
    assert ours("Hello", max_new_tokens=20)


def test_peft_pipeline_no_warning():
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, device_map="auto"), ADAPTER, device_map="auto"
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        assert pipeline("text-generation", model=model, tokenizer=tokenizer)("Who is it?", max_new_tokens=20)
    assert "is not supported" not in log.out


# ------------------------------------------------------------- load_adapter from a state dict


@both
def test_peft_add_adapter_with_state_dict(auto):
    model = auto.from_pretrained(BASE)
    with pytest.raises(ValueError):
        model.load_adapter(peft_model_id=None)
    state = adapter_tensors()
    model.load_adapter(adapter_state_dict=state, peft_config=lora())
    with pytest.raises(ValueError):
        model.load_adapter(adapter_state_dict=state, peft_config=None)
    assert adapted(model) and generates(model)


@both
def test_peft_add_adapter_with_state_dict_low_cpu_mem_usage(auto):
    model = auto.from_pretrained(BASE)
    config = LoraConfig()
    for name, low in (("default", False), ("other", True)):
        model.load_adapter(
            adapter_state_dict=adapter_tensors(), adapter_name=name, peft_config=config, low_cpu_mem_usage=low
        )
    assert not any(p.device.type == "meta" for p in model.parameters())


@both
def test_peft_from_pretrained_unexpected_keys_warning(auto):
    model = auto.from_pretrained(BASE)
    state = adapter_tensors()
    state["foobar"] = next(iter(state.values()))
    with CaptureLogger(LOGGER) as log:
        model.load_adapter(adapter_state_dict=state, peft_config=LoraConfig())
    text = "Loading adapter weights from state_dict led to unexpected keys not found in the model: foobar"
    assert ("foobar | UNEXPECTED" if V5 else text) in plain(log.out)


@both
def test_peft_from_pretrained_missing_keys_warning(auto):
    model = auto.from_pretrained(BASE)
    state = adapter_tensors()
    absent = next(iter(state))
    del state[absent]
    with CaptureLogger(LOGGER) as log:
        model.load_adapter(adapter_state_dict=state, peft_config=LoraConfig(), adapter_name="other")
    before, _, last = absent.removeprefix("base_model.model.").rpartition(".")
    text = f"Loading adapter weights from state_dict led to missing keys in the model: {before}.other.{last}"
    assert (f".other.{last} | MISSING |" if V5 else text) in plain(log.out)


def plain(text):
    """One space where the report of Transformers 5 has a column's width."""
    return " ".join(text.split())


@pytest.mark.skipif(not V5, reason="Transformers 5 stores experts in one tensor")
def test_peft_load_adapter_calls_conversion_in_peft(tmp_path):
    """An adapter of a mixture of experts, made with Transformers 4, one LoRA for each expert, meets fused experts."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MIXTRAL).eval()
    hidden, inner, experts = model.config.hidden_size, model.config.intermediate_size, model.config.num_local_experts
    state = {}
    for layer in range(model.config.num_hidden_layers):
        for expert in range(experts):
            for name, (inputs, outputs) in {
                "w1": (hidden, inner),
                "w2": (inner, hidden),
                "w3": (hidden, inner),
            }.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                state[f"{key}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
                state[f"{key}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    base = logits(model)
    config = LoraConfig(r=4, target_modules=["w1", "w2", "w3"])
    model.load_adapter(adapter_state_dict=state, peft_config=config)
    assert adapted(model)
    assert config.target_parameters
    assert far(logits(model), base, 1e-3)


@pytest.mark.skipif(not V5, reason="Transformers 5 stores experts in one tensor")
def test_peft_add_adapter_calls_conversion_in_peft():
    model = AutoModelForCausalLM.from_pretrained(MIXTRAL).eval()
    base = logits(model)
    config = lora(r=4, target_modules=["w1", "w2", "w3"])
    model.add_adapter(config)
    assert adapted(model) and config.target_parameters
    assert far(logits(model), base, 1e-6)


# ------------------------------------------------------------- methods that are not LoRA


@both
def test_non_lora_load_adapter(auto, tmp_path):
    model = auto.from_pretrained(BASE)
    base = logits(model)
    model = get_peft_model(model, LoKrConfig(init_weights=False))
    expected = logits(model)
    assert far(base, expected, 1e-4)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


@both
def test_non_lora_add_adapter(auto):
    model = auto.from_pretrained(BASE)
    base = logits(model)
    model.add_adapter(LoKrConfig(init_weights=False))
    assert far(logits(model), base, 1e-4)


# ------------------------------------------------------------- hotswap


@pytest.fixture
def fresh_dynamo():
    yield
    torch.compiler.reset()
    gc.collect()


def check_hotswap(folder, first, second, compiled):
    """Two adapters of these ranks take turns under one name; outputs are each one's own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    ids = torch.randint(0, 100, (1, 10))
    outputs = [logits(model, ids)]
    for name, rank in (("adapter_1", first), ("adapter_2", second)):
        model.add_adapter(lora(r=rank), adapter_name=name)
        model.set_adapter(name)
        outputs.append(logits(model, ids))
    base, one, two = outputs
    assert far(base, one) and far(base, two) and far(one, two)
    for name in ("adapter_1", "adapter_2"):
        model.set_adapter(name)
        model.save_pretrained(folder / name)

    model = AutoModelForCausalLM.from_pretrained(BASE)
    prepared = compiled or first != second
    if prepared:
        model.enable_peft_hotswap(target_rank=max(first, second))
    model.load_adapter(folder / "adapter_1", adapter_name="adapter_1")
    if compiled:
        model = torch.compile(model, mode="reduce-overhead")
    torch.testing.assert_close(logits(model, ids), one, atol=1e-6, rtol=1e-6)
    # After enable_peft_hotswap a load under a name that exists swaps; without it the caller says so.
    model.load_adapter(folder / "adapter_2", adapter_name="adapter_1", **({} if prepared else {"hotswap": True}))
    torch.testing.assert_close(logits(model, ids), two, atol=1e-6, rtol=1e-6)


@later
def test_hotswap_wrong_peft_type_raises():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.add_adapter(IA3Config(feedforward_modules=[]), adapter_name="ia3")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(ADAPTER, adapter_name="ia3", hotswap=True)


@later
def test_hotswap_without_existing_adapter_raises():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(ValueError, match="there must already be an existing adapter with the same adapter name"):
        model.load_adapter(ADAPTER, adapter_name="adapter_1", hotswap=True)


@later
def test_hotswap_different_adapter_name_raises():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.load_adapter(ADAPTER, adapter_name="adapter_1")
    with pytest.raises(ValueError, match="there must already be an existing adapter with the same adapter name"):
        model.load_adapter(ADAPTER, adapter_name="another", hotswap=True)


def with_adapter():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.add_adapter(LoraConfig())
    return model


@later
def test_enable_peft_hotswap_called_after_adapter_added_raises():
    with pytest.raises(RuntimeError, match="Call `enable_peft_hotswap` before loading the first adapter"):
        with_adapter().enable_peft_hotswap(target_rank=32)


@later
def test_enable_peft_hotswap_called_after_adapter_added_warns():
    model = with_adapter()
    with CaptureLogger(LOGGER) as log:
        model.enable_peft_hotswap(target_rank=32, check_compiled="warn")
    assert "It is recommended to call `enable_peft_hotswap` before loading the first adapter" in log.out


@later
def test_enable_peft_hotswap_called_after_adapter_added_ignored():
    model = with_adapter()
    with CaptureLogger(LOGGER) as log:
        model.enable_peft_hotswap(target_rank=32, check_compiled="ignore")
    assert log.out == ""


@later
def test_hotswap_without_compile_and_same_ranks_works(tmp_path):
    check_hotswap(tmp_path, 8, 8, compiled=False)


@later
def test_hotswap_without_compile_and_with_lower_rank_works(tmp_path):
    check_hotswap(tmp_path, 13, 7, compiled=False)


@later
def test_hotswap_without_compile_and_with_higher_rank_works(tmp_path):
    check_hotswap(tmp_path, 7, 13, compiled=False)


def check_compiled_hotswap(folder, first, second):
    """A swap that made Dynamo compile again would raise."""
    with torch._dynamo.config.patch(error_on_recompile=True), torch._inductor.utils.fresh_inductor_cache():
        check_hotswap(folder, first, second, compiled=True)


@later
def test_hotswap_with_compile_and_same_ranks_works(tmp_path, fresh_dynamo):
    check_compiled_hotswap(tmp_path, 8, 8)


@later
def test_hotswap_with_compile_and_lower_rank_works(tmp_path, fresh_dynamo):
    check_compiled_hotswap(tmp_path, 13, 7)


@later
def test_hotswap_with_compile_and_higher_rank_works(tmp_path, fresh_dynamo):
    check_compiled_hotswap(tmp_path, 7, 13)
