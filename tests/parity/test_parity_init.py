"""Fresh adapters: the same distributions, and where the start is determined by the weights, the same values."""

import numpy as np
import peft
import pytest
import torch
from twins import OURS, Twins, text_net

import peftc

BIG = {"vocab": 50, "dim": 128, "hidden": 192, "layers": 1}


def fresh(init, r=8, targets=("q_proj", "up"), seed=0, **fields):
    """(their layers, our state dict): one new adapter on each twin."""
    twins = Twins(text_net, seed, **BIG)
    theirs = peft.LoraConfig(r=r, target_modules=list(targets), init_lora_weights=init, **fields)
    ours = peftc.LoraConfig(r=r, target_modules=list(targets), init_lora_weights=init, **fields)
    peft.inject_adapter_in_model(theirs, twins.theirs)
    peftc.manual_seed(seed)
    twins.ours.add_adapter(ours)
    twins.theirs.eval()
    twins.ours.eval()
    return twins, twins.saved(), twins.ours.get_adapter_state_dict()


def same_distribution(a, b, rtol=0.15):
    """Two samples: shape, mean, spread and extremes agree as far as a few thousand draws can tell."""
    assert a.shape == b.shape
    if not b.any():
        assert not a.any()
        return
    assert abs(a.mean() - b.mean()) < 4 * b.std() / np.sqrt(b.size) * 1.5
    np.testing.assert_allclose(a.std(), b.std(), rtol=rtol)
    np.testing.assert_allclose(np.abs(a).max(), np.abs(b).max(), rtol=0.5)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("targets", [("q_proj", "up"), ("c_attn",), ("embed",)])
def test_distribution(init, targets):
    _, theirs, ours = fresh(init, targets=targets)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        same_distribution(ours[key], value)


def test_uniform_of_the_default_is_bounded_like_torch():
    _, theirs, ours = fresh(True)
    for key in ours:
        if "lora_A" in key:
            bound = 1 / np.sqrt(ours[key].shape[1])  # kaiming_uniform with a = sqrt(5)
            assert np.abs(ours[key]).max() <= bound * (1 + 1e-6)
            assert np.abs(theirs[key]).max() <= bound * (1 + 1e-6)


def test_draws_repeat_with_the_seed_and_differ_otherwise():
    first, again, other = fresh(True, seed=1)[2], fresh(True, seed=1)[2], fresh(True, seed=2)[2]
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
        assert "lora_B" in key or not np.array_equal(first[key], other[key])
    keys = [key for key in first if "lora_A" in key]
    assert not np.array_equal(first[keys[0]][:, :8], first[keys[1]][:, :8])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_weights(init):
    """pissa and olora take the adapter out of the base weight: the product is the same, the output does not change."""
    twins, theirs, ours = fresh(init, r=4)
    x = twins.inputs()
    base = [y.detach().numpy() for y in Twins(text_net, 0, **BIG).theirs(torch.from_numpy(x))]
    for key in [key for key in theirs if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        expected = theirs[other] @ theirs[key]
        np.testing.assert_allclose(ours[other] @ ours[key], expected, atol=2e-4 * np.abs(expected).max())
    for result, before in zip(twins.ours(x), base, strict=True):
        np.testing.assert_allclose(result, before, atol=5e-4 * np.abs(before).max())
    # Defect: the reference leaves the changed base weights behind
    twins.ours.disable_adapters()
    for result, before in zip(twins.ours(x), base, strict=True):
        np.testing.assert_allclose(result, before, atol=1e-5 * np.abs(before).max())
    twins.ours.delete_adapter("default")
    for result, before in zip(twins.ours(x), base, strict=True):
        np.testing.assert_allclose(result, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_from_the_weights_then_load(init):
    """Such an adapter, trained and loaded again, means base − start + trained, as in PEFT."""
    twins = Twins(text_net, 0, **BIG)
    fields = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    state = twins.inject(peft.LoraConfig(**fields))
    twins.ours.load_adapter(peft_config=peftc.LoraConfig(**fields, inference_mode=True), adapter_state_dict=state)
    assert twins.check(rtol=3e-4)


def test_orthogonal():
    _, theirs, ours = fresh("orthogonal", r=8)
    for key in [key for key in theirs if "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        product = ours[other] @ ours[key]
        assert np.abs(product).max() < 1e-5 and ours[other].any() and ours[key].any()
        same_distribution(ours[key], theirs[key], 0.3)
    with pytest.raises(ValueError, match="7"):
        fresh("orthogonal", r=7)


def test_adalora_and_ia3():
    twins = Twins(text_net, 0, **BIG)
    fields = {"init_r": 6, "target_modules": ["q_proj", "up"], "total_step": 10, "tinit": 1, "tfinal": 1}
    peft.inject_adapter_in_model(peft.AdaLoraConfig(**fields), twins.theirs, "first")
    twins.ours.add_adapter(peftc.AdaLoraConfig(**fields), "first")
    theirs, ours = twins.saved("first"), twins.ours.get_adapter_state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        same_distribution(ours[key], value, 0.2)
    twins = Twins(text_net, 0, **BIG)
    fields = {"target_modules": ["q_proj", "up"], "feedforward_modules": ["up"]}
    peft.inject_adapter_in_model(peft.IA3Config(**fields), twins.theirs, "first")
    twins.ours.add_adapter(peftc.IA3Config(**fields), "first")
    theirs, ours = twins.saved("first"), twins.ours.get_adapter_state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("seed", range(3))
def test_fresh_adapters_change_nothing(seed):
    """B = 0, E = 0, scale 1: until it is trained an adapter is the identity. DoRA starts at the weight's norm."""
    twins = Twins(text_net, seed)
    x = twins.inputs()
    base = [np.array(y) for y in twins.ours(x)]
    for name, config in {
        "a": peftc.LoraConfig(target_modules=["q_proj", "embed", "c_attn"]),
        "d": peftc.LoraConfig(target_modules=["q_proj", "up"], use_dora=True),
        "i": peftc.IA3Config(target_modules=["v_proj", "down"], feedforward_modules=["down"]),
        "l": peftc.AdaLoraConfig(target_modules=["v_proj"], total_step=10, tinit=1, tfinal=1, inference_mode=True),
        "m": peftc.LoraConfig(target_modules=["q_proj"], modules_to_save=["head"], bias="all"),
    }.items():
        if name == "l":  # only one trainable adapter beside AdaLora
            for other in twins.ours.peft_config.values():
                other.inference_mode = True
        twins.ours.add_adapter(config, name)
        twins.ours.eval()
        for result, before in zip(twins.ours(x), base, strict=True):
            np.testing.assert_allclose(result, before, rtol=0, atol=1e-5)
    assert OURS.mixins
