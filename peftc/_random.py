"""Where seeds come from: one sequence per process, for every draw that is not given a seed of its own."""

from __future__ import annotations

import itertools
import os

from . import _core

_MASK = (1 << 64) - 1
_base: int | None = None
_counter = itertools.count()


def manual_seed(seed: int) -> None:
    """Start the sequence of random draws (adapter and layer initialisation, dropout) again from `seed`.

    The draws that follow depend on `seed` and on their order alone: not on the number of threads, the machine or the
    process. Without a call the sequence starts from the system's entropy.

    Raises TypeError when `seed` is not an integer and ValueError when it is outside −2⁶³ … 2⁶⁴ − 1.
    """
    global _base, _counter
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"seed must be an integer, not {type(seed).__name__}")
    seed = seed.__index__()
    if not -(1 << 63) <= seed <= _MASK:
        raise ValueError(f"seed must be between -2**63 and 2**64 - 1, got {seed}")
    _counter = itertools.count()
    _base = seed & _MASK
    _core.manual_seed(_base)


def next_seed() -> int:
    """The next seed of the sequence, 0 … 2⁶⁴ − 1. Safe from any thread."""
    global _base
    if _base is None:
        _base = int.from_bytes(os.urandom(8), "little")
    return _mix(_mix(_base) ^ next(_counter))


def _mix(x: int) -> int:
    # SplitMix64's finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
    # neighbouring seeds must not share draws.
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
