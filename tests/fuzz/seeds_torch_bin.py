"""Seeds for fuzz_torch_bin: files of torch.save, and the pickles in them.

usage: python tests/fuzz/seeds_torch_bin.py FOLDER
"""

import collections
import io
import sys
import zipfile
from pathlib import Path

import torch


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base = torch.arange(24.0)
    attributed = torch.ones(2)
    attributed.note = "x"
    states = {
        "plain": {"w": base},
        "views": {"t": base.view(4, 6).T, "e": base[:3].expand(2, 3), "s": base[3], "p": torch.nn.Parameter(base[:4])},
        "module": torch.nn.Linear(4, 6).state_dict(),
        "types": {str(d): torch.ones(3, dtype=d) for d in (torch.bfloat16, torch.uint16, torch.bool, torch.int64)},
        "other": {
            "a": {"b": base, "n": None},
            "x": [1, (2.0, "s")],
            "o": collections.OrderedDict(k={1}),
            "t": attributed,
        },
    }
    for name, state in states.items():
        for protocol in (2, 4):
            for as_zip in (True, False):
                if name == "types" and not as_zip:
                    continue
                buffer = io.BytesIO()
                torch.save(state, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
                stem = f"{name}-{protocol}-{'zip' if as_zip else 'legacy'}"
                (folder / stem).write_bytes(b"\0" + buffer.getvalue())
                if as_zip:
                    with zipfile.ZipFile(buffer) as archive:
                        pickled = archive.read("archive/data.pkl")
                    (folder / f"{stem}-pickle").write_bytes(b"\1" + pickled)
    for mode in (1, 2):
        view = b"N" if mode == 2 else b""
        body = (
            b"\x80\x02}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((U\7storagectorch\nFloatStorage\nU\0010U\3cpuK\x18"
            + view + b"tQK\0K\4K\6\x86K\6K\1\x86\x89ccollections\nOrderedDict\n)RtRs."
        )  # fmt: skip
        (folder / f"hand-{mode}").write_bytes(bytes([mode]) + body)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
