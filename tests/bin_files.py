"""Files in the layouts of torch.save, made without torch: good ones, hand-made ones and damaged ones."""

from __future__ import annotations

import collections
import io
import itertools
import pickle
import pickletools
import random
import struct
import zipfile
from typing import Any

import numpy as np

# --------------------------------------------------- whole files, from a pickle and the bytes of its storages


def archive(pickled: bytes, storages: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None,
            folder: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:  # fmt: skip
    """The zip layout."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        z.writestr(f"{folder}/data.pkl", pickled)
        for key, content in (storages or {}).items():
            z.writestr(f"{folder}/data/{key}", content)
        z.writestr(f"{folder}/version", b"3\n")
        for name, content in (extra or {}).items():
            z.writestr(name, content)
    return buffer.getvalue()


def stream(pickled: bytes, keys=("0",), storages=(bytes(16),), counts=(4,), version=1001) -> bytes:
    """The legacy layout; counts are in elements."""
    out = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(version, 2) + pickle.dumps({"little_endian": True}, 2)
    out += pickled + pickle.dumps(list(keys), 2)
    for count, content in zip(counts, storages, strict=True):
        out += struct.pack("<q", count) + content
    return out


def taken_apart(data: bytes) -> tuple[bytes, dict[str, bytes], dict[str, int]]:
    """The pickle of a file in either layout, its storages, and how many elements the legacy layout gives them."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            storages = {n.partition("/data/")[2]: z.read(n) for n in z.namelist() if "/data/" in n}
            return z.read("archive/data.pkl"), storages, {}
    file, pickles = io.BytesIO(data), []
    for _ in range(5):  # magic number, version, facts about the writer, the object, the storages' keys
        start = file.tell()
        collections.deque(pickletools.genops(file), maxlen=0)  # to its end
        pickles.append(data[start : file.tell()])
    sizes = _sizes_of_storages(pickles[3])
    storages, counts = {}, {}
    for key in pickle.loads(pickles[4]):
        counts[key] = struct.unpack("<q", file.read(8))[0]
        storages[key] = file.read(counts[key] * sizes[key])
    assert file.read() == b""
    return pickles[3], storages, counts


def _sizes_of_storages(pickled: bytes) -> dict[str, int]:
    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> None:
            sizes[pid[2]] = pid[1].itemsize

        def find_class(self, module: str, name: str) -> Any:
            if name in KINDS:
                return KINDS[name]
            return collections.OrderedDict if name == "OrderedDict" else lambda *args: None

    sizes: dict[str, int] = {}
    Reader(io.BytesIO(pickled)).load()
    return sizes


# ------------------------------------------------------------------------------- pieces of hand-made pickles

FOUR = {"0": struct.pack("<4f", 1, 2, 3, 4)}


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integer(n: int) -> bytes:
    return b"J" + struct.pack("<i", n) if -(2**31) <= n < 2**31 else b"\x8a\x09" + n.to_bytes(9, "little", signed=True)


def storage(key="0", count=4, kind="torch\nFloatStorage") -> bytes:
    return b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu") + integer(count) + b"tQ"


def ints(values) -> bytes:
    return b"(" + b"".join(integer(v) for v in values) + b"t"


def tensor(offset=0, shape=(4,), stride=(1,), **kwargs) -> bytes:
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**kwargs) + integer(offset) + ints(shape) + ints(stride)
            + b"\x89ccollections\nOrderedDict\n)Rt" + b"R")  # fmt: skip


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def one(value: bytes, key="w") -> bytes:
    return pickled(b"}" + text(key) + value + b"s")


def legacy(body: bytes, keys=("0",), storages=(FOUR["0"],), counts=(4,), version=1001) -> bytes:
    return stream(pickled(body), keys, storages, counts, version)


LEGACY_ONE = b"}" + text("w") + tensor().replace(b"tQ", b"NtQ") + b"s"


def patched(data: bytes, at: int, fmt: str, *values) -> bytes:
    out = bytearray(data)
    struct.pack_into(fmt, out, at, *values)
    return bytes(out)


# ---------------------------------------------------------------- what torch.save writes, from NumPy's arrays


class BFloat16(np.ndarray):
    """array.view(BFloat16) of uint16: its bits are bfloat16."""


# name of the storage type → dtype in memory; bfloat16 is told apart by its class
KINDS = {
    "FloatStorage": np.dtype("<f4"), "DoubleStorage": np.dtype("<f8"), "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"), "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"), "ComplexFloatStorage": np.dtype("<c8"),
}  # fmt: skip
_KIND_OF = {dtype: kind for kind, dtype in KINDS.items()}
_NAMES = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8",
          "b1": "BOOL", "c8": "C64"}  # fmt: skip


