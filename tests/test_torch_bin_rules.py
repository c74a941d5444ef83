"""adapter_model.bin: a file for each rule, most of them made by hand. Needs no torch, so that it runs on the sanitized
extension, too."""

from __future__ import annotations

import io
import os
import pickle
import struct
import threading
import zipfile
import zlib
from pickle import UnpicklingError

import numpy as np
import pytest
from bin_files import FOUR, LEGACY_ONE, archive, integer, legacy, one, patched, pickled, save, storage, tensor, text

import peftc
from peftc import _core


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
        (getattr, (tmp_path, "name"), "getattr|pathlib"),
        (open, (str(marker), "w"), "open"),
    ]:
        for protocol in (2, 3, 4, 5):
            for as_zip in (True, False):
                for state in ({"x": Evil(function, *args)}, Evil(function, *args)):
                    refused(save(state, protocol, as_zip), name)
    refused(pickle.dumps(Evil(os.system, f"touch {marker}"), 4), "system")
    assert not marker.exists()


def test_expansion_limit():
    """Expanded tensors may be larger than the file, up to 64 MiB or eight times its size."""
    small = np.zeros(1, np.float32)
    wide = np.broadcast_to(small, 2**24)
    assert _core.parse_torch_bin(save({"w": wide}))["w"].nbytes == 2**26
    refused(save({"w": wide, "v": small}), "'v'.*expanded tensors")
    big = np.zeros(3 * 2**20, np.float32)  # 12 MiB: up to 96
    assert len(_core.parse_torch_bin(save({str(i): big for i in range(8)}))) == 8
    refused(save({str(i): big for i in range(9)}), "expanded tensors")


# ------------------------------------------------------------------------- the zip layout


def good() -> tuple[bytes, dict]:
    state = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "h": np.ones(5, np.float16)}
    return save(state), state


def local_and_central(data: bytes, name: str) -> tuple[int, int]:
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        info = next(i for i in z.infolist() if i.filename.endswith(name))
    return info.header_offset, data.rindex(b"PK\x01\x02", 0, data.rindex(info.filename.encode()))


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
    base = np.arange(100_000, dtype=np.float32)
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


# ---------------------------------------------------------------------- the legacy layout


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
    t = np.ones(1)
    assert list(_core.parse_torch_bin(save({"a": {"b": t, "": {"c": t}}, "": {"x": t}}))) == ["a.b", "a..c", ".x"]
    refused(save({"a.b": t, "a": {"b": t}}), "'a.b' occurs twice")
    refused(save({1: t}), "not a string")
    refused(save({"state": {0: {"m": t}}}), "not a string")
    refused(save({("a", "b"): t}), "not a string")
    refused(save({"a": [t]}), "other than a dict")
    refused(
        archive(pickled(b"}" + text("w") + tensor() + b"s" + text("w") + tensor() + b"s"), FOUR), "'w' is given twice"
    )
    for twice in (tensor() + b"s" + text("w") + b"Ns", b"Ns" + text("w") + tensor() + b"s"):  # torch: the last one
        refused(archive(pickled(b"}" + text("w") + twice), FOUR), "'w' is given twice")
        inner = b"}" + text("a") + b"}" + text("w") + twice + b"s"
        refused(archive(pickled(inner), FOUR), r"'a\.w' is given twice")
    twice = b"}" + text("a") + b"Ns" + text("a") + b"}" + text("w") + tensor() + b"ss"
    refused(archive(pickled(twice), FOUR), "'a' is given twice")
    assert list(_core.parse_torch_bin(archive(pickled(b"}" + text("n") + b"Ns" + text("n") + b"Ns")))) == []
    refused(archive(one(tensor(shape=(9,)), "a\n\x1b[31m"), FOUR), "outside its storage")
    refused(archive(one(b"]" + tensor() + b"a", "a\n\x1b[31m"), FOUR), r"'a\\x0a\\x1b\[31m'")


def test_storage_under_two_types():
    """One storage is one type: the second description must equal the first."""
    two = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(kind="torch\nIntStorage") + b"s"
    refused(archive(pickled(two), FOUR), "two different ways")
    two = b"}" + text("a") + tensor() + b"s" + text("b") + tensor(count=3, shape=(3,)) + b"s"
    refused(archive(pickled(two), FOUR), "two different ways")


# ----------------------------------------------------------------------------------- files


def test_load_adapter_weights(tmp_path):
    """A folder or a file; safetensors before .bin; what is missing is named."""
    w = np.arange(6.0).reshape(2, 3)
    (tmp_path / "adapter_model.bin").write_bytes(save({"w": w}))
    for path in (tmp_path, str(tmp_path), tmp_path / "adapter_model.bin"):
        got = peftc.load_adapter_weights(path)
        assert list(got) == ["w"] and (got["w"] == w).all()
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
    state = {str(i): np.random.default_rng(i).standard_normal((64, 64)).T for i in range(20)}
    path.write_bytes(save(state))
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(_core.torch_bin_raw(path))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 8 and all(r == results[0] for r in results)
