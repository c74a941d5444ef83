"""Optimizers and learning-rate schedules with torch's names and arithmetic; the steps run in C."""

from . import lr_scheduler
from .adamw import AdamW
from .clip import clip_grad_norm_, clip_grad_value_
from .loraplus import loraplus_groups
from .optimizer import Optimizer
from .sgd import SGD

__all__ = [
    "SGD",
    "AdamW",
    "Optimizer",
    "clip_grad_norm_",
    "clip_grad_value_",
    "loraplus_groups",
    "lr_scheduler",
]
