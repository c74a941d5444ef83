"""Random sequences of calls in lockstep: Transformers' mixin with PEFT on a model, ours on its twin.

After every call both must agree on: the exception (type and text), what is loaded and active, configs, names, dtypes,
flags and values of all parameters, buffers, state dicts, which modules PEFT's isinstance knows, training modes, what was
logged, and the outputs; training steps also on gradients and updates; saves on the files. Intended differences
(docs/differences.md) are applied to the reference in `lockstep_reference.Reference` and nowhere else.

    PEFTC_SEQUENCES=10000 pytest tests/torch/test_lockstep.py     more sequences than the usual 600
    python tests/torch/test_lockstep.py 1234                      one of them, shortened to what is needed to fail
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from lockstep_models import TRANSFORMERS
from lockstep_steps import Lockstep, Mismatch, Ours, Patched, Reference, specification

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = int(os.environ.get("PEFTC_SEQUENCES", "600"))
LENGTH = 10
PER_TEST = 20


def subject_of(seed: int) -> type:
    """Transformers' models by turns with our mixin before theirs, and patched."""
    return Patched if specification(seed)["kind"] in TRANSFORMERS and seed % 2 else Ours


def run(seed: int, subject: type) -> None:
    with tempfile.TemporaryDirectory(prefix="lockstep") as folder:
        Lockstep(specification(seed), subject, Path(folder)).run(LENGTH)


def run_all(seeds, subject_of) -> None:
    """Every seed, even after one has failed; the report shows the first few failures."""
    failures = []
    for seed in seeds:
        try:
            run(seed, subject_of(seed))
        except Mismatch as mismatch:
            failures.append(f"seed {seed}: {mismatch}")
    if failures:
        pytest.fail(f"{len(failures)} of {len(seeds)} sequences differ\n\n" + "\n".join(failures[:3]), pytrace=False)


@pytest.mark.parametrize("first", range(0, SEQUENCES, PER_TEST))
def test_sequences(first):
    run_all(range(first, min(first + PER_TEST, SEQUENCES)), subject_of)


@pytest.mark.parametrize("first", range(0, 60, PER_TEST))
def test_reference_against_itself(first):
    """The harness finds no difference where there is none."""
    run_all(range(first, first + PER_TEST), lambda seed: Reference)


def shorten(seed: int, subject: type) -> str:
    """The text of the failure of sequence `seed` after leaving out every step that it does not need."""

    def failure(steps):
        with tempfile.TemporaryDirectory(prefix="lockstep") as folder:
            try:
                Lockstep(spec, subject, Path(folder)).replay(steps)
            except Mismatch as mismatch:
                return str(mismatch)
        return None

    spec = specification(seed)
    with tempfile.TemporaryDirectory(prefix="lockstep") as folder:
        lockstep = Lockstep(spec, subject, Path(folder))
        try:
            lockstep.run(LENGTH)
        except Mismatch as mismatch:
            text, steps = str(mismatch), lockstep.log
        else:
            return f"sequence {seed} passes"
    kind = text.split("\n")[0][:30]
    for i in reversed(range(len(steps))):
        shorter = [*steps[:i], *steps[i + 1 :]]
        found = failure(shorter)
        if found is not None and found.startswith(kind):
            steps, text = shorter, found
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        if argument != "--reference":
            number = int(argument)
            print(shorten(number, Reference if "--reference" in sys.argv else subject_of(number)))
