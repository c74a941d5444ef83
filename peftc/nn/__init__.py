"""Neural-network modules on NumPy arrays, with torch's names, arguments and weight layouts.

The layers are C types; `Module` and the containers give the tree its dotted names, which equal torch's, so adapters
and state dicts move freely between the two.
"""

from . import functional
from .activations import GELU, ReLU, SiLU, Tanh
from .layers import Conv1D, Conv2d, Dropout, Embedding, Identity, LayerNorm, Linear, RMSNorm
from .module import Module, ModuleDict, ModuleList, Parameter, Sequential
from .tensor import Tensor

__all__ = [
    "GELU",
    "Conv1D",
    "Conv2d",
    "Dropout",
    "Embedding",
    "Identity",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "SiLU",
    "Tanh",
    "Tensor",
    "functional",
]
