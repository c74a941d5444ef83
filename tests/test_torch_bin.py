"""adapter_model.bin: equal to torch.load for what torch.save writes, and safe with what it does not."""

from __future__ import annotations

import collections
import io
import itertools
import os
import pickle
import pickletools
import random
import struct
import threading
import zipfile
import zlib
from pickle import UnpicklingError

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import peftc
from peftc import _core

NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
RAW_ONLY = [d for d in NAMES if d.is_floating_point and d.itemsize == 1] + [torch.uint16, torch.uint32, torch.uint64]


def save(obj, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **kwargs)
    return buffer.getvalue()


def tensor_bytes(t) -> bytes:
    flat_copy = torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().flatten())
    return bytes(flat_copy.view(torch.uint8).numpy())


def flat(state, prefix="") -> dict:
    out = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            out[prefix + key] = value
        elif isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
    return out


def check_equal(state, data: bytes) -> None:
    got = _core.torch_bin_raw(data)
    want = flat(state)
    assert list(got) == list(want)
    for name, t in want.items():
        dtype, shape, content = got[name]
        assert (dtype, shape) == (NAMES[t.dtype], tuple(t.shape)), name
        assert content == tensor_bytes(t), name


# ------------------------------------------------------------------ what torch.save writes


def random_tensor(rng: random.Random, dtype, pool: list):
    if pool and rng.random() < 0.2:
        base = rng.choice(pool)
    elif rng.random() < 0.05:
        return torch.randn(4, 4)[2:2]
    else:
        shape = [rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.randint(0, 4))]
        base = (torch.rand(shape) * 200 - 50 if dtype.is_floating_point else torch.randint(0, 100, shape)).to(dtype)
        pool.append(base)
    how = rng.randrange(7)
    if how == 1 and base.dim() >= 2:
        return base.transpose(0, -1)
    if how == 2 and base.dim() >= 1 and base.shape[0] > 1:
        return base[1:]
    if how == 3 and base.dim() >= 1:
        return base[..., ::2]
    if how == 4:
        return base.unsqueeze(0).expand(3, *base.shape)
    if how == 5 and base.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return torch.nn.Parameter(base, requires_grad=rng.random() < 0.5)
    if how == 6 and base.numel() > 4:
        return base.as_strided((2, 2), (1, 2), 1)
    return base


def random_state(rng: random.Random, dtypes, depth=0):
    state = collections.OrderedDict() if rng.random() < 0.5 else {}
    pool: list = []
    for i in range(rng.randint(0, 6)):
        key = rng.choice(["base_model.model.", "a", "é", ""]) + str(i)
        roll = rng.random()
        if roll < 0.75:
            state[key] = random_tensor(rng, rng.choice(dtypes), pool)
        elif roll < 0.85 and depth < 3:
            state[key] = random_state(rng, dtypes, depth + 1)
        else:
            state[key] = rng.choice(
                [None, True, 3, -(2**40), 2**300, 1.5, "text", b"bytes", [1, "x"], (1, 2, 3, 4), {1, 2}, {3: "x"},
                 torch.float32, torch.device("cpu"), torch.Size([2, 3]), 2j, bytearray(b"x"), torch.strided]
            )  # fmt: skip
    if isinstance(state, collections.OrderedDict) and rng.random() < 0.5:
        state._metadata = collections.OrderedDict({"": {"version": 1}})
    return state


