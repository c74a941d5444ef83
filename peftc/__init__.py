"""peftc: adapters (LoRA, IA3, AdaLora) on a model, in C.

Only the C core is loaded here; every other name is imported when it is first used, so that `import peftc` costs
little more than `import numpy`.
"""

from typing import TYPE_CHECKING

# Before the core, which would import it too: NumPy's OpenBLAS starts its threads when it is loaded, and that takes
# tens of milliseconds longer when the core's OpenBLAS has just started its own.
import numpy as _numpy  # noqa: F401

try:
    from ._core import get_num_threads, set_num_threads
except ImportError as error:
    if "scipy_openblas" not in str(error):
        raise
    from . import _blas

    _blas.load()
    from ._core import get_num_threads, set_num_threads

if TYPE_CHECKING:  # the names below, as type checkers read them
    from . import models, nn, optim, safetensors
    from ._adalora import AdaLoraCallback
    from ._random import manual_seed
    from ._show import show_config
    from .config import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftType, TaskType
    from .hosts.torch_patch import patch_transformers
    from .hosts.torch_peft_model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from .mixin import PeftAdapterMixin
    from .nn.grad_mode import no_grad
    from .peft_api import (
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from .training import evaluate, train
    from .weights import load_adapter_weights

    __all__ = [  # noqa: RUF022  (the order of the documentation)
        "get_num_threads",
        "set_num_threads",
        "PeftAdapterMixin",
        "PeftConfig",
        "LoraConfig",
        "IA3Config",
        "AdaLoraConfig",
        "PeftType",
        "TaskType",
        "train",
        "evaluate",
        "AdaLoraCallback",
        "load_adapter_weights",
        "manual_seed",
        "no_grad",
        "patch_transformers",
        "get_peft_model",
        "inject_adapter_in_model",
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftModelForQuestionAnswering",
        "PeftModelForFeatureExtraction",
        "show_config",
        "models",
        "nn",
        "optim",
        "safetensors",
    ]

__version__ = "0.1.0"

_OF_TORCH = "hosts.torch_peft_model"  # imports torch: the classes are modules of it

# Where each public name comes from. `docs/make_api.py` documents exactly these.
_EXPORTS = {
    "PeftAdapterMixin": "mixin",
    "PeftConfig": "config",
    "LoraConfig": "config",
    "IA3Config": "config",
    "AdaLoraConfig": "config",
    "PeftType": "config",
    "TaskType": "config",
    "train": "training",
    "evaluate": "training",
    "AdaLoraCallback": "_adalora",
    "load_adapter_weights": "weights",
    "manual_seed": "_random",
    "no_grad": "nn.grad_mode",
    "patch_transformers": "hosts.torch_patch",
    "get_peft_model": "peft_api",
    "inject_adapter_in_model": "peft_api",
    "get_peft_model_state_dict": "peft_api",
    "set_peft_model_state_dict": "peft_api",
    "PeftModel": _OF_TORCH,
    "PeftModelForCausalLM": _OF_TORCH,
    "PeftModelForSeq2SeqLM": _OF_TORCH,
    "PeftModelForSequenceClassification": _OF_TORCH,
    "PeftModelForTokenClassification": _OF_TORCH,
    "PeftModelForQuestionAnswering": _OF_TORCH,
    "PeftModelForFeatureExtraction": _OF_TORCH,
    "show_config": "_show",
}
_MODULES = ("models", "nn", "optim", "safetensors")

if not TYPE_CHECKING:  # type checkers know every name from above, and report others

    def __getattr__(name: str) -> object:
        # Not importlib.import_module: it costs more than the rest of this file.
        if name in _MODULES:
            __import__(f"{__name__}.{name}")
            return globals()[name]
        if name in _EXPORTS:
            if _EXPORTS[name] == _OF_TORCH:
                from ._optional import require

                require("torch", f"peftc.{name}, a module of torch,")
            value = getattr(__import__(f"{__name__}.{_EXPORTS[name]}", fromlist=[name]), name)
            globals()[name] = value
            return value
        if name == "__all__":  # `from peftc import *` imports what can be imported
            from ._optional import is_installed

            names = ["get_num_threads", "set_num_threads", *_EXPORTS, *_MODULES]
            return [name for name in names if _EXPORTS.get(name) != _OF_TORCH or is_installed("torch")]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})
