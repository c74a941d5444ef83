"""What the models share: reading a checkpoint folder, and the adapters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from ..mixin import PeftAdapterMixin
from ..nn import Embedding, LayerNorm, Linear, Module
from .config import ModelConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class PreTrainedModel(PeftAdapterMixin, Module):
    """A model that is read from a folder. Subclasses build their tree from a config in `__init__`.

    Attributes:
        config: what the model was built from.
        name_or_path: the folder it was read from, or "".
    """

    base_model_prefix: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.name_or_path = ""

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        **overrides: Any,
    ) -> Self:
        """The model in a checkpoint folder, in eval mode.

        Weights stay where they are: they are mapped read-only from the file and shared between processes. What the
        checkpoint lacks (a classifier, often) is drawn afresh, and a warning on the logger "peftc.models" names it. The
        folder must not be changed while the model lives; replace files, do not overwrite them.

        Args:
            path: folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.
            dtype: "float32", "float64", "float16" or "bfloat16" to convert the weights to; None keeps the file's.
            ignore_mismatched_sizes: draw weights afresh whose shape in the file is another, instead of refusing.
            **overrides: fields of config.json to replace, like num_labels=3.

        Raises:
            OSError: no such folder or file.
            ValueError: a config that cannot work, shapes that differ, or a checkpoint of something else.
            TypeError: an override that the model's config does not have.
            SafetensorError: a weights file is damaged.
        """
        from .loading import Checkpoint, load_weights

        config = ModelConfig.from_pretrained(path)
        known = {**cls.defaults, **config.to_dict()}
        unknown = [name for name in overrides if name not in known and name != "num_labels"]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pretrained: config.json has no field {unknown[0]!r}")
        config = ModelConfig.from_pretrained(path, **overrides)
        if "num_labels" in overrides:
            config.num_labels = overrides["num_labels"]
        checkpoint = Checkpoint(path)
        model = cls(config, dtype=dtype or checkpoint.main_dtype())  # type: ignore[call-arg]  # subclasses take dtype
        load_weights(model, checkpoint, dtype, ignore_mismatched_sizes)
        model.name_or_path = os.fspath(path)
        return model.eval()

    def _start_weights(self) -> None:
        """First values as the model's authors draw them: normal with standard deviation initializer_range."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, (Linear, Embedding)):
                module.weight._fill("normal", 0.0, std)
                if module.bias is not None:
                    module.bias._fill("zeros", 0.0, 0.0)


def norm(size: int, config: ModelConfig, dtype: Any) -> LayerNorm:
    """A LayerNorm as the config wants it."""
    return LayerNorm(size, eps=config.layer_norm_eps, dtype=dtype)
