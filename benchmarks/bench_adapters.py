"""What adapters cost beside the model: loading, switching, deleting, memory; and a 100 MB adapter against its file.

    python benchmarks/bench_adapters.py [--adapters 500] [--peft-adapters 20] [--mb 100] [--no-peft]

Model: 224 linears of width 64 (Llama's count), adapters with r=8. PEFT is measured in a process of its own (it shares
nothing with ours but the files), on the same adapters, fewer of them because its costs grow with their number; the two
alternate. Times are medians over repeats; µs are per call.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LAYERS, WIDTH, RANK = 32, 64, 8
NAMES = ["q", "k", "v", "o", "gate", "up", "down"]


def rss():
    """Resident memory of this process, bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss():
    """Highest resident memory since reset_peak(), bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def per_call(call, seconds=0.2):
    """Median time of one call in µs, over batches."""
    call()
    start = time.perf_counter()
    call()
    once = max(time.perf_counter() - start, 1e-7)
    batch = max(1, int(seconds / 10 / once))
    samples = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(batch):
            call()
        samples.append((time.perf_counter() - start) / batch * 1e6)
    return statistics.median(samples)


def timed(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


# ------------------------------------------------------------------------ ours


def our_model(layers=LAYERS, width=WIDTH):
    import peftc

    class Layer(peftc.nn.Module):
        def __init__(self):
            super().__init__()
            for name in NAMES:
                setattr(self, name, peftc.nn.Linear(width, width, bias=False))

    class Model(peftc.PeftAdapterMixin, peftc.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = peftc.nn.ModuleList([Layer() for _ in range(layers)])

    return Model().eval()


def measure_ours(folder, count):
    import peftc  # noqa: F401

    model, small = our_model(), our_model()
    for each in (model, small):
        each.load_adapter(folder, "warm")
        each.delete_adapter("warm")
    small.load_adapter(folder, "a0")
    gc.collect()
    before = rss()
    for i in range(count):
        model.load_adapter(folder, f"a{i}")
    full = rss()
    second, last = [], []
    for _ in range(40):  # in turn, so that a machine whose speed drifts slows both
        second.append(timed(lambda: small.load_adapter(folder, "a1")))
        small.delete_adapter("a1")
        model.delete_adapter(f"a{count - 1}")
        last.append(timed(lambda: model.load_adapter(folder, f"a{count - 1}")))
    registry = model._peftc_attachment.registry
    result = {
        "load 2nd": statistics.median(second),
        "load last": statistics.median(last),
        "set_adapter (C)": per_call(lambda: registry.activate(["a1"])),
        "disable+enable (C)": per_call(
            lambda: (setattr(registry, "enabled", False), setattr(registry, "enabled", True))
        ),
        "set_adapter": per_call(lambda: model.set_adapter("a1")),
        "disable_adapters": per_call(model.disable_adapters),
        "disable+enable": per_call(lambda: (model.disable_adapters(), model.enable_adapters())),
        "get_adapter_state_dict": per_call(lambda: model.get_adapter_state_dict("a1")),
    }
    model.enable_adapters()
    result["delete all"] = timed(lambda: model.delete_adapter(list(model.peft_config)))
    gc.collect()
    after = rss()
    result |= {"rss before": before, "rss full": full, "rss after": after}
    return result


# ------------------------------------------------------------------------ PEFT


def measure_peft(folder, count):
    import warnings

    import torch
    from transformers.integrations.peft import PeftAdapterMixin

    warnings.simplefilter("ignore")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in NAMES:
                setattr(self, name, torch.nn.Linear(WIDTH, WIDTH, bias=False))

    class Model(PeftAdapterMixin, torch.nn.Module):
        device = "cpu"

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(LAYERS)])

    model = Model().eval()
    model.load_adapter(folder, "warm")
    gc.collect()
    before = rss()
    loads = [timed(lambda i=i: model.load_adapter(folder, f"a{i}")) for i in range(count)]
    return {
        "load 2nd": statistics.median(loads[1:4]),
        "load last": statistics.median(loads[-3:]),
        "set_adapter": per_call(lambda: model.set_adapter("a1")),
        "disable_adapters": per_call(model.disable_adapters),
        "disable+enable": per_call(lambda: (model.disable_adapters(), model.enable_adapters())),
        "get_adapter_state_dict": per_call(lambda: model.get_adapter_state_dict("a1")),
        "delete all": timed(lambda: model.delete_adapter(list(model.peft_config))),
        "rss before": before,
        "rss full": rss(),
    }


# ---------------------------------------------------------------- a big adapter


def measure_big(folder, mb):
    """Load an adapter of `mb` megabytes: peak memory over the base, and speed against reading the file."""
    rank = 64
    width = int(mb * 1e6 / (len(NAMES) * 8 * 2 * 4 * rank))
    model = our_model(8, width)
    path = Path(folder, "adapter_model.safetensors")
    if not path.exists():
        import peftc

        model.add_adapter(peftc.LoraConfig(target_modules=NAMES, r=rank))
        model.save_adapter(folder)
        model.delete_adapter("default")
    for parameter in model.parameters():  # in memory, as a real base would be
        float(np.asarray(parameter)[0].sum())
    size = path.stat().st_size
    buffer = bytearray(size)

    def read():
        with open(path, "rb", buffering=0) as file:
            view = memoryview(buffer)
            while view and (got := file.readinto(view)):
                view = view[got:]

    def read_fresh():
        nonlocal buffer
        buffer = bytearray(size)
        read()

    read()
    reads, fresh, loads, peaks = [], [], [], []
    for _ in range(7):  # in turn, so that a machine whose speed drifts slows all three
        reads.append(timed(read))
        fresh.append(timed(read_fresh))
        gc.collect()
        base = rss()
        reset_peak()
        loads.append(timed(lambda: model.load_adapter(folder, "big")))
        peaks.append((peak_rss() - base) / size)
        model.delete_adapter("big")
    return {
        "size": size,
        "read": statistics.median(reads),
        "read into new memory": statistics.median(fresh),
        "load": statistics.median(loads),
        "ratio": statistics.median(a / b for a, b in zip(reads, loads, strict=True)),
        "ratio of new memory": statistics.median(a / b for a, b in zip(fresh, loads, strict=True)),
        "peak/size": statistics.median(peaks),
    }


# ------------------------------------------------------------------- reporting


def child(what, *arguments):
    """Run one measurement in a process of its own."""
    out = subprocess.run(
        [sys.executable, __file__, "--child", what, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def median_of(results):
    return {key: statistics.median(r[key] for r in results) for key in results[0]}


def make_folder(folder):
    import peftc

    model = our_model()
    model.add_adapter(peftc.LoraConfig(target_modules=NAMES, r=RANK, init_lora_weights=False))
    model.save_adapter(folder)


def report(ours, theirs, count, peft_count):
    print(f"\n224 linears of width {WIDTH}, r={RANK}; {count} adapters here, {peft_count} with PEFT 0.17.1\n")
    print(f"{'':28}{'peftc':>12}{'PEFT':>14}{'ratio':>10}")
    units = {"load 2nd": "ms", "load last": "ms", "delete all": "ms"}
    for key, value in ours.items():
        if key.startswith("rss"):
            continue
        unit = units.get(key, "µs")
        other = theirs.get(key) if theirs else None
        right = f"{other:>11.1f} {unit}{other / value:>9.0f}×" if other else ""
        print(f"{key:28}{value:>9.2f} {unit}{right}")
    ratio = ours["load last"] / ours["load 2nd"]
    left = (ours["rss after"] - ours["rss before"]) / ours["rss before"]
    print(f"\nload of the last / of the 2nd: {ratio:.2f} (wanted ≤ 1.2)")
    print(
        f"resident memory: {ours['rss before'] / 1e6:.0f} MB before, {ours['rss full'] / 1e6:.0f} MB full, "
        f"{ours['rss after'] / 1e6:.0f} MB after deleting all ({left:+.1%}, wanted within 10 %)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--peft-adapters", type=int, default=20)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--child", nargs="+")
    options = parser.parse_args()
    if options.child:
        what, folder, count = options.child
        measure = {"ours": measure_ours, "peft": measure_peft, "big": measure_big}[what]
        print(json.dumps(measure(folder, int(count))))
        return
    with tempfile.TemporaryDirectory() as folder:
        small, big = Path(folder, "small"), Path(folder, "big")
        make_folder(small)
        ours, theirs, bigs = [], [], []
        for _ in range(options.repeats):
            ours.append(child("ours", small, options.adapters))
            if not options.no_peft:
                theirs.append(child("peft", small, options.peft_adapters))
        for _ in range(options.repeats):
            bigs.append(child("big", big, options.mb))
        report(median_of(ours), median_of(theirs) if theirs else None, options.adapters, options.peft_adapters)
        result = median_of(bigs)
        print(f"\nan adapter of {result['size'] / 1e6:.0f} MB")
        print(f"  reading the file (page cache) into a warm buffer  {result['read']:8.1f} ms")
        print(f"  reading it into new memory, as a load must        {result['read into new memory']:8.1f} ms")
        print(
            f"  load_adapter                                      {result['load']:8.1f} ms: {result['ratio']:.2f} × the "
            f"speed of the first (wanted ≥ 0.5), {result['ratio of new memory']:.2f} × that of the second"
        )
        print(
            f"  peak memory above the base                        {result['peak/size']:8.3f} × its size (wanted ≤ 1.15)"
        )


if __name__ == "__main__":
    main()