LEGACY_DTYPES = [d for d in NAMES if d not in RAW_ONLY]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False])
def test_random_state_dicts(protocol, as_zip):
    """Whatever torch.save writes is read as torch.load reads it."""
    rng = random.Random(protocol * 2 + as_zip)
    torch.manual_seed(0)
    for _ in range(300):
        # the legacy layout cannot hold one storage under two types
        dtypes = list(NAMES) if as_zip else LEGACY_DTYPES
        state = random_state(rng, dtypes)
        data = save(state, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
        check_equal(state, data)
        if rng.random() < 0.2:
            check_equal(torch.load(io.BytesIO(data), weights_only=False), data)


def test_file_and_bytes_are_read_alike(tmp_path):
    """The path through pread and the one through memory give the same arrays."""
    rng = random.Random(7)
    for i in range(60):
        state = random_state(rng, LEGACY_DTYPES)
        path = tmp_path / f"{i}.bin"
        path.write_bytes(save(state, _use_new_zipfile_serialization=bool(i % 2)))
        assert _core.torch_bin_raw(str(path)) == _core.torch_bin_raw(path.read_bytes())


def test_arrays_are_plain():
    """Arrays are writable, contiguous, separate, and of NumPy's own types."""
    w = torch.arange(6.0).view(2, 3)
    state = {"w": w, "t": w.T, "half": torch.ones(2, dtype=torch.float16), "n": torch.tensor(5)}
    got = _core.parse_torch_bin(save(state))
    for name, array in got.items():
        np.testing.assert_array_equal(array, state[name].numpy())
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata
    got["w"][:] = 0
    assert got["t"].any()


def test_module_state_dict():
    """nn.Module.state_dict() sets _metadata on its OrderedDict."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for as_zip in (True, False):
        check_equal(model.state_dict(), save(model.state_dict(), _use_new_zipfile_serialization=as_zip))


def test_tensors_with_attributes():
    """A tensor or parameter with attributes is pickled through other functions."""
    t = torch.ones(3)
    t.note = "x"
    p = torch.nn.Parameter(torch.ones(2))
    p.note = 3
    check_equal({"t": t, "p": p}, save({"t": t, "p": p}))


def test_large_shared_storage(tmp_path):
    """Many views of one storage, in blocks, columns and steps, through both paths."""
    base = torch.arange(300_000, dtype=torch.int32).view(300, 1000)
    state = {"all": base, "rows": base[10:200], "cols": base[:, 5:900], "t": base.T, "step": base[::7, ::13],
             "deep": base.view(10, 30, 1000).permute(2, 0, 1), "one": base[7, 7], "twice": base.expand(2, 300, 1000)}  # fmt: skip
    for as_zip in (True, False):
        data = save(state, _use_new_zipfile_serialization=as_zip)
        check_equal(state, data)
        path = tmp_path / "x.bin"
        path.write_bytes(data)
        assert _core.torch_bin_raw(path) == _core.torch_bin_raw(data)


def test_bfloat16_needs_ml_dtypes():
    """bfloat16 is read with ml_dtypes, and otherwise the error says what to install."""
    data = save({"w": torch.ones(2, dtype=torch.bfloat16)})
    try:
        import ml_dtypes
    except ImportError:
        with pytest.raises(TypeError, match="ml_dtypes"):
            _core.parse_torch_bin(data)
    else:
        assert _core.parse_torch_bin(data)["w"].dtype == ml_dtypes.bfloat16
    assert _core.torch_bin_raw(data)["w"] == ("BF16", (2,), b"\x80\x3f" * 2)


def test_without_checksums():
    """torch can leave checksums out of an archive; then none is compared."""
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        state = {"w": torch.randn(1000), "v": torch.randn(3, 4).T}
        check_equal(state, save(state))
    finally:
        torch.serialization.set_crc32_options(before)


# ------------------------------------------------------------------------ malformed files


def archive(pickled: bytes, storages: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None,
            folder: str = "archive", compression: int = zipfile.ZIP_STORED) -> bytes:  # fmt: skip
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as z:
        z.writestr(f"{folder}/data.pkl", pickled)
        for key, content in (storages or {}).items():
            z.writestr(f"{folder}/data/{key}", content)
        z.writestr(f"{folder}/version", b"3\n")
        for name, content in (extra or {}).items():
            z.writestr(name, content)
    return buffer.getvalue()


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


FOUR = {"0": struct.pack("<4f", 1, 2, 3, 4)}


def refused(data: bytes, match: str) -> None:
    with pytest.raises(UnpicklingError, match=match):
        _core.parse_torch_bin(data)


def test_hand_made_archive():
    """The builder of this file makes good files: what follows fails for its own reason."""
    data = archive(one(tensor()), FOUR)
    assert _core.parse_torch_bin(data)["w"].tolist() == [1, 2, 3, 4]
    assert _core.parse_torch_bin(archive(one(tensor(shape=(2, 2), stride=(1, 2))), FOUR))["w"].tolist() == [
        [1, 3],
        [2, 4],
    ]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (tensor(shape=(5,)), "outside its storage"),
        (tensor(offset=1), "outside its storage"),
        (tensor(offset=-1), "arguments"),
        (tensor(shape=(-1,)), "negative"),
        (tensor(stride=(-1,)), "negative"),
        (tensor(stride=(2,)), "outside its storage"),
        (tensor(shape=(2**62, 4), stride=(0, 0)), "multiply"),
        (tensor(shape=(2**62, 2**62), stride=(0, 0)), "multiply"),
        (tensor(shape=(2, 2), stride=(2**62, 2**62)), "outside its storage"),
        (tensor(offset=2**63 - 1), "outside its storage"),
        (tensor(shape=(2, 2)), "2 sizes and 1 strides"),
        (tensor(shape=(1,) * 65, stride=(1,) * 65), "65 dimensions"),
        (tensor(shape=(2**40, 0, 2**40), stride=(0, 0, 0)), "multiply"),
        (tensor(shape=(2**26,), stride=(0,)), "expanded tensors"),
        (tensor(count=5), "should have 20 bytes"),
        (tensor(count=-1), "described wrongly"),
        (tensor(count=2**62), "cannot exist"),
        (tensor(key="1"), "no entry for storage"),
        (tensor(key="../0"), "no entry for storage"),
        (tensor(key="x" * 300), "no entry for storage"),
        (tensor(kind="torch\nQInt8Storage"), "torch.QInt8Storage"),
        (tensor(kind="torch\nIntStorage").replace(b"t\x89c", b"t\x88c"), "require gradients"),
        (tensor(kind="torch\nfloat32"), "not a storage type"),
        (b"]" + tensor() + b"a", "other than a dict"),
        (tensor() + b"\x85\x85", "other than a dict"),
        (storage(), "other than a dict"),
    ],
)  # fmt: skip
def test_bad_tensors(value, match):
    """Sizes, strides, offsets and storages are checked before anything is read."""
    refused(archive(one(value), FOUR), match)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"cposix\nsystem\n" + text("true") + b"\x85R", "posix.system"),
        (b"cos\nsystem\n" + text("true") + b"\x85R", "os.system"),
        (b"cbuiltins\neval\n" + text("1") + b"\x85R", "builtins.eval"),
        (b"c__builtin__\nexec\n" + text("1") + b"\x85R", "__builtin__.exec"),
        (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "create an instance of torch._utils._rebuild_tensor_v2"),
        (b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R", "arguments"),
        (storage().replace(b"tQ", b"NtQ"), "no place in a zip"),
        (b"cbuiltins\nobject\n)\x81", "builtins.object"),
        (b"csubprocess\nPopen\n", "subprocess.Popen"),
        (b"ctorch\nload\n", "torch.load"),
        (b"ctorch.hub\nload\n", "torch.hub.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
        (b"ctorch._utils\n_rebuild_qtensor\n", "torch._utils._rebuild_qtensor"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", "_rebuild_sparse_tensor"),
        (b"cnumpy.core.multiarray\n_reconstruct\n", "numpy.core.multiarray._reconstruct"),
        (text("os") + text("system") + b"\x93", "os.system"),
        (text("builtins") + text("getattr") + b"\x93", "builtins.getattr"),
        (text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93", "_rebuild_tensor_v2"),
        (b"K\x01K\x02\x93", "must be strings"),
        (b"(ios\nsystem\n", "os.system"),
        (b"(cos\nsystem\no", "os.system"),
        (b"(}o", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"P0\n", "PERSID"),
        (b"K\x01Q", "persistent id"),
        (b"(" + text("module") + b"NNNNtQ", "persistent id"),
        (b"}}\x92", "NEWOBJ_EX"),
        (b"\x97", "NEXT_BUFFER"),
        (b"(\x91", "FROZENSET"),
        (b"I1\n", "INT"),
        (b"}0", "POP"),
        (b"}2", "DUP"),
        (b"\xff", "unknown opcode 0xff"),
        (b"K\x01K\x02R", "refused to call an int"),
        (b"ctorch\nfloat32\n)R", "refused to call torch.float32"),
        (b"ctorch\nTensor\n)R", "refused to call torch.Tensor"),
        (b"ccollections\nOrderedDict\nK\x01R", "arguments"),
        (b"ccollections\nOrderedDict\n)\x85R", "arguments"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "arguments"),
        (b"ctorch._utils\n_rebuild_parameter\nN\x85R", "arguments"),
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", "arguments"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nctorch\nTensor\n)}tR", "arguments"),
        (b"}}b", "refused to set the attributes of a dict"),
        (b"ccollections\nOrderedDict\n)R]b", "must be a dict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b", "refused to set the attributes of a function"),
        (b"K\x01K\x01a", "cannot add items to an int"),
        (b"}K\x01a", "cannot add items to a dict"),
        (b"](K\x01K\x01u", "cannot add items to a list"),
        (b"}(K\x01u", "key without a value"),
        (b"}]K\x01s", "a list cannot be a key"),
        (b"}}K\x01s", "a dict cannot be a key"),
        (b"t", "needs a mark"),
        (b"a", "more values than there are"),
        (b"](a", "more values than there are"),
        (b"(\x85", "more values than there are"),
        (b"R", "more values than there are"),
        (b"b", "more values than there are"),
        (b"Q", "more values than there are"),
        (b"s", "more values than there are"),
        (b"q\x00", "more values than there are"),
        (b"\x94", "more values than there are"),
        (b"h\x00", "memo entry 0 does not exist"),
        (b"j\xff\xff\xff\xff", "does not exist"),
        (b"Nr\xff\xff\xff\xff", "out of proportion"),
        (b"X\xff\xff\xff\xff", "longer than"),
        (b"X\x10\x00\x00\x00abc", "ends in the middle"),
        (b"\x8d" + b"\xff" * 8, "longer than"),
        (b"X\x01\x00\x00\x00\xff", "not UTF-8"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80", "not UTF-8"),
        (b"\x95" + b"\xff" * 8, "frame"),
        (b"c" + b"x" * 300 + b"\ny\n", "longer than 255"),
        (b"(" * 1001, "nested more than 1000"),
        (b"NN", "2 values instead of one"),
        (b"", "0 values instead of one"),
        (b"K\x01", "an int and not a dict"),
        (b"]", "a list and not a dict"),
    ],
)  # fmt: skip
def test_hostile_pickles(body, match):
    """Everything that is not data is refused by name, before it could do anything."""
    refused(archive(pickled(body), FOUR), match)


def test_protocols_and_edges_of_a_pickle():
    """Only protocols 2 to 5, from the first byte to the STOP."""
    refused(archive(b"}."), "does not begin")
    refused(archive(b"\x80\x01}."), "protocol 1 is not supported")
    refused(archive(b"\x80\x06}."), "protocol 6 is not supported")
    refused(archive(b"\x80\x02}\x80\x02."), "unknown opcode 0x80")
    refused(archive(b"\x80\x02}.}"), "behind the end")
    refused(archive(b"\x80\x02}"), "ends in the middle")
    refused(archive(b""), "ends in the middle")


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_nothing_is_run(tmp_path):
    """Real exploits, in every layout and protocol: refused by name, and nothing happened."""
    marker = tmp_path / "was-run"
    for function, args, name in [
        (os.system, (f"touch {marker}",), "system"),
        (eval, (f"open({str(marker)!r}, 'w')",), "eval"),
        (getattr, (os, "system"), "getattr"),
        (open, (str(marker), "w"), "open"),
    ]:
        for protocol in (2, 3, 4, 5):
            for as_zip in (True, False):
                for state in ({"x": Evil(function, *args)}, Evil(function, *args)):
                    try:
                        data = save(state, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
                    except TypeError:  # a module cannot be pickled
                        continue
                    refused(data, name)
    refused(pickle.dumps(Evil(os.system, f"touch {marker}"), 4), "system")
    assert not marker.exists()


def changed(rng: random.Random, data: bytes) -> bytes:
    """A pickle with a few of its instructions exchanged, repeated, removed or altered."""
    starts = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    ops = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.randint(1, 3)):
        i, j, how = rng.randrange(1, len(ops)), rng.randrange(1, len(ops)), rng.randrange(6)
        if how == 0:
            ops[i], ops[j] = ops[j], ops[i]
        elif how == 1:
            ops.insert(i, ops[j])
        elif how == 2 and len(ops) > 3:
            del ops[i]
        elif how == 3:
            ops[i] = (
                bytes([rng.choice(b"(.NJKMGXTUBC)t]a}esuqrhjcRbQ\x81\x85\x86\x87\x88\x89\x8a\x8f\x90")]) + ops[i][1:]
            )
        elif how == 4:
            at = rng.randrange(len(ops[i]))
            ops[i] = ops[i][:at] + bytes([ops[i][at] ^ 1 << rng.randrange(8)]) + ops[i][at + 1 :]
        else:
            ops.insert(i, rng.choice([b"N", b"}", b"]", b")", b"\x85", b"h\0", b"R", b"\x88", b"K\1", b"\x86", b"b"]))
    return b"".join(ops)


@pytest.mark.filterwarnings("ignore")
def test_changed_pickles_against_torch():
    """What is accepted here is either refused by torch for a harmless reason, or gives the same tensors."""
    rng = random.Random(3)
    torch.manual_seed(0)
    accepted = 0
    harmless = ["unhashable type", "restore data location", "torch.Size() takes", "device string", "device type"]
    # opcodes of plain data that torch.load lacks: bytes, long strings and integers, sets
    harmless += [f"Unsupported operand {op}\n" for op in (66, 67, 84, 139, 140, 141, 142, 143, 144, 150)]
    others = []
    for _ in range(80):
        data = save(random_state(rng, [torch.float32, torch.int16]))
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            original = z.read("archive/data.pkl")
            storages = {n[13:]: z.read(n) for n in z.namelist() if n.startswith("archive/data/")}
        for _ in range(12):
            data = archive(changed(rng, original), storages)
            try:
                got = _core.torch_bin_raw(data)
            except UnpicklingError:
                continue
            accepted += 1
            try:
                want = torch.load(io.BytesIO(data), weights_only=True)
            except Exception as error:  # noqa: BLE001 - torch raises anything
                if not any(reason in str(error) for reason in harmless):
                    others.append(str(error).partition("error: ")[2][:300])
            else:
                check_equal(want, data)
                assert got.keys() == flat(want).keys()
    assert not others
    assert accepted > 30


# ---------------------------------------------------------------------------------- bombs


def nested_tuples(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def shared_bomb(levels: int, opcode=b"\x86") -> bytes:
    out = b")q\x00"
    for i in range(levels):
        out += b"h" + bytes([i]) + b"h" + bytes([i]) + opcode + b"q" + bytes([i + 1])
    return out


@pytest.mark.parametrize(
    "body",
    [
        b"}" + nested_tuples(1_000_000) + b"Ns",  # torch.load segfaults when it hashes this key
        b"}" + text("k") + nested_tuples(1_000_000) + b"s",
        b"}" + shared_bomb(100) + b"Ns",  # torch.load hangs: 2^100 hashes
        b"}" + text("k") + shared_bomb(100) + b"s",
        b"}" + b"".join(text(f"k{i}") + shared_bomb(60) + b"s" for i in range(100)),
        b"}q\x00" + text("a") + b"h\x00s",  # a dict in itself
        b"]q\x00h\x00a",
        b"}" + text("a") + b"]q\x00h\x00as",
        b"}" + b"".join(text("a") + b"}" for _ in range(2000)) + b"s" * 2000,
        b"]" * 4_300_000 + b"t",
        b"N" * 9_000_000 + b"t",
        b"(" + b"N" * 8_000_000 + b"tq\x00" + b"]h\x00a" * 1000,
        b"}" + b"".join(b"Nr" + struct.pack("<I", i) for i in range(200_000)),
        b"(" + b"K\x01" * 100_000 + b"tq\x00" + b"ccollections\nOrderedDict\n]h\x00a\x85R" * 10,
        b"]q\x00(" + b"NN\x86" * 100_000 + b"eq\x01ccollections\nOrderedDict\nq\x020" + b"h\x02h\x01\x85R" * 1000,
        b"](" + b"NN\x86" * 100_000 + b"eq\x01" + b"ccollections\nOrderedDict\nh\x01\x85R" * 1000,
        b"(" + b"NN" * 100_000 + b"tq\x01" + b"cbuiltins\nset\nh\x01\x85R" * 1000,
    ],
    ids=range(17),
)  # fmt: skip
def test_bombs(body):
    """Deep, shared and cyclic objects: an error or a small dict, at once and in bounded memory."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF)
    for data in (archive(pickled(body)),):
        try:
            assert len(_core.torch_bin_raw(data)) == 0
        except UnpicklingError:
            pass
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5  # CPU time, not the clock
    assert (after.ru_maxrss - before.ru_maxrss) * 1024 < 2**30


def test_shared_dicts_do_not_multiply():
    """Dicts that share dicts would have 2^30 names."""
    body = b"}q\x00" + text("w") + tensor() + b"s"
    body = b"}q\x00" + text("w") + b"Ns"
    layers = b""
    for i in range(30):
        layers += b"}q" + bytes([i + 1]) + text("a") + b"h" + bytes([i]) + b"s" + text("b") + b"h" + bytes([i]) + b"s"
    data = archive(pickled(b"(" + body + layers + b"t"), FOUR)
    refused(data, "a tuple and not a dict")
    data = archive(pickled(b"}" + text("x") + b"(" + body + layers + b"ts"), FOUR)
    assert _core.parse_torch_bin(data) == {}
    # the outermost dict itself: build it last and leave only it on the stack
    inner = "w"
    state: dict = {inner: torch.ones(1)}
    for _ in range(30):
        state = {"a": state, "b": state}
    refused(save(state), "entries in its dicts|names|tensors take")


def test_expansion_limit():
    """Expanded tensors may be larger than the file, up to 64 MiB or eight times its size."""
    small = torch.zeros(1)
    assert _core.parse_torch_bin(save({"w": small.expand(2**24)}))["w"].nbytes == 2**26
    refused(save({"w": small.expand(2**24), "v": small}), "'v'.*expanded tensors")
    big = torch.zeros(3 * 2**20)  # 12 MiB: up to 96
    assert len(_core.parse_torch_bin(save({str(i): big for i in range(8)}))) == 8
    refused(save({str(i): big for i in range(9)}), "expanded tensors")


# ------------------------------------------------------------------------- the zip layout


def good() -> tuple[bytes, dict]:
    state = {"w": torch.arange(12.0).view(3, 4), "h": torch.ones(5, dtype=torch.float16)}
    return save(state), state


def local_and_central(data: bytes, name: str) -> tuple[int, int]:
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        info = next(i for i in z.infolist() if i.filename.endswith(name))
    return info.header_offset, data.rindex(b"PK\x01\x02", 0, data.rindex(info.filename.encode()))


def patched(data: bytes, at: int, fmt: str, *values) -> bytes:
    out = bytearray(data)
    struct.pack_into(fmt, out, at, *values)
    return bytes(out)


def test_checksum():
    """A flipped bit in any tensor, in the pickle, or in a checksum is found."""
    data, _ = good()
    for name in ("data.pkl", "data/0", "data/1", "byteorder", "archive/version"):
        local, central = local_and_central(data, name)
        start = local + 30 + sum(struct.unpack_from("<HH", data, local + 26))
        refused(patched(data, start, "B", data[start] ^ 1), "checksum")
        refused(patched(data, central + 16, "<I", 12345), "checksum|differently")


def test_checksum_of_views(tmp_path):
    """The checksum is compared also when only a part of a storage is read."""
    base = torch.arange(100_000, dtype=torch.float32)
    data = save({"part": base[10:20]})
    at = data.index(struct.pack("<f", 77_777.0))
    bad = patched(data, at, "B", data[at] ^ 1)
    refused(bad, "checksum")
    path = tmp_path / "x.bin"
    path.write_bytes(bad)
    with pytest.raises(UnpicklingError, match="checksum"):
        _core.load_torch_bin(path)


def test_zip_rules():
    """What a zip archive may not be."""
    data, _ = good()
    local, central = local_and_central(data, "data/0")
    _, other = local_and_central(data, "data/1")
    refused(archive(one(tensor()), FOUR, compression=zipfile.ZIP_DEFLATED), r"compressed \(deflate\)")
    refused(archive(one(tensor()), FOUR, compression=zipfile.ZIP_BZIP2), "compressed")
    refused(patched(data, central + 8, "<H", 0x0809), "encrypted")
    refused(patched(data, central + 8, "<H", 0x2808), "encrypted")
    refused(patched(data, local + 6, "<H", 0x0809), "differently")
    refused(patched(data, local + 8, "<H", 8), "differently")
    refused(patched(data, local + 30, "B", ord("X")), "another name")
    refused(patched(data, local, "B", 0), "no local header")
    refused(patched(data, central + 42, "<I", struct.unpack_from("<I", data, other + 42)[0]), "overlaps")
    refused(patched(data, central + 42, "<I", struct.unpack_from("<I", data, central + 42)[0] + 1), "overlaps|no local")
    refused(patched(data, central + 20, "<II", 49, 48), "two sizes differ")
    refused(patched(data, central + 20, "<II", 4000, 4000), "outside the archive|overlaps")
    refused(patched(data, central + 34, "<H", 1), "split archive")
    refused(patched(data, central, "B", 0), "malformed")
    refused(patched(data, central + 28, "<H", 60000), "malformed")
    refused(patched(data, len(data) - 4, "B", 1), "end record|directory")
    refused(patched(data, len(data) - 6, "<I", 0), "contradict|directory")
    refused(data[:-1], "end record is missing")
    refused(data[: len(data) // 2], "end record is missing")
    refused(data + b"x", "end record is missing")
    refused(archive(one(tensor()), FOUR, extra={"other/x": b""}), "second top folder")
    refused(archive(one(tensor()), FOUR, extra={"x": b""}), "top folder")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = archive(one(tensor()), FOUR, extra={"archive/data/0": b"x" * 16})
    refused(twice, "occurs twice")
    refused(archive(one(tensor()), FOUR, extra={"archive/constants.pkl": b""}), "TorchScript")
    refused(archive(one(tensor()), FOUR, extra={"archive/byteorder": b"middle"}), "byte order 'middle'")
    refused(archive(one(tensor()), {}), "no entry for storage")
    refused(archive(one(tensor()), FOUR).replace(b"archive/version", b"archive/verzion"), "without an entry 'version'")
    refused(
        archive(one(tensor()), FOUR).replace(b"archive/data.pkl", b"archive/data.pkX"), "without an entry 'data.pkl'"
    )


def test_a_comment_is_allowed():
    """Archivers may add a comment; one that contains an end record does not mislead."""
    buffer = io.BytesIO(archive(one(tensor()), FOUR))
    with zipfile.ZipFile(buffer, "a") as z:
        z.comment = b"hello"
    assert len(_core.parse_torch_bin(buffer.getvalue())) == 1


def test_zip64():
    """Sizes and offsets in zip64 fields, as in files beyond 4 GiB."""
    plain = archive(one(tensor()), FOUR)
    with zipfile.ZipFile(io.BytesIO(plain)) as z:
        infos = [(i.filename, z.read(i)) for i in z.infolist()]
    body, directory = b"", b""
    for name, content in infos:
        crc, size, offset, raw = zlib.crc32(content), len(content), len(body), name.encode()
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 45, 8, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw + content
        body += struct.pack("<4sIQQ", b"PK\7\x08", crc, size, size)
        extra = struct.pack("<HH3Q", 1, 24, size, size, offset)
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 8, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(raw),
                                 len(extra), 0, 0, 0, 0, 0xFFFFFFFF) + raw + extra  # fmt: skip
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(infos), len(infos), len(directory), len(body))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    data = body + directory + end64 + locator + end
    assert _core.parse_torch_bin(data)["w"].tolist() == [1, 2, 3, 4]
    refused(
        body + directory.replace(struct.pack("<HH", 1, 24), struct.pack("<HH", 1, 23)) + end64 + locator + end, "zip64"
    )
    refused(body + directory + end64 + patched(locator, 8, "<Q", 0) + end, "zip64 end record")
    refused(body + directory + end64 + locator + patched(end, 8, "<HH", 2, 2), "contradict")


def test_big_endian():
    """A file written on a big-endian machine."""
    data = archive(one(tensor()), {"0": struct.pack(">4f", 1, 2, 3, 4)}, extra={"archive/byteorder": b"big"})
    assert _core.parse_torch_bin(data)["w"].tolist() == [1, 2, 3, 4]
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].tolist() == [1, 2, 3, 4]


