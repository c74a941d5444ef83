"""What adapters add to a training step of a Llama-shaped torch model: peftc under Transformers against PEFT.

Each implementation runs in a process of its own, in turn (alternate.py). The base step is forward and backward through
frozen weights down to the embeddings, which is what a step with adapters computes besides them; "added" is a step with
adapters less the base step of the same process. The optimizer's step is the same for both and left out.

The heap keeps its memory between steps (KEEP). By default glibc gives the end of it back to the system, and every page
that a step then needs again is a fault: whether a step of either side pays for none or for tens of thousands hangs on which
small object happens to lie last, and hides what adapters add. `--heap default` leaves it so.

    python benchmarks/bench_torch_train.py [--layers 8] [--width 256] [--rounds 15] [--threads 2] [--heap default]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import warnings

from alternate import ENOUGH, QUIET, Worker, serve

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {"1 × 16": (1, 16), "2 × 64": (2, 64), "4 × 128": (4, 128), "8 × 128": (8, 128)}
CASES = {
    "LoRA r=16, all linears": ("LORA", {"r": 16, "target_modules": ALL}),
    "LoRA r=16, q and v": ("LORA", {"r": 16, "target_modules": ["q_proj", "v_proj"]}),
    "LoRA r=16, dropout 0.1": ("LORA", {"r": 16, "target_modules": ALL, "lora_dropout": 0.1}),
    "IA3, k, v and down": (
        "IA3",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "AdaLora r=12, all linears": ("ADALORA", {"init_r": 12, "target_modules": ALL, "total_step": 100}),
}


KEEP = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


def worker(side: str, layers: int, width: int, threads: int) -> None:
    import copy

    import peft
    import torch
    import transformers

    import peftc

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    peftc.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    base = transformers.LlamaForCausalLM(config).requires_grad_(False)
    kinds = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "ADALORA": peft.AdaLoraConfig}
    cases = {}
    with peftc.patch_transformers() if side == "ours" else contextlib.nullcontext():
        models = {"base": base}
        for case, (kind, fields) in CASES.items():
            models[case] = copy.deepcopy(base)
            models[case].add_adapter(kinds[kind](**fields))
            for name, parameter in models[case].named_parameters():
                if "lora_B" in name or "lora_E" in name:
                    torch.nn.init.normal_(parameter, std=0.02)

    def step(model, ids, embeddings):
        for parameter in model.parameters():
            parameter.grad = None
        embeddings.grad = None
        model(inputs_embeds=embeddings, labels=ids).loss.backward()

    for shape, (rows, length) in SHAPES.items():
        ids = torch.randint(0, 512, (rows, length))
        embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
        for case, model in models.items():
            model.train()
            cases[f"{shape}: {case}"] = lambda m=model, i=ids, e=embeddings: step(m, i, e)
    serve(cases)


def one_round(sides, shape: str, case: str) -> dict[str, tuple[float, float, float]]:
    """Of the first and the second side: (base step, step with the adapter, share of the time without a core)."""
    result = {}
    for key, side in zip(("ours", "theirs"), sides, strict=True):
        calls = 3
        base, idle = side.run(f"{shape}: base", calls)
        step, more = side.run(f"{shape}: {case}", calls)
        result[key] = (base, step, max(idle, more))
    return result


class Figures:
    """Of a quantity: medians over the rounds that count, and what it was in the best rounds."""

    def __init__(self, ours: float, theirs: float, best_ours: float, best_theirs: float) -> None:
        self.ours, self.theirs, self.best_ours, self.best_theirs = ours, theirs, best_ours, best_theirs

    @classmethod
    def of(cls, counted, rounds, quantity):
        medians = [statistics.median(quantity(r[key]) for r in counted) for key in ("ours", "theirs")]
        # The best base step and the best step with the adapter, whichever rounds they were in.
        best = [quantity(tuple(min(r[key][i] for r in rounds) for i in range(2))) for key in ("ours", "theirs")]
        return cls(*medians, *best)

    def __str__(self) -> str:
        pairs = [(self.ours, self.best_ours), (self.theirs, self.best_theirs)]
        text = "".join(f"{f'{a * 1e3:.1f} ({b * 1e3:.1f})':>16}" for a, b in pairs)
        ratio, best = self.theirs / self.ours, self.best_theirs / self.best_ours
        return text + f"{f'{ratio:.2f} ({best:.2f})':>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, the smallest first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heap", choices=["keep", "default"], default="keep")
    parser.add_argument("--worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.layers, options.width, options.threads)
        return
    variables = KEEP if options.heap == "keep" else {}
    sides = [
        Worker(__file__, [*sys.argv[1:], "--worker", side], options.threads, variables) for side in ("ours", "theirs")
    ]
    print(f"{options.layers} layers × {options.width}, {options.threads} threads; milliseconds: median (best)\n")
    print(f"{'batch':9}{'':27}{'step':>16}{'PEFT':>16}{'ratio':>14}{'added':>16}{'PEFT':>16}{'ratio':>14}  quiet")
    for shape in list(SHAPES)[: options.shapes]:
        for case in CASES:
            rounds = [one_round(sides if i % 2 == 0 else sides[::-1], shape, case) for i in range(options.rounds)]
            rounds = [r if i % 2 == 0 else {"ours": r["theirs"], "theirs": r["ours"]} for i, r in enumerate(rounds)]
            quiet = [r for r in rounds if max(share for *_, share in r.values()) <= QUIET]
            counted = quiet if len(quiet) >= min(ENOUGH, len(rounds)) else rounds
            step, added = (Figures.of(counted, rounds, lambda t, k=k: t[1] - k * t[0]) for k in (0, 1))
            print(f"{shape:9}{case:27}{step}{added}  {len(quiet)} of {len(rounds)}", flush=True)
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
