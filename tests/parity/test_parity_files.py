"""Adapter folders: what peftc writes is what PEFT writes, byte for byte, and each loads the other's."""

import json
import random
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from test_parity_forward import adalora_fields, ia3_fields, lora_fields
from twins import CONFIGS, TORCH, Twins, text_net

import peftc

METHODS = {"LORA": lora_fields, "IA3": ia3_fields, "ADALORA": adalora_fields}


def trained(twins, config):
    """A PeftModel over the torch twin with random adapter values."""
    model = peft.get_peft_model(twins.theirs, config)
    generator = torch.Generator().manual_seed(7)
    for path, parameter in model.named_parameters():
        if "default" in path.split(".") and "ranknum" not in path:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model.eval()


def output(model, x):
    with torch.no_grad():
        return [y.numpy() for y in model(torch.from_numpy(x))]


def assert_close(ours, theirs, rtol=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("seed", range(30))
def test_round_trip(seed, tmp_path):
    rng = random.Random(seed)
    method = ["LORA", "LORA", "IA3", "ADALORA"][seed % 4]
    fields = METHODS[method](rng)
    if rng.random() < 0.5:
        fields["task_type"] = "SEQ_CLS"
    twins = Twins(text_net, seed)
    if fields.get("task_type") == "SEQ_CLS":  # PEFT wraps the heads it finds by name for this task
        fields.pop("modules_to_save", None)
    config = CONFIGS[method](**fields)
    if fields.get("task_type"):
        config.task_type = None  # PeftModel for a task wants a Transformers model
    model = trained(twins, config)
    x = twins.inputs()
    expected = output(model, x)
    model.save_pretrained(tmp_path / "theirs")

    twins.ours.load_adapter(tmp_path / "theirs")
    assert_close(twins.ours(x), expected)
    twins.ours.save_adapter(tmp_path / "ours")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()

    # The order of a set of names is the process's: the yardstick is PEFT saving what it has read from the same file.
    peft.PeftConfig.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    ours = (tmp_path / "ours" / "adapter_config.json").read_bytes()
    assert ours == (tmp_path / "again" / "adapter_config.json").read_bytes()

    again = peft.PeftModel.from_pretrained(Twins(text_net, seed).theirs, tmp_path / "ours").eval()
    assert_close(output(again, x), expected, 0)


@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapter_folder(method, tmp_path):
    """A folder of an adapter made by peftc, config included, is the one PEFT writes for the same values."""
    rng = random.Random(3)
    fields = METHODS[method](rng)
    fields = {**fields, "target_modules": ["q_proj"]}
    if method == "IA3":
        fields["feedforward_modules"] = []
    twins = Twins(text_net, 3)
    config = CONFIGS[method](**fields)
    ours = {"LORA": peftc.LoraConfig, "IA3": peftc.IA3Config, "ADALORA": peftc.AdaLoraConfig}[method](**fields)
    twins.ours.add_adapter(ours)
    twins.ours.save_adapter(tmp_path / "ours")
    twins.inject(config)
    config.inference_mode = True
    config.save_pretrained(tmp_path / "theirs")
    name = "adapter_config.json"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    model = peft.PeftModel.from_pretrained(Twins(text_net, 3).theirs, tmp_path / "ours").eval()
    x = twins.inputs()
    assert_close(twins.ours(x), output(model, x))


@pytest.mark.parametrize("seed", range(6))
def test_learned_rank_pattern(seed, tmp_path):
    """Defect 3: the mixin of the reference cannot load a trained AdaLora adapter; PeftModel can, and so can ours."""
    rng = random.Random(seed)
    fields = {**adalora_fields(rng), "init_r": 6, "target_modules": ["q_proj", "up"]}
    twins = Twins(text_net, seed)
    model = trained(twins, peft.AdaLoraConfig(**fields))
    pattern = {}
    for path, parameter in model.named_parameters():
        if path.endswith("lora_E.default"):
            mask = [rng.random() < 0.5 for _ in range(6)]
            pattern[path.removeprefix("base_model.model.")] = mask
            parameter.data[~torch.tensor(mask)] = 0.0
    x = twins.inputs()
    expected = output(model, x)
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(Twins(text_net, seed).theirs, tmp_path / "theirs").eval()
    assert_close(output(loaded, x), expected)

    twins.ours.load_adapter(tmp_path / "theirs")
    assert_close(twins.ours(x), expected)
    twins.ours.save_adapter(tmp_path / "ours")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
    again = peft.PeftModel.from_pretrained(Twins(text_net, seed).theirs, tmp_path / "ours").eval()
    assert_close(output(again, x), expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_bin_folder(protocol, tmp_path):
    twins = Twins(text_net, 1)
    model = trained(twins, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    if protocol != 2:
        state = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
        torch.save(state, tmp_path / "adapter_model.bin", pickle_protocol=protocol)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    x = twins.inputs()
    twins.ours.load_adapter(tmp_path)
    assert_close(twins.ours(x), output(model, x))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_saved_under_the_names_that_peft_loads(bias, tmp_path):
    """Defect 4. The reference saves none for lora_only; given ours, it loads them."""
    twins = Twins(text_net, 5)
    twins.ours.add_adapter(peftc.LoraConfig(r=2, target_modules=["q_proj"], bias=bias, init_lora_weights=False))
    state = twins.ours.get_adapter_state_dict()
    biases = [key for key in state if key.endswith("bias")]
    assert "encoder.layers.0.attn.q_proj.base_layer.bias" in biases
    assert ("head.bias" in biases) == (bias == "all")
    for key in biases:
        state[key] += 0.5
    twins.ours.save_adapter(tmp_path)
    x = twins.inputs()
    model = peft.PeftModel.from_pretrained(twins.theirs, tmp_path).eval()
    assert_close(twins.ours(x), output(model, x))
    twins.ours.disable_adapters()
    assert_close(twins.ours(x), output(Twins(text_net, 5).theirs, x))


def test_saved_config_is_json_that_peft_reads(tmp_path):
    twins = Twins(text_net, 2)
    twins.ours.add_adapter(peftc.LoraConfig(target_modules="all-linear", r=2))
    twins.ours.save_adapter(tmp_path)
    fields = json.loads(Path(tmp_path, "adapter_config.json").read_text())
    assert fields["inference_mode"] is True
    assert "encoder.layers.0.attn.q_proj" in fields["target_modules"] or "q_proj" in fields["target_modules"]
    model = peft.PeftModel.from_pretrained(twins.theirs, tmp_path)
    assert model.peft_config["default"].r == 2


def test_all_linear_and_many_targets_like_peft():
    """What "all-linear" and a long list of names turn into is PEFT's result, which the file keeps."""
    for fields in (
        {"target_modules": "all-linear"},
        {
            "target_modules": [
                f"encoder.layers.{i}.{n}"
                for i in range(3)
                for n in ("attn.q_proj", "attn.v_proj", "attn.c_attn", "mlp.up", "mlp.down")
            ]
            + ["head", "embed", "score", "nothing.a", "nothing.b"]
        },
    ):
        twins = Twins(text_net, 0)
        theirs, ours = peft.LoraConfig(**fields), peftc.LoraConfig(**fields)
        peft.inject_adapter_in_model(theirs, twins.theirs)
        twins.ours.add_adapter(ours)
        assert set(ours.target_modules) == set(theirs.target_modules)
        assert type(ours.target_modules) is type(theirs.target_modules)
    assert TORCH is not None
