"""Real PEFT on torch and peftc on the same weights: forward passes with one and with several adapters."""

import random

import numpy as np
import pytest
from twins import Twins, image_net, text_net

LINEARS = ["q_proj", "v_proj", "up", "down"]
TARGETS = [
    ["q_proj", "v_proj"],
    ["q_proj", "up", "down"],
    ["c_attn"],
    ["attn.q_proj", "layers.1.mlp.up"],
    ["embed"],
    ["embed", "q_proj", "c_attn"],
    r".*\.layers\.[02]\.(attn|mlp)\.(v_proj|down)",
    "encoder.layers.0.attn.q_proj|head",
]


def lora_fields(rng):
    """A random LoRA config that PEFT accepts on text_net."""
    fields = {
        "r": rng.choice([1, 2, 4, 8]),
        "lora_alpha": rng.choice([1, 4, 8, 16, 3]),
        "use_rslora": rng.random() < 0.3,
        "target_modules": rng.choice(TARGETS),
        "lora_dropout": rng.choice([0.0, 0.1]),
    }
    if rng.random() < 0.3:
        fields["rank_pattern"] = rng.choice(
            [{"q_proj": 3}, {"layers.1.attn.q_proj": 5, "q_proj": 2}, {"^down": 2, "up": 6}]
        )
    if rng.random() < 0.3:
        fields["alpha_pattern"] = rng.choice([{"v_proj": 5}, {r"layers\.\d\.mlp\.up": 7}])
    linear_only = isinstance(fields["target_modules"], list) and not {"embed", "c_attn"} & set(fields["target_modules"])
    if rng.random() < 0.25:
        fields["use_dora"] = True
    elif linear_only and rng.random() < 0.25:
        fields["lora_bias"] = True
    if rng.random() < 0.3:
        fields["modules_to_save"] = rng.choice([["head"], ["score"], ["head", "score"]])
        if fields["target_modules"] == TARGETS[-1]:
            fields["target_modules"] = "encoder.layers.0.attn.q_proj"
    if rng.random() < 0.2 and isinstance(fields["target_modules"], list) and len(fields["target_modules"]) > 1:
        fields["exclude_modules"] = rng.choice([["layers.1.attn.q_proj"], r".*layers\.2\..*", ["v_proj"]])
        if fields["exclude_modules"] == ["v_proj"] and set(fields["target_modules"]) <= {"v_proj"}:
            del fields["exclude_modules"]
    if rng.random() < 0.2 and fields["target_modules"] in (TARGETS[0], TARGETS[1]):
        fields["layers_to_transform"] = rng.choice([1, [0, 2], [2]])
        if rng.random() < 0.5:
            fields["layers_pattern"] = rng.choice(["layers", ["blocks", "layers"]])
    return fields


@pytest.mark.parametrize("seed", range(60))
def test_lora(seed):
    rng = random.Random(seed)
    twins = Twins(text_net, seed, bias=True, padding_idx=rng.choice([None, 0]))
    twins.add("LORA", **lora_fields(rng))
    assert twins.check()
    twins.enable(False)
    assert twins.check()
    twins.enable(True)
    assert twins.check()


@pytest.mark.parametrize("seed", range(12))
def test_lora_float64(seed):
    rng = random.Random(1000 + seed)
    twins = Twins(text_net, seed, dtype="float64")
    fields = lora_fields(rng)
    twins.add("LORA", **fields)
    # PEFT computes DoRA's norm in float32 for nothing but linears: the rest is exact to rounding
    assert twins.check(rtol=1e-6 if fields.get("use_dora") else None)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("seed", range(4))
def test_trained_biases(bias, seed):
    """Defect 4: PEFT saves no biases for lora_only; their values go over by the names that PEFT loads."""
    rng = random.Random(seed)
    twins = Twins(text_net, seed)
    fields = {"r": 2, "target_modules": rng.choice([["q_proj", "up"], ["head", "down"]]), "bias": bias}
    import peft

    import peftc

    state = twins.inject(peft.LoraConfig(**fields))
    for key, value in twins.theirs.state_dict().items():
        if key.endswith("base_layer.bias") or (bias == "all" and key.endswith("bias")):
            state[key] = value.numpy().copy()
    twins.ours.load_adapter(peft_config=peftc.LoraConfig(**fields), adapter_state_dict=state)
    assert twins.check()
    ours = twins.ours.get_adapter_state_dict()
    assert set(ours) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(ours[key], value)


