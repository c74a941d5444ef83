"""What a `PeftModel` has as its `base_model`: the model with adapters of one method, and what can be done to them.

PEFT calls these LoraModel, IA3Model and AdaLoraModel; once it is imported, isinstance says so of ours.
"""

import dataclasses
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn

from .. import _prepare
from .._adalora import PARAMETERS
from .._attachment import Attachment
from ..mixin import PeftAdapterMixin
from . import torch_adalora, torch_mixed
from .torch_inject import attachment, put
from .torch_registry import TorchRegistry
from .torch_unload import unload

_EMBEDDINGS = ("embed_tokens", "lm_head")  # names of tied layers that merging has to warn about


class Tuner(nn.Module):
    """A model (`model`) and its adapters. Anything else that is asked of it is the model's."""

    prefix = ""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def _registry(self) -> TorchRegistry:
        registry: TorchRegistry = attachment(self._modules["model"]).registry
        return registry

    @property
    def peft_config(self) -> dict[str, Any]:
        """adapter's name → its config."""
        configs: dict[str, Any] | None = self._modules["model"].__dict__.get("peft_config")
        return {} if configs is None else configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self._modules["model"].__dict__["peft_config"] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's configuration as a dict; of a model without one, what PEFT takes in its place."""
        config: Any = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else config  # type: ignore[no-any-return]  # any model's

    def get_peft_config_as_dict(self, inference: bool = False) -> dict[str, Any]:
        """The fields of the config of the adapter that came last; inference: with inference_mode=True."""
        fields: dict[str, Any] = {}
        for config in list(self.peft_config.values())[-1:]:
            values = dataclasses.asdict(config)
            fields = {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
            if inference:
                fields["inference_mode"] = True
        return fields

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the modules that adapters adapt, those of the first adapter first."""
        registry = self._registry
        return list(dict.fromkeys(path for name in registry.names() for path in registry.adapted_modules(name)))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """May PEFT's `convert_to_lora` make LoRA of the adapters?"""
        registry = self._registry
        layers = [layer for name in registry.names() for _, layer in registry.adapted_layers(name)]
        return all(layer.supports_lora_conversion() for layer in layers)

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of parameters that adapters adapt: none. Adapters with target_parameters are made by PEFT."""
        return []

    # ---------------------------------------------------------------- adapters

    def inject_adapter(self, model: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Make the adapter that `peft_config` has a config for; what is active stays so."""
        config = self.peft_config.pop(adapter_name)
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: Any, *, source: Any = None, label: str = "config") -> Any:
        """Make an adapter, active if it is the first one."""
        registry = self._registry
        made = put(self.model, adapter_name, config, source=source, label=label, activate=not len(registry))
        self._warn_if_tied(adapter_name)
        return made

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in the order they apply."""
        return self._registry.active()

    @property
    def active_adapter(self) -> Any:
        """The active adapter; a list if there are several, or none."""
        names = self._registry.active()
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several in the order of the list, and trainable unless inference_mode.

        Raises:
            ValueError: an unknown name; two adapters that replace the same module.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        registry = self._registry
        if registry.merged():
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
        registry.activate(names)
        for name in names:
            registry.set_trainable(name, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the tensors of these adapters, active or not, have gradients, or not. Unknown names are passed over."""
        wanted = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        registry = self._registry
        for name in registry.names():
            if name in wanted:
                registry.set_trainable(name, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters apply again, and make them trainable."""
        registry = self._registry
        registry.enabled = True
        for name in registry.active():
            registry.set_trainable(name, True)

    def disable_adapter_layers(self) -> None:
        """Run the base model alone."""
        self._registry.enabled = False

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If none stays active, the first of the others by name becomes it, with a warning.

        Raises:
            ValueError: an unknown name.
        """
        registry, configs = self._registry, self.peft_config
        if adapter_name not in configs:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        was_active = adapter_name in registry.active()
        registry.remove(adapter_name)
        del configs[adapter_name]
        attached = attachment(self.model)
        attached.made_from.pop(adapter_name, None)
        attached.allocators.pop(adapter_name, None)
        attached.host.adapters_changed(self.model, registry)
        if was_active and not registry.active() and configs:
            heir = min(configs)
            registry.activate([heir])
            registry.set_trainable(heir, True)
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {heir}.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones if None) into the base weights while it lasts.

        Raises:
            ValueError: an unknown name; a str instead of a list; safe_merge found NaN or infinity.
        """
        self._warn_before_merging()
        names = self._to_merge(adapter_names)
        if names:
            self._registry.merge(names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit."""
        if not self._registry.merged():
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self._registry.unmerge()

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        registry = self._registry
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = registry.active() if adapter_names is None else list(dict.fromkeys(adapter_names))
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        merged = registry.merged()
        new = [name for name in names if name not in merged]
        if merged and new:
            warnings.warn(
                f"Already following adapters were merged {','.join(merged)}. You are now additionally merging "
                f"{','.join(new)}.",
                stacklevel=3,
            )
        elif merged:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return new

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters (the active ones if None) folded into its weights for good; no adapter is left.

        Raises:
            ValueError: as `merge_adapter`; several adapters that replace the same module. Nothing is changed then.
        """
        self._warn_before_merging()
        return self._unload(self._to_merge(adapter_names), progressbar, safe_merge)

    def unload(self) -> nn.Module:
        """The base model without adapters. Modules that the active adapter replaces stay replaced, as in PEFT."""
        return self._unload(None, False, False)

    def _unload(self, merge: list[str] | None, progressbar: bool, safe_merge: bool) -> nn.Module:
        heads = [name for name in merge or () if self._registry.saved_modules(name)]
        if len(merge or ()) > 1 and heads:
            raise ValueError("Cannot unload multiple adapters that specify `modules_to_save`.")
        registry = self._registry
        model: nn.Module = unload(registry, merge, safe_merge, progressbar)
        attachment(model).host.adapters_changed(model, registry)
        model.__dict__.pop("peft_config", None)
        model.__dict__.pop("_peftc_attachment", None)
        return model

    # ----------------------------------------------------------------- tied weights

    def _tied_targets(self, names: list[str]) -> list[str]:
        config: Any = getattr(self.model, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(config, dict) or not config.get("tie_word_embeddings"):
            return []
        adapted = dict.fromkeys(path for name in names for path in self._registry.adapted_modules(name))
        return [path for path in adapted if path.rpartition(".")[2] in _EMBEDDINGS]

    def _warn_if_tied(self, name: str) -> None:
        tied = self._tied_targets([name])
        if tied:
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the tied_target_modules={tied!r} are part of the adapter. "
                "This can lead to complications, for example when merging the adapter or converting your model to "
                "formats other than safetensors.",
                stacklevel=4,
            )

    def _warn_before_merging(self) -> None:
        tied = self._tied_targets(list(self.peft_config))
        if tied:
            warnings.warn(
                f"Model with `tie_word_embeddings=True` and the tied_target_modules={tied!r} are part of the adapter. "
                "This can lead to complications: merging changes both ends. Load the model with "
                "`tie_word_embeddings=False` and copy the weights to untie them first.",
                stacklevel=3,
            )

    # ------------------------------------------------------------------- running

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names=` of a call: see torch_mixed."""
        with torch_mixed.rows(self._registry, self.training, kwargs.get("adapter_names"), kwargs.get("num_beams")):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")


