"""The low-rank kernels for torch tensors beside the torch operations that do the same, r = 16.

For each number of rows and width: forward, y += s · (x Aᵀ) Bᵀ in place, against `y.addmm_(x @ A.T, B.T, alpha=s)`, and
backward, dx, dA and dB, against the five products that torch needs for it.  Both run alternately, each call right after
a real linear layer of torch, so that torch's threads are in the state in which a model leaves them; the time of the
layer is not counted.  Printed: medians in microseconds and the median of the ratios of neighbouring runs.

    python benchmarks/bench_torch_kernels.py [--threads 1] [--dtype bfloat16] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from peftc import _core

RANK = 16


def clock(before: Callable[[], object], call: Callable[[], object], repeats: int) -> float:
    """Microseconds of `call`, median over `repeats`."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def compare(base: Callable[[], object], ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> str:
    clock(base, ours, 2)
    quick = clock(base, theirs, 3)
    repeats = max(1, min(50, int(20_000 / quick)))
    pairs = [(clock(base, ours, repeats), clock(base, theirs, repeats)) for _ in range(runs)]
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return f"{mine:10.1f} {other:10.1f} {ratio:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _core.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, args.dtype)
    runs = 5 if args.quick else 11
    print(f"torch {torch.__version__}, peftc on {_core.build_info()['isa']}, {args.threads} thread(s), {args.dtype}")
    print(f"{'rows':>6} {'width':>6}   forward: µs, torch, ratio       backward: µs, torch, ratio")
    for width in (256, 4096) if args.quick else (256, 1024, 4096):
        layer = torch.nn.Linear(width, 256, dtype=dtype)
        a, b = torch.randn(RANK, width).to(dtype) / width**0.5, torch.randn(width, RANK).to(dtype) / 4
        for rows in (1, 16, 1024) if args.quick else (1, 16, 128, 1024, 8192):
            x, y, grad = (torch.randn(rows, width).to(dtype) for _ in range(3))
            few = x[:32]
            dx, da, db = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
            terms = ((a, b, 1e-3, None, None),)

            def base(layer: torch.nn.Linear = layer, few: torch.Tensor = few) -> object:
                return layer(few)

            def forward(x: torch.Tensor = x, y: torch.Tensor = y, terms: tuple = terms) -> object:
                return _core.lowrank_forward(x, y, y, terms)

            def torch_forward(
                x: torch.Tensor = x, y: torch.Tensor = y, a: torch.Tensor = a, b: torch.Tensor = b
            ) -> object:
                return y.addmm_(x @ a.T, b.T, alpha=1e-3)

            tensors = (grad, x, a, b)

            def backward(tensors: tuple = tensors, outs: tuple = (dx, da, db)) -> object:
                return _core.lowrank_backward(*tensors, None, 0.5, *outs, None)

            def torch_backward(tensors: tuple = tensors) -> object:
                grad, x, a, b = tensors
                through = (grad @ b).mul_(0.5)
                return through @ a, through.T @ x, grad.T @ (x @ a.T).mul_(0.5)

            assert forward() and backward()
            line = compare(base, forward, torch_forward, runs) + "   " + compare(base, backward, torch_backward, runs)
            print(f"{rows:6} {width:6} {line}", flush=True)


if __name__ == "__main__":
    main()
