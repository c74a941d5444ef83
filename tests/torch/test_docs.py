"""The code of the documentation about torch models runs as it stands: "Replace PEFT in your script", the notebook."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import peftc

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "replace-peft.md"
NOTEBOOK = ROOT / "docs" / "notebooks" / "adapters.ipynb"


def code_blocks(text: str) -> list[str]:
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip("\n") for block in blocks]


def test_every_block_of_the_page_runs(minilm, tmp_path):
    blocks = code_blocks(PAGE.read_text())
    assert len(blocks) == 3 and all("import" in block or "adapter_names" in block for block in blocks)
    code = "\n\n".join(blocks).replace("build/mine", str(tmp_path / "mine"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trainable params:")
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()


def test_the_page_names_what_there_is():
    text = PAGE.read_text()
    for name in re.findall(r"\bpeftc\.(\w+)\b", text):
        assert name == "auto" or hasattr(peftc, name), name
    for target in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = target.partition("#")
        assert (PAGE.parent / name).is_file(), target
        headings = re.findall(r"^#+ (.+)$", (PAGE.parent / name).read_text(), re.MULTILINE)
        assert not heading or heading in [found.lower().replace(" ", "-") for found in headings], target
    for path in re.findall(r"`((?:benchmarks|tests)/[^`]+)`", text):
        assert (ROOT / path).exists(), path


def whole(outputs: list[Any]) -> list[str]:
    """What is printed, and the kind of everything else. A slow machine prints in more pieces than a fast one."""
    found: list[str] = []
    printing = False
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and printing:
            found[-1] += output.text
        else:
            found.append(output.text if output.output_type == "stream" else output.output_type)
        printing = output.output_type == "stream"
    return found


def test_the_notebook_runs_and_has_its_picture(minilm):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in kept)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in made)
    assert not [output for output in made if output.output_type == "error"]
    for before, after in zip(whole(kept), whole(made), strict=True):
        assert before == after
