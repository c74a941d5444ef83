"""A save either happens or leaves everything as it was."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from limits import small_disk

import peftc.safetensors as st

OLD, NEW = {"a": np.arange(10.0)}, {"a": np.arange(20.0)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "x.safetensors"
    st.save_file(OLD, path)
    return path


def mode(path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def intact(path) -> bool:
    """The old file, and nothing beside it."""
    return os.listdir(path.parent) == [path.name] and st.load_file(path)["a"].shape == (10,)


def test_replaces(path):
    st.save_file(NEW, path)
    assert os.listdir(path.parent) == [path.name]
    assert st.load_file(path)["a"].shape == (20,)


@pytest.mark.parametrize("umask,expected", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_of_a_new_file(umask, expected, tmp_path):
    """The one that open() gives (the official writer always gives 0600)."""
    before = os.umask(umask)
    try:
        st.save_file(OLD, tmp_path / "x")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x") == expected


@pytest.mark.parametrize("bits", [0o600, 0o644, 0o640, 0o666])
def test_mode_of_a_replaced_file(bits, path):
    os.chmod(path, bits)
    st.save_file(NEW, path)
    assert mode(path) == bits


def test_symbolic_link(path, tmp_path):
    """The link stays, the file that it names is replaced; also through a chain, relative and dangling."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "relative").symlink_to("../x.safetensors")
    (tmp_path / "chain").symlink_to(tmp_path / "sub" / "relative")
    st.save_file(NEW, tmp_path / "chain")
    assert (tmp_path / "chain").is_symlink() and (tmp_path / "sub" / "relative").is_symlink()
    assert not path.is_symlink()
    assert st.load_file(path)["a"].shape == (20,)

    (tmp_path / "dangling").symlink_to("sub/later")
    st.save_file(NEW, tmp_path / "dangling")
    assert (tmp_path / "dangling").is_symlink()
    assert st.load_file(tmp_path / "sub" / "later")["a"].shape == (20,)

    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        st.save_file(NEW, tmp_path / "loop")


def test_names(tmp_path, monkeypatch):
    """No folder in the path, and a name as long as the system allows."""
    monkeypatch.chdir(tmp_path)
    st.save_file(OLD, "x")
    st.save_file(OLD, "n" * 255)
    assert sorted(os.listdir()) == ["n" * 255, "x"]


def test_bad_targets(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for target, error in [
        (tmp_path, IsADirectoryError),
        (str(tmp_path / "file") + "/", IsADirectoryError),
        (tmp_path / "nope" / "x", FileNotFoundError),
        (tmp_path / "file" / "x", NotADirectoryError),
        (tmp_path / "fifo", OSError),
        ("", FileNotFoundError),
        (tmp_path / ("n" * 256), OSError),
    ]:
        with pytest.raises(error, match="cannot"):
            st.save_file(NEW, target)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


def test_device_is_not_replaced():
    """As root a rename over /dev/null would succeed."""
    with pytest.raises(OSError, match="regular file"):
        st.save_file(NEW, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def run(code: str, *args, **kwargs) -> subprocess.CompletedProcess:
    prelude = "import os, resource, sys, numpy as np, peftc.safetensors as st\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


@pytest.mark.parametrize("what", ["folder", "file"])
def test_not_writable(what, path):
    """Neither into a read-only folder nor over a read-only file (which a rename alone would replace)."""
    os.chmod(path.parent if what == "folder" else path, 0o555 if what == "folder" else 0o444)
    code = """
if os.geteuid() == 0:
    os.setuid(65534)
try: st.save_file({"a": np.arange(20.0)}, sys.argv[1])
except PermissionError as error: print(error)
"""
    top = path.parent
    reachable = []
    while top != top.parent and os.geteuid() == 0:  # the folders of tmp_path are closed to other users
        if not os.stat(top).st_mode & 0o005:
            reachable.append((top, mode(top)))
            os.chmod(top, mode(top) | 0o005)
        top = top.parent
    try:
        done = run(code, path)
    finally:
        for folder, bits in reachable:
            os.chmod(folder, bits)
        os.chmod(path.parent, 0o755)
    assert "x.safetensors" in done.stdout, done.stderr
    assert intact(path)


@pytest.mark.parametrize("existing", [True, False])
def test_disk_full(existing, path):
    """The limit on a file's size stands in for a full disk: both fail in the middle of a write."""
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try: st.save_file({"a": np.zeros(1 << 20), "b": np.zeros((4, 5)).T}, sys.argv[1])
except OSError as error: print(error)
"""
    target = path if existing else path.parent / "new"
    done = run(code, target)
    assert "cannot write" in done.stdout and str(target) in done.stdout, done.stderr
    assert intact(path)


def test_disk_really_full(tmp_path):
    """ENOSPC on a small tmpfs, where the test may mount one."""
    mount = tmp_path / "small"
    with small_disk(mount, "1m"):
        path = mount / "x.safetensors"
        st.save_file(OLD, path)
        with pytest.raises(OSError, match="No space left"):
            st.save_file({"a": np.zeros(1 << 20)}, path)
        assert intact(path)
        st.save_file(NEW, path)  # the space is free again


def test_array_that_cannot_be_copied(path):
    """A failure in NumPy in the middle of the file leaves the old one."""
    wide = np.lib.stride_tricks.as_strided(np.zeros(1), (1 << 56,), (0,))  # more than any address space holds
    with pytest.raises(MemoryError):
        st.save_file({"a": np.arange(20.0), "z": wide}, path)
    with pytest.raises(MemoryError):
        st.save({"z": wide})
    assert intact(path)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.06, 0.1])
def test_killed(delay, path):
    """SIGKILL at any moment: the file that is there is whole, old or new."""
    code = """
new = {"a": np.arange(20.0), "big": np.zeros(4 << 20), "t": np.zeros((1000, 1000)).T}
print("go", flush=True)
while True: st.save_file(new, sys.argv[1])
"""
    prelude = "import sys, numpy as np, peftc.safetensors as st\n"
    process = subprocess.Popen([sys.executable, "-c", prelude + code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"go\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    tensors = st.load_file(path)
    assert tensors["a"].shape in ((10,), (20,))
    assert tensors.keys() == ({"a"} if tensors["a"].shape == (10,) else {"a", "big", "t"})
    left = [name for name in os.listdir(path.parent) if name != path.name]
    assert all(name.startswith(".peftc-") and name.endswith(".tmp") for name in left)
    assert len(left) <= 1
