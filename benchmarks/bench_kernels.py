# ruff: noqa: B023 - the closures over loop variables are called within the same round
"""Linear layers of peftc's kernels beside torch and OpenBLAS, at the shapes of MiniLM and of a 4096-wide model.

Builds the C part of peftc as a plain shared library in a temporary folder (the kernels have no Python interface of
their own), then runs the three alternately on the same data.  Weights rotate through a set larger than the second
level cache, as they do in a model.  Printed: GFLOP/s from the median of the runs, and the median of the ratios torch
time / peftc time of neighbouring runs, which a busy machine disturbs least.

    python benchmarks/bench_kernels.py [--threads 1] [--quick] [--isa avx2]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
F32 = 12  # PC_F32 of src/core/dtype.h; checked below
GELU = 1


def build(folder: str) -> ctypes.CDLL:
    """Compile src/core and src/kernels into a shared library."""
    import scipy_openblas32

    lib = scipy_openblas32.get_lib_dir()
    core = [ROOT / "src/core" / f"{name}.c" for name in ("dtype", "memory", "parallel", "rng", "status", "utf8")]
    sources = [*core, *sorted((ROOT / "src/kernels").rglob("*.c"))]
    out = os.path.join(folder, "libpeftc_kernels.so")
    flags = ["-std=c11", "-O3", "-g1", "-fPIC", "-shared", "-DPC_TEST_HOOKS"]
    link = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lscipy_openblas", "-lm", "-pthread"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", out, *link], check=True)
    return ctypes.CDLL(out)


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def clock(call: Callable[[int], object], repeats: int) -> float:
    start = time.perf_counter()
    for i in range(repeats):
        call(i)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and runs")
    parser.add_argument("--isa", help="force avx512, avx2, neon or generic")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        lib = build(folder)
    lib.pc_kernels_init()
    lib.pc_kernels_isa.restype = ctypes.c_char_p
    lib.pc_dtype_from_name.restype = ctypes.c_int
    assert lib.pc_dtype_from_name(b"F32", ctypes.c_size_t(3)) == F32
    if args.isa and not lib.pc_kernels_force_isa(args.isa.encode()):
        raise SystemExit(f"this CPU has no {args.isa}")
    runtime = ctypes.c_void_p()
    lib.pc_runtime_new(ctypes.byref(runtime), None)
    lib.pc_runtime_set_threads(runtime, args.threads, None)
    print(f"peftc kernels: {lib.pc_kernels_isa().decode()}, torch {torch.__version__}, {args.threads} thread(s)")
    print(f"{'n':>5} {'k':>5} {'m':>5}  {'peftc':>6} {'torch':>6} {'OpenBLAS':>8}  GFLOP/s   torch/peftc time")

    shapes = [(384, 384), (1536, 384), (384, 1536), (4096, 4096)]
    rows = [1, 16, 256, 1024] if args.quick else [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024]
    runs = 5 if args.quick else 11
    long = ctypes.c_int64
    for n, k in shapes:
        copies = 1 + 40_000_000 // (4 * n * k)
        weights = [np.random.default_rng(i).standard_normal((n, k), dtype=np.float32) for i in range(copies)]
        theirs = [torch.from_numpy(w) for w in weights]
        bias = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
        torch_bias = torch.from_numpy(bias)
        for m in rows:
            x = np.random.default_rng(1).standard_normal((m, k), dtype=np.float32)
            y = np.empty((m, n), np.float32)
            z = np.empty((m, n), np.float32)
            torch_x = torch.from_numpy(x)

            def ours(i: int) -> object:
                return lib.pc_linear(runtime, F32, long(m), long(n), long(k), pointer(x), F32,
                                     pointer(weights[i % copies]), pointer(bias), 0, pointer(y), None)  # fmt: skip

            def blas(i: int) -> object:
                one, zero = ctypes.c_double(1), ctypes.c_double(0)
                return lib.pc_gemm(runtime, F32, False, True, long(m), long(n), long(k), one, pointer(x), long(k),
                                   pointer(weights[i % copies]), long(k), zero, pointer(z), long(n), None)  # fmt: skip

            def theirs_call(i: int) -> object:
                return torch.nn.functional.linear(torch_x, theirs[i % copies], torch_bias)

            flops = 2.0 * m * n * k
            repeats = max(copies, int(1.5e9 / flops) if m > 1 else 3 * copies)
            calls = {"peftc": ours, "torch": theirs_call, "OpenBLAS": blas}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for call in calls.values():
                clock(call, copies)
            for _ in range(runs):
                for name, call in calls.items():
                    times[name].append(clock(call, repeats))
            expected = theirs_call(0).numpy()
            ours(0)
            assert np.allclose(y, expected, rtol=1e-4, atol=1e-3)
            ratio = statistics.median(t / p for t, p in zip(times["torch"], times["peftc"], strict=True))
            speed = {name: flops / statistics.median(value) / 1e9 for name, value in times.items()}
            print(
                f"{n:5} {k:5} {m:5}  {speed['peftc']:6.1f} {speed['torch']:6.1f} {speed['OpenBLAS']:8.1f}"
                f"            {ratio:.2f}",
                flush=True,
            )
    lib.pc_runtime_free(runtime)


if __name__ == "__main__":
    main()
