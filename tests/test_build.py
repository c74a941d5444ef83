"""The build: what a wheel and a source distribution contain, and what happens where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import peftc
from peftc._optional import is_installed

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not run from a source tree"),
    pytest.mark.skipif(peftc._core.build_info()["sanitized"], reason="compilers are not run under the sanitizers"),
]
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("PEFTC_", "PYTHONPATH"))}
TREE = (
    "src",
    "peftc",
    "docs",
    "benchmarks",
    "tests/c",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def run(*command: object, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRON, **environ},
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources without anything built."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "zz_missing.c")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    done = run(*pip, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "wheels").glob("peftc-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("peftc/") for name in names)
    assert {Path(name).suffix for name in names} == {".py", ".pyi", ".typed", ".so"}
    assert len([name for name in names if name.endswith(".so")]) == 1
    assert {"peftc/__init__.py", "peftc/_core.pyi", "peftc/py.typed"} <= names
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "peftc").rglob("*.py") if "__pycache__" not in p.parts}
    assert {name for name in names if name.endswith(".py")} == expected


def test_wheel_works_apart_from_its_dependencies(wheel, tmp_path):
    """Also where OpenBLAS is not beside it in the same site-packages (pip install --target, layered environments)."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "apart")
    code = "import peftc, numpy; peftc.show_config(); print(peftc.__file__)"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "apart"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(tmp_path / "apart"))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_wheel_searches_no_folder_of_the_build_machine(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (extension,) = (tmp_path / "peftc").glob("*.so")
    dynamic = run("readelf", "-d", extension, cwd=tmp_path).stdout
    (path,) = [line for line in dynamic.splitlines() if "RUNPATH" in line or "RPATH" in line]
    folders = path.partition("[")[2].rstrip("]").split(":")
    ours = [folder for folder in folders if not folder.startswith(sys.base_prefix)]  # Python adds its own
    assert ours == ["$ORIGIN/../scipy_openblas32/lib"]
    exported = run("readelf", "--dyn-syms", "-W", extension, cwd=tmp_path).stdout.splitlines()
    defined = [line.split()[-1] for line in exported if " GLOBAL " in line and " UND " not in line]
    assert defined == ["PyInit__core"]


def test_source_distribution_is_complete(tree):
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", "dist", cwd=tree)
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("src", "*.[ch]"), ("peftc", "*.py"), ("tests/c", "*.[ch]")):
        assert {p.relative_to(tree).as_posix() for p in (tree / folder).rglob(pattern)} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.parametrize(
    "where", [{"PKG_CONFIG_LIBDIR": "/nonexistent", "PKG_CONFIG_PATH": ""}, {"PATH": "/nonexistent"}]
)
def test_missing_cjson_is_one_clear_message(tree, where):
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "other", cwd=tree, **where)
    assert done.returncode != 0
    assert "peftc needs the cJSON library to build" in done.stderr
    assert "sudo apt-get install libcjson-dev pkg-config" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("pkg-config is not installed" in done.stderr) == ("PATH" in where)


def test_pip_shows_that_message(tree):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "none", "."]
    done = run(*pip, cwd=tree, PKG_CONFIG_LIBDIR="/nonexistent", PKG_CONFIG_PATH="")
    assert done.returncode != 0
    assert "sudo apt-get install libcjson-dev pkg-config" in done.stdout + done.stderr


@pytest.mark.skipif(not is_installed("torch"), reason="the page has classes for torch models")
def test_api_reference_is_up_to_date():
    done = run(sys.executable, ROOT / "docs" / "make_api.py", "--check", cwd=ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
