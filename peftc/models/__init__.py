"""Models of Transformers on NumPy: read from a checkpoint folder, run, adapted.

`from_pretrained` picks the class by the folder's config.json. Module names are those of Transformers, so adapters made
there fit.
"""

from __future__ import annotations

import os
from typing import Any

from .base import PreTrainedModel
from .bert import BertForSequenceClassification, BertModel
from .config import ModelConfig
from .outputs import ModelOutput
from .wordpiece import WordPieceTokenizer

__all__ = [
    "BertForSequenceClassification",
    "BertModel",
    "ModelConfig",
    "ModelOutput",
    "PreTrainedModel",
    "WordPieceTokenizer",
    "from_pretrained",
]

# Another architecture is another file in this folder and its classes here.
_CLASSES: dict[str, type[PreTrainedModel]] = {
    "BertModel": BertModel,
    "BertForSequenceClassification": BertForSequenceClassification,
}
_BASE_CLASSES: dict[str, type[PreTrainedModel]] = {"bert": BertModel}
_CLASSIFIERS: dict[str, type[PreTrainedModel]] = {"bert": BertForSequenceClassification}


def from_pretrained(
    path: str | os.PathLike[str], num_labels: int | None = None, dtype: Any = None, **overrides: Any
) -> PreTrainedModel:
    """The model in a checkpoint folder, in eval mode, its weights mapped read-only from the file.

    Args:
        path: folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.
        num_labels: make a sequence classifier with this many labels. None: the class that config.json names, or the bare
            model when that class is not known here.
        dtype: what to store weights in; None keeps the file's, which needs no memory beyond the mapping.
        **overrides: fields of config.json to replace, and `ignore_mismatched_sizes`; see
            `PreTrainedModel.from_pretrained`.

    Raises:
        OSError: no such folder or file.
        ValueError: config.json or the weights do not describe a model that peftc has.
        SafetensorError: a weights file is damaged.
    """
    config = ModelConfig.from_pretrained(path)
    kind = config.get("model_type", "")
    named = [name for name in config.get("architectures") or [] if name in _CLASSES]
    if num_labels is not None:
        overrides["num_labels"] = num_labels
        chosen = _CLASSIFIERS.get(kind)
    else:
        chosen = _CLASSES[named[0]] if named else _BASE_CLASSES.get(kind)
    if chosen is None:
        raise ValueError(
            f"{os.fspath(path)}: model_type {kind!r} is not one that peftc.models has ({', '.join(sorted(_BASE_CLASSES))}); "
            "other models run under torch"
        )
    return chosen.from_pretrained(path, dtype=dtype, **overrides)