class _Name:
    """A function or class that is pickled by name without being there."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:  # save_reduce() asks for something that can be called
        raise NotImplementedError


_REBUILD = _Name("torch._utils", "_rebuild_tensor_v2")
_STORAGE_TYPES = {kind: _Name("torch", kind) for kind in KINDS}


class _Storage:
    def __init__(self, owner: np.ndarray, kind: str) -> None:
        self.owner, self.kind = owner, kind


class _Writer(pickle._Pickler):  # the one in Python: only there save_global() can be replaced
    def __init__(self, protocol: int, as_zip: bool) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, protocol)
        self.as_zip = as_zip
        self.storages: dict[int, tuple[str, np.ndarray]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        key, _ = self.storages.setdefault(id(obj.owner), (str(len(self.storages)), obj.owner))
        described = ("storage", _STORAGE_TYPES[obj.kind], key, "cpu", obj.owner.size)
        return described if self.as_zip else (*described, None)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Name):
            return obj.name
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        owner, item = obj, obj.itemsize
        at: Any = obj.base
        while at is not None:
            if isinstance(at, np.ndarray):
                owner = at
            at = getattr(at, "base", None)
        offset = (obj.__array_interface__["data"][0] - owner.__array_interface__["data"][0]) // item if obj.size else 0
        kind = "BFloat16Storage" if isinstance(obj, BFloat16) else _KIND_OF[obj.dtype]
        stride = tuple(step // item for step in obj.strides)
        return _REBUILD, (_Storage(owner, kind), offset, obj.shape, stride, False, collections.OrderedDict())

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not isinstance(obj, _Name):
            super().save_global(obj, name)
            return
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)


def save(state: Any, protocol: int = 2, as_zip: bool = True) -> bytes:
    """The file of torch.save for dicts of arrays (views of one array share its storage) and plain values."""
    writer = _Writer(protocol, as_zip)
    writer.dump(state)
    storages = {key: owner.tobytes("A") for key, owner in writer.storages.values()}
    if as_zip:
        return archive(writer.file.getvalue(), storages, {"archive/byteorder": b"little"})
    counts = [owner.size for _, owner in writer.storages.values()]
    return stream(writer.file.getvalue(), list(storages), list(storages.values()), counts)


def expected(state: dict, prefix: str = "") -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What torch_bin_raw gives for the file of a state."""
    out = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            name = "BF16" if isinstance(value, BFloat16) else _NAMES[value.dtype.str[1:]]
            out[prefix + key] = (name, value.shape, value.tobytes())
        elif isinstance(value, dict):
            out |= expected(value, f"{prefix}{key}.")
    return out


def random_array(rng: random.Random, pool: list[np.ndarray]) -> np.ndarray:
    """An array of its own or a view of one that is in the pool already."""
    if pool and rng.random() < 0.3:
        base = rng.choice(pool)
    else:
        kind = rng.choice(list(KINDS))
        shape = [rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.randint(0, 4))]
        base = np.frombuffer(rng.randbytes(8 * int(np.prod(shape))), "u1").copy().astype(KINDS[kind])
        base = base[: int(np.prod(shape))].reshape(shape).copy()
        base = base.view(BFloat16) if kind == "BFloat16Storage" else base
        pool.append(base)
    how = rng.randrange(6)
    if how == 1 and base.ndim >= 2:
        return base.swapaxes(0, -1)
    if how == 2 and base.ndim >= 1:
        return base[1:]
    if how == 3 and base.ndim >= 1:
        return base[..., ::2]
    if how == 4:
        return np.broadcast_to(base, (3, *base.shape), subok=True)
    return base


PLAIN = [None, True, 3, -(2**40), 2**300, 1.5, "text", b"bytes", [1, "x"], (1, 2, 3, 4), {1, 2}, {3: "x"}, 2j,
         bytearray(b"x")]  # fmt: skip


def random_state(rng: random.Random, depth: int = 0) -> dict:
    state: dict = collections.OrderedDict() if rng.random() < 0.5 else {}
    pool: list[np.ndarray] = []
    for i in range(rng.randint(0, 6)):
        key = rng.choice(["base_model.model.", "a", "é", ""]) + str(i)
        roll = rng.random()
        if roll < 0.8:
            state[key] = random_array(rng, pool)
        elif roll < 0.9 and depth < 3:
            state[key] = random_state(rng, depth + 1)
        else:
            state[key] = rng.choice(PLAIN)
    return state


# ------------------------------------------------------------------------------------------ damaged files

_SINGLE = [bytes([code]) for code in b"(.NJKMGXTUBC)t]a}esuqrhjcRbQ\x81\x85\x86\x87\x88\x89\x8a\x8f\x90"]
_INSERTED = [b"N", b"}", b"]", b")", b"\x85", b"h\0", b"R", b"\x88", b"K\1", b"\x86", b"b"]


