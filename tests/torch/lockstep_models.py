"""The models of the lockstep tests: small, of every layer kind that takes adapters, and each available with either mixin.

A class here exists twice: `Theirs…` has Transformers' mixin, `Ours…` has peftc's. They are made from the same seed, so
they have the same weights. Transformers' own models bring their mixin along; `Ours` puts peftc's before it.
"""

from __future__ import annotations

import functools

import torch
from their_mixin import OnCpu
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import peftc

#: The torch host's mixin: reference against reference runs where peftc has none.
OurMixin = peftc.PeftAdapterMixin


class Attention(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.c_attn = Conv1D(dim, dim)

    def forward(self, x):
        return torch.tanh(self.q_proj(x)) + self.v_proj(x) * 0.5 + self.c_attn(x) * 0.25


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.attn = Attention(dim, bias)
        self.mlp = Mlp(dim, hidden, bias)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = x + self.attn(x)
        return self.norm(x + self.mlp(x))


class TextNet(nn.Module):
    """Embedding, blocks of linears and a Conv1D, two heads. `shared`: both blocks have the same v_proj; `tied`: the
    vocabulary head has the embedding's weight."""

    def __init__(self, *, bias=True, padding_idx=None, shared=False, tied=False, vocab=13, dim=8, hidden=12):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim, padding_idx=padding_idx)
        self.blocks = nn.Module()  # a container below the top, so that layers_to_transform finds "blocks.layers.N"
        self.blocks.layers = nn.ModuleList([Block(dim, hidden, bias) for _ in range(2)])
        if shared:
            self.blocks.layers[1].attn.v_proj = self.blocks.layers[0].attn.v_proj
        self.extra = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, 5)
        self.to_vocab = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.to_vocab.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.blocks.layers:
            x = layer(x)
        x = x + torch.tanh(self.extra(x))
        return self.head(x), self.to_vocab(x)


class ImageNet(nn.Module):
    def __init__(self, *, kernel=3, stride=1, padding=1, groups=1, bias=True):
        super().__init__()
        self.first = nn.Conv2d(4, 6, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        self.second = nn.Conv2d(6, 4, 1, bias=bias)
        self.fc = nn.Linear(4, 6, bias=bias)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        return (self.head(torch.tanh(self.fc(x.mean((2, 3))))),)


class SignalNet(nn.Module):
    """A convolution along one dimension, and one along three."""

    def __init__(self, *, kernel=3, stride=1, padding=1, groups=1, bias=True):
        super().__init__()
        self.line = nn.Conv1d(4, 6, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        self.room = nn.Conv3d(2, 4, (kernel, 1, 1), padding=(1, 0, 0), groups=groups, bias=bias)
        self.fc = nn.Linear(4, 6, bias=bias)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        line = torch.tanh(self.line(x.mean(3)))
        room = torch.tanh(self.room(line.reshape(len(x), 2, 3, -1, 1)))
        return (self.head(torch.tanh(self.fc(room.mean((2, 3, 4))))),)


class TheirSignalNet(OnCpu, SignalNet):
    pass


class OurSignalNet(OurMixin, SignalNet):
    pass


class TheirTextNet(OnCpu, TextNet):
    pass


class TheirImageNet(OnCpu, ImageNet):
    pass


class OurTextNet(OurMixin, TextNet):
    pass


class OurImageNet(OurMixin, ImageNet):
    pass


class OurBert(OurMixin, BertForSequenceClassification):
    pass


class OurLlama(OurMixin, LlamaForCausalLM):
    pass


class OurGpt2(OurMixin, GPT2LMHeadModel):
    pass


@functools.cache
def _config(kind: str, tied: bool):
    """The configurations of the tiny Transformers models; made once."""
    if kind == "bert":
        return BertConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=8, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    if kind == "llama":
        return LlamaConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=12, max_position_embeddings=8, tie_word_embeddings=tied,
        )  # fmt: skip
    return GPT2Config(
        vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


#: kind → (with Transformers' mixin, with peftc's)
CLASSES = {
    "text": (TheirTextNet, OurTextNet),
    "image": (TheirImageNet, OurImageNet),
    "signal": (TheirSignalNet, OurSignalNet),
    "bert": (BertForSequenceClassification, OurBert),
    "llama": (LlamaForCausalLM, OurLlama),
    "gpt2": (GPT2LMHeadModel, OurGpt2),
}
TRANSFORMERS = frozenset({"bert", "llama", "gpt2"})

#: kind → layers that LoRA can adapt; those that AdaLora can; IA3's and its feed-forward ones; layers for modules_to_save
LAYERS = {
    "text": {
        "LORA": ["q_proj", "v_proj", "c_attn", "up", "down", "embed", "to_vocab"],
        "ADALORA": ["q_proj", "v_proj", "c_attn", "up"],
        "IA3": ["q_proj", "v_proj", "c_attn", "down"],
        "feedforward": ["down"],
        "LOHA": ["extra"],
        "heads": ["head"],
    },
    "signal": {
        "LORA": ["line", "room", "fc"],
        "ADALORA": ["fc"],
        "IA3": ["fc"],
        "feedforward": [],
        "heads": ["head"],
    },
    "image": {
        "LORA": ["first", "second", "fc"],
        "ADALORA": ["fc"],
        "IA3": ["first", "second", "fc"],
        "feedforward": ["second"],
        "heads": ["head"],
    },
    "bert": {
        "LORA": ["query", "value", "intermediate.dense", "word_embeddings"],
        "ADALORA": ["query", "value"],
        "IA3": ["key", "value", "output.dense"],
        "feedforward": ["output.dense"],
        "heads": ["classifier"],
    },
    "llama": {
        "LORA": ["q_proj", "v_proj", "down_proj", "embed_tokens"],
        "ADALORA": ["q_proj", "v_proj"],
        "IA3": ["k_proj", "v_proj", "down_proj"],
        "feedforward": ["down_proj"],
        "heads": ["lm_head"],
    },
    "gpt2": {
        "LORA": ["c_attn", "c_fc", "wte"],
        "ADALORA": ["c_attn", "c_fc"],
        "IA3": ["c_attn", "mlp.c_proj"],
        "feedforward": ["mlp.c_proj"],
        "heads": [],
    },
}


def build(kind: str, ours: bool, seed: int, **shape) -> nn.Module:
    """A model of this kind with weights that depend on the seed alone; norms and biases are not 1 and 0."""
    torch.manual_seed(seed)
    cls = CLASSES[kind][ours]
    model = cls(_config(kind, shape.get("tied", False))) if kind in TRANSFORMERS else cls(**shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35 + ("norm" in name.lower()))
    padding = getattr(getattr(model, "embed", None), "padding_idx", None)
    if padding is not None and not shape.get("tied"):  # DoRA divides by the norms of the head's rows
        model.embed.weight.data[padding] = 0
    return model


def inputs(kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("image", "signal"):
        return torch.randn((2, 4, 5, 5), generator=generator)
    return torch.randint(0, 13, (2, 5), generator=generator)


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The model's tensors for x, whose dtype follows the model's where it is a float."""
    if x.is_floating_point():
        x = x.to(next(model.parameters()).dtype)
    result = model(x)
    return [result.logits] if hasattr(result, "logits") else list(result)
