"""Seeds for fuzz_safetensors.c: python tests/fuzz/seeds_safetensors.py FOLDER

Each file starts with the byte (or three) that the target takes off: see its first comment.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

DTYPES = {"BOOL": 8, "U8": 8, "I16": 16, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "I64": 64,
          "F8_E4M3": 8, "F6_E2M3": 6, "F4": 4}  # fmt: skip


def tensors(*items: tuple[str, str, list[int]]) -> tuple[dict, int]:
    header, place = {}, 0
    for name, dtype, shape in items:
        count = 1
        for dim in shape:
            count *= dim
        size = count * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return header, place


def seeds() -> dict[str, bytes]:
    lora, size = tensors(*((f"l.{i}.lora_{x}.weight", "F32", [2, 3]) for i in range(3) for x in "AB"))
    every, every_size = tensors(*((d, d, [2, 4]) for d in DTYPES))
    odd, odd_size = tensors(("", "F32", []), ("empty", "F64", [0, 3]), ('é😀\0\n"\\', "U8", [5]), ("tail", "I16", [0]))
    files = {
        "nothing": ({}, 0),
        "lora": ({"__metadata__": {"format": "pt"}} | lora, size),
        "reversed": (dict(reversed(lora.items())), size),
        "every": (every, every_size),
        "odd": (odd | {"__metadata__": {}}, odd_size),
        "ignored": ({"a": {"x": [1, -2.5e3, True, None, {"y": "z"}], **tensors(("a", "U8", [1]))[0]["a"]}}, 1),
        "null": ({"__metadata__": None} | lora, size),
    }
    out = {}
    for name, (header, payload) in files.items():
        for escaped in (True, False):
            raw = json.dumps(header, ensure_ascii=escaped).encode()
            kind = f"{name}-{'ascii' if escaped else 'utf8'}"
            out[f"header-{kind}"] = b"\x01" + struct.pack("<H", payload) + raw
            out[f"file-{kind}"] = (
                b"\x00" + struct.pack("<Q", len(raw)) + raw + bytes(i * 7 % 256 for i in range(payload))
            )
    return out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (folder / name).write_bytes(content)