def changed_pickle(rng: random.Random, data: bytes, values: float = 0.8, frames: float = 0.1) -> bytes:
    """A pickle with a few of its instructions altered.

    With the probability `values` what is altered is a number, a name or a type, and the structure is left whole, so
    that many of the results can still be read. With the probability `frames` the FRAMEs are left in, and with them
    lengths that are no longer right.
    """
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    ops = [data[a:b] for a, b in itertools.pairwise(starts)]
    if rng.random() >= frames:
        ops = [op for op in ops if op[:1] != pickle.FRAME]
    texts = [op for op in ops if op[:1] in (pickle.BINUNICODE, pickle.SHORT_BINUNICODE)]
    if rng.random() < values:
        for _ in range(rng.randint(1, 2)):
            i = rng.randrange(1, len(ops))
            for _ in range(20):  # to one that has a value
                if ops[i] != (other := _other_value(rng, ops[i], texts)):
                    ops[i] = other
                    break
                i = rng.randrange(1, len(ops))
        return b"".join(ops)
    for _ in range(rng.randint(1, 2)):
        i, j, how = rng.randrange(1, len(ops)), rng.randrange(1, len(ops)), rng.randrange(6)
        if how == 0:
            ops[i], ops[j] = ops[j], ops[i]
        elif how == 1:
            ops.insert(i, ops[j])
        elif how == 2 and len(ops) > 3:
            del ops[i]
        elif how == 3:
            ops[i] = rng.choice(_SINGLE) + ops[i][1:]
        elif how == 4:
            at = rng.randrange(len(ops[i]))
            ops[i] = ops[i][:at] + bytes([ops[i][at] ^ 1 << rng.randrange(8)]) + ops[i][at + 1 :]
        else:
            ops.insert(i, rng.choice(_INSERTED))
    return b"".join(ops)


_STRUCTURE = {b"storage", b"cpu", b"torch", b"torch._utils", b"_rebuild_tensor_v2", b"collections", b"OrderedDict"}


def _other_value(rng: random.Random, op: bytes, texts: list[bytes]) -> bytes:
    code = op[:1]
    if code == pickle.BININT1:
        return code + bytes([rng.choice([0, 1, max(op[1] - 1, 0), max(op[1] - 2, 0), op[1] // 2, (op[1] + 1) % 256])])
    if code in (pickle.NEWTRUE, pickle.NEWFALSE):
        return rng.choice([pickle.NEWTRUE, pickle.NEWFALSE])
    if code in (pickle.BINGET, pickle.BINPUT) and rng.random() < 0.1:
        return code + bytes([rng.randrange(max(op[1], 1))])
    word = op[5:] if code == pickle.BINUNICODE else op[2:] if code == pickle.SHORT_BINUNICODE else b""
    if code == pickle.GLOBAL and op.endswith(b"Storage\n"):
        return b"ctorch\n" + rng.choice(list(KINDS)).encode() + b"\n"
    if word in _STRUCTURE and rng.random() < 0.9:
        return op
    if word.endswith(b"Storage"):
        new = rng.choice(list(KINDS)).encode()
    elif word and rng.random() < 0.5:
        new = word + rng.choice([b"x", b".", "é".encode(), b"\0"])
    elif word:
        return rng.choice(texts)
    else:
        return op
    return code + (struct.pack("<I", len(new)) if code == pickle.BINUNICODE else bytes([len(new)])) + new


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes altered, or a piece cut out, repeated or put behind."""
    out = bytearray(data)
    how = rng.randrange(6)
    a, b = sorted((rng.randrange(len(out) + 1), rng.randrange(len(out) + 1)))
    if how == 0:
        del out[b:]
    elif how == 1:
        del out[a:b]
    elif how == 2:
        out[a:a] = out[a : min(b, a + 64)]
    elif how == 3:
        out += rng.randbytes(rng.randint(1, 9))
    else:
        for _ in range(rng.randint(1, 3)):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def changed_file(rng: random.Random, data: bytes, values: float = 0.8, frames: float = 0.1) -> bytes:
    """A file in either layout with its pickle, its storages or any of its bytes altered."""
    roll = rng.random()
    if roll < 0.1:
        return changed_bytes(rng, data)
    pickle_, storages, counts = taken_apart(data)
    if roll < 0.9 or not storages:
        pickle_ = changed_pickle(rng, pickle_, values, frames)
    else:  # contents that the checksums, made anew, agree with
        key = rng.choice(list(storages))
        content = bytearray(storages[key])
        for _ in range(min(3, len(content))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if data[:2] == b"PK" and rng.random() < 0.3:
            content += b"more"
        storages[key] = bytes(content)
    if data[:2] == b"PK":
        return archive(pickle_, storages)
    return stream(pickle_, list(storages), list(storages.values()), list(counts.values()))


# ------------------------------------------------------------------------------------------------- bombs


def nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def shared_bomb(levels: int, opcode=b"\x86") -> bytes:
    """2 ** levels paths through a few tuples."""
    out = b")q\x00"
    for i in range(levels):
        out += b"h" + bytes([i]) + b"h" + bytes([i]) + opcode + b"q" + bytes([i + 1])
    return out
