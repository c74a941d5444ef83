"""What callers give for an adapter, as what peftc works with: configs of peftc or PEFT, dicts of their fields, files, tensors."""
# ruff: noqa: UP045  (Optional, as in the signatures that use these)

import os
import re
import sys
from typing import Any, Optional

from . import _core
from .config import PeftConfig

_PREFIX = "base_model.model."


def _config_types() -> tuple[type, ...]:
    """Our PeftConfig, and PEFT's if something has imported peft."""
    theirs = getattr(sys.modules.get("peft"), "PeftConfig", None)
    return (PeftConfig, theirs) if theirs is not None else (PeftConfig,)


def is_config(value: Any) -> bool:
    return isinstance(value, _config_types())


def as_config(value: Any, argument: str, host: Any) -> Any:
    """A config as it is, or made from a dict of its fields."""
    if is_config(value):
        return value
    if isinstance(value, dict):
        if value.get("peft_type") is None:
            raise ValueError(f'{argument} is a dict without "peft_type", which says what method it configures')
        try:
            return PeftConfig.from_peft_type(**value)
        except (NotImplementedError, KeyError) as refused:
            return host.config_elsewhere(refused, None, value)
    raise TypeError(
        f"{argument} should be an instance of PeftConfig or a dict of its fields. Got {type(value)} instead."
    )


def read_config(path: str, host: Any) -> Any:
    from .config import PeftConfig

    folder = os.path.dirname(path)
    try:
        return PeftConfig.from_pretrained(folder)
    except (NotImplementedError, KeyError) as refused:
        return host.config_elsewhere(refused, folder, None)


def write_config(config: Any, path: str) -> None:
    """adapter_config.json as PEFT's `save_pretrained` writes it, atomically."""
    from .config import to_file_text

    _core.config_write(path, to_file_text({**config.to_dict(), "inference_mode": True}))


def read_weights(source: Any) -> dict[str, Any]:
    """All tensors of a weights file, or a caller's mapping as a dict."""
    if isinstance(source, str):
        from .weights import load_adapter_weights

        return load_adapter_weights(source)
    try:
        return dict(source)
    except (TypeError, ValueError):
        raise TypeError(f"adapter_state_dict should be a dict of name -> array. Got {type(source)} instead.") from None


def renamed(tensors: dict[str, Any], key_mapping: Optional[dict[str, str]], host: Any) -> dict[str, Any]:
    """Tensors under the names of this model: without PEFT's prefix, and after key_mapping."""
    result = {}
    for key, value in tensors.items():
        if not isinstance(key, str):
            raise TypeError(f"adapter_state_dict has a key that is no str: {key!r}")
        result[new_key(key, key_mapping)] = host.as_array(value)
    return result


def new_key(key: str, key_mapping: Optional[dict[str, str]]) -> str:
    """A tensor's name without PEFT's prefix and after the first pattern that matches."""
    name = key.removeprefix(_PREFIX)
    for pattern, replacement in (key_mapping or {}).items():
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name
