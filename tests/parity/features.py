"""Every feature of the methods as a config on a small model: the rows of the table whose columns are the tests of
test_parity_features.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from twins import CONFIGS, Twins, image_net, text_net

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Feature:
    method: str
    fields: dict[str, Any]
    build: Callable[..., Any] = text_net
    shape: dict[str, Any] = field(default_factory=dict)
    masked: bool = False  # AdaLora: some singular values are zero
    pruned: bool = False  # … and the config's rank_pattern says so

    def config(self, types=CONFIGS):
        return types[self.method](**{k: list(v) if isinstance(v, list) else v for k, v in self.fields.items()})

    def second(self):
        """Another adapter of the same method on the same layers, for several at once."""
        fields = {"target_modules": self.fields["target_modules"], "inference_mode": True}
        if self.method == "LORA":
            fields |= {"r": 3, "lora_alpha": 5}
        elif self.method == "ADALORA":
            fields |= {"init_r": 3, "total_step": 10, "tinit": 1, "tfinal": 1}
        else:
            fields["feedforward_modules"] = self.fields["feedforward_modules"]
        where = ("exclude_modules", "layers_to_transform", "layers_pattern")
        return fields | {name: self.fields[name] for name in where if name in self.fields}


def lora(targets=("q_proj", "up"), build=text_net, shape=None, **fields):
    targets = list(targets) if isinstance(targets, tuple) else targets
    return Feature("LORA", {"r": 4, "lora_alpha": 8, "target_modules": targets, **fields}, build, shape or {})


def ia3(targets, feedforward=(), build=text_net, **fields):
    return Feature("IA3", {"target_modules": list(targets), "feedforward_modules": list(feedforward), **fields}, build)


def adalora(targets=("q_proj", "up"), masked=False, pruned=False, **fields):
    schedule = {"init_r": 6, "target_r": 2, "lora_alpha": 8, "total_step": 100, "tinit": 5, "tfinal": 10}
    return Feature("ADALORA", {**schedule, "target_modules": list(targets), **fields}, masked=masked, pruned=pruned)


LAYERS = [
    f"encoder.layers.{i}.{name}"
    for i in range(3)
    for name in ("attn.q_proj", "attn.v_proj", "attn.c_attn", "mlp.up", "mlp.down")
]
CONV = {"build": image_net, "targets": ("first", "second")}

FEATURES = {
    # LoRA: sizes and scales
    "r=1": lora(r=1),
    "r=16 above the layer's width": lora(r=16),
    "alpha": lora(lora_alpha=3),
    "rslora": lora(use_rslora=True),
    "rank_pattern": lora(rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up": 5}),
    "alpha_pattern": lora(alpha_pattern={"^up": 3, r"layers\.\d\.attn\.q_proj": 7}),
    "rank_pattern, alpha_pattern, rslora": lora(
        rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "up": 1}, use_rslora=True
    ),
    # LoRA: biases
    "bias=all": lora(bias="all"),
    "bias=lora_only": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "bias=all, lora_bias": lora(bias="all", lora_bias=True),
    # LoRA: options
    "fan_in_fan_out": lora(("c_attn",), fan_in_fan_out=True),
    "fan_in_fan_out corrected for Linear": lora(fan_in_fan_out=True),
    "fan_in_fan_out corrected for Conv1D": lora(("c_attn",)),
    "dropout": lora(lora_dropout=0.3),
    "dora": lora(use_dora=True),
    "dora, rslora, rank_pattern": lora(use_dora=True, use_rslora=True, rank_pattern={"up": 2}),
    "dora on Conv1D": lora(("c_attn",), use_dora=True),
    "dora on Embedding": lora(("embed",), use_dora=True),
    "dora on Conv2d": lora(**CONV, use_dora=True),
    "dora, bias=all": lora(use_dora=True, bias="all"),
    # LoRA: initial values (random values replace them, but what pissa and olora do to the base stays)
    "init=False": lora(init_lora_weights=False),
    "init=gaussian": lora(init_lora_weights="gaussian"),
    "init=orthogonal": lora(init_lora_weights="orthogonal"),
    "init=olora": lora(init_lora_weights="olora"),
    # An SVD in f32 is right to some 1e-6, PEFT's as ours: one block, as more of them would amplify that.
    "init=pissa": lora(shape={"layers": 1}, init_lora_weights="pissa"),
    "init=pissa on Conv1D": lora(("c_attn",), shape={"layers": 1}, init_lora_weights="pissa"),
    "init=pissa, rslora": lora(shape={"layers": 1}, init_lora_weights="pissa", use_rslora=True),
    # LoRA: kinds of layers
    "Linear": lora(("q_proj", "v_proj", "up", "down")),
    "Linear without bias": lora(shape={"bias": False}),
    "Conv1D": lora(("c_attn",), lora_alpha=3),
    "Embedding": lora(("embed",)),
    "Embedding with padding_idx": lora(("embed",), shape={"padding_idx": 0}),
    "Conv2d": lora(**CONV),
    "Conv2d with stride and padding": lora(**CONV, shape={"kernel": (3, 2), "stride": (1, 2), "padding": (1, 0)}),
    "Conv2d, lora_bias": lora(**CONV, lora_bias=True),
    "Linear, Conv1D and Embedding": lora(("embed", "c_attn", "down")),
    # targets
    "targets by suffix": lora(("attn.q_proj", "layers.1.mlp.up")),
    "targets in full": lora(("encoder.layers.2.mlp.down", "head")),
    "targets by regex": lora(r".*\.layers\.[02]\.(attn|mlp)\.(v_proj|down)"),
    "targets by regex without prefix": lora("encoder.layers.0.attn.q_proj|score"),
    "all-linear": lora("all-linear"),
    "many targets": lora((*LAYERS, "head", "embed", "score", "nothing.a", "nothing.b")),
    "exclude_modules": lora(exclude_modules=["layers.1.attn.q_proj", "encoder.layers.0.mlp.up"]),
    "exclude_modules by regex": lora(exclude_modules=r".*layers\.2\..*"),
    "layers_to_transform": lora(layers_to_transform=1),
    "layers_to_transform, layers_pattern": lora(layers_to_transform=[0, 2], layers_pattern="layers"),
    "layers_pattern as a list": lora(layers_to_transform=[2], layers_pattern=["blocks", "layers"]),
    "modules_to_save": lora(modules_to_save=["head"]),
    "modules_to_save: several": lora(modules_to_save=["head", "score", "norm"]),
    "modules_to_save: a subtree": lora(("q_proj",), modules_to_save=["encoder.layers.1.mlp"]),
    "modules_to_save, bias=lora_only": lora(modules_to_save=["head"], bias="lora_only"),
    # IA3
    "ia3 output": ia3(("q_proj", "v_proj")),
    "ia3 feedforward": ia3(("up", "down"), ("up", "down")),
    "ia3 output and feedforward": ia3(("v_proj", "down"), ("down",)),
    "ia3 on Conv1D": ia3(("c_attn",)),
    "ia3 feedforward on Conv1D": ia3(("c_attn",), ("c_attn",)),
    "ia3 on Conv2d": ia3(("first", "second"), build=image_net),
    "ia3 feedforward on Conv2d": ia3(("first", "second"), ("second",), build=image_net),
    "ia3, modules_to_save": ia3(("v_proj",), modules_to_save=["head"]),
    "ia3, exclude_modules": ia3(("v_proj", "down"), ("down",), exclude_modules=["layers.0.mlp.down"]),
    # AdaLora
    "adalora": adalora(),
    "adalora, alpha=0": adalora(lora_alpha=0),
    "adalora on Conv1D": adalora(("c_attn", "v_proj")),
    "adalora mask": adalora(masked=True),
    "adalora rank_pattern": adalora(masked=True, pruned=True),
    "adalora, modules_to_save": adalora(modules_to_save=["head"]),
    "adalora, bias=all": adalora(bias="all"),
    "adalora, layers_to_transform": adalora(layers_to_transform=[1], layers_pattern="layers"),
}


def randomise(model, name, bias="none", seed=7):
    """Random values for the adapter `name` of a PEFT model; biases too where they are trained and saved."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        own = name in path.split(".") and "ranknum" not in path
        if own or (bias == "all" and path.endswith("bias")):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2
            one = 1.0 if "ia3_" in path or "magnitude" in path else 0.0
            parameter.data = (one if own else parameter.data) + noise


