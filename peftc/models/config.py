"""config.json of a model as an object."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any


class ModelConfig:
    """The fields of a config.json as attributes.

    Fields that the file does not have take the model's defaults; a field that neither has is an AttributeError.
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **overrides: Any) -> ModelConfig:
        """Read `path`/config.json and replace fields.

        Raises:
            OSError: there is no such file.
            ValueError: it is not a JSON object.
        """
        file = os.path.join(os.fspath(path), "config.json")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file} not found: a model is a folder with config.json and model.safetensors")
        with open(file, encoding="utf-8") as stream:
            try:
                fields = json.load(stream)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{file} must hold a JSON object, not a {type(fields).__name__}")
        return cls(**{**fields, **overrides})

    @property
    def num_labels(self) -> int:
        """Labels of a classifier: as set, or as many as id2label has, or 2."""
        fields = self.__dict__
        if "num_labels" in fields:
            count: int = fields["num_labels"]
            return count
        return len(fields.get("id2label") or (0, 1))

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"num_labels must be a positive integer, got {value!r}")
        self.__dict__["num_labels"] = int(value)

    if TYPE_CHECKING:  # the fields are whatever the file has

        def __getattr__(self, name: str) -> Any: ...

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default`."""
        return self.__dict__.get(name, default)

    def with_defaults(self, defaults: dict[str, Any]) -> ModelConfig:
        """A copy in which fields that are absent have these values."""
        return type(self)(**{**defaults, **self.__dict__})

    def to_dict(self) -> dict[str, Any]:
        """A new dict of all fields."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, sort_keys=True, default=repr)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # mutable