# ---------------------------------------------------------------------- the legacy layout


def legacy(body: bytes, keys=("0",), storages=(FOUR["0"],), counts=(4,), version=1001) -> bytes:
    out = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(version, 2) + pickle.dumps({"little_endian": True}, 2)
    out += pickled(body) + pickle.dumps(list(keys), 2)
    for count, content in zip(counts, storages, strict=True):
        out += struct.pack("<q", count) + content
    return out


LEGACY_ONE = b"}" + text("w") + tensor().replace(b"tQ", b"NtQ") + b"s"


def test_legacy_rules():
    """Every storage is listed once, with the size that its tensors expect, and nothing follows."""
    assert _core.parse_torch_bin(legacy(LEGACY_ONE))["w"].tolist() == [1, 2, 3, 4]
    refused(legacy(LEGACY_ONE, (), (), ()), "does not list")  # torch.load gives uninitialised memory
    refused(legacy(LEGACY_ONE, ("1",)), "no tensor lies in it")
    refused(legacy(LEGACY_ONE, ("0", "0"), (FOUR["0"],) * 2, (4, 4)), "listed twice")
    refused(legacy(LEGACY_ONE, counts=(3,)), "another size")
    refused(legacy(LEGACY_ONE, counts=(-1,)), "another size")
    refused(legacy(LEGACY_ONE, storages=(b"x" * 15,)), "cut short")
    refused(legacy(LEGACY_ONE) + b"x", "behind its last storage")
    refused(legacy(LEGACY_ONE, version=1000), "protocol version")
    refused(legacy(LEGACY_ONE, keys=(3,)), "not a string")
    refused(legacy(LEGACY_ONE.replace(b"NtQ", b"tQ")), "not that of a storage in the legacy layout")
    refused(pickle.dumps(3, 2) + legacy(LEGACY_ONE), "another pickle")
    refused(pickle.dumps({"w": [1.0, 2.0]}, 2), "another pickle")
    refused(legacy(LEGACY_ONE.replace(b"J\x04\x00\x00\x00Nt", b"J\x00\x00\x00\x7fNt")), "larger than the file")
    for at in range(1, len(legacy(LEGACY_ONE))):
        refused(legacy(LEGACY_ONE)[:at], ".")


