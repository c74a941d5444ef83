"""Gradients on the NumPy host against PEFT on torch: the same weights and inputs, every method and kind of layer."""

import numpy as np
import peft
import pytest
import torch
from features import FEATURES
from twins import OUR_CONFIGS, Twins, image_net, text_net

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def compare(ours, theirs, dtype, at_least=1):
    """Gradients by name, each up to the tolerance relative to its largest element."""
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    got = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(wanted) >= at_least
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    for name, gradient in wanted.items():
        assert got[name] is not None, f"{name} got no gradient"
        assert got[name].shape == gradient.shape
        assert got[name].dtype == dtype
        largest = max(float(np.abs(gradient).max()), 1e-3)
        worst = float(np.abs(got[name] - gradient).max())
        assert worst <= TOLERANCE[dtype] * largest, f"{name}: off by {worst:g}, largest element {largest:g}"


def go_back(twins, seed=0):
    """One pass forward and back through both, for a random linear function of all results."""
    rng = np.random.default_rng(seed)
    x = twins.inputs()
    theirs = twins.theirs(torch.from_numpy(x))
    ours = twins.ours(x)
    weights = [rng.standard_normal(y.shape).astype(twins.dtype) for y in theirs]
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(
            b, a.detach().numpy(), rtol=0, atol=TOLERANCE[twins.dtype] * max(1, float(abs(a).max()))
        )
    reached = [i for i, y in enumerate(theirs) if y.requires_grad]
    sum((theirs[i] * torch.from_numpy(weights[i])).sum() for i in reached).backward()
    twins.ours.backward(tuple(weights[i] for i in reached), tuple(ours[i] for i in reached))


def trained(feature, dtype):
    """Twins with the feature's adapter, in train mode without dropout."""
    fields = {**feature.fields, "inference_mode": False}
    fields = {k: list(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "lora_dropout" in fields:
        fields["lora_dropout"] = 0.0
    twins = Twins(feature.build, dtype=dtype, **feature.shape)
    state = twins.inject(type(feature.config())(**fields))
    if fields.get("bias") == "lora_only":  # which the reference does not save
        biases = {n: p for n, p in twins.theirs.named_parameters() if n.endswith(".base_layer.bias")}
        state |= {n: p.detach().numpy().copy() for n, p in biases.items()}
    twins.ours.load_adapter(
        peft_config=OUR_CONFIGS[feature.method](**fields), adapter_state_dict=state, adapter_name="default"
    )
    for name, parameter in twins.theirs.named_parameters():  # bias=… of the reference's mixin
        parameter.requires_grad = parameter.requires_grad and "ranknum" not in name
    twins.theirs.train()
    twins.ours.train()
    return twins


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients_of_every_feature(name, dtype):
    feature = FEATURES[name]
    if dtype == "float64" and feature.fields.get("init_lora_weights") in ("pissa", "olora"):
        pytest.skip("the reference does not make these in float64")
    twins = trained(feature, dtype)
    go_back(twins)
    compare(twins.ours, twins.theirs, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("build", [text_net, image_net])
def test_gradients_of_every_base_parameter(build, dtype):
    twins = Twins(build, dtype=dtype)
    twins.theirs.train()
    twins.ours.train()
    go_back(twins)
    compare(twins.ours, twins.theirs, dtype, at_least=4)


@pytest.mark.parametrize("shape", [{"stride": 2}, {"padding": 0, "dilation": 2}, {"groups": 2}, {"kernel": (3, 1)}])
def test_gradients_of_convolutions(shape):
    twins = Twins(image_net, dtype="float64", **shape)
    twins.theirs.train()
    twins.ours.train()
    go_back(twins)
    compare(twins.ours, twins.theirs, "float64", at_least=4)


def test_gradients_add_up_until_they_are_forgotten():
    twins = trained(FEATURES["r=1"], "float64")
    go_back(twins, 1)
    once = {n: p.grad.copy() for n, p in twins.ours.named_parameters() if p.grad is not None}
    go_back(twins, 2)
    compare(twins.ours, twins.theirs, "float64")
    twins.ours.zero_grad()
    assert all(p.grad is None for p in twins.ours.parameters())
    assert once


def test_nested_adapters_of_several_methods():
    """LoRA on IA3 on LoRA: each sees what the ones inside give it."""
    twins = Twins(text_net, dtype="float64")
    targets = {"target_modules": ["q_proj", "down"], "inference_mode": False}
    adapters = {
        "one": ("LORA", {"r": 2, "lora_alpha": 3, **targets}),
        "two": ("LORA", {"r": 3, "use_dora": True, **targets}),
    }
    for name, (method, fields) in adapters.items():
        config = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config}[method](**fields)
        state = twins.inject(config, name)
        twins.ours.load_adapter(adapter_name=name, peft_config=OUR_CONFIGS[method](**fields), adapter_state_dict=state)
    twins.set(list(adapters))
    twins.theirs.train()
    twins.ours.train()
    go_back(twins)
    compare(twins.ours, twins.theirs, "float64")
