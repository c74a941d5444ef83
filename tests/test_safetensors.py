"""peftc.safetensors against safetensors.numpy: same functions, same bytes, same values."""

from __future__ import annotations

import inspect
import os
import pathlib
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy as official
from hypothesis import given, settings
from hypothesis import strategies as hs
from hypothesis.extra import numpy as hnp

import peftc.safetensors as st

REAL = pathlib.Path(__file__).parent / "data" / "real"
DTYPES = ["bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]


def filled(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(f"{dtype} {shape}".encode()))
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 255, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8).view(dtype)[..., 0]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit by bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ------------------------------------------------------------------ writing


def test_bytes_are_the_official_writer_s():
    """Every dtype, 0-d and empty arrays, names and metadata that need escapes."""
    tensors = {f"{d}.{len(s)}.{s}": filled(d, s) for d in DTYPES for s in ((), (0,), (3,), (2, 0, 3), (2, 3, 4))}
    tensors |= {"": np.zeros(1), 'q"\\/\b\f\n\r\t\x00\x01\x1f\x7f\u2028é😀\uffff': np.ones(2, "f4"), "a\0b": np.ones(1)}
    for metadata in (None, {}, {"format": "pt"}, {'k"\\\n\x02é😀': "\x7f\0\t/"}):
        assert st.save(tensors, metadata) == official.save(tensors, metadata)


def test_order_of_tensors_is_the_official_writer_s():
    """By dtype, in the official list's order and not by size alone, then by the name's bytes."""
    tensors = {n + d: np.zeros(1, d) for d in DTYPES[::-1] for n in ("b", "a", "é", "z", "A", "\uffff", "😀", "aa")}
    assert st.save(tensors) == official.save(tensors)


@settings(max_examples=200, deadline=None)
@given(
    hs.dictionaries(
        hs.text(hs.characters(exclude_categories=["Cs"]), max_size=8),
        hnp.arrays(
            hs.sampled_from([np.dtype(d) for d in DTYPES]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)
        ),
        max_size=5,
    )
)
def test_bytes_random(tensors):
    written = st.save(tensors, {"format": "pt"})
    assert written == official.save(tensors, {"format": "pt"})
    read = st.load(written)
    assert read.keys() == tensors.keys()
    assert all(same(read[k], np.ascontiguousarray(v).reshape(v.shape)) for k, v in tensors.items())


