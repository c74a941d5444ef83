"""Python's garbage collector while adapters are made."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Promotions:
    """Whether new objects may skip the garbage collector's young generations."""

    def __init__(self) -> None:
        #: whether the process has never been seen to keep objects from the collector (gc.freeze), which counting them tells
        self._nothing_frozen = True
        self._full_collections = 0
        self._since = 0

    def due(self) -> bool:
        """May they now? Each time puts off the next full collection, which a few of them must not do for ever."""
        full = gc.get_stats()[2]["collections"]
        if full != self._full_collections:
            self._full_collections, self._since = full, 0
        return self._nothing_frozen and self._since < gc.get_threshold()[2]

    def carry_out(self) -> None:
        """Let everything that is young be old."""
        self._since += 1
        self._nothing_frozen = gc.get_freeze_count() == 0
        if self._nothing_frozen:  # else it would be unfrozen
            gc.freeze()
            gc.unfreeze()


promotions = Promotions()


@contextmanager
def grown_up() -> Iterator[None]:
    """What is made inside goes to the garbage collector's oldest generation, where it would end up anyway.

    Thousands of objects come at once, and none is garbage: collections on the way there would look at each for nothing.
    """
    if not gc.isenabled():
        yield
        return
    due = promotions.due()
    if due:
        gc.collect(1)  # what is young by now is promoted as well: first goes what is garbage
    gc.disable()
    try:
        yield
        if due:
            promotions.carry_out()
    finally:
        gc.enable()
