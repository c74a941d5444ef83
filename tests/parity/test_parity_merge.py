"""Merged weights and what the merged model computes, against PEFT's merge_adapter."""

import random

import numpy as np
import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from test_parity_forward import adalora_fields, ia3_fields, lora_fields
from twins import Twins, image_net, text_net


def merge_theirs(twins, names=None):
    for module in twins.theirs.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(adapter_names=names)


@pytest.mark.parametrize("seed", range(40))
def test_merge(seed):
    rng = random.Random(seed)
    method, make = [("LORA", lora_fields), ("LORA", lora_fields), ("IA3", ia3_fields), ("ADALORA", adalora_fields)][
        seed % 4
    ]
    fields = make(rng)
    dtype = rng.choice(["float32", "float64"])
    twins = Twins(text_net, seed, dtype=dtype)
    twins.add(method, **fields)
    x = twins.inputs()
    unmerged, _ = twins.outputs(x)
    merge_theirs(twins)
    twins.ours.merge_adapter()
    loose = 1e-5 if dtype == "float32" else 1e-6
    assert twins.check(x, loose)
    for merged, before in zip(twins.ours(x), unmerged, strict=True):
        scale = max(1.0, float(np.abs(before).max()))
        np.testing.assert_allclose(merged, before, rtol=0, atol=2e-5 * scale)

    twins.ours.unmerge_adapter()
    for again, before in zip(twins.ours(x), unmerged, strict=True):
        np.testing.assert_allclose(again, before, rtol=0, atol=1e-5 * max(1.0, float(np.abs(before).max())))
    for key, value in twins.base.items():  # ours never touches the base weights
        np.testing.assert_array_equal(np.asarray(base_state(twins.ours)[key]), value)


def base_state(model):
    """The base weights by the names they had before any adapter."""
    return {
        f"{path}.{part}": getattr(module, part)
        for path, module in model.named_modules()
        for part in ("weight", "bias")
        if getattr(module, part, None) is not None
    }


@pytest.mark.parametrize("seed", range(12))
def test_merge_conv2d(seed):
    rng = random.Random(seed)
    twins = Twins(image_net, seed, kernel=rng.choice([1, 3]), padding=rng.choice([0, 1]))
    if rng.random() < 0.7:
        fields = {"r": 3, "target_modules": ["first", "second"], "use_dora": rng.random() < 0.4}
        twins.add("LORA", **fields)
    else:
        twins.add("IA3", target_modules=["first", "second"], feedforward_modules=rng.choice([[], ["second"]]))
    x = twins.inputs()
    merge_theirs(twins)
    twins.ours.merge_adapter()
    assert twins.check(x)


@pytest.mark.parametrize("seed", range(8))
def test_merge_some_of_several(seed):
    rng = random.Random(seed)
    twins = Twins(text_net, seed)
    for name in ("first", "second", "third"):
        twins.add("LORA", name, r=rng.choice([2, 4]), target_modules=["q_proj", "down"])
    names = rng.sample(["first", "second", "third"], 2)
    x = twins.inputs()
    merge_theirs(twins, names)
    twins.ours.set_adapter([])
    twins.ours.merge_adapter(names)
    assert twins.check(x)


@pytest.mark.parametrize("net", [text_net, image_net])
def test_merge_several_dora(net):
    """PEFT 0.17 takes the norm of the second with the first in the weights; ours is what the unmerged model computes."""
    twins = Twins(net, 7, kernel=3, padding=1) if net is image_net else Twins(net, 7)
    targets = ["first", "second"] if net is image_net else ["q_proj", "down", "c_attn", "embed"]
    for name, dora in (("one", True), ("two", False), ("three", True)):
        twins.add("LORA", name, r=2, target_modules=targets, use_dora=dora)
    x = twins.inputs()
    twins.ours.set_adapter(["one", "two", "three"])
    before = twins.ours(x)
    twins.ours.merge_adapter()
    for merged, unmerged in zip(twins.ours(x), before, strict=True):
        np.testing.assert_allclose(merged, unmerged, rtol=0, atol=2e-5 * max(1.0, float(np.abs(unmerged).max())))
