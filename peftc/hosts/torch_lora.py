"""LoRA and DoRA on torch layers: parameters under PEFT's names, and the forward pass.

A linear layer's low-rank sum runs in C on CPU tensors (torch_lowrank.py) and in torch ops everywhere else; the two
agree to rounding.  Formulas: LoRA, Hu et al. 2021, section 4.1; DoRA, Liu et al. 2024, equation 5 with the norm
detached (section 4.3).
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling

from .. import _core
from .torch_layers import AdaptedLayer, Rows, dropout_module, number_puts
from .torch_lowrank import adapted_linear, add_lowrank, add_plain, mixed_linear
from .torch_stamps import Linear as PlainLinear
from .torch_stamps import (
    ModuleDict,
    linear,
    linears,
    module_dict,
    parameter,
    parameter_dict,
    parameters,
    put_parameter,
    stamp,
)
from .torch_watch import runs_eagerly

#: Which axis of a factor is its rank.
RANK_AXIS = types.MappingProxyType({"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1})
#: What of a state dict of the model has the factors that pissa and olora started from, as the core calls them.
_INITIAL = ("lora_initial_A", "lora_initial_B")


class Magnitude(nn.Module):
    """DoRA's magnitude vector; its one parameter is called `weight`, as in PEFT."""

    weight: nn.Parameter

    @staticmethod
    def over(tensor: torch.Tensor) -> "Magnitude":
        made = stamp(Magnitude, Magnitude)
        made._parameters["weight"] = parameter(tensor)
        return made

    def forward(self, norm: torch.Tensor) -> torch.Tensor:
        """By how much DoRA scales each output. A call, so that FSDP, which may wrap this module, brings the weight in."""
        return self.weight / norm


