"""The code in the README runs as it stands, in the repository's folder."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def code_blocks() -> list[str]:
    """Indented blocks that import something: the others are shell commands."""
    section = README.read_text().split("## Use it")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks if "import" in block]


def test_examples_run(monkeypatch, tmp_path):
    """One after the other in one namespace, as a reader would paste them; what is saved goes elsewhere."""
    monkeypatch.chdir(README.parent)
    blocks = code_blocks()
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("build/again", str(tmp_path / "again")), str(README), "exec"), namespace)  # noqa: S102  (our own README)
    assert namespace["logits"].shape == (1, 2)
    assert (tmp_path / "again" / "adapter_model.safetensors").stat().st_size > 0
    assert namespace["mine"].active_adapters() == ["first", "second"]
