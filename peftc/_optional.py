"""Packages that peftc does without until something is asked that needs one."""

from __future__ import annotations

from importlib.util import find_spec


def is_installed(package: str) -> bool:
    """A folder that merely has the name, which Python would take for a package, is not it."""
    try:
        spec = find_spec(package)
    except ValueError:  # it is imported, and was made by hand
        return True
    return spec is not None and spec.origin is not None


def require(package: str, what: str, otherwise: str = "") -> None:
    """ModuleNotFoundError, which says what it is needed for and how to get it, unless `package` is installed."""
    if not is_installed(package):
        text = f"{what} needs the package {package}, which is not installed: pip install {package}{otherwise}"
        raise ModuleNotFoundError(text, name=package)
