"""The module tree of a torch model as it is without adapters: names, places, and what the core needs to know of each.

Adapted layers and saved modules are looked through: a name means the same module whether it is wrapped or not.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _core
from .torch_wrappers import lasts, leads, leads_of

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
FROM_NAME = {name: dtype for dtype, name in DTYPES.items()}


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(dotted name, module without adapters) for every module, the model first as ""; each module once."""
    return _core.walk_modules(model, leads, leads_of)


def kind_of(module: nn.Module) -> str:
    """torch's class name of what the module does, "" for a module that no adapter has native code for."""
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return ""
    kind = _EXACT.get(type(module))
    if kind is not None:
        return kind
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "Conv1D"
    # Subclasses compute the same unless they replace forward (quantised layers do).
    for base, kind in _EXACT.items():
        if isinstance(module, base) and type(module).forward is base.forward:
            return kind
    return ""


_EXACT: dict[type, str] = {
    nn.Linear: "Linear",
    nn.Conv1d: "Conv1d",
    nn.Conv2d: "Conv2d",
    nn.Conv3d: "Conv3d",
    nn.Embedding: "Embedding",
    nn.MultiheadAttention: "MultiheadAttention",
}


def is_packed(weight: Any) -> bool:
    """Is the weight a tensor of a class that keeps other tensors in its place (torchao's quantised ones)?

    DTensor is one as well, and computes as a tensor does.
    """
    return type(weight) not in _PLAIN and is_traceable_wrapper_subclass(weight) and type(weight).__name__ != "DTensor"


#: What weights mostly are.
_PLAIN = (nn.Parameter, torch.Tensor)


def _address(tensor: Any, holders: list[Any]) -> int | None:
    if tensor is None or tensor.device.type == "meta" or tensor.dtype not in DTYPES:
        return None
    held = tensor.detach().cpu().contiguous()
    holders.append(held)
    return int(held.data_ptr())


def weight_of(module: Any) -> torch.Tensor:
    """The weight that is adapted."""
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight: torch.Tensor = getattr(module, name)
    return weight


def home_of(module: Any) -> torch.device:
    """Where an adapter's tensors live: with the layer's weights, or, if accelerate fetches those, where it computes."""
    device = weight_of(module).device
    hook = getattr(module, "_hf_hook", None) if device.type == "meta" else None
    if hook is None:
        return device
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return device


class Description(NamedTuple):
    """What an adapter needs to know of a model's modules."""

    rows: list[tuple[str, Any]]  # (name, module as `AdapterRegistry.bind` takes those of other libraries)
    parameters: list[Any]  # the modules' own
    elsewhere: dict[int, nn.Module]  # id → module, of those whose weight is not in the CPU's memory
    holders: list[Any]  # keep the tensors alive whose addresses are in the rows


def describe(modules: list[tuple[str, nn.Module]], with_values: bool) -> Description:
    """Describe modules, which are given with their names; with_values=False gives no addresses of weights."""
    elsewhere: dict[int, nn.Module] = {}
    holders: list[Any] = []

    def row(module: nn.Module) -> tuple[Any, ...]:
        kind = kind_of(module)
        weight = weight_of(module) if kind else None  # a parametrization computes it each time
        if is_packed(weight):
            return _opaque(f"{type(module).__name__} of {type(weight).__name__}")
        if weight is not None:
            if not weight.is_cpu:
                elsewhere[id(module)] = module
            return _described(module, kind, weight, holders, with_values)
        cls = type(module)
        # Else it may be a matter of the instance.
        if not issubclass(cls, tuple(_EXACT)) and cls.__name__ != "Conv1D" and lasts(cls):
            _OPAQUE[cls] = _opaque(cls.__name__)
        return _opaque(cls.__name__)

    rows, parameters = _core.describe_modules(modules, None if with_values else nn.Linear, _OPAQUE, row)
    return Description(rows, parameters, elsewhere, holders)


#: class → the row of its modules, of classes that no adapter has code for; filled as they are met
_OPAQUE: dict[type, tuple[Any, ...]] = {}


def _opaque(name: str) -> tuple[Any, ...]:
    """The row of a module that no adapter has code for."""
    return (name, "", "", 0, 0, None, None, False)


def _described(module: nn.Module, kind: str, weight: Any, holders: list[Any], with_values: bool) -> tuple[Any, ...]:
    name = type(module).__name__
    parameters = module._parameters
    bias = parameters["bias"] if "bias" in parameters else getattr(module, "bias", None)
    dtype = DTYPES.get(weight.dtype, "I8")
    address = _address(weight, holders) if with_values else None
    bias_address = _address(bias, holders) if with_values else None
    if kind in ("Conv1d", "Conv2d", "Conv3d"):
        conv: Any = module
        row = (name, kind, dtype, conv.in_channels, conv.out_channels, address, bias_address, bias is not None)
        return (*row, conv.kernel_size, conv.groups)
    rows, columns = weight.shape
    extents = (columns, rows) if kind in ("Linear", "MultiheadAttention") else (rows, columns)
    return (name, kind, dtype, *extents, address, bias_address, bias is not None)
