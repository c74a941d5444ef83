"""AdaLora on torch layers (Zhang et al. 2023): y = base(x) + scaling / (ranknum + 1e-5) · B diag(E) A dropout(x)."""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from .. import _core
from .._adalora import PARAMETERS
from .torch_layers import AdaptedLayer, number_puts
from .torch_lora import LoraLayer
from .torch_lowrank import adapted_linear, add_plain
from .torch_stamps import ModuleDict, ParameterDict, parameters, put_parameter, puts_of


class AdaLoraLayer(LoraLayer):
    """AdaLora on nn.Linear and on GPT-2's Conv1D; every tensor is a parameter of a ParameterDict, as in PEFT."""

    method = "ADALORA"
    _direct = adapted_linear
    printed_before = "adalora."

    def _get_name(self) -> str:
        return "SVDLinear"

    adapter_layer_names = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "ranknum")
    first_containers = (
        ("lora_dropout", ModuleDict),
        ("lora_A", ParameterDict),
        ("lora_B", ParameterDict),
        ("lora_E", ParameterDict),
        ("ranknum", ParameterDict),
    )

    @classmethod
    def plan_put(cls, layers: list[Any], name: str, tensors: Any, slots: list[Any], config: Any) -> Callable[[], None]:
        fields = "lora_A", "lora_B", "lora_E", "ranknum"
        assert tensors.are(*fields)
        made: list[Any] = []
        for field, column in zip(fields, tensors.columns(len(fields)), strict=True):
            made += puts_of(field, name, parameters(column))
        return functools.partial(
            _core.put_items,
            layers,
            (*number_puts(layers, name, slots, config), *made),
        )

    def _scaling_of_config(self, name: str) -> float:
        alpha = self.lora_alpha[name]
        return alpha if alpha > 0 else float(self.ranknum[name])

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Draw this layer's tensors of an adapter anew, with torch's generator."""
        if adapter_name in self.lora_A:
            nn.init.zeros_(self.lora_E[adapter_name])
            nn.init.normal_(self.lora_A[adapter_name], std=0.02)
            nn.init.normal_(self.lora_B[adapter_name], std=0.02)

    def _scale(self, name: str) -> torch.Tensor:
        return self.scaling[name] / (self.ranknum[name] + 1e-5)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self.lora_B[adapter] @ (self.lora_A[adapter] * self.lora_E[adapter])
        return (delta.T if self.fan_in_fan_out else delta) * self._scale(adapter)

    def merge_into(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, plain: torch.Tensor
    ) -> tuple[Any, Any]:
        return weight + self.get_delta_weight(name), bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        live = self._peftc.live
        if not args and not kwargs and not is_compiling() and (result := adapted_linear(self, x, live)) is not None:
            return result
        result = self._modules["base_layer"](x, *args, **kwargs)
        if not is_compiling() and (added := add_plain(self, x, result, live)) is not None:
            return added
        dtype = result.dtype
        for name in self._live():
            a = self.lora_A[name]
            x = self._cast(x, a.dtype)
            low = self.lora_dropout[name](x) @ (a * self.lora_E[name]).T @ self.lora_B[name].T
            result = result + low * self._scale(name)
        return result.to(dtype)


# --------------------------------------------------------------------- training


def _as_array(tensor: torch.Tensor) -> Any:
    """float32 or float64 in the CPU's memory; the tensor's own memory where that is what it is."""
    tensor = tensor.detach()
    if tensor.dtype is not torch.float64:
        tensor = tensor.float()
    return tensor.cpu().contiguous().numpy()


def triplets(layers: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    """See `Host.triplets`."""
    return {
        path: tuple(
            (_as_array(p), None if p.grad is None else _as_array(p.grad))
            for p in (layer.lora_A[name], layer.lora_B[name], layer.lora_E[name])
        )
        for path, layer in layers
    }


def mask_triplets(layers: list[tuple[str, Any]], name: str, masks: dict[str, list[bool]]) -> None:
    """See `Host.mask_triplets`."""
    with torch.no_grad():
        for path, layer in layers:
            if path in masks and not all(masks[path]):
                values = layer.lora_E[name]
                values.masked_fill_(~torch.tensor(masks[path], device=values.device).view_as(values), 0.0)


def resize(layer: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an adapter of a layer, peftc's or PEFT's, these lora_A, lora_B, lora_E, of another rank, in place of its own.

    ranknum, by which it scales, stays.
    """
    for field, values in tensors.items():
        container = layer._modules[field]
        old = container._parameters[name]
        made = nn.Parameter(values.to(device=old.device, dtype=old.dtype).clone(), requires_grad=old.requires_grad)
        if isinstance(layer, AdaLoraLayer):
            put_parameter(container, name, made)
        else:
            container[name] = made
    layer.r[name] = len(tensors["lora_E"])


