"""What `import peftc` loads, and what that costs beside `import numpy`."""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib import metadata

import pytest

import peftc
from peftc._optional import is_installed

HEAVY = ("torch", "transformers", "peft", "huggingface_hub", "safetensors", "accelerate", "tqdm")


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def test_importtime_shows_nothing_heavy():
    report = run("import peftc", "-X", "importtime").stderr
    names = [line.rpartition("|")[2].strip() for line in report.splitlines() if line.startswith("import time:")]
    assert "peftc._core" in names and "numpy" in names
    assert not [name for name in names if name.split(".")[0] in HEAVY]


def test_only_the_core_is_loaded():
    """Besides numpy and the core: nothing of peftc, and nothing of the standard library that numpy does without."""
    code = "import sys, numpy; before = set(sys.modules); import peftc; print(*sorted(set(sys.modules) - before))"
    assert set(run(code).stdout.split()) <= {"peftc", "peftc._core"}


@pytest.mark.parametrize("name", peftc.__all__)
def test_public_names_import_alone_and_without_torch(name):
    """But for the classes that are modules of torch: these bring torch along, and nothing else."""
    code = f"import sys, peftc; peftc.{name}; print(*[m for m in {HEAVY} if m in sys.modules])"
    # torch imports tqdm
    assert run(code).stdout.split() == (["torch", "tqdm"] if name.startswith("PeftModel") else [])


def test_public_names_are_listed_and_documented():
    assert set(peftc.__all__) <= set(dir(peftc))
    for name in peftc.__all__:
        assert (getattr(peftc, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="has no attribute 'LoraConfiguration'"):
        _ = peftc.LoraConfiguration
    namespace: dict[str, object] = {}
    exec("from peftc import *", namespace)  # noqa: S102
    assert set(peftc.__all__) <= set(namespace)


@pytest.mark.parametrize(
    ("call", "package"),
    [
        ("peftc.PeftModel", "torch"),
        ("peftc.patch_transformers()", "torch"),
        ("peftc.get_peft_model(None, None)", "torch"),
        ("peftc.inject_adapter_in_model(None, None)", "torch"),
        ("peftc.get_peft_model_state_dict(None)", "torch"),
        ("peftc.set_peft_model_state_dict(None, {})", "torch"),
        ("peftc.patch_transformers()", "transformers"),
        ("import peftc.auto", "transformers"),
    ],
)
def test_without_what_it_needs(call, package):
    """The error names what was asked for, the package and the remedy; without torch all other names can be imported."""
    code = f"""
import sys
sys.modules[{package!r}] = None
import peftc
try:
    {call}
except ModuleNotFoundError as error:
    print(error.name, error)
namespace = {{}}
exec("from peftc import *", namespace)
print("get_peft_model" in namespace, "PeftModel" in namespace)
"""
    if package == "transformers" and not is_installed("torch"):
        pytest.skip("torch is asked for first")
    first, second = run(code).stdout.splitlines()
    name = "peftc.patch_transformers" if "auto" in call else call.partition("(")[0]
    assert first.startswith(f"{package} {name}")
    assert f"needs the package {package}, which is not installed: pip install {package}" in first
    assert second == f"True {package != 'torch'}"


def test_a_folder_called_torch_is_not_torch(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(
        sys, "modules", {name: m for name, m in sys.modules.items() if name.partition(".")[0] != "torch"}
    )
    assert not is_installed("torch")
    assert not is_installed("no_such_package")
    assert is_installed("numpy")


def test_time_beside_numpy(capsys):
    """Printed, not judged: other processes share the machine. Alternating runs, so that drift hits both."""
    runs = 15
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {"numpy": [], "peftc": []}
    for _ in range(runs):
        for name, taken in times.items():
            taken.append(float(run(code.format(name)).stdout))
    numpy, ours = statistics.median(times["numpy"]), statistics.median(times["peftc"])
    with capsys.disabled():
        print(f"\nimport numpy {numpy * 1e3:.1f} ms, import peftc {ours * 1e3:.1f} ms, ratio {ours / numpy:.2f}")


def test_version_is_the_distribution_s():
    try:
        assert metadata.version("peftc") == peftc.__version__
    except metadata.PackageNotFoundError:
        pytest.skip("peftc is not installed, only importable")


def test_show_config(capsys):
    peftc.show_config()
    shown = capsys.readouterr().out
    for word in (peftc.__version__, "numpy", "kernels", "blas", "threads"):
        assert word in shown


def test_threads():
    before = peftc.get_num_threads()
    try:
        peftc.set_num_threads(3)
        assert peftc.get_num_threads() == 3
        for bad in (0, -1, 257, 10**30):
            with pytest.raises((ValueError, OverflowError)):
                peftc.set_num_threads(bad)
        with pytest.raises(TypeError):
            peftc.set_num_threads("2")
        assert peftc.get_num_threads() == 3
    finally:
        peftc.set_num_threads(before)


def test_manual_seed(monkeypatch):
    from peftc import _random
    from peftc._random import next_seed

    monkeypatch.setattr(_random, "_base", None)  # put back afterwards
    peftc.manual_seed(5)
    first = [next_seed() for _ in range(100)]
    peftc.manual_seed(6)
    other = [next_seed() for _ in range(100)]
    peftc.manual_seed(5)
    assert [next_seed() for _ in range(100)] == first
    assert len({*first, *other}) == 200
    peftc.manual_seed(-1)
    for bad, error in (
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        (1.5, TypeError),
        ("1", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error):
            peftc.manual_seed(bad)


def test_unseeded_processes_differ():
    code = "from peftc._random import next_seed; print(next_seed())"
    assert run(code).stdout != run(code).stdout
