"""The rules of docs/file-formats.md, one group of files each, decided by peftc and by the official reader."""

# ruff: noqa: UP031 (headers are full of braces)

from __future__ import annotations

import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from limits import bounded_memory, one_file

import peftc.safetensors as st

F32 = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
ONE = '{"a":{%s}}' % F32


def build(header: str | bytes, data: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.fixture(autouse=True)
def bounded():
    with bounded_memory():
        yield


def ours_accepts(file: bytes) -> bool:
    try:
        with one_file(file):
            st.load(file)
    except st.SafetensorError as error:
        assert str(error), "an error needs a text"
        return False
    return True


def official_accepts(file: bytes) -> bool:
    try:
        safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return False
    return True


def nested(levels: int) -> str:
    """A header whose deepest value is at this level; the object itself is level 1, the tensor's entry level 2."""
    arrays = levels - 2
    return '{"a":{%s,"x":%s}}' % (F32, "[" * arrays + "]" * arrays)


def field(value: str) -> str:
    return '{"a":{%s,"x":%s}}' % (F32, value)


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return '{"a":{"dtype":%s,"shape":%s,"data_offsets":%s}}' % (dtype, shape, offsets)


BOTH, NEITHER, OFFICIAL_ONLY = (True, True), (False, False), (False, True)

CASES = [
    # 1. header length
    ("1 empty file", b"", NEITHER),
    ("1 seven bytes", bytes(7), NEITHER),
    ("1 length zero", bytes(8), NEITHER),
    ("1 length zero, data", bytes(16), NEITHER),
    ("1 length beyond the file", build(ONE, length=len(ONE) + 9), NEITHER),
    ("1 length 2^64-1", build(ONE, length=2**64 - 1), NEITHER),
    ("1 length 2^64-8", build(ONE, length=2**64 - 8), NEITHER),
    ("1 length 100,000,001", build(ONE, length=100_000_001), NEITHER),
    ("1 odd length", build(ONE + " "), BOTH),
    ("1 length cuts the object", build(ONE, length=len(ONE) - 1), NEITHER),
    # 2. whitespace
    ("2 all four kinds behind", build(ONE + " \t\r\n"), BOTH),
    ("2 between tokens", build('{ "a"\t:\r{"dtype" : "F32",\n"shape":[ 2 ], "data_offsets":[0 ,\t8] }\n}'), BOTH),
    ("2 leading space", build(" " + ONE), BOTH),
    ("2 NUL padding", build(ONE + "\0\0\0"), NEITHER),
    ("2 NUL in front", build("\0" + ONE), NEITHER),
    ("2 BOM", build("\ufeff" + ONE), NEITHER),
    ("2 vertical tab", build(ONE + "\v"), NEITHER),
    ("2 form feed", build(ONE + "\f"), NEITHER),
    ("2 no-break space", build(ONE + "\u00a0"), NEITHER),
    ("2 something behind", build(ONE + " {}"), NEITHER),
    ("2 a comma behind", build(ONE + ","), NEITHER),
    # 3. strings
    ("3 a name in UTF-8", build(ONE.replace('"a"', '"é😀"')), BOTH),
    ("3 NUL escaped is a character", build(ONE.replace('"a"', '"a\\u0000b"')), BOTH),
    ("3 invalid UTF-8 in a name", build(ONE.encode().replace(b'"a"', b'"\xff"')), NEITHER),
    ("3 overlong UTF-8", build(ONE.encode().replace(b'"a"', b'"\xc0\xaf"')), NEITHER),
    ("3 a surrogate in UTF-8", build(ONE.encode().replace(b'"a"', b'"\xed\xa0\x80"')), NEITHER),
    ("3 above U+10FFFF", build(ONE.encode().replace(b'"a"', b'"\xf4\x90\x80\x80"')), NEITHER),
    ("3 cut UTF-8", build(ONE.encode() + b"\xe2\x82"), NEITHER),
    ("3 raw newline", build(ONE.replace('"a"', '"a\nb"')), NEITHER),
    ("3 raw NUL", build(ONE.replace('"a"', '"a\0b"')), NEITHER),
    ("3 raw DEL is fine", build(ONE.replace('"a"', '"a\x7fb"')), BOTH),
    ("3 lone high surrogate", build(ONE.replace('"a"', '"\\ud800"')), NEITHER),
    ("3 lone low surrogate", build(ONE.replace('"a"', '"\\udc00"')), NEITHER),
    ("3 high surrogate and a letter", build(ONE.replace('"a"', '"\\ud83dx"')), NEITHER),
    ("3 two high surrogates", build(ONE.replace('"a"', '"\\ud83d\\ud83d"')), NEITHER),
    ("3 a surrogate pair", build(ONE.replace('"a"', '"\\uD83d\\uDe00"')), BOTH),
    ("3 unknown escape", build(ONE.replace('"a"', '"\\x41"')), NEITHER),
    ("3 short escape", build(ONE.replace('"a"', '"\\u41"')), NEITHER),
    ("3 control byte in an ignored field", build(field('"\x01"')), NEITHER),
    ("3 lone surrogate in an ignored field", build(field('"\\udfff"')), NEITHER),
    ("3 lone surrogate in an ignored name", build(field('{"\\udfff":1}')), NEITHER),
    ("3 bad UTF-8 in an ignored field", build(field('"?"').encode().replace(b"?", b"\x80")), NEITHER),
    # 4. depth and numbers
    ("4 127 levels", build(nested(127)), BOTH),
    ("4 128 levels", build(nested(128)), NEITHER),
    ("4 a million levels", build("[" * 1_000_000), NEITHER),
    ("4 1e309", build(field("1e309")), NEITHER),
    ("4 -1e309", build(field("-1e309")), NEITHER),
    ("4 1e308", build(field("1e308")), BOTH),
    ("4 1e-999", build(field("1e-999")), BOTH),
    ("4 0e99999999999", build(field("0e99999999999")), BOTH),
    ("4 1e-99999999999", build(field("1e-99999999999")), BOTH),
    ("4 1e99999999999", build(field("1e99999999999")), NEITHER),
    ("4 310 digits", build(field("1" * 310)), NEITHER),
    ("4 300 digits", build(field("1" * 300)), BOTH),
    ("4 0.000…1e400", build(field("0." + "0" * 200 + "1e400")), BOTH),
    ("4 leading zero", build(field("01")), NEITHER),
    ("4 lone minus", build(field("-")), NEITHER),
    ("4 plus", build(field("+1")), NEITHER),
    ("4 no digit after the point", build(field("1.")), NEITHER),
    ("4 no digit before the point", build(field(".5")), NEITHER),
    ("4 no exponent", build(field("1e")), NEITHER),
    ("4 NaN", build(field("NaN")), NEITHER),
    ("4 Infinity", build(field("Infinity")), NEITHER),
    ("4 hexadecimal", build(field("0x1")), NEITHER),
    ("4 True", build(field("True")), NEITHER),
    ("4 a comment", build(field("/**/1")), NEITHER),
    ("4 trailing comma", build(field("[1,]")), NEITHER),
    ("4 trailing comma in the object", build('{"a":{%s},}' % F32), NEITHER),
    ("4 single quotes", build(field("'x'")), NEITHER),
    # 5. integers
    ("5 shape 1.0", build(entry(shape="[2.0]")), NEITHER),
    ("5 shape 2e0", build(entry(shape="[2e0]")), NEITHER),
    ("5 shape -0", build(entry(shape="[2,-0]", offsets="[0,0]"), b""), NEITHER),
    ("5 shape negative", build(entry(shape="[-2]")), NEITHER),
    ("5 shape string", build(entry(shape='["2"]')), NEITHER),
    ("5 shape true", build(entry(shape="[true,2]")), NEITHER),
    ("5 shape null", build(entry(shape="[null]")), NEITHER),
    ("5 shape 2^64", build(entry(shape=f"[0,{2**64}]", offsets="[0,0]"), b""), NEITHER),
    ("5 shape 02", build(entry(shape="[02]")), NEITHER),
    ("5 shape not a list", build(entry(shape="2")), NEITHER),
    ("5 shape nested", build(entry(shape="[[2]]")), NEITHER),
    ("5 shape null itself", build(entry(shape="null")), NEITHER),
    ("5 offset 8.0", build(entry(offsets="[0,8.0]")), NEITHER),
    ("5 offset -0", build(entry(offsets="[-0,8]")), NEITHER),
    ("5 offset 2^53+1 is exact", build(entry(offsets=f"[0,{2**53 + 1}]")), NEITHER),
    ("5 one offset", build(entry(offsets="[8]")), NEITHER),
    ("5 three offsets", build(entry(offsets="[0,8,8]")), NEITHER),
    ("5 no offsets", build(entry(offsets="[]")), NEITHER),
    ("5 offsets as an object", build(entry(offsets='{"0":0,"1":8}')), NEITHER),
    # 6. field names
    ("6 Dtype is not dtype", build(ONE.replace("dtype", "Dtype")), NEITHER),
    ("6 SHAPE is not shape", build(ONE.replace("shape", "SHAPE")), NEITHER),
    ("6 escaped spelling", build(ONE.replace("shape", "\\u0073hape")), BOTH),
    ("6 escaped __metadata__ with a number", build('{"\\u005f_metadata__":{"x":1},"a":{%s}}' % F32), NEITHER),
    ("6 unknown fields", build(field('{"y":[1,null,true,false,"",{}]}')), BOTH),
    ("6 dtype missing", build('{"a":{"shape":[2],"data_offsets":[0,8]}}'), NEITHER),
    ("6 shape missing", build('{"a":{"dtype":"F32","data_offsets":[0,8]}}'), NEITHER),
    ("6 data_offsets missing", build('{"a":{"dtype":"F32","shape":[2]}}'), NEITHER),
    ("6 unknown dtype", build(entry(dtype='"F33"')), NEITHER),
    ("6 dtype in lower case", build(entry(dtype='"f32"')), NEITHER),
    ("6 dtype with a space", build(entry(dtype='"F32 "')), NEITHER),
    ("6 dtype with a NUL", build(entry(dtype='"F32\\u0000"')), NEITHER),
    ("6 dtype a number", build(entry(dtype="32")), NEITHER),
    # 7. given twice
    ("7 dtype twice", build('{"a":{"dtype":"F32",%s}}' % F32), NEITHER),
    ("7 shape twice", build('{"a":{"shape":[2],%s}}' % F32), NEITHER),
    ("7 data_offsets twice", build('{"a":{"data_offsets":[0,8],%s}}' % F32), NEITHER),
    ("7 dtype twice, once escaped", build('{"a":{"\\u0064type":"F32",%s}}' % F32), NEITHER),
    ("7 __metadata__ twice", build('{"__metadata__":{},"__metadata__":{},"a":{%s}}' % F32), NEITHER),
    ("7 __metadata__ null and again", build('{"__metadata__":null,"__metadata__":{},"a":{%s}}' % F32), NEITHER),
    ("7 an unknown field twice", build('{"a":{"x":1,"x":2,%s}}' % F32), BOTH),
    ("7 a metadata key twice", build('{"__metadata__":{"x":"1","x":"2"},"a":{%s}}' % F32), BOTH),
    ("7 a name twice, the first copy broken", build('{"a":{"dtype":"?"},"a":{%s}}' % F32), NEITHER),
    # 8. oddities
    ("8 a name twice", build('{"a":{%s},"a":{%s}}' % (F32, F32)), OFFICIAL_ONLY),
    ("8 a name twice, once escaped", build('{"a":{%s},"\\u0061":{%s}}' % (F32, F32)), OFFICIAL_ONLY),
    ("8 an entry as an array", build('{"a":["F32",[2],[0,8]]}'), OFFICIAL_ONLY),
    ("8 dtype as an object", build(entry(dtype='{"F32":null}')), OFFICIAL_ONLY),
    ("8 more than 64 dimensions", build(entry(shape="[" + "1," * 64 + "2]")), OFFICIAL_ONLY),
    ("8 64 dimensions", build(entry(shape="[" + "1," * 63 + "2]")), BOTH),
    ("8 no tensors", build("{}", b""), BOTH),
    ("8 no tensors, but data", build("{}"), NEITHER),
    ("8 __metadata__ null", build('{"__metadata__":null,"a":{%s}}' % F32), BOTH),
    ("8 __metadata__ last", build('{"a":{%s},"__metadata__":{"x":"y"}}' % F32), BOTH),
    ("8 __metadata__ a list", build('{"__metadata__":[],"a":{%s}}' % F32), NEITHER),
    ("8 __metadata__ a string", build('{"__metadata__":"x","a":{%s}}' % F32), NEITHER),
    ("8 metadata value a number", build('{"__metadata__":{"x":1},"a":{%s}}' % F32), NEITHER),
    ("8 metadata value null", build('{"__metadata__":{"x":null},"a":{%s}}' % F32), NEITHER),
    ("8 metadata value an object", build('{"__metadata__":{"x":{}},"a":{%s}}' % F32), NEITHER),
    ("8 BOOL bytes that are neither 0 nor 1", build(entry('"BOOL"', "[8]"), bytes(range(8))), BOTH),
    ("8 an entry null", build('{"a":null}'), NEITHER),
    ("8 an entry a string", build('{"a":"x"}'), NEITHER),
    ("8 the header a list", build("[]", b""), NEITHER),
    ("8 the header null", build("null", b""), NEITHER),
    ("8 an empty name", build(ONE.replace('"a"', '""')), BOTH),
    # 9. coverage
    ("9 data too long", build(ONE, bytes(9)), NEITHER),
    ("9 data too short", build(ONE, bytes(7)), NEITHER),
    ("9 a hole in front", build(entry(offsets="[8,16]"), bytes(16)), NEITHER),
    ("9 end before begin", build(entry(offsets="[8,0]")), NEITHER),
    ("9 offsets larger than the shape", build(entry(offsets="[0,16]"), bytes(16)), NEITHER),
    ("9 offsets 2^64-8 … 2^64-1", build(entry(offsets=f"[{2**64 - 8},{2**64 - 1}]")), NEITHER),
    ("9 overlap", build('{"a":{%s},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}' % F32, bytes(12)), NEITHER),
    ("9 the same place", build('{"a":{%s},"b":{%s}}' % (F32, F32)), NEITHER),
    (
        "9 a hole between",
        build('{"a":{%s},"b":{"dtype":"F32","shape":[2],"data_offsets":[9,17]}}' % F32, bytes(17)),
        NEITHER,
    ),
    ("9 any order", build('{"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"a":{%s}}' % F32, bytes(16)), BOTH),
    (
        "9 unaligned",
        build(
            '{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"F32","shape":[2],'
            '"data_offsets":[1,9]}}',
            bytes(9),
        ),
        BOTH,
    ),
    ("9 empty at the start", build('{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{%s}}' % F32), BOTH),
    ("9 empty at the end", build('{"e":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},"a":{%s}}' % F32), BOTH),
    ("9 empty inside", build('{"e":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"a":{%s}}' % F32), NEITHER),
    (
        "9 two empty at one place",
        build(
            '{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"f":{"dtype":"F32",'
            '"shape":[0],"data_offsets":[0,0]},"a":{%s}}' % F32
        ),
        BOTH,
    ),
    ("9 empty beyond the end", build('{"e":{"dtype":"F32","shape":[0],"data_offsets":[9,9]},"a":{%s}}' % F32), NEITHER),
    # 10. products
    ("10 overflow hidden by a zero behind", build(entry(shape=f"[{2**63},2,0]", offsets="[0,0]"), b""), NEITHER),
    ("10 product times bits overflows", build(entry(shape=f"[{2**62}]", offsets="[0,0]"), b""), NEITHER),
    ("10 product wraps to the size", build(entry(shape=f"[{2**63},2]", offsets="[0,0]"), b""), NEITHER),
    ("10 wraps with the bits", build(entry(shape=f"[{2**60 + 2}]"), bytes(8)), NEITHER),
    ("10 F4 half a byte", build(entry('"F4"', "[3]", "[0,2]"), bytes(2)), NEITHER),
    ("10 F6 not whole bytes", build(entry('"F6_E2M3"', "[3]", "[0,3]"), bytes(3)), NEITHER),
]


@pytest.mark.parametrize("file,expected", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_rule(file, expected, tmp_path):
    """Bytes in memory and a file on disk are decided alike, and as the rule says."""
    assert (ours_accepts(file), official_accepts(file)) == expected
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    if expected[0]:
        with st.safe_open(path, "np") as f:
            f.keys()
    else:
        with pytest.raises(st.SafetensorError, match="x.safetensors"):
            st.safe_open(path, "np")


def opens(file: bytes, tmp_path) -> dict[str, tuple[str, list[int]]]:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file)
    with st.safe_open(path, "np") as f:
        return {k: (f.get_slice(k).get_dtype(), f.get_slice(k).get_shape()) for k in f.offset_keys()}


def test_header_of_the_largest_length(tmp_path):
    """Rule 1: 100,000,000 bytes of header are legal, and one more is not."""
    path = tmp_path / "x.safetensors"
    for length, good in ((100_000_000, True), (100_000_001, False)):
        header = ONE.encode()
        path.write_bytes(build(header + b" " * (length - len(header))))
        if good:
            assert list(st.load_file(path)) == ["a"]
        else:
            with pytest.raises(st.SafetensorError, match="100000001 bytes"):
                st.load_file(path)


def test_names_that_differ_after_a_nul(tmp_path):
    """Rule 3: "a" and "a\\0b" are two tensors."""
    file = build('{"a":{%s},"a\\u0000b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}' % F32, bytes(8) + b"\7")
    tensors = st.load(file)
    assert set(tensors) == {"a", "a\0b"}
    assert tensors["a\0b"].tolist() == [7]


def test_huge_integers_stay_exact(tmp_path):
    """Rule 5: no number takes the way through a double."""
    n = 2**53 + 1
    assert opens(build(entry(shape=f"[0,{n}]", offsets="[0,0]"), b""), tmp_path) == {"a": ("F32", [0, n])}
    with pytest.raises(st.SafetensorError, match=str(4 * n)):
        st.load(build(entry(shape=f"[{n}]")))


def test_product_order(tmp_path):
    """Rule 10: a zero in front saves the product, one behind does not. NumPy cannot hold the array; reading says so."""
    file = build(entry(shape=f"[0,{2**63},2]", offsets="[0,0]"), b"")
    assert official_accepts(file)
    assert opens(file, tmp_path) == {"a": ("F32", [0, 2**63, 2])}
    with pytest.raises(st.SafetensorError, match="too large for NumPy"):
        st.load(file)


@pytest.mark.parametrize("dtype,shape,size", [("F4", "[4]", 2), ("F6_E2M3", "[4]", 3), ("F6_E3M2", "[2,2]", 3)])
def test_dtypes_below_a_byte(dtype, shape, size, tmp_path):
    """Rule 10: whole bytes are legal; NumPy has no type for them, and reading says so."""
    file = build(entry(f'"{dtype}"', shape, f"[0,{size}]"), bytes(size))
    assert official_accepts(file)
    assert opens(file, tmp_path)["a"][0] == dtype
    with pytest.raises(TypeError, match=dtype):
        st.load(file)
    with st.safe_open(tmp_path / "x.safetensors", "np") as f, pytest.raises(TypeError, match=dtype):
        f.get_slice("a")[0]


@pytest.mark.parametrize(
    "text,expected",
    [
        ("", None),
        ('"__metadata__":null,', None),
        ('"__metadata__":{},', {}),
        ('"__metadata__":{"x":"1","\\u0000":"\\n"},', {"x": "1", "\0": "\n"}),
        ('"__metadata__":{"x":"1","y":"2","x":"3"},', {"x": "3", "y": "2"}),
    ],
)
def test_metadata(text, expected, tmp_path):
    """Rule 11: None when absent, {} when empty; of a key given twice the last value counts, as in the official one."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(build('{%s"a":{%s}}' % (text, F32)))
    with st.safe_open(path, "np") as f, safetensors.safe_open(path, "np") as g:
        assert f.metadata() == g.metadata() == expected


def test_order_of_ties_is_the_header_s():
    """Empty tensors at one place come in the header's order, every time."""
    names = [f"e{i}" for i in (3, 1, 2, 0)]
    header = ",".join('"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in names)
    for _ in range(3):
        assert list(st.load(build("{%s}" % header, b""))) == names


@pytest.mark.parametrize(
    "file,words",
    [
        (build(entry(dtype='"F99"')), ['"a"', '"F99"']),
        (build(entry(shape="[2.5]")), ['"a"', "shape", "byte"]),
        (build(entry(offsets="[0,4]"), bytes(4)), ['"a"', "8 bytes", "give 4"]),
        (build(ONE, bytes(3)), ["8 bytes", "holds 3", "cut off"]),
        (build(ONE, length=5000), ["5000", "cut off"]),
        (b"<html><body>404 Not Found</body></html>", ["not a safetensors file"]),
        (build('{"a":{%s},"a":{%s}}' % (F32, F32)).replace(b"[0,8]}}", b"[8,8]}}"), ['"a"']),
        (build(ONE.replace('"a"', '"%s"' % ("é" * 500))), []),
    ],
)
def test_messages_name_tensor_and_reason(file, words):
    try:
        st.load(file)
    except st.SafetensorError as error:
        for word in words:
            assert word in str(error)
    else:
        assert not words


def test_long_and_odd_names_in_messages():
    """A message quotes a name without its control characters and cuts it at a character."""
    name = "\\u0007\\u001b[31m" + "é" * 5000
    with pytest.raises(st.SafetensorError) as info:
        st.load(build('{"%s":{"dtype":"?","shape":[],"data_offsets":[0,0]}}' % name))
    text = str(info.value)
    assert "\x07" not in text and "\x1b" not in text and "…" in text and len(text) < 400


def test_many_tensors():
    """100,000 tensors in a shuffled header: no quadratic work, all found."""
    rng = np.random.default_rng(0)
    n = 100_000
    header = ",".join(
        f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in rng.permutation(n).tolist()
    )
    tensors = st.load(build("{%s}" % header, bytes(i % 251 for i in range(n))))
    assert len(tensors) == n
    assert all(tensors[f"t{i}"][0] == i % 251 for i in range(0, n, 997))
