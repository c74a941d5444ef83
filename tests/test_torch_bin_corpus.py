"""adapter_model.bin, in bulk: whatever the layouts can hold, thousands of damaged files, and bombs. Needs no torch, so
that all of it runs on the sanitized extension, too."""

from __future__ import annotations

import random
import struct
from pickle import UnpicklingError

import numpy as np
import pytest
from bin_files import (
    FOUR,
    archive,
    changed_bytes,
    changed_file,
    expected,
    nested_tuples,
    pickled,
    random_state,
    save,
    shared_bomb,
    tensor,
    text,
)
from limits import bounded_memory, one_file

from peftc import _core

LAYOUTS = [(protocol, as_zip) for protocol in (2, 3, 4, 5) for as_zip in (True, False)]


def refused(data: bytes, match: str) -> None:
    with pytest.raises(UnpicklingError, match=match):
        _core.parse_torch_bin(data)


@pytest.mark.parametrize(("protocol", "as_zip"), LAYOUTS)
def test_states(protocol, as_zip, tmp_path):
    """Every tensor comes back with its bytes in order, from a file and from memory."""
    rng = random.Random(protocol * 2 + as_zip)
    path, tensors = tmp_path / "x.bin", 0
    for _ in range(150):
        state = random_state(rng)
        data = save(state, protocol, as_zip)
        got = _core.torch_bin_raw(data)
        assert got == expected(state) and list(got) == list(expected(state))
        path.write_bytes(data)
        assert _core.torch_bin_raw(str(path)) == got
        tensors += len(got)
    assert tensors > 300


@pytest.mark.parametrize(("protocol", "as_zip"), LAYOUTS)
@pytest.mark.parametrize("values", [0.9, 0.2], ids=["values", "structure"])
def test_damaged_files(protocol, as_zip, values):
    """Accepted, or refused with the file's name; in bounded time and memory."""
    rng = random.Random(f"{protocol} {as_zip} {values}")
    accepted = 0
    with bounded_memory():
        for _ in range(25):
            whole = save(random_state(rng), protocol, as_zip)
            for _ in range(20):
                data = changed_file(rng, whole, values)
                with one_file(data):
                    try:
                        _core.torch_bin_raw(data)
                    except UnpicklingError as error:
                        assert str(error).startswith("adapter_model.bin"), data
                    else:
                        accepted += 1
    assert 100 < accepted < 490


def test_damaged_bytes():
    """The zip directory, the headers and the list of storages: whatever no checksum covers."""
    rng = random.Random(8)
    with bounded_memory():
        for i in range(2000):
            data = changed_bytes(rng, save({"w": np.arange(6.0), "v": np.ones(2, "f4")}, as_zip=bool(i % 2)))
            with one_file(data):
                try:
                    _core.torch_bin_raw(data)
                except UnpicklingError as error:
                    assert str(error).startswith("adapter_model.bin"), data


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
    with bounded_memory(), one_file(body[:100]):
        try:
            assert len(_core.torch_bin_raw(archive(pickled(body)))) == 0
        except UnpicklingError:
            pass


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
    state: dict = {inner: np.ones(1)}
    for _ in range(30):
        state = {"a": state, "b": state}
    refused(save(state), "entries in its dicts|names|tensors take")