class LoraLayer(AdaptedLayer):
    """What LoRA's layers share: containers, and what is known of each adapter."""

    method = "LORA"
    printed_before = "lora."
    first_containers = (("lora_dropout", ModuleDict), ("lora_A", ModuleDict), ("lora_B", ModuleDict))
    later_containers = types.MappingProxyType(
        {
            "lora_embedding_A": parameter_dict,
            "lora_embedding_B": parameter_dict,
            "lora_magnitude_vector": module_dict,
        }
    )
    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "_initial", "room",
    )  # fmt: skip

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    #: only of adapters that use it: most do not
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    #: pissa and olora: the factors that the adapter started from; their product is subtracted while it is active
    _initial: dict[str, tuple[torch.Tensor, torch.Tensor]]
    #: rank that the tensors of an adapter have room for, which is above its own: see torch_hotswap.py
    room: dict[str, int]

    def put(self, name: str, tensors: dict[str, torch.Tensor], slot: Any, config: Any) -> None:
        children = self._modules
        _, _, rank, alpha, scaling, *_ = slot
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, scaling
        self.use_dora[name] = "lora_magnitude_vector" in tensors
        self.lora_bias[name] = "lora_B.bias" in tensors
        if getattr(config, "use_rslora", False):
            self.use_rslora[name] = True
        children["lora_dropout"]._modules[name] = dropout_module(config.lora_dropout, self.training, self._peftc)
        self._put_factors(name, tensors)
        if "lora_magnitude_vector" in tensors:
            magnitude = Magnitude.over(tensors["lora_magnitude_vector"])
            magnitude.training = self.training
            self.lora_magnitude_vector._modules[name] = magnitude
        if "lora_initial_A" in tensors:
            self._initial[name] = (tensors["lora_initial_A"], tensors["lora_initial_B"])

    def _put_factors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        initial = self.__dict__.get("_initial")  # AdaLora's layers have none
        for name, (a, b) in (initial or {}).items():
            initial[name] = (fn(a), fn(b))
        return self

    # What pissa and olora started from has to go with the base weights, which they leave as they were. PEFT's state dicts
    # have the weights that are left of those instead: with them nothing is to be subtracted.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, factors in self.__dict__.get("_initial", {}).items():
            for field, tensor in zip(_INITIAL, factors, strict=True):
                destination[f"{prefix}{field}.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        initial = self.__dict__.get("_initial")
        for name in self.adapters() if initial is not None else ():
            keys = [f"{prefix}{field}.{name}" for field in _INITIAL]
            given = [state_dict[key] for key in keys if key in state_dict]
            unexpected_keys[:] = [key for key in unexpected_keys if key not in keys]
            held = list(self._factors(name).values())
            if [one.shape for one in given] == [one.shape for one in held]:
                initial[name] = tuple(one.detach().to(own, copy=True) for one, own in zip(given, held, strict=True))
            elif given:
                error_msgs.append(f"{', '.join(keys)}: both are needed, of the shapes of {name}'s factors.")
            elif any(key.startswith(f"{prefix}base_layer.") for key in state_dict) and any(
                key.startswith(f"{prefix}{field}.{name}") for field in RANK_AXIS for key in state_dict
            ):
                initial.pop(name, None)

    def _factors(self, name: str) -> dict[str, torch.Tensor]:
        """An adapter's lora_A and lora_B, or those of an embedding, without the room that there may be."""
        found = {}
        for field in RANK_AXIS:
            held: Any = self._modules.get(field)
            if held is not None and name in held:
                found[field] = self.own_part(name, field, getattr(held[name], "weight", held[name]))
        return found

    def own_part(self, name: str, field: str, tensor: Any) -> Any:
        room = self.__dict__.get("room")  # AdaLora's layers have none
        if not room or name not in room or field not in RANK_AXIS or tensor.dim() < 2:  # a bias has no rank
            return tensor
        return tensor.narrow(RANK_AXIS[field], 0, self.r[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale as often as the config says, times this."""
        if adapter in self.scaling:
            self._put_scaling(adapter, scale * self._scaling_of_config(adapter))

    def _scaling_of_config(self, name: str) -> float:
        return self.lora_alpha[name] / (self.r[name] ** 0.5 if name in self.use_rslora else self.r[name])

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for name in self._scaled():
                self._put_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters; None: make it again what the config says."""
        for name in self._scaled():
            if scale is None:
                self.set_scale(name, 1)
            else:
                self._put_scaling(name, self.scaling[name] / scale)

    def _scaled(self) -> list[str]:
        return [name for name in self._peftc.active if name in self.lora_A]

    def _put_scaling(self, name: str, value: Any) -> None:
        old = self.scaling[name]
        if isinstance(old, torch.Tensor):  # an adapter that can be swapped without compiling again
            old.fill_(value)
        else:
            self.scaling[name] = value

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Draw this layer's tensors of an adapter anew, with torch's generator: True or "gaussian"; False leaves them."""
        if init_lora_weights is False:
            return
        own = self._factors(adapter_name)
        if "lora_A" in own:
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(own["lora_A"], a=5**0.5)
            elif init_lora_weights.lower() == "gaussian":
                nn.init.normal_(own["lora_A"], std=1 / self.r[adapter_name])
            else:
                raise ValueError(f"Unknown initialization {init_lora_weights=}")
            nn.init.zeros_(own["lora_B"])
            if self.lora_bias[adapter_name]:
                nn.init.zeros_(self.lora_B[adapter_name].bias)
        elif own:
            nn.init.zeros_(own["lora_embedding_A"])
            nn.init.normal_(own["lora_embedding_B"])

    def _cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x if x.dtype == dtype or not self.cast_input_dtype_enabled else x.to(dtype)

    def _drops(self, name: str) -> bool:
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.training and not isinstance(dropout, nn.Identity)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._peftc.rows is not None or "adapter_names" in kwargs:
            return self._mixed(x, *args, **kwargs)
        result = self._modules["base_layer"](x, *args, **kwargs)
        dtype = result.dtype
        for name in self._live():
            result = self._add(name, x, result)
        return result.to(dtype)

    def _add(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The result with one adapter applied to it."""
        raise NotImplementedError

    def _mixed(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Each row of the batch with its own adapter ("__base__": none)."""
        rows = self._peftc.rows if adapter_names is None else Rows(adapter_names)
        assert rows is not None  # one of the two says it
        rows.check(x)
        if not args and not kwargs and (made := self._mixed_in_c(x, rows)) is not None:
            return made
        result: torch.Tensor = self._modules["base_layer"](x, *args, **kwargs)
        dtype = result.dtype
        for name, where in rows.groups:
            if name in self.scaling:
                part = result[where]
                added = self._add(name, x[where], part)
                if added is not part or not isinstance(where, slice):
                    result[where] = added.to(dtype)
        return result

    def _mixed_in_c(self, x: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        """What `_mixed` gives in one call, or None where torch's operations are needed."""
        return None

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        delta = self._product(adapter)
        return delta * self.scaling[adapter]

    def _product(self, adapter: str) -> torch.Tensor:
        raise NotImplementedError

    def _norm(self, weight: torch.Tensor, product: torch.Tensor, scaling: float) -> torch.Tensor:
        """DoRA: the length of each output's weights, shaped like the magnitude. weight and product as stored."""
        raise NotImplementedError

    def merge_into(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, plain: torch.Tensor
    ) -> tuple[Any, Any]:
        """The weight and bias with one adapter folded in; new tensors.

        plain: the weight with no adapter in it, of which DoRA takes the norm, as in a forward pass.
        """
        scaling = self.scaling[name]
        merged = None if self.use_dora[name] or name in self._initial else self._sum_in_c(name, weight)
        if merged is None:
            product = self._product(name)
            merged = weight + product * scaling
            if self.use_dora[name]:
                magnitude = self._modules["lora_magnitude_vector"]._modules[name]._parameters["weight"]
                norm = self._norm(plain, product, scaling)
                merged = self._along_outputs(magnitude / norm) * merged
        if self.lora_bias[name]:
            extra = self._modules["lora_B"]._modules[name].bias * scaling
            bias = extra if bias is None else bias + extra
        return merged, bias

    def _sum_in_c(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        """weight + scaling · B A in one pass over the weight, or None where torch's operations are needed."""
        return None

    def _along_outputs(self, scale: torch.Tensor) -> torch.Tensor:
        """A DoRA scale shaped to multiply the weight as stored."""
        raise NotImplementedError


# --------------------------------------------------------------------------- linear


def _product_by_calls(a: Any, b: Any, x: torch.Tensor) -> torch.Tensor:
    """B A of modules that are not plain ones, x (…, in): FSDP brings the weights of those that it wraps in for a call."""
    product: torch.Tensor = b(a(torch.eye(x.shape[-1], device=x.device, dtype=x.dtype))).T
    return product


class Linear(LoraLayer):
    """LoRA on nn.Linear and on GPT-2's Conv1D: y = base(x) + scaling · B A dropout(x)."""

    _direct = adapted_linear

    @classmethod
    def plan_put(cls, layers: list[Any], name: str, tensors: Any, slots: list[Any], config: Any) -> Callable[[], None]:
        if not tensors.are("lora_A", "lora_B"):  # a magnitude, a bias, initial factors
            return super().plan_put(layers, name, tensors, slots, config)
        training = [layer.training for layer in layers]
        a, b = (linears(parameters(column), training) for column in tensors.columns(2))
        return functools.partial(
            _core.put_items,
            layers,
            (
                *number_puts(layers, name, slots, config),
                (("use_dora",), name, False),
                (("lora_bias",), name, False),
                *([(("use_rslora",), name, True)] if getattr(config, "use_rslora", False) else []),
                (("_modules", "lora_A", "_modules"), name, a),
                (("_modules", "lora_B", "_modules"), name, b),
            ),
        )

    def _put_factors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        children = self._modules
        bias = tensors.get("lora_B.bias")
        children["lora_A"]._modules[name] = linear(parameter(tensors["lora_A"]), None, self.training)
        children["lora_B"]._modules[name] = linear(
            parameter(tensors["lora_B"]), None if bias is None else parameter(bias), self.training
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _product(self, adapter: str) -> torch.Tensor:
        product = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
        if adapter in self._initial:
            a, b = self._initial[adapter]
            product = product - b @ a
        return product.T if self.fan_in_fan_out else product

    def _sum_in_c(self, name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if not runs_eagerly():
            return None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        made = torch.empty_like(weight)
        done = _core.add_lowrank_to_weight(weight, a, b, self.scaling[name], None, self.fan_in_fan_out, made)
        return made if done else None

    def _norm(self, weight: torch.Tensor, product: torch.Tensor, scaling: float) -> torch.Tensor:
        total = weight + scaling * product
        return torch.linalg.norm(total, dim=0 if self.fan_in_fan_out else 1)

    def _along_outputs(self, scale: torch.Tensor) -> torch.Tensor:
        return scale if self.fan_in_fan_out else scale.unsqueeze(1)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._peftc.rows is not None or "adapter_names" in kwargs:
            return self._mixed(x, *args, **kwargs)
        live = self._peftc.live
        if not args and not kwargs and not is_compiling() and (result := adapted_linear(self, x, live)) is not None:
            return result
        result = self._modules["base_layer"](x, *args, **kwargs)
        if not live:
            return result
        if not is_compiling() and (added := add_plain(self, x, result, live)) is not None:
            return added
        dtype = result.dtype
        plain: list[str] = []  # neighbours in the list without DoRA: one call adds them all
        for name in self._live():
            if self.use_dora[name]:
                result = self._plain(x, result, plain)
                plain = []
                result = self._dora(name, x, result)
            else:
                plain.append(name)
        result = self._plain(x, result, plain)
        return result if result.dtype is dtype else result.to(dtype)

    def _mixed_in_c(self, x: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        return None if is_compiling() else mixed_linear(self, x, rows.parts)

    def _plain(self, x: torch.Tensor, result: torch.Tensor, names: list[str]) -> torch.Tensor:
        if not names:
            return result
        a, b, dropouts = (self._modules[field]._modules for field in ("lora_A", "lora_B", "lora_dropout"))
        return add_lowrank(self, x, result, [(a[n], b[n], dropouts[n], self.scaling[n], n) for n in names])

    def _dora(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_A[name], self.lora_B[name]
        base, scaling = self.get_base_layer(), self.scaling[name]
        x = self._cast(x, a.weight.dtype)
        weight, bias = base.weight.to(x.dtype), base.bias
        product = (b.weight @ a.weight if type(a) is type(b) is PlainLinear else _product_by_calls(a, b, x)).detach()
        norm = self._norm(weight, product.T if self.fan_in_fan_out else product, scaling).detach()
        scale = self.lora_magnitude_vector[name](norm)
        if self._drops(name):
            x = self.lora_dropout[name](x)
            plain = F.linear(x, weight.T if self.fan_in_fan_out else weight)
        else:
            plain = result if bias is None else result - bias
        return result + ((scale - 1) * plain + scale * b(a(x)) * scaling)

    def _add(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        if not is_compiling() and (added := add_plain(self, x, result, (name,))) is not None:
            return added
        x = self._cast(x, self.lora_A[name].weight.dtype)
        return self._dora(name, x, result) if self.use_dora[name] else self._plain(x, result, [name])


# ------------------------------------------------------------------------ convolution


class _Convolution(LoraLayer):
    """LoRA on a convolution: A is one of the base's kernel to r channels, B a 1 × 1 one."""

    _module: type[nn.Module]
    _apply_conv: Any

    def _put_factors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        base: Any = self.get_base_layer()
        shape = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        for field, extra in (
            ("lora_A", {"kernel_size": base.kernel_size, **shape}),
            ("lora_B", {"groups": base.groups}),
        ):
            weight = tensors[field]
            options: dict[str, Any] = {"kernel_size": 1, "bias": False, **extra}
            groups = options.get("groups", 1)
            conv = type(self)._module
            key = (conv, field, weight.shape, tuple(sorted((k, str(v)) for k, v in options.items())))
            made = stamp(key, lambda w=weight, o=options, g=groups, c=conv: c(w.shape[1] * g, w.shape[0], **o))
            made._parameters["weight"] = parameter(weight)
            bias = tensors.get(f"{field}.bias")
            made._parameters["bias"] = None if bias is None else parameter(bias)
            made.training = self.training
            self._modules[field]._modules[name] = made

    def _product(self, adapter: str) -> torch.Tensor:
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        product = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:])
        if adapter in self._initial:
            first_a, first_b = self._initial[adapter]
            product = product - (first_b.flatten(1) @ first_a.flatten(1)).reshape(product.shape)
        return product

    def _norm(self, weight: torch.Tensor, product: torch.Tensor, scaling: float) -> torch.Tensor:
        total = weight + scaling * product
        return total.norm(p=2, dim=tuple(range(1, total.dim())), keepdim=True).transpose(1, 0)

    def _along_outputs(self, scale: torch.Tensor) -> torch.Tensor:
        return scale.transpose(0, 1)

    def merge_into(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None, plain: torch.Tensor
    ) -> tuple[Any, Any]:
        if self.get_base_layer().groups != 1:
            raise NotImplementedError(
                "merging LoRA into a grouped convolution is not possible: its weight has no place for the product "
                "of all input channels; keep the adapter unmerged"
            )
        return super().merge_into(name, weight, bias, plain)

    def _add(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        x = self._cast(x, a.weight.dtype)
        if not self.use_dora[name]:
            return result + b(a(self.lora_dropout[name](x))) * scaling
        base: Any = self.get_base_layer()
        norm = self._norm(base.weight, self._product(name).detach(), scaling).detach()
        scale = self.lora_magnitude_vector[name](norm)
        if self._drops(name):
            x = self.lora_dropout[name](x)
            conv = type(self)._apply_conv
            plain = conv(x, base.weight, None, base.stride, base.padding, base.dilation, base.groups)
        else:
            plain = result if base.bias is None else result - base.bias.view(-1, *(1,) * (base.weight.dim() - 2))
        return result + ((scale - 1) * plain + scale * b(a(x)) * scaling)


class Conv1d(_Convolution):
    """LoRA on nn.Conv1d."""

    _module, _apply_conv = nn.Conv1d, staticmethod(F.conv1d)


class Conv2d(_Convolution):
    """LoRA on nn.Conv2d."""

    _module, _apply_conv = nn.Conv2d, staticmethod(F.conv2d)


class Conv3d(_Convolution):
    """LoRA on nn.Conv3d."""

    _module, _apply_conv = nn.Conv3d, staticmethod(F.conv3d)


# -------------------------------------------------------------------------- embedding


class Embedding(LoraLayer):
    """LoRA on nn.Embedding: A (r, num) is looked up by column, B (dim, r)."""

    def _put_factors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        for field in ("lora_embedding_A", "lora_embedding_B"):
            put_parameter(getattr(self, field), name, parameter(tensors[field]))

    def _live(self) -> list[str]:
        held = self._modules["lora_embedding_A"]._parameters
        return [name for name in self._peftc.live if name in held]

    def _product(self, adapter: str) -> torch.Tensor:
        product = (self.lora_embedding_B[adapter] @ self.lora_embedding_A[adapter]).T
        if adapter in self._initial:
            a, b = self._initial[adapter]
            product = product - (b @ a).T
        return product

    def _norm(self, weight: torch.Tensor, product: torch.Tensor, scaling: float) -> torch.Tensor:
        return torch.linalg.norm((weight + scaling * product).T, dim=1)

    def _along_outputs(self, scale: torch.Tensor) -> torch.Tensor:
        return scale

    def _look_up(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return F.embedding(
            ids,
            table,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

    def _add(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_embedding_A[name].T, self.lora_embedding_B[name].T
        scaling = self.scaling[name]
        added = (self._look_up(x, a) @ b) * scaling
        if name in self._initial:
            first_a, first_b = self._initial[name]
            added = added - (self._look_up(x, first_a.T) @ first_b.T) * scaling
        if not self.use_dora[name]:
            return result + added
        base: Any = self.get_base_layer()
        norm = self._norm(base.weight, self._product(name).detach(), scaling).detach()
        scale = self.lora_magnitude_vector[name](norm)
        return scale * result + scale * added


#: base class → layer class; looked up by isinstance, in order
LAYERS: types.MappingProxyType[str, type[LoraLayer]] = types.MappingProxyType(
    {
        "Linear": Linear,
        "Conv1D": Linear,
        "Conv1d": Conv1d,
        "Conv2d": Conv2d,
        "Conv3d": Conv3d,
        "Embedding": Embedding,
    }
)
