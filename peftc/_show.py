"""`peftc.show_config()`: what to paste into a bug report."""

from __future__ import annotations

import platform
import sys

import numpy

from . import __version__
from ._core import build_info


def show_config() -> None:
    """Print versions, kernels, BLAS and threads: the facts that a report of a wrong or slow result needs."""
    info = build_info()
    rows = {
        "peftc": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}",
        "numpy": numpy.__version__,
        "kernels": info["isa"],
        "blas": info["blas"],
        "threads": info["threads"],
        "build": "sanitized" if info["sanitized"] else "with test hooks" if info["test_hooks"] else "release",
    }
    # Only what is already loaded: showing the configuration imports nothing.
    for name in ("torch", "transformers", "peft", "safetensors", "huggingface_hub"):
        if name in sys.modules:
            rows[name] = getattr(sys.modules[name], "__version__", "?")
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