def take_ranks(layers: list[tuple[str, Any]], name: str, values: Mapping[str, torch.Tensor]) -> bool:
    """Give an adapter of (key, layer) the ranks that its tensors were saved with. Did any change?

    values: "<key>.lora_A" and so on → tensor. What does not go together is left for the caller, who compares shapes.
    """
    resized = False
    for key, layer in layers:
        tensors = {field: values[f"{key}.{field}"] for field in PARAMETERS if f"{key}.{field}" in values}
        if len(tensors) < len(PARAMETERS):
            continue
        rank = len(tensors["lora_E"])
        held = [getattr(layer, field)[name].shape for field in PARAMETERS]
        wanted = [(rank, held[0][1]), (held[1][0], rank), (rank, 1)]
        if rank != held[2][0] and [tuple(tensors[field].shape) for field in PARAMETERS] == wanted:
            resize(layer, name, tensors)
            resized = True
    return resized


def orthogonality(layers: list[tuple[str, Any]], name: str) -> torch.Tensor:
    """The mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over layers, 0-dimensional. Matrices of one rank are done together."""
    grams: dict[Any, list[torch.Tensor]] = {}
    for _, layer in layers:
        a, b = layer.lora_A[name], layer.lora_B[name]
        grams.setdefault((len(a), a.dtype, a.device), []).extend((a @ a.T, b.T @ b))
    total: Any = 0
    for (rank, dtype, device), matrices in grams.items():
        off = torch.stack(matrices) - torch.eye(rank, dtype=dtype, device=device)
        total = total + torch.linalg.vector_norm(off, dim=(1, 2)).sum()
    return total / max(1, 2 * len(layers))


def add_orthogonality(model: Any, args: Any, output: Any) -> None:
    """A forward hook: where the output has a loss, AdaLora's regularisation is part of it.

    As in PEFT that is so for adapters with a task_type, whose models PEFT wraps for the task, and for no others.
    """
    loss = getattr(output, "loss", None)
    attached = model.__dict__.get("_peftc_attachment")
    if attached is None or not isinstance(loss, torch.Tensor) or not attached.registry.enabled:
        return
    for name in attached.registry.active():
        config = model.peft_config[name]
        if attached.registry.peft_type(name) != "ADALORA" or config.inference_mode or config.task_type is None:
            continue
        if config.orth_reg_weight:
            term = orthogonality(attached.registry.layers_of(name), name)
            output.loss = loss + config.orth_reg_weight * term.to(loss.device)


def settle_hook(model: Any, wanted: bool) -> None:
    """Register `add_orthogonality` on the model, or take it away."""
    found = [key for key, hook in model._forward_hooks.items() if hook is add_orthogonality]
    if wanted and not found:
        model.register_forward_hook(add_orthogonality)
    for key in found if not wanted else []:
        del model._forward_hooks[key]


LAYERS: types.MappingProxyType[str, type[AdaptedLayer]] = types.MappingProxyType(
    {"Linear": AdaLoraLayer, "Conv1D": AdaLoraLayer}
)
