"""What a model's forward pass returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class ModelOutput:
    """Named results: attributes, dict access by name, tuple access by position.

    Results that were not asked for are None as attributes and absent otherwise.
    """

    __slots__ = ("_fields",)

    def __init__(self, **fields: Any) -> None:
        object.__setattr__(self, "_fields", fields)

    def __getattr__(self, name: str) -> Any:
        if name != "_fields" and name in self._fields:
            return self._fields[name]
        raise AttributeError(f"the output has {', '.join(self.keys())}, and no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._fields[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            value = self._fields.get(key)
            if value is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]

    def keys(self) -> list[str]:
        """Names of the results that are there."""
        return [name for name, value in self._fields.items() if value is not None]

    def values(self) -> list[Any]:
        """The results that are there."""
        return [value for value in self._fields.values() if value is not None]

    def items(self) -> list[tuple[str, Any]]:
        """(name, result) of those that are there."""
        return [(name, value) for name, value in self._fields.items() if value is not None]

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are there, in order."""
        return tuple(self.values())

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self._fields)

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "_fields", state)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_brief(value)}" for name, value in self.items())
        return f"ModelOutput({shown})"


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"<{value.dtype} {shape}>"
    return f"<tuple of {len(value)}>" if isinstance(value, tuple) else repr(value)
