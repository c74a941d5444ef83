"""What reading a file may cost, whoever made it: 5 s of CPU time, 1 GiB of memory; disks that get full. Needs no torch."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 5  # of CPU time, of all threads together: the clock would measure the machine's other work
BYTES = 2**30
LOST_AFTER = 60  # CPU seconds after which a file is taken to be read for ever; sanitizers are slow

if hasattr(signal, "SIGPROF"):
    faulthandler.register(signal.SIGPROF, chain=True)  # where it was, and then the default: the end of the process


@contextlib.contextmanager
def one_file(what: object) -> Iterator[None]:
    """Within: the reading of one file, which takes less than 5 s of CPU time.

    One that never comes back ends the process, with the place on stderr.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, LOST_AFTER)
    start = time.process_time()
    try:
        yield
    finally:
        taken = time.process_time() - start
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    assert taken < SECONDS, f"{taken:.1f} s of CPU time: {what!r:.2000}"


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within: any number of files, which together never make the process more than 1 GiB larger."""
    before = _resident_from_now_on()
    yield
    grown = _peak() - before
    assert grown < BYTES, f"{grown / 2**20:.0f} MiB"


@contextlib.contextmanager
def no_more_memory() -> Iterator[None]:
    """Within: what would make the process more than 1 GiB larger gets a MemoryError: code that is not ours may ask for
    all that the machine has, which ends the process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Within: `folder`, which is made, is a tmpfs of that size ("8k", "1m"). Skips the test where it may not mount one."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False, capture_output=True
        )
    except OSError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip("not allowed to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _resident_from_now_on() -> int:
    """The process's resident bytes; its peak is counted anew from here where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        resource = pytest.importorskip("resource")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
