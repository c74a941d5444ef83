"""The torch host: adapters on any torch.nn.Module, under PEFT's names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import _core
from . import torch_adalora, torch_generation, torch_hotswap
from .generation import Generation
from .torch_layers import AdaptedLayer
from .torch_registry import TorchRegistry
from .torch_save import save_file
from .torch_tree import kind_of, walk
from .torch_wrappers import lasts, unwrap


def _path_of(model: Any, modules: list[tuple[str, Any]], getter: str) -> str | None:
    """Dotted name of the module that one of the model's methods returns; None when it has no such method or module."""
    get = getattr(model, getter, None)
    found = get() if get is not None else None
    if found is None:
        return None
    found = unwrap(found)
    return next((path for path, module in modules if module is found), None)


#: tensors to draw a number into, which nobody uses; making one would take longer than the draw
_NUMBERS: list[torch.Tensor] = []


def _new_number() -> torch.Tensor:
    with torch.inference_mode(False):  # else it could be drawn into in that mode alone
        return torch.tensor(0, dtype=torch.int64, device="cpu")


#: class → how its modules go to eval mode, for `_core.put_in_eval`; filled as classes are met
_EVAL_KINDS: dict[type, int] = {}


def _eval_kind(cls: Any) -> int:
    kind = 2 if cls.train is not nn.Module.train else int(issubclass(cls, AdaptedLayer))
    if lasts(cls):
        _EVAL_KINDS[cls] = kind
    return kind


class TorchHost:
    """See `peftc.hosts.Host`."""

    name = "torch"

    def __reduce__(self) -> str:
        return "HOST"

    def owns(self, model: object) -> bool:
        return isinstance(model, nn.Module)

    def new_registry(self) -> TorchRegistry:
        return TorchRegistry()

    def serve(self, registry: Any, model: Any) -> None:
        registry.model = model

    def new_seed(self) -> int:
        """From torch's generator, so that torch.manual_seed makes fresh adapters repeat."""
        number = _NUMBERS.pop() if _NUMBERS else _new_number()
        seed = int(number.random_(2**62).item())
        _NUMBERS.append(number)
        return seed

    def generation(self, model: Any) -> Generation:
        return torch_generation.generation_of(model)

    def named_modules(self, model: Any) -> list[tuple[str, Any]]:
        return walk(model)

    def is_linear(self, module: Any) -> bool:
        # Subclasses too: they may be quantised, and PEFT's to adapt.
        return isinstance(module, nn.Linear) or kind_of(module) == "Conv1D"

    def kind(self, module: Any) -> str:
        return kind_of(module)

    def adapted_kinds(self, registry: TorchRegistry, modules: list[tuple[str, Any]], name: str) -> set[str]:
        return registry.adapted_kinds(name)

    def output_embedding(self, model: Any, modules: list[tuple[str, Any]]) -> str | None:
        return _path_of(model, modules[::-1], "get_output_embeddings")  # it is one of the last

    def input_embedding(self, model: Any, modules: list[tuple[str, Any]]) -> str | None:
        return _path_of(model, modules, "get_input_embeddings")

    def model_config(self, model: Any) -> dict[str, Any]:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        return config if isinstance(config, dict) else {"model_type": "custom"}

    def device(self, model: Any) -> str:
        return str(next((p.device for p in model.parameters()), "cpu"))

    def check_device(self, device: Any, argument: str) -> None:
        """Everything goes: adapter tensors are made on the device of their base layer."""

    def as_array(self, tensor: Any) -> Any:
        """A torch tensor as an array (bfloat16 as float32, which holds all its values); others as they are."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()

    def config_elsewhere(self, refused: Exception, folder: str | None, fields: dict[str, Any] | None) -> Any:
        from . import torch_peft

        torch_peft.check_elsewhere(refused)
        return torch_peft.as_pefts(fields) if folder is None else torch_peft.read_config(folder)

    def make_elsewhere(
        self,
        registry: Any,
        name: str,
        config: Any,
        instead: dict[str, Any],
        source: Any,
        refused: Exception,
        *,
        label: str,
        trainable: bool,
    ) -> tuple[Any, dict[str, Any], list[str], list[str]]:
        from . import torch_peft

        torch_peft.check_elsewhere(refused)
        made: tuple[Any, dict[str, Any], list[str], list[str]] = registry.make_with_peft(
            name, config, instead, source, label=label, trainable=trainable
        )
        return made

    def flags(self, registry: TorchRegistry) -> Callable[[], None]:
        return registry.flags()

    def make_room(self, registry: TorchRegistry, name: str, rank: int) -> None:
        torch_hotswap.make_room(registry, name, rank)

    def replace(self, registry: TorchRegistry, name: str, make: Callable[[str], Any]) -> Any:
        return torch_hotswap.replace(registry, name, make)

    def plan_places(self, model: Any, device_map: Any, max_memory: Any, offload_folder: Any, offload_index: Any) -> Any:
        if getattr(model, "hf_device_map", None) is None:
            return None
        from . import torch_dispatch

        return torch_dispatch.plan(model, device_map, max_memory, offload_folder, offload_index)

    def carry_out(self, model: Any, plan: Any) -> None:
        from . import torch_dispatch

        torch_dispatch.carry_out(model, plan)

    def to_eval(self, model: Any) -> None:
        """An adapted layer that is in eval mode has its adapters in it too, if none was loaded to be trained: passed over."""
        if type(model).train is not nn.Module.train or type(model).eval is not nn.Module.eval:
            model.eval()
            return
        _core.put_in_eval(model, _EVAL_KINDS, _eval_kind)

    def save(self, tensors: dict[str, Any], path: str) -> None:
        save_file(tensors, path)

    def state_from(self, registry: TorchRegistry, name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return registry.state_from(name, state_dict)

    def triplets(self, model: Any, registry: Any, name: str) -> dict[str, Any]:
        return torch_adalora.triplets(registry.layers_of(name), name)

    def mask_triplets(self, model: Any, registry: Any, name: str, masks: dict[str, list[bool]]) -> None:
        torch_adalora.mask_triplets(registry.layers_of(name), name, masks)

    def orthogonality_loss(self, model: Any, registry: Any, name: str, weight: float) -> torch.Tensor:
        return torch_adalora.orthogonality(registry.layers_of(name), name) * weight

    def adapters_changed(self, model: Any, registry: Any) -> None:
        torch_adalora.settle_hook(model, any(registry.peft_type(name) == "ADALORA" for name in registry.names()))

    def activation_changed(self, model: Any, registry: Any) -> None:
        pass


HOST = TorchHost()