def ia3_fields(rng):
    targets = rng.choice([["v_proj", "down"], ["q_proj", "up", "down"], ["c_attn", "v_proj"], LINEARS])
    fields = {
        "target_modules": targets,
        "feedforward_modules": [t for t in targets if t in ("down", "up") and rng.random() < 0.7],
    }
    if rng.random() < 0.3:
        fields["modules_to_save"] = ["head"]
    return fields


@pytest.mark.parametrize("seed", range(24))
def test_ia3(seed):
    rng = random.Random(seed)
    twins = Twins(text_net, seed, dtype=rng.choice(["float32", "float64"]))
    twins.add("IA3", **ia3_fields(rng))
    assert twins.check()
    twins.enable(False)
    assert twins.check()


def adalora_fields(rng):
    init_r = rng.choice([2, 4, 6])
    return {
        "init_r": init_r,
        "target_r": 1,
        "lora_alpha": rng.choice([1, 8, 16]),
        "target_modules": rng.choice([["q_proj"], ["q_proj", "up", "down"], ["c_attn", "v_proj"]]),
        "total_step": 100,
        "tinit": 5,
        "tfinal": 10,
    }


@pytest.mark.parametrize("seed", range(16))
def test_adalora(seed):
    rng = random.Random(seed)
    twins = Twins(text_net, seed, dtype=rng.choice(["float32", "float64"]))
    twins.add("ADALORA", **adalora_fields(rng))
    # PEFT keeps ranknum in float32 whatever the layer's dtype
    assert twins.check(rtol=1e-6 if twins.dtype == "float64" else None)


@pytest.mark.parametrize("seed", range(24))
def test_conv2d(seed):
    rng = random.Random(seed)
    shape = {
        "kernel": rng.choice([1, 3, (3, 2)]),
        "stride": rng.choice([1, 2, (1, 2)]),
        "padding": rng.choice([0, 1, (1, 0)]),
    }
    twins = Twins(image_net, seed, dtype=rng.choice(["float32", "float64"]), **shape)
    fields = {
        "r": rng.choice([1, 2, 4]),
        "lora_alpha": 5,
        "target_modules": rng.choice([["first"], ["first", "second"]]),
    }
    fields["use_dora"] = rng.random() < 0.4
    if not fields["use_dora"] and rng.random() < 0.3:
        fields["lora_bias"] = True
    twins.add("LORA", **fields)
    assert twins.check(rtol=1e-6 if twins.dtype == "float64" else None)


@pytest.mark.parametrize("seed", range(4))
def test_ia3_conv2d(seed):
    rng = random.Random(seed)
    twins = Twins(image_net, seed)
    feedforward = ["second"] if rng.random() < 0.5 else []
    twins.add("IA3", target_modules=["first", "second"], feedforward_modules=feedforward)
    assert twins.check()


@pytest.mark.parametrize("seed", range(40))
def test_several_adapters(seed):
    """Several of one family are active together, in list order; switching between subsets."""
    rng = random.Random(seed)
    family = rng.choice(["LORA", "LORA", "IA3"])
    twins = Twins(text_net, seed, dtype=rng.choice(["float32", "float64"]))
    names = ["first", "second", "third"][: rng.choice([2, 3])]
    for name in names:
        fields = lora_fields(rng) if family == "LORA" else ia3_fields(rng)
        fields.pop("modules_to_save", None)
        if family == "IA3":  # PEFT fixes feed-forward per layer by the first adapter; ours is each adapter's own
            fields["feedforward_modules"] = []
        fields["lora_dropout"] = 0.0
        # small values: large ones would amplify the rounding of both
        twins.add(
            family, name, scale=0.1, **{k: v for k, v in fields.items() if family == "LORA" or k != "lora_dropout"}
        )
    for _ in range(4):
        subset = rng.sample(names, rng.randint(0, len(names)))
        twins.set(subset)
        assert twins.check(rtol=1e-6 if twins.dtype == "float64" else None)
    twins.set(names[0])
    assert twins.check(rtol=1e-6 if twins.dtype == "float64" else None)


@pytest.mark.parametrize("seed", range(8))
def test_methods_mixed_on_one_model(seed):
    """LoRA and AdaLora share a family in PEFT; IA3 wraps on its own: on different layers the order plays no part."""
    rng = random.Random(seed)
    twins = Twins(text_net, seed)
    order = [
        ("LORA", "first", {"r": 3, "target_modules": ["q_proj"]}),
        ("IA3", "second", {"target_modules": ["up"], "feedforward_modules": []}),
    ]
    rng.shuffle(order)
    for method, name, fields in order:
        twins.add(method, name, **fields)
    assert twins.ours.active_adapters() == [name for _, name, _ in order]
    assert twins.check()
