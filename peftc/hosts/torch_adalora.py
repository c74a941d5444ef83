"""AdaLora on torch layers (Zhang et al. 2023): y = base(x) + scaling / (ranknum + 1e-5) · B diag(E) A dropout(x)."""

import types
from typing import Any

import torch

from .torch_layers import (
    AdaptedLayer,
    dropout_module,
    module_dict,
    parameter,
    parameter_dict,
    put_parameter,
    transposed,
)
from .torch_lora import LoraLayer


class AdaLoraLayer(LoraLayer):
    """AdaLora on nn.Linear and on GPT-2's Conv1D; every tensor is a parameter of a ParameterDict, as in PEFT."""

    method = "ADALORA"
    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    first_containers = (
        ("lora_dropout", module_dict),
        ("lora_A", parameter_dict),
        ("lora_B", parameter_dict),
        ("lora_E", parameter_dict),
        ("ranknum", parameter_dict),
    )

    def put(self, name: str, tensors: dict[str, torch.Tensor], slot: Any, config: Any) -> None:
        _, _, rank, alpha, scaling, _ = slot
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, scaling
        self._modules["lora_dropout"]._modules[name] = dropout_module(config.lora_dropout, self.training, self._peftc)
        for field in ("lora_A", "lora_B", "lora_E", "ranknum"):
            put_parameter(self._modules[field], name, parameter(tensors[field]))

    @property
    def fan_in_fan_out(self) -> bool:
        return transposed(self.get_base_layer())

    def _scale(self, name: str) -> torch.Tensor:
        return self.scaling[name] / (self.ranknum[name] + 1e-5)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self.lora_B[adapter] @ (self.lora_A[adapter] * self.lora_E[adapter])
        return (delta.T if self.fan_in_fan_out else delta) * self._scale(adapter)

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[Any, Any]:
        return weight + self.get_delta_weight(name), bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self._modules["base_layer"](x, *args, **kwargs)
        for name in self._live():
            a = self.lora_A[name]
            x = self._cast(x, a.dtype)
            low = self.lora_dropout[name](x) @ (a * self.lora_E[name]).T @ self.lora_B[name].T
            result = result + low * self._scale(name)
        return result


LAYERS: types.MappingProxyType[str, type[AdaptedLayer]] = types.MappingProxyType(
    {"Linear": AdaLoraLayer, "Conv1D": AdaLoraLayer}
)