def test_legacy_view():
    """Files of torch before 0.4 name parts of storages."""
    view = b"(" + text("v") + integer(1) + integer(3) + b"t"
    body = b"}" + text("w") + tensor(shape=(3,)).replace(b"tQ", view + b"tQ") + b"s"
    assert _core.parse_torch_bin(legacy(body))["w"].tolist() == [2, 3, 4]
    bad = b"(" + text("v") + integer(2) + integer(3) + b"t"
    refused(legacy(b"}" + text("w") + tensor(shape=(3,)).replace(b"tQ", bad + b"tQ") + b"s"), "reaches outside")


# -------------------------------------------------------------------------- other contents


def test_what_else_people_name_bin():
    """Files that are not of torch.save are called by their name."""
    refused(b"", "is empty")
    refused(b"version https://git-lfs\noid sha256:00\nsize 3\n", "git lfs pull")
    refused(struct.pack("<Q", 2) + b"{}      ", "safetensors")
    refused(b"hello", "not a file of torch.save")
    refused(b"sys_info" + bytes(600), "tar layout")
    refused(bytes(257) + b"ustar" + bytes(600), "tar layout")


def test_names():
    """Nested names are joined; names that collide or are no strings are refused."""
    t = torch.ones(1)
    assert list(_core.parse_torch_bin(save({"a": {"b": t, "": {"c": t}}, "": {"x": t}}))) == ["a.b", "a..c", ".x"]
    refused(save({"a.b": t, "a": {"b": t}}), "'a.b' occurs twice")
    refused(save({1: t}), "not a string")
    refused(save({"state": {0: {"m": t}}}), "not a string")
    refused(save({("a", "b"): t}), "not a string")
    refused(save({"a": [t]}), "other than a dict")
    refused(
        archive(pickled(b"}" + text("w") + tensor() + b"s" + text("w") + tensor() + b"s"), FOUR), "'w' occurs twice"
    )
    refused(archive(one(tensor(shape=(9,)), "a\n\x1b[31m"), FOUR), "outside its storage")
    refused(archive(one(b"]" + tensor() + b"a", "a\n\x1b[31m"), FOUR), r"'a\\x0a\\x1b\[31m'")


