"""Each feature of the methods (features.py) against PEFT in every respect: the forward pass with one adapter and with
several, merged weights, the state dict, the saved folder, and that PEFT loads what peftc saves."""

import itertools

import numpy as np
import peft
import pytest
import torch
from features import FEATURES, Pair, close
from safetensors.numpy import load_file
from twins import OUR_CONFIGS, Twins, text_net

import peftc

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Merging", "ignore:.*was merged")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
each_feature = pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)


@each_feature
def test_forward_with_one(feature, tmp_path):
    pair = Pair(feature, tmp_path).load()
    pair.check()
    pair.ours.disable_adapters()
    if feature.fields.get("bias") != "all":  # difference: PEFT's biases stay in effect
        pair.check(pair.fresh())
    pair.ours.enable_adapters()
    pair.check()


@each_feature
def test_forward_with_several(feature, tmp_path):
    pair = Pair(feature, tmp_path / "first").load()
    pair.add_other(tmp_path)
    for names in (["default", "other"], ["other", "default"], ["default"]):
        pair.set(names)
        assert pair.ours.active_adapters() == names
        pair.check()


def probe(layer, kind):
    """An input for which the output of a layer is its weight (its bias, for the last row)."""
    if kind == "Embedding":
        return np.arange(layer.weight.shape[0])
    if kind == "Conv2d":
        return np.random.default_rng(0).standard_normal((3, layer.weight.shape[1], 9, 8)).astype(np.float32)
    width = layer.weight.shape[0 if kind == "Conv1D" else 1]
    return np.concatenate([np.eye(width, dtype=np.float32), np.zeros((1, width), np.float32)])


def check_merged_weights(pair):
    modules = dict(pair.ours.named_modules())
    layers = pair.layers()
    assert set(layers) == set(pair.ours._peftc_attachment.registry.adapted_modules("default"))
    for path, theirs in layers.items():
        base = theirs.get_base_layer()
        x = probe(base, type(base).__name__)
        with torch.no_grad():
            close(modules[path](x), base(torch.from_numpy(x)).numpy())


@each_feature
def test_merged_weights(feature, tmp_path):
    pair = Pair(feature, tmp_path).load()
    for layer in pair.layers().values():
        layer.merge()
    pair.ours.merge_adapter()
    check_merged_weights(pair)
    pair.check()


@pytest.mark.parametrize("feature", ["alpha", "dora", "init=pissa", "Conv2d", "ia3 output", "adalora"])
def test_merged_weights_of_several(feature, tmp_path):
    pair = Pair(FEATURES[feature], tmp_path / "first").load()
    pair.add_other(tmp_path)
    pair.set(["other", "default"])
    before = [np.array(y) for y in pair.ours(pair.x)]
    for layer in pair.layers().values():
        layer.merge()
    pair.ours.merge_adapter()
    for merged, unmerged in zip(pair.ours(pair.x), before, strict=True):
        close(merged, unmerged)
    if pair.feature.fields.get("use_dora"):  # difference: PEFT's norm is that of weights with the others merged in
        return
    check_merged_weights(pair)
    pair.check()


@each_feature
def test_state_dict(feature, tmp_path):
    pair = Pair(feature, tmp_path).load()
    expected, state = pair.state(), pair.ours.get_adapter_state_dict()
    if feature.fields.get("bias") == "lora_only":  # difference: PEFT loses these
        lost = {key for key in state if key.endswith(".base_layer.bias")}
        assert lost == {f"{path}.base_layer.bias" for path in pair.layers()}
        state = {key: value for key, value in state.items() if key not in lost}
    assert list(state) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value)


FRESH = {name: feature for name, feature in FEATURES.items() if not feature.pruned}  # only a file has what was learned


@pytest.mark.parametrize("feature", FRESH.values(), ids=FRESH)
def test_fresh_adapter(feature, tmp_path):
    """`add_adapter` makes what a load makes: the same keys, shapes and dtypes."""
    pair = Pair(feature, tmp_path).load()
    other = Twins(feature.build, 4, **feature.shape).ours
    other.add_adapter(feature.config(OUR_CONFIGS))
    fresh, loaded = other.get_adapter_state_dict(), pair.ours.get_adapter_state_dict()
    assert list(fresh) == list(loaded)
    assert [(v.shape, v.dtype) for v in fresh.values()] == [(v.shape, v.dtype) for v in loaded.values()]


@each_feature
def test_saved_folder(feature, tmp_path):
    """Byte for byte PEFT's; where a set of names has no order, what PEFT writes after reading the same file."""
    pair = Pair(feature, tmp_path / "theirs").load()
    pair.ours.save_adapter(tmp_path / "ours")
    if feature.fields.get("bias") == "lora_only":  # difference: PEFT loses the biases
        mine, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
        assert set(theirs) < set(mine)
        assert all(key.endswith(".base_layer.bias") for key in set(mine) - set(theirs))
        for key, value in theirs.items():
            np.testing.assert_array_equal(mine[key], value)
    else:
        assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    peft.PeftConfig.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    assert (tmp_path / "ours" / CONFIG).read_bytes() == (tmp_path / "again" / CONFIG).read_bytes()


@each_feature
def test_peft_loads_ours(feature, tmp_path):
    pair = Pair(feature, tmp_path / "theirs").load()
    pair.ours.save_adapter(tmp_path / "ours")
    pair.check(peft.PeftModel.from_pretrained(pair.fresh(), tmp_path / "ours").eval())


ON_ONE_LAYER = {
    "lora": ("LORA", {"r": 3, "target_modules": ["q_proj", "up"]}),
    "dora": ("LORA", {"r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "ia3": ("IA3", {"target_modules": ["q_proj", "up"], "feedforward_modules": ["up"]}),
    "adalora": ("ADALORA", {"init_r": 3, "target_modules": ["q_proj", "up"], "total_step": 9, "tinit": 1, "tfinal": 1}),
}


@pytest.mark.parametrize("order", list(itertools.permutations(["lora", "ia3", "adalora"])), ids="-".join)
def test_methods_on_one_layer(order):
    """PEFT wraps a layer once per method, in the order of loading: ours with the list in that order."""
    twins = Twins(text_net, 5)
    for name in order:
        method, fields = ON_ONE_LAYER[name]
        twins.add(method, f"the_{name}", scale=0.1, **fields, **({"inference_mode": True} if method != "IA3" else {}))
    names = [f"the_{name}" for name in order]
    twins.set(names)
    twins.check()
    twins.enable(False)
    twins.check()
    twins.enable(True)
    twins.check()


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_in_training(use_dora):
    """The draws differ; their distribution over many rows does not."""
    twins = Twins(text_net, 2, dim=24, layers=1)
    fields = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.4, "use_dora": use_dora}
    twins.add("LORA", scale=0.5, **fields)
    twins.theirs.train()
    twins.ours.train()
    theirs = twins.theirs.get_submodule("encoder.layers.0.attn.q_proj")
    mine = dict(twins.ours.named_modules())["encoder.layers.0.attn.q_proj"]
    x = np.broadcast_to(twins.rng.standard_normal(24).astype(np.float32), (20_000, 24)).copy()
    torch.manual_seed(1)
    peftc.manual_seed(1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    result = np.asarray(mine(x))
    spread = expected.std(0)
    assert spread.min() > 0
    np.testing.assert_allclose(result.mean(0), expected.mean(0), atol=6 * spread.max() / np.sqrt(len(x)))
    np.testing.assert_allclose(result.std(0), spread, rtol=0.05)
    twins.theirs.eval()
    twins.ours.eval()
    twins.check()