class LoraModel(Tuner):
    """A model with LoRA."""

    prefix = "lora_"

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the same "
                    "output as the base model would without adaption.",
                    stacklevel=2,
                )

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """A new adapter, not active, that is a weighted combination of others.

        Args:
            adapters, weights: which, and how much of each.
            adapter_name: its name; if it is taken, nothing happens.
            combination_type: "linear" (A and B, each weighted by the root of weight · scaling), "cat" (ranks add up),
                "svd" (the best of rank svd_rank for the sum of the products); "ties", "dare_linear", "dare_ties",
                "magnitude_prune" (A and B pruned to `density` first), each also with "_svd" (the products are).
            svd_rank: rank of the result; the largest of the adapters' if None.
            svd_clamp: quantile that the factors of an SVD are clamped to.
            svd_full_matrices, svd_driver: as of torch.linalg.svd.
            density: share of the values that pruning keeps.
            majority_sign_method: "total" or "frequency": how ties elects the sign of a value.

        Raises:
            ValueError: an unknown adapter; ranks that differ where they must not; an unknown combination; two adapters
                that replace the same module; targets given as lists and as patterns. Nothing is changed then.
        """
        from .torch_weighted import add_lora

        add_lora(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd={"rank": svd_rank, "clamp": svd_clamp, "full_matrices": svd_full_matrices, "driver": svd_driver},
            pruning={"density": density, "majority_sign_method": majority_sign_method},
        )

    def subtract_mutated_init(
        self, output_state_dict: Mapping[str, torch.Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, torch.Tensor]:
        """The LoRA adapter of twice the rank that does to the unchanged base model what a pissa or olora adapter has learned.

        Args:
            output_state_dict: the adapter's state dict, under a `PeftModel`'s names.
            adapter_name: an adapter of this model with the values that it had before training.
            kwargs: a dict whose state_dict is taken for that of this model.

        Raises:
            ValueError: adapter_name lacks a tensor of output_state_dict.
        """
        from .torch_peft_save import difference
        from .torch_state import get_state

        first = get_state(self, (kwargs or {}).get("state_dict"), adapter_name, False, "auto")
        return difference(
            output_state_dict, {f"base_model.{key}": tensor for key, tensor in first.items()}, f"adapter {adapter_name}"
        )


class AdaLoraModel(LoraModel):
    """A model with AdaLora. The loss of a task's model has the penalty on A and B that are not orthogonal in it."""

    # What the mixin does for the training of an AdaLora, on this model's adapters.
    update_and_allocate = PeftAdapterMixin.update_and_allocate
    orthogonality_loss = PeftAdapterMixin.orthogonality_loss
    adalora_state_dict = PeftAdapterMixin.adalora_state_dict
    load_adalora_state_dict = PeftAdapterMixin.load_adalora_state_dict
    _allocator = PeftAdapterMixin._allocator

    def _attached(self) -> Attachment:
        return attachment(self.model)

    @property
    def trainable_adapter_name(self) -> str | None:
        """The adapter that is being trained, of which there is one at most."""
        return next((name for name, config in self.peft_config.items() if not config.inference_mode), None)

    def resize_modules_by_rank_pattern(self, rank_pattern: Mapping[str, Any], adapter_name: str) -> None:
        """Drop the triplets that a rank pattern leaves out from an adapter's tensors. All modules, or none.

        Args:
            rank_pattern: name of a module's lora_E, with or without the adapter's after it → which triplets to keep,
                a list or a tensor of bool.

        Raises:
            ValueError: what keeps a module's triplets is neither; it is of another length; no module of that name.
        """
        layers = dict(self._registry.layers_of(adapter_name))
        plan: list[tuple[Any, dict[str, torch.Tensor]]] = []
        for key, kept in rank_pattern.items():
            if not isinstance(kept, (list, torch.Tensor)):
                raise ValueError("Unexpected type of rank_idx")
            path, mask = _module_of(key, adapter_name), torch.as_tensor(kept).view(-1).bool()
            if path not in layers:
                raise ValueError(f"rank_pattern has {key}, and adapter {adapter_name} adapts no module {path}")
            held = {field: getattr(layers[path], field)[adapter_name].detach() for field in PARAMETERS}
            if len(mask) != len(held["lora_E"]):
                raise ValueError(
                    f"rank_pattern of {key} is for {len(mask)} triplets, of which there are {len(held['lora_E'])}"
                )
            mask = mask.to(held["lora_E"].device)
            plan.append((layers[path], {field: _kept(field, tensor, mask) for field, tensor in held.items()}))
        for layer, tensors in plan:
            torch_adalora.resize(layer, adapter_name, tensors)
        attachment(self.model).allocators.pop(adapter_name, None)  # it knows the ranks that were

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: Mapping[str, Any], state_dict: dict[str, torch.Tensor], adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """Drop the triplets that a rank pattern leaves out from a `PeftModel`'s state dict, in place.

        Raises:
            KeyError: state_dict lacks a module of the pattern. It is not changed then.
        """
        resized: dict[str, torch.Tensor] = {}
        for key, kept in rank_pattern.items():
            mask = torch.as_tensor(kept).view(-1).bool()
            for field in PARAMETERS:
                name = f"base_model.model.{_module_of(key, adapter_name)}.{field}.{adapter_name}"
                tensor = state_dict[name]
                if tensor.shape[field == "lora_B"] != int(mask.sum()):
                    resized[name] = _kept(field, tensor, mask.to(tensor.device))
        state_dict.update(resized)
        return state_dict

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # has none
        raise TypeError(f"{type(self).__name__} does not support add_weighted_adapter method.")


def _module_of(key: str, adapter: str) -> str:
    """The module of a rank pattern's key: "encoder.fc.lora_E", or "encoder.fc.lora_E.default"."""
    return key.removesuffix(f".{adapter}").removesuffix(".lora_E")


def _kept(field: str, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor[:, mask] if field == "lora_B" else tensor[mask]


class IA3Model(Tuner):
    """A model with IA³."""

    prefix = "ia3_"

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:  # type: ignore[override]  # PEFT's
        """A new adapter, not active, whose vectors are the weighted sums of those of others.

        Raises:
            ValueError: an unknown adapter; two that replace the same module; targets given as lists and as patterns.
        """
        from .torch_weighted import add_ia3

        add_ia3(self, adapters, weights, adapter_name)


#: peft_type → class
TUNERS: types.MappingProxyType[str, type[Tuner]] = types.MappingProxyType(
    {"LORA": LoraModel, "ADALORA": AdaLoraModel, "IA3": IA3Model}
)


def tuner_for(config: Any) -> type[Tuner]:
    """The class for a config's method.

    Raises:
        NotImplementedError: peftc has no code for it.
    """
    method = _prepare.method_of(config)
    if method not in TUNERS:
        raise NotImplementedError(f"peftc has no code for the method {method} of PEFT; it knows {', '.join(TUNERS)}")
    return TUNERS[method]
