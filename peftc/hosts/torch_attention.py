"""LoRA on nn.MultiheadAttention: one pair of factors for in_proj_weight, one for out_proj, under PEFT's names.

Attention has no linear layers that a sum could be added to: it multiplies with the weights themselves.  So a forward pass
runs it with W + s · B A in their place, new tensors that live as long as the call.  PEFT writes the sum into the
parameters and subtracts it afterwards, which leaves rounding in them.

PEFT (0.17 to 0.21) adds out_proj's product twice, and its gradient once: its merge calls that of the layer inside, which
adds it again.  Adapters were trained like that, so it is the same here.
"""

import types
from typing import Any

import torch

from .torch_layers import AdaptedLayer
from .torch_lora import Linear, LoraLayer
from .torch_stamps import linear, parameter
from .torch_wrappers import around, inner

#: what torch's own code asks an attention for: TransformerEncoderLayer computes with these itself where it can
_OF_BASE = frozenset(
    {
        "embed_dim",
        "kdim",
        "vdim",
        "_qkv_same_embed_dim",
        "num_heads",
        "dropout",
        "batch_first",
        "head_dim",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "add_zero_attn",
        "merge_masks",
    }
)
_OUT = "base_layer.out_proj."


class OutProjection(Linear):
    """What an adapted attention has as out_proj. It is not called; attention multiplies with its weight."""

    def _get_name(self) -> str:
        return "Linear"

    def merge_into(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, plain: torch.Tensor
    ) -> tuple[Any, Any]:
        return super().merge_into(name, weight + self.get_delta_weight(name), bias, plain)


class MultiheadAttention(LoraLayer):
    """LoRA on nn.MultiheadAttention whose query, key and value have the same width."""

    weight_name, bias_name = "in_proj_weight", "in_proj_bias"

    def _extents(self, base: Any) -> tuple[int, int]:
        return base.embed_dim, 3 * base.embed_dim

    def put(self, name: str, tensors: dict[str, torch.Tensor], slot: Any, config: Any) -> None:
        super().put(name, tensors, slot, config)
        out = self._out()
        if out is None:
            children: Any = self.get_base_layer()._modules
            top = children["out_proj"]
            (out,) = OutProjection.around([top], self._peftc)
            children["out_proj"] = out
        out.put(name, {field: tensors[_OUT + field] for field in ("lora_A", "lora_B")}, slot, config)

    def _put_factors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        children: Any = self._modules
        for field in ("lora_A", "lora_B"):
            children[field]._modules[name] = linear(parameter(tensors[field]), None, self.training)

    def _out(self) -> Any:
        wrappers = around(self.get_base_layer(), "out_proj")
        return next((wrapper for _, _, wrapper in wrappers if type(wrapper) is OutProjection), None)

    def part(self, name: str) -> tuple[AdaptedLayer, str, str]:
        if not name.startswith(_OUT):
            return super().part(name)
        return self._out(), ".out_proj", name.removeprefix(_OUT)

    def _product(self, adapter: str) -> torch.Tensor:
        a: torch.Tensor = self.lora_A[adapter].weight
        b: torch.Tensor = self.lora_B[adapter].weight
        if a.dtype is torch.float16 and a.device.type == "cpu":  # as PEFT: products of float16 in float32
            return (b.float() @ a.float()).to(a.dtype)
        return b @ a

    def _sums(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(in_proj_weight, out_proj's weight) with these adapters in them."""
        base: Any = self.get_base_layer()
        out = self._out()
        into, of_out = base.in_proj_weight, out.weight
        for name in names:
            into = into + self.get_delta_weight(name).to(into.dtype)
            delta = out.get_delta_weight(name).to(of_out.dtype)
            of_out = of_out + delta + delta.detach()  # twice, see above
        return into, of_out

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As nn.MultiheadAttention's; x is the query."""
        if self._peftc.rows is not None or "adapter_names" in kwargs:
            raise TypeError("lora.MultiheadAttention does not support mixed adapter batches.")
        attention: Any = self._modules["base_layer"]
        live = self._live()
        if not live:
            return attention(x, *args, **kwargs)
        into, of_out = self._sums(live)
        before = _way(attention)
        out = f"{before}out_proj."
        weights = {
            f"{before}in_proj_weight": into,
            f"{out}{_way(self.get_base_layer().out_proj)}weight": of_out,
        }
        result = torch.func.functional_call(attention, weights, (x, *args), kwargs)
        return (result[0].to(x.dtype), *result[1:])

    def __getattr__(self, name: str) -> Any:
        if name in _OF_BASE:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """The weight that is in effect."""
        live = self._live()
        base: Any = self.get_base_layer()
        weight: torch.Tensor = self._sums(live)[0] if live else base.in_proj_weight
        return weight

    @property
    def out_proj(self) -> Any:
        """The output's projection, with the weight that is in effect."""
        out: Any = self.get_base_layer()._modules["out_proj"]
        live = self._live()
        if not live:
            return out
        return types.SimpleNamespace(weight=self._sums(live)[1], bias=out.bias)


def _way(module: Any) -> str:
    """ "base_layer." for each wrapper between a module and what it is around: how names below it begin."""
    way = ""
    while (found := inner(module)) is not None:
        way += f"{found[1]}."
        module = found[0]._modules[found[1]]
    return way
