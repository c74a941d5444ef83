"""A weight of a tensor class of its own, as torchao's quantised weights are."""

import torch


class Packed(torch.Tensor):
    """Keeps its values as another tensor; computes as if dequantised first."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Packed(inner["values"])

    def __repr__(self, **_):
        return f"Packed({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, function, kinds, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(args[0].values)

        def plain(value):
            return value.values if isinstance(value, Packed) else value

        return function(*map(plain, args), **(kwargs or {}))