def test_bytes_of_torch_save_file(tmp_path):
    """What PEFT writes: safetensors.torch.save_file with metadata {"format": "pt"}."""
    torch = pytest.importorskip("torch")
    import safetensors.torch

    tensors = {f"base_model.model.l.{i}.lora_{x}.weight": torch.randn(4, 3 + i) for i in range(3) for x in "AB"}
    tensors["half"] = torch.randn(5).half()
    tensors["scalar"] = torch.tensor(3)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    st.save_file({k: v.numpy() for k, v in tensors.items()}, tmp_path / "ours", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("domain", ["movies", "news", "products", "tweets"])
def test_real_adapters_round_trip(domain, tmp_path):
    """Files that PEFT wrote come back byte for byte."""
    path = REAL / domain / "adapter_model.safetensors"
    with st.safe_open(path, "np") as f:
        tensors, metadata = f.get_tensors(), f.metadata()
    theirs = official.load_file(path)
    assert tensors.keys() == theirs.keys()
    assert all(same(tensors[k], theirs[k]) for k in theirs)
    st.save_file(tensors, tmp_path / "again", metadata)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


LAYOUTS = {
    "transposed": lambda a: a.T,
    "fortran": lambda a: np.asfortranarray(a),
    "sliced": lambda a: a[1:, ::2],
    "column": lambda a: a[:, 1],
    "reversed": lambda a: a[::-1, ::-1],
    "broadcast": lambda a: np.broadcast_to(a[0], (5, *a[0].shape)),
    "broadcast scalar": lambda a: np.broadcast_to(a[0, 0], (3, 2)),
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "big endian, transposed": lambda a: a.astype(a.dtype.newbyteorder(">")).T,
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "empty slice": lambda a: a[2:2, ::-1],
    "subclass": lambda a: a.view(np.recarray),
    "sliding": lambda a: np.lib.stride_tricks.sliding_window_view(a, (2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["f4", "i2", "c8", "bool"])
def test_values_that_the_array_shows(layout, dtype, tmp_path):
    """Whatever the memory layout; the official writer gets most of these wrong."""
    array = LAYOUTS[layout](filled(dtype, (4, 6)))
    plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", subok=False)
    st.save_file({"x": array, "y": array[..., :1]}, tmp_path / "x")
    read = official.load_file(tmp_path / "x")
    assert same(read["x"], plain)
    assert same(read["y"], plain[..., :1])
    assert st.save({"x": array}) == official.save({"x": plain})


def test_metadata_keeps_its_order():
    """The official order is a hash table's and changes from run to run; ours is the dict's."""
    metadata = {k: str(i) for i, k in enumerate("zyxabc")}
    written = st.save({}, metadata)
    (length,) = struct.unpack("<Q", written[:8])
    assert written[8 : 8 + length].rstrip() == (b'{"__metadata__":{"z":"0","y":"1","x":"2","a":"3","b":"4","c":"5"}}')
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(official.save({}, {}))  # a defect of the official writer: not JSON
    assert st.load(st.save({}, {})) == {}


@pytest.mark.parametrize(
    "tensors,metadata,error,words",
    [
        ({"a": 1.0}, None, TypeError, ["'a'", "float", "numpy.asarray"]),
        ({"a": [1.0]}, None, TypeError, ["'a'", "list"]),
        ({"a": np.float32(1)}, None, TypeError, ["'a'", "float32"]),
        ({1: np.zeros(1)}, None, TypeError, ["str", "int"]),
        ({b"a": np.zeros(1)}, None, TypeError, ["str", "bytes"]),
        ([np.zeros(1)], None, TypeError, ["dict", "list"]),
        (None, None, TypeError, ["dict"]),
        ({"a": np.zeros(1, "c16")}, None, st.SafetensorError, ["'a'", "complex128"]),
        ({"a": np.zeros(1, "U3")}, None, st.SafetensorError, ["'a'", "U3"]),
        ({"a": np.zeros(1, "O")}, None, st.SafetensorError, ["'a'", "object"]),
        ({"a": np.zeros(1, "M8[s]")}, None, st.SafetensorError, ["'a'", "datetime64"]),
        ({"a": np.zeros(1, np.longdouble)}, None, st.SafetensorError, ["'a'"]),
        ({"a": np.zeros(1, [("x", "f4")])}, None, st.SafetensorError, ["'a'"]),
        ({"__metadata__": np.zeros(1)}, None, st.SafetensorError, ["__metadata__"]),
        ({"\ud800": np.zeros(1)}, None, UnicodeEncodeError, []),
        ({}, {"a": 1}, TypeError, ["'a'", "int"]),
        ({}, {1: "a"}, TypeError, ["int"]),
        ({}, {"a": None}, TypeError, ["NoneType"]),
        ({}, {"\udfff": "a"}, UnicodeEncodeError, []),
        ({}, [("a", "b")], TypeError, ["metadata", "list"]),
    ],
)
def test_refused_to_write(tensors, metadata, error, words, tmp_path):
    """A clear error, and no file."""
    for call in (lambda: st.save(tensors, metadata), lambda: st.save_file(tensors, tmp_path / "x", metadata)):
        with pytest.raises(error) as info:
            call()
        assert all(word in str(info.value) for word in words), info.value
    assert os.listdir(tmp_path) == []


def test_metadata_too_large_for_a_header(tmp_path):
    with pytest.raises(st.SafetensorError, match="100000000"):
        st.save_file({}, tmp_path / "x", {"k": "v" * 100_000_000})
    assert os.listdir(tmp_path) == []


def test_any_mapping():
    import collections
    import types

    array = np.arange(3.0)
    plain = st.save({"a": array}, {"k": "v"})
    assert st.save(types.MappingProxyType({"a": array}), collections.OrderedDict(k="v")) == plain
    assert st.save(collections.UserDict(a=array), collections.UserDict(k="v")) == plain


# ------------------------------------------------------------------ reading


@pytest.fixture
def file(tmp_path):
    tensors = {d: filled(d, (3, 4, 5)) for d in DTYPES} | {"scalar": np.array(2.5), "empty": np.zeros((0, 3), "f4")}
    path = tmp_path / "x.safetensors"
    official.save_file(tensors, path, {"who": "official"})
    return path, tensors


def test_load(file):
    path, tensors = file
    for read in (st.load_file(path), st.load(path.read_bytes()), st.load_file(path, backend="pread")):
        assert read.keys() == tensors.keys()
        for name, array in read.items():
            assert same(array, tensors[name])
            assert array.flags.c_contiguous and array.flags.writeable and array.flags.owndata and array.flags.aligned


def test_load_any_buffer(file):
    path, _ = file
    data = path.read_bytes()
    for buffer in (bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        assert same(st.load(buffer)["f4"], st.load(data)["f4"])
    for wrong in ("text", 3, None, memoryview(data)[::2]):
        with pytest.raises((TypeError, BufferError)):
            st.load(wrong)


def test_paths(file, tmp_path):
    """str, bytes and os.PathLike, not UTF-8 included; NUL is refused."""
    path, tensors = file
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.safetensors"
    for p in (str(path), os.fsencode(path), path):
        assert len(st.load_file(p)) == len(tensors)
    st.save_file({"a": np.zeros(1)}, odd)
    assert list(st.load_file(os.fsdecode(odd))) == ["a"]
    with open(odd, "wb") as f:
        f.write(b"too short")
    with pytest.raises(st.SafetensorError, match=r"\?\?.safetensors"):
        st.load_file(odd)
    for wrong, error in ((3, TypeError), (None, TypeError), ("a\0b", ValueError)):
        with pytest.raises(error):
            st.load_file(wrong)
        with pytest.raises(error):
            st.save_file({}, wrong)


def test_safe_open(file):
    path, tensors = file
    with st.safe_open(path, framework="np", device="cpu", backend="pread") as f, official.safe_open(path, "np") as g:
        assert f.keys() == g.keys() == sorted(tensors)
        assert f.offset_keys() == g.offset_keys()
        assert f.metadata() == g.metadata() == {"who": "official"}
        assert list(f.get_tensors()) == f.offset_keys()
        for name, array in tensors.items():
            assert same(f.get_tensor(name), array)
            assert f.get_slice(name).get_shape() == g.get_slice(name).get_shape()
            assert f.get_slice(name).get_dtype() == g.get_slice(name).get_dtype()
        for call in (f.get_tensor, f.get_slice):
            with pytest.raises(st.SafetensorError, match="File does not contain tensor nope"):
                call("nope")
            with pytest.raises(TypeError):
                call(1)
        part = f.get_slice("f4")
    for call in (f.keys, f.offset_keys, f.metadata, f.get_tensors, lambda: f.get_tensor("f4"), f.__enter__().keys):
        with pytest.raises(st.SafetensorError, match="File is closed"):
            call()
    assert same(part[1], tensors["f4"][1])  # a slice keeps the file open
    with pytest.raises(TypeError):
        type(part)()


@pytest.mark.parametrize(
    "args,kwargs,error,words",
    [
        (("pt",), {}, st.SafetensorError, "safetensors package"),
        (("flax",), {}, st.SafetensorError, "'flax'"),
        (("zz",), {}, st.SafetensorError, "framework 'zz' is invalid"),
        ((3,), {}, TypeError, "framework"),
        ((), {}, TypeError, "framework"),
        (("np", "cuda:0"), {}, st.SafetensorError, "'cuda:0'"),
        (("np",), {"device": 0}, st.SafetensorError, "device 0"),
        (("np",), {"backend": "zz"}, st.SafetensorError, "'zz'"),
        (("np",), {"backend": 1}, TypeError, "backend"),
        (("np", "cpu", "mmap"), {}, TypeError, "positional"),
    ],
)
def test_safe_open_options(args, kwargs, error, words, file):
    with pytest.raises(error, match=words):
        st.safe_open(file[0], *args, **kwargs)


def test_signatures_are_the_official_ones():
    for name in ("load_file", "load", "save_file", "save"):
        theirs, ours = (inspect.signature(getattr(m, name)).parameters.values() for m in (official, st))
        assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]
    assert str(inspect.signature(st.safe_open)) == "(filename, framework, device='cpu', *, backend='mmap')"
    assert st.safe_open.__module__ == st.SafetensorError.__module__ == "peftc.safetensors"


SLICES = ["0", "-1", "()", "...", "(0, ...)", "(..., 0)", "(1, ..., 2)", "(..., 1, 2)", "(0, 1, 2)", "slice(None)",
          "slice(1, None)", "slice(-2, None)", "slice(0, 99)", "slice(2, 1)", "slice(3, 3)", "slice(None, None, 2)",
          "slice(None, None, -1)", "(slice(None), 1)", "(slice(None), slice(None), 3)", "(slice(None), slice(1, 3))",
          "(slice(None, None, -2), slice(3, 0, -1), slice(4, None, -3))", "np.int8(1)", "slice(None, None, 2**70)",
          "(slice(None, None, -2**70), ...)", "(slice(None), slice(None), slice(1, 2))"]  # fmt: skip


@pytest.mark.parametrize("index", SLICES)
def test_slices_are_numpy_s(index, file):
    path, tensors = file
    with st.safe_open(path, "np") as f:
        for name in ("f4", "u1", "c8"):
            assert same(f.get_slice(name)[eval(index)], np.array(tensors[name][eval(index)], order="C"))


SHAPES = [(3, 4, 5), (2, 9, 3000), (300, 700), (7,), (1, 1, 4), (5, 2, 70_000), ()]


@settings(max_examples=300, deadline=None)
@given(data=hs.data())
def test_slices_random(big_file, data):
    """Any shape and any basic index, with rows longer and shorter than the read buffer."""
    shape = data.draw(hs.sampled_from(SHAPES))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=False, allow_ellipsis=True))
    array = _big(shape)
    with st.safe_open(big_file, "np") as f:
        assert same(f.get_slice(str(shape))[index], np.array(array[index], order="C"))


def _big(shape):
    return np.arange(int(np.prod(shape)), dtype="u4").reshape(shape)


@pytest.fixture(scope="module")
def big_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    st.save_file({str(s): _big(s) for s in SHAPES}, path)
    return path


@pytest.mark.parametrize(
    "index,error",
    [("3", IndexError), ("-4", IndexError), ("(0, 0, 0, 0)", IndexError), ("(..., ...)", IndexError),
     ("2**70", IndexError), ("None", st.SafetensorError), ("True", st.SafetensorError), ("'a'", st.SafetensorError),
     ("1.0", st.SafetensorError), ("[0, 1]", st.SafetensorError), ("[]", st.SafetensorError),
     ("np.array([0])", st.SafetensorError), ("slice(None, None, 0)", ValueError), ("slice('a')", TypeError)],
)  # fmt: skip
def test_slices_refused(index, error, file):
    with st.safe_open(file[0], "np") as f, pytest.raises(error):
        f.get_slice("f4")[eval(index)]


def test_ml_dtypes(tmp_path):
    """BF16 and F8 through ml_dtypes, the same bytes as the official writer."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    tensors = {n: np.arange(1, 7).astype(getattr(ml_dtypes, n)).reshape(2, 3) for n in names}
    assert st.save(tensors) == official.save(tensors)
    read = st.load(st.save({k: v.T for k, v in tensors.items()}))
    for name, array in tensors.items():
        assert same(read[name], np.ascontiguousarray(array.T))


def test_without_ml_dtypes(monkeypatch, tmp_path):
    """BF16 without the package: the error says what to install; shape and dtype can be asked all the same."""
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(TypeError, match="pip install ml_dtypes"):
        st.load_file(tmp_path / "x")
    with st.safe_open(tmp_path / "x", "np") as f:
        assert (f.get_slice("a").get_dtype(), f.get_slice("a").get_shape()) == ("BF16", [2])


# ------------------------------------------------------------ awkward files


def test_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nope"):
        st.load_file(tmp_path / "nope")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "f").touch()
        st.load_file(tmp_path / "f" / "x")
    with pytest.raises(IsADirectoryError):
        st.load_file(tmp_path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "fifo", "socket"])
def test_special_files_do_not_hang(path, tmp_path):
    if path == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    elif path == "socket":
        import socket

        path = tmp_path / "socket"
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises(OSError, match="regular file|No such device"):
        st.load_file(path)


def test_file_that_shrinks(tmp_path):
    """Cut between opening and reading: an error, not a crash (a mapping would be a SIGBUS)."""
    path = tmp_path / "x"
    st.save_file({"a": np.ones(100_000), "b": np.ones(100_000)}, path)
    with st.safe_open(path, "np") as f:
        os.truncate(path, 900_000)
        assert f.get_tensor("a").sum() == 100_000
        for call in (lambda: f.get_tensor("b"), f.get_tensors, lambda: f.get_slice("b")[90_000:]):
            with pytest.raises(st.SafetensorError, match="shorter"):
                call()


def test_file_that_is_replaced(tmp_path):
    """An open file keeps its content when a save replaces it."""
    path = tmp_path / "x"
    st.save_file({"a": np.ones(10)}, path)
    with st.safe_open(path, "np") as f:
        st.save_file({"a": np.zeros(20)}, path)
        assert f.get_tensor("a").tolist() == [1.0] * 10
    assert st.load_file(path)["a"].tolist() == [0.0] * 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS")
def test_memory_is_bounded_by_the_file(tmp_path):
    """A file that claims terabytes, or holds a megabyte of brackets, costs next to nothing."""
    lies = b'{"a":{"dtype":"F64","shape":[%d],"data_offsets":[0,%d]}}' % (10**12, 8 * 10**12)
    (tmp_path / "lies").write_bytes(struct.pack("<Q", len(lies)) + lies + bytes(64))
    (tmp_path / "length").write_bytes(struct.pack("<Q", 100_000_000) + b"{")
    (tmp_path / "depth").write_bytes(struct.pack("<Q", 1_000_000) + b'{"a":' + b"[" * 999_995)
    code = """
import resource, sys, numpy, peftc.safetensors as st
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
for path in sys.argv[1:]:
    try: st.load_file(path)
    except st.SafetensorError: print("refused")
"""
    args = [sys.executable, "-c", code, *(tmp_path / n for n in ("lies", "length", "depth"))]
    done = subprocess.run(args, check=False, capture_output=True, text=True, timeout=60)
    if "AddressSanitizer" in done.stderr or "LD_PRELOAD" in os.environ:
        pytest.skip("not under a sanitizer")
    assert done.stdout.split() == ["refused"] * 3, done.stderr


def test_threads(tmp_path):
    """Many threads read and write one file; each sees a whole old or new one."""
    path = tmp_path / "x"
    st.save_file({"a": np.full(50_000, 0.0), "b": np.full(50_000, 0.0)}, path)
    stop = threading.Event()
    wrong: list[object] = []

    def read():
        while not stop.is_set():
            try:
                t = st.load_file(path)
                values = {*t["a"].tolist(), *t["b"].tolist()}
                if len(values) != 1:
                    wrong.append(values)
            except Exception as error:  # noqa: BLE001 (whatever it is, it is wrong)
                wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(25):
        st.save_file({"a": np.full(50_000, float(i)), "b": np.full(50_000, float(i))}, path)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert os.listdir(tmp_path) == ["x"]


def test_closing_while_reading(tmp_path):
    """Leaving the with block in one thread does not close the file under another's read."""
    path = tmp_path / "x"
    st.save_file({"a": np.ones(2_000_000)}, path)
    for _ in range(5):
        f = st.safe_open(path, "np")
        sums: list[float] = []

        def read(f=f, sums=sums):
            try:
                while True:
                    sums.append(f.get_tensor("a").sum())
            except st.SafetensorError:
                pass

        thread = threading.Thread(target=read)
        thread.start()
        while not sums:
            pass
        f.__exit__(None, None, None)
        thread.join()
        assert set(sums) == {2_000_000.0}


def test_no_leaks(tmp_path):
    """Files, arrays and errors are given back."""
    path = tmp_path / "x"
    st.save_file({"a": np.ones(1000), "b": np.ones((10, 10)).T}, path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    array, other = np.ones(1), np.ones(1, "c16")  # made once: np.ones itself may keep a reference to its dtype
    count = sys.getrefcount(np.dtype("f8"))
    for _ in range(200):
        f = st.safe_open(path, "np")
        f.get_slice("b")[1:, ::2]
        f.get_tensors()
        st.load(st.save(f.get_tensors(), {"k": "v"}))
        with pytest.raises(st.SafetensorError):
            st.load(b"12345678901234567890")
        with pytest.raises(st.SafetensorError):
            st.save({"a": array, "b": other})
    del f
    assert sys.getrefcount(np.dtype("f8")) < count + 20
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