def test_lazy_bits():
    """A lazily conjugated tensor's stored numbers are not its values."""
    t = torch.ones(2, dtype=torch.complex64)
    check_equal({"t": t}, save({"t": t}))
    refused(save({"t": t.conj()}), "resolve_conj")
    refused(save({"t": torch._neg_view(torch.ones(2))}), "resolve_neg")


def test_storage_under_two_types():
    """One storage is one type: the second description must equal the first."""
    two = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(kind="torch\nIntStorage") + b"s"
    refused(archive(pickled(two), FOUR), "two different ways")
    two = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(count=3, shape=(3,)) + b"s"
    refused(archive(pickled(two), FOUR), "two different ways")


# ----------------------------------------------------------------------------------- files


def test_load_adapter_weights(tmp_path):
    """A folder or a file; safetensors before .bin; what is missing is named."""
    w = torch.arange(6.0).view(2, 3)
    torch.save({"w": w}, tmp_path / "adapter_model.bin")
    for path in (tmp_path, str(tmp_path), tmp_path / "adapter_model.bin"):
        got = peftc.load_adapter_weights(path)
        assert list(got) == ["w"] and (got["w"] == w.numpy()).all()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").touch()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors or adapter_model.bin, and holds README.md"):
        peftc.load_adapter_weights(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        peftc.load_adapter_weights(tmp_path / "nothing")


def test_errors_name_the_file(tmp_path):
    """Every error begins with the path."""
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(archive(pickled(b"cos\nsystem\n")))
    with pytest.raises(UnpicklingError, match=f"{path}: byte 2 of the pickle: refused 'os.system'"):
        _core.load_torch_bin(path)
    with pytest.raises(FileNotFoundError, match="nothing.bin"):
        _core.load_torch_bin(tmp_path / "nothing.bin")
    with pytest.raises(IsADirectoryError):
        _core.load_torch_bin(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="not a regular file"):
        _core.load_torch_bin(fifo)
    with pytest.raises(TypeError):
        _core.load_torch_bin(3)
    with pytest.raises(TypeError):
        _core.parse_torch_bin("text")
    with pytest.raises(ValueError, match="null"):
        _core.load_torch_bin("a\0b")
    long = tmp_path / ("d" * 200)
    for _ in range(6):
        long = long / ("d" * 200)
    long.mkdir(parents=True)
    (long / "x.bin").write_bytes(b"hello")
    with pytest.raises(UnpicklingError, match="not a file of torch.save"):
        _core.load_torch_bin(long / "x.bin")


def test_threads(tmp_path):
    """The GIL is released: several threads read at once and get the same."""
    path = tmp_path / "x.bin"
    state = {str(i): torch.randn(64, 64).T for i in range(20)}
    torch.save(state, path)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(_core.torch_bin_raw(path))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 8 and all(r == results[0] for r in results)
