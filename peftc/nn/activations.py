"""Activation functions as modules."""

from __future__ import annotations

import numpy as np

from .. import _core
from .module import Module


class GELU(Module):
    """Gaussian error linear unit; see `functional.gelu`."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate is 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _core.gelu(x) if self.approximate == "none" else _core.gelu_tanh(x)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _core.relu(x)


class SiLU(Module):
    """x·sigmoid(x)."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _core.silu(x)


class Tanh(Module):
    """Hyperbolic tangent."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _core.tanh(x)
