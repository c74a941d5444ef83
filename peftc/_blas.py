"""Only for when the loader does not find OpenBLAS by itself."""

from __future__ import annotations


def load() -> None:
    """Load the OpenBLAS of the package scipy-openblas32 wherever it is installed, for `peftc._core` to link against.

    The extension looks beside itself in site-packages. The two are apart with `pip install --target` or `--user`, and
    in an environment on top of another one.
    """
    import ctypes
    from pathlib import Path

    try:
        import scipy_openblas32
    except ImportError as error:
        raise ImportError("peftc needs the package scipy-openblas32: pip install scipy-openblas32") from error
    for path in sorted(Path(scipy_openblas32.get_lib_dir()).glob("*scipy_openblas*")):
        if ".so" in path.name or path.suffix == ".dylib":
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
    raise ImportError(f"scipy-openblas32 has no library in {scipy_openblas32.get_lib_dir()}: install it again")
