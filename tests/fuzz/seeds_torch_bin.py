"""Seeds for fuzz_torch_bin: files in the layouts of torch.save, and the pickles in them. Made without torch.

usage: python tests/fuzz/seeds_torch_bin.py FOLDER
"""

import collections
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bin_files import BFloat16, one, random_state, save, taken_apart, tensor, text


def states() -> dict[str, dict]:
    base = np.arange(24, dtype=np.float32)
    views = {"t": base.reshape(4, 6).T, "e": np.broadcast_to(base[:3], (2, 3)), "s": base[3:4], "p": base[:4]}
    types = {kind: np.ones(3, kind) for kind in ("f2", "f8", "?", "u1", "i1", "i2", "i4", "i8", "c8")}
    rng = random.Random(0)
    return {
        "plain": {"w": base},
        "views": views,
        "types": types | {"bf16": np.ones(3, "u2").view(BFloat16)},
        "other": {"a": {"b": base, "n": None}, "x": [1, (2.0, "s")], "o": collections.OrderedDict(k={1})},
    } | {f"random{i}": random_state(rng) for i in range(8)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in states().items():
        for protocol in (2, 4):
            for as_zip in (True, False):
                data = save(state, protocol, as_zip)
                stem = f"{name}-{protocol}-{'zip' if as_zip else 'legacy'}"
                (folder / stem).write_bytes(b"\0" + data)
                (folder / f"{stem}-pickle").write_bytes((b"\1" if as_zip else b"\2") + taken_apart(data)[0])
    # what the target's storage of 24 float32 fits, so that a changed pickle still finds its tensor
    fits = tensor(shape=(4, 6), stride=(6, 1), count=24)
    note = b"}" + text("note") + text("x") + b"s"
    ordered = b"ccollections\nOrderedDict\n)R"
    attributed = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + fits.partition(b"\n(")[0] + b"\nctorch\nTensor\n("
    attributed += fits.partition(b"\n(")[2].removesuffix(b"R") + note + b"tR"
    for name, value in {
        "fits": fits,
        "parameter": b"ctorch._utils\n_rebuild_parameter\n(" + fits + b"\x88" + ordered + b"tR",
        "attributed": attributed,
    }.items():
        (folder / f"hand-{name}").write_bytes(b"\1" + one(value))
        (folder / f"hand-{name}-legacy").write_bytes(b"\2" + one(value.replace(b"tQ", b"NtQ")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