class Pair:
    """A PeftModel with random adapter values, its saved folder, and our model on the same base weights."""

    def __init__(self, feature, folder):
        self.feature, self.folder = feature, folder
        self.twins = Twins(feature.build, 3, **feature.shape)
        self.ours = self.twins.ours
        self.model = peft.get_peft_model(self.twins.theirs, feature.config())
        randomise(self.model, "default", feature.fields.get("bias", "none"))
        if feature.masked:
            self.mask()
        self.model.eval()
        self.model.save_pretrained(folder)
        if feature.pruned:  # what it is after a load: smaller matrices
            self.model = peft.PeftModel.from_pretrained(self.fresh(), folder).eval()
        self.x = self.twins.inputs()

    def fresh(self):
        """Another torch model with the same base weights."""
        return Twins(self.feature.build, 3, **self.feature.shape).theirs

    def mask(self):
        rng, pattern = random.Random(5), {}
        for path, parameter in self.model.named_parameters():
            if path.endswith("lora_E.default"):
                keep = [rng.random() < 0.5 for _ in range(parameter.shape[0])]
                parameter.data[~torch.tensor(keep)] = 0.0
                pattern[path.removeprefix(PREFIX)] = keep
        if self.feature.pruned:
            self.model.peft_config["default"].rank_pattern = pattern

    def load(self):
        """The folder, into our model."""
        self.ours.load_adapter(self.folder)
        return self

    def add_other(self, folder):
        """A second adapter of the method on both."""
        fields = self.feature.second()
        self.model.add_adapter("other", CONFIGS[self.feature.method](**fields))
        randomise(self.model, "other", seed=11)
        self.model.eval()
        self.model.save_pretrained(folder, selected_adapters=["other"])
        self.ours.load_adapter(folder / "other", "other")

    def set(self, names):
        self.model.base_model.set_adapter(names)
        self.ours.set_adapter(names)

    def layers(self):
        """path → their layer."""
        return {
            path.removeprefix(PREFIX): module
            for path, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    def check(self, model=None, rtol=1e-5):
        """The same output, up to rtol of the largest value."""
        model = model if model is not None else self.model
        with torch.no_grad():
            expected = [y.numpy() for y in model(torch.from_numpy(self.x))]
        for mine, theirs in zip(self.ours(self.x), expected, strict=True):
            close(mine, theirs, rtol)

    def state(self):
        """What PEFT saves."""
        state = get_peft_model_state_dict(self.model)
        return {key.removeprefix(PREFIX): value.detach().numpy() for key, value in state.items()}


def close(mine, theirs, rtol=1e-5):
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=0, atol=rtol * scale)
