"""Time two implementations in turn, each in a process of its own.

In one process they would disturb each other: the threads of a pool keep looking for work for milliseconds after a call
and take the core from the other's call. Here a worker runs when it is asked to and answers when its threads have gone to
sleep. With the time of a round comes how long the worker's threads were ready to run and had no core, as Linux counts
it: rounds in which other work took the cores are left out of the medians where enough quiet ones remain.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PARKED = 0.02  # seconds after which the threads of every pool here sleep
QUIET = 0.03  # share of a round that threads may wait for a core
ENOUGH = 5  # quiet rounds that make a median


def waited() -> float:
    """Seconds that threads of this process were ready to run and had no core, so far; 0 where nobody counts them."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return total / 1e9


def serve(cases: dict[str, Callable[[], object]]) -> None:
    """The worker: answer each line [case, calls] with [seconds per call, share of the time without a core]."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, calls = json.loads(line)
        call = cases[name]
        call()  # wakes the pool and warms the caches
        before, start = waited(), time.perf_counter()
        for _ in range(calls):
            call()
        took = time.perf_counter() - start
        share = (waited() - before) / took
        time.sleep(PARKED)
        print(json.dumps([took / calls, share]), flush=True)


class Worker:
    """A process that runs `serve`: this script again, with `arguments`."""

    def __init__(
        self, script: str, arguments: Sequence[str], threads: int, variables: Mapping[str, str] | None = None
    ) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= variables or {}
        command = [sys.executable, script, *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def run(self, case: str, calls: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([case, calls]) + "\n")
        self.process.stdin.flush()
        seconds, share = self._answer()
        return seconds, share

    def close(self) -> None:
        self.process.communicate()


@dataclass
class Result:
    """Seconds per call of ours and theirs, and theirs / ours; medians over the rounds that count, and the best."""

    ours: float
    theirs: float
    ratio: float
    best_ours: float
    best_theirs: float
    quiet: int  # rounds without other work on the cores
    rounds: int

    @property
    def best_ratio(self) -> float:
        return self.best_theirs / self.best_ours


def alternate(ours: Worker, theirs: Worker, case: str, rounds: int, seconds: float = 0.05) -> Result:
    """Measure `case` in turn; a round of either takes about `seconds`."""
    calls = max(1, round(seconds / min(theirs.run(case, 1)[0] for _ in range(3))))
    pairs = []
    for i in range(rounds):
        if i % 2 == 0:  # each goes first as often as the other
            a, b = ours.run(case, calls), theirs.run(case, calls)
        else:
            b, a = theirs.run(case, calls), ours.run(case, calls)
        pairs.append((a, b))
    quiet = [pair for pair in pairs if max(share for _, share in pair) <= QUIET]
    counted = quiet if len(quiet) >= min(ENOUGH, rounds) else pairs
    return Result(
        ours=statistics.median(a[0] for a, _ in counted),
        theirs=statistics.median(b[0] for _, b in counted),
        ratio=statistics.median(b[0] / a[0] for a, b in counted),
        best_ours=min(a[0] for a, _ in pairs),
        best_theirs=min(b[0] for _, b in pairs),
        quiet=len(quiet),
        rounds=rounds,
    )
