"""Small models and configs: every layer that LoRA, IA³ and AdaLora know, in every option that changes the layer.

The table covers what PEFT's own test of custom models covers for these methods.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x):
        return self.lin1(self.drop(torch.relu(self.lin0(x.to(self.lin0.weight.dtype)))))


class Words(nn.Module):
    """An embedding, GPT-2's Conv1D, a linear head."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, ids):
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))).flatten(1))


class Signal(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv1d = nn.Conv1d(4, 6, 3, groups=groups, padding=1)
        self.lin0 = nn.Linear(60, 2)

    def forward(self, x):
        x = x.repeat(1, 4).view(len(x), 4, 10).to(self.conv1d.weight.dtype)
        return self.lin0(torch.relu(self.conv1d(x)).flatten(1))


class Image(nn.Module):
    def __init__(self, channels=3, out=10, kernel=3, groups=1):
        super().__init__()
        self.channels = channels
        self.conv2d = nn.Conv2d(channels, out, kernel, groups=groups)
        side = 6 - kernel + 1
        self.lin0 = nn.Linear(out * side * side, 2)

    def forward(self, x):
        x = x.flatten(1).repeat(1, 36)[:, : self.channels * 36].view(-1, self.channels, 6, 6)
        return self.lin0(torch.relu(self.conv2d(x.to(self.conv2d.weight.dtype))).flatten(1))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv3d = nn.Conv3d(2, 4, 2)
        self.lin0 = nn.Linear(4 * 8, 2)

    def forward(self, x):
        x = x.flatten(1).repeat(1, 6)[:, :54].view(-1, 2, 3, 3, 3)
        return self.lin0(torch.relu(self.conv3d(x.to(self.conv3d.weight.dtype))).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x):
        x = x.to(self.mha.in_proj_weight.dtype)
        return self.lin0(self.mha(x, x, x)[0])


MODELS: dict[str, Any] = {
    "mlp": MLP,
    "mlp without bias": lambda: MLP(bias=False),
    "words": Words,
    "signal": Signal,
    "image": Image,
    "image 1x1": lambda: Image(kernel=1),
    "image in groups": lambda: Image(channels=4, out=8, groups=2),
    "volume": Volume,
    "attention": Attention,
}


class Case(NamedTuple):
    model: str
    method: str
    options: dict[str, Any]

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return MODELS[self.model]()

    def config(self, **more: Any) -> Any:
        """A config of PEFT whose fresh adapters do something."""
        options = {**self.options, **more}
        if self.method == "LORA":
            return peft.LoraConfig(**{"init_lora_weights": False, **options})
        if self.method == "ADALORA":
            return peft.AdaLoraConfig(**{"init_lora_weights": False, "total_step": 10, "init_r": 4, **options})
        return peft.IA3Config(**{"init_ia3_weights": False, **options})

    def batch(self, rows: int = 3) -> torch.Tensor:
        torch.manual_seed(1)
        if self.model == "words":
            return torch.randint(0, 100, (rows, 10))
        return torch.randn(rows, 10)

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.method.lower()} {self.model}: {options}"

    @property
    def merges(self) -> bool:
        return self.model != "image in groups" or self.method == "IA3"


def _lora(model: str, *targets: str, **options: Any) -> Case:
    return Case(model, "LORA", {"target_modules": list(targets), **options})


def _adalora(model: str, *targets: str, **options: Any) -> Case:
    return Case(model, "ADALORA", {"target_modules": list(targets), **options})


def _ia3(model: str, *targets: str, inputs: tuple[str, ...] = (), **options: Any) -> Case:
    return Case(model, "IA3", {"target_modules": list(targets), "feedforward_modules": list(inputs), **options})


CASES: list[Case] = [
    Case("mlp", "LORA", {"target_modules": "lin0"}),
    _lora("mlp", "lin0"),
    _lora("mlp", "lin1"),
    _lora("mlp", "lin0", "lin1"),
    _lora("mlp", "lin0", modules_to_save=["lin1"]),
    _lora("mlp", "lin0", lora_alpha=4, lora_dropout=0.1),
    _lora("mlp", "lin0", use_dora=True),
    _lora("mlp", "lin0", "lin1", use_dora=True),
    Case("mlp", "LORA", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}),
    _lora("mlp", "lin0", "lin1", lora_bias=True, lora_alpha=32),
    _lora("mlp", "lin0", "lin1", use_rslora=True, r=4, rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 3}),
    _lora("mlp", "lin0", init_lora_weights="gaussian"),
    _lora("mlp without bias", "lin0", "lin1"),
    _lora("words", "conv1d"),
    _lora("words", "emb"),
    _lora("words", "emb", "conv1d"),
    _lora("words", "conv1d", use_dora=True),
    _lora("words", "emb", use_dora=True),
    _lora("words", "emb", "conv1d", use_dora=True),
    _lora("image", "conv2d"),
    _lora("image", "conv2d", "lin0"),
    _lora("image", "conv2d", use_dora=True),
    _lora("image", "conv2d", "lin0", use_dora=True),
    _lora("image", "conv2d", lora_bias=True, lora_alpha=32),
    _lora("image 1x1", "conv2d"),
    _lora("image in groups", "conv2d"),
    _lora("signal", "conv1d"),
    _lora("signal", "conv1d", use_dora=True),
    _lora("volume", "conv3d"),
    _lora("volume", "conv3d", "lin0"),
    _lora("volume", "conv3d", use_dora=True),
    _lora("volume", "conv3d", lora_bias=True, lora_alpha=32),
    _lora("attention", "mha"),
    _lora("attention", "mha", "lin0"),
    Case("mlp", "IA3", {"target_modules": "lin0", "feedforward_modules": []}),
    Case("mlp", "IA3", {"target_modules": "lin0", "feedforward_modules": "lin0"}),
    _ia3("mlp", "lin0"),
    _ia3("mlp", "lin0", inputs=("lin0",)),
    _ia3("mlp", "lin1"),
    _ia3("mlp", "lin1", inputs=("lin1",)),
    _ia3("mlp", "lin0", "lin1"),
    _ia3("mlp", "lin0", "lin1", inputs=("lin0", "lin1")),
    _ia3("mlp", "lin0", inputs=("lin0",), modules_to_save=["lin1"]),
    _ia3("words", "conv1d", inputs=("conv1d",)),
    _ia3("words", "conv1d", "lin0", inputs=("conv1d", "lin0")),
    _ia3("words", "conv1d", inputs=("conv1d",), modules_to_save=["lin0"]),
    _ia3("image", "conv2d"),
    _ia3("image", "conv2d", inputs=("conv2d",)),
    _ia3("image", "conv2d", "lin0"),
    _ia3("image", "conv2d", "lin0", inputs=("conv2d",)),
    _ia3("image", "conv2d", "lin0", inputs=("conv2d", "lin0")),
    _ia3("volume", "conv3d"),
    _ia3("volume", "conv3d", "lin0", inputs=("conv3d", "lin0")),
    Case("mlp", "ADALORA", {"target_modules": "lin0"}),
    _adalora("mlp", "lin0", "lin1"),
    _adalora("mlp", "lin0", modules_to_save=["lin1"]),
    _adalora("mlp", "lin0", lora_alpha=4, lora_dropout=0.1),
    _adalora("words", "conv1d", "lin0"),
]
