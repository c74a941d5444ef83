"""The NumPy host: models built from peftc.nn, weights in memory or mapped from a file, CPU only.

The layers are C types that look up the registry's activation in their forward pass, so nothing in the model has to be
replaced or flipped when adapters come, go or switch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import _core
from .._adalora import PARAMETERS
from .._random import next_seed
from .generation import FOUR, Generation, no_such_modules

#: Values of device_map that leave the placement to the host; here that is always the CPU.
_AUTOMATIC = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})


def _name_of(model: Any, modules: list[tuple[str, Any]], getter: str) -> str | None:
    """Dotted name of the module that one of the model's methods returns; None when it has no such method or module."""
    get = getattr(model, getter, None)
    found = get() if get is not None else None
    if found is None:
        return None
    return next((name for name, module in modules if module is found), None)


class NumpyHost:
    """See `peftc.hosts.Host`."""

    name = "numpy"

    def owns(self, model: object) -> bool:
        return isinstance(model, _core.Module)

    def new_registry(self) -> _core.AdapterRegistry:
        return _core.AdapterRegistry()

    def serve(self, registry: Any, model: Any) -> None:
        """Nothing: this host's modules know their registry."""

    def new_seed(self) -> int:
        return next_seed()

    def generation(self, model: Any) -> Generation:
        return FOUR

    def named_modules(self, model: Any) -> list[tuple[str, Any]]:
        return list(model.named_modules(remove_duplicate=False))

    def is_linear(self, module: Any) -> bool:
        return self.kind(module) in ("Linear", "Conv1D")

    def kind(self, module: Any) -> str:
        return module.kind if isinstance(module, _core.Layer) else ""

    def adapted_kinds(self, registry: Any, modules: list[tuple[str, Any]], name: str) -> set[str]:
        found = dict(modules)
        return {self.kind(found[path]) for path in registry.adapted_modules(name)}

    def output_embedding(self, model: Any, modules: list[tuple[str, Any]]) -> str | None:
        return _name_of(model, modules, "get_output_embeddings")

    def input_embedding(self, model: Any, modules: list[tuple[str, Any]]) -> str | None:
        return _name_of(model, modules, "get_input_embeddings")

    def model_config(self, model: Any) -> dict[str, Any]:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        if isinstance(config, dict):
            return config
        return dict(vars(config)) if hasattr(config, "__dict__") else {"model_type": "custom"}

    def device(self, model: Any) -> str:
        return "cpu"

    def check_device(self, device: Any, argument: str) -> None:
        """Accepts the CPU in any spelling (None, "cpu", "auto", {"": "cpu"}, torch.device("cpu")), refuses the rest."""
        if isinstance(device, dict):
            for module, place in device.items():
                self.check_device(place, f"{argument}[{module!r}]")
            return
        if device is None:
            return
        text = device if isinstance(device, str) else str(getattr(device, "type", device))
        if text in _AUTOMATIC or text.partition(":")[0] == "cpu":
            return
        if text == "disk":
            raise ValueError(
                f'{argument}="disk" is not needed on this host: base weights read by peftc.models are mapped from '
                'their file already, and adapters are kept in memory. Use "cpu"'
            )
        raise ValueError(
            f"{argument} names {device!r}, but this model runs on NumPy, which has the CPU only. Leave {argument} out or "
            'pass "cpu"; a GPU needs a torch model'
        )

    def as_array(self, tensor: Any) -> Any:
        """NumPy arrays as they are; torch tensors as arrays over the same memory where NumPy has their dtype."""
        if isinstance(tensor, np.ndarray) or not hasattr(tensor, "detach"):
            return tensor
        tensor = tensor.detach().cpu()
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16, float8: NumPy has no such dtype; float32 holds all their values
            return tensor.float().numpy()

    def config_elsewhere(self, refused: Exception, folder: str | None, fields: dict[str, Any] | None) -> Any:
        raise refused

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
        raise refused

    def flags(self, registry: _core.AdapterRegistry) -> Callable[[], None]:
        trainable = {name: registry.trainable(name) for name in registry.names()}

        def restore() -> None:
            for name, flag in trainable.items():
                registry.set_trainable(name, flag)

        return restore

    def make_room(self, registry: _core.AdapterRegistry, name: str, rank: int) -> None:
        """Nothing: no compiler looks at these models."""

    def replace(self, registry: _core.AdapterRegistry, name: str, make: Callable[[str], Any]) -> Any:
        """The other adapter takes the place whole, in one step: a forward pass on another thread ends as it began."""
        incoming = name
        while incoming in registry:
            incoming += "'"
        made = make(incoming)
        try:
            extra = set(registry.adapted_modules(incoming)) - set(registry.adapted_modules(name))
            if extra:
                raise RuntimeError(no_such_modules(name, extra))
            registry.replace(name, incoming)
        except BaseException:
            registry.remove(incoming)
            raise
        return made

    def state_from(self, registry: _core.AdapterRegistry, name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: state_dict[full] if full else tensor
            for key, full, tensor, saved, _, _ in registry.tensors(name)
            if saved and (not full or full in state_dict)
        }

    def plan_places(self, model: Any, device_map: Any, max_memory: Any, offload_folder: Any, offload_index: Any) -> Any:
        return None

    def carry_out(self, model: Any, plan: Any) -> None:
        pass

    def to_eval(self, model: Any) -> None:
        model.eval()

    def save(self, tensors: dict[str, Any], path: str) -> None:
        _core.safetensors_save_file(tensors, path, {"format": "pt"})

    def triplets(self, model: Any, registry: Any, name: str) -> dict[str, Any]:
        gradients = {full: parameter.grad for full, parameter in model.named_parameters()}
        found: dict[str, dict[str, Any]] = {}
        for _, full, tensor, _, _, module in registry.tensors(name):
            parameter = full.removeprefix(f"{module}.").partition(".")[0]
            if parameter in PARAMETERS:
                grad = gradients.get(full)
                found.setdefault(module, {})[parameter] = (_wide(tensor), None if grad is None else _wide(grad))
        return {module: tuple(tensors[p] for p in PARAMETERS) for module, tensors in found.items()}

    def mask_triplets(self, model: Any, registry: Any, name: str, masks: dict[str, list[bool]]) -> None:
        for _, full, tensor, _, _, module in registry.tensors(name):
            if module in masks and full.startswith(f"{module}.lora_E."):
                tensor[~np.array(masks[module], dtype=bool)] = 0

    def orthogonality_loss(self, model: Any, registry: Any, name: str, weight: float) -> float:
        parameters = dict(model.named_parameters())
        rows = [
            (full, tensor)
            for _, full, tensor, _, _, module in registry.tensors(name)
            if full.startswith((f"{module}.lora_A.", f"{module}.lora_B."))
        ]
        total = 0.0
        for full, tensor in rows:
            parameter = parameters[full]
            grad = np.zeros_like(_wide(tensor))
            total += _core.orthogonality(_wide(tensor), ".lora_B." in full, weight / len(rows), grad)
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return weight * total / max(1, len(rows))

    def adapters_changed(self, model: Any, registry: _core.AdapterRegistry) -> None:
        # Base parameters are frozen once there is an adapter; those of adapters follow from what is active.
        if len(registry):
            model.requires_grad_(False)

    def activation_changed(self, model: Any, registry: _core.AdapterRegistry) -> None:
        pass


def _wide(array: Any) -> Any:
    """The array itself if it is float32 or float64 without gaps, else a float32 copy."""
    array = np.asarray(array)
    return np.ascontiguousarray(array, dtype=np.float64 if array.dtype == np.float64 else np.float32)


HOST = NumpyHost()
