"""peftc under Transformers against PEFT: adding, loading, switching, deleting adapters, and what a layer costs.

Both work on the same kind of model in one process and in turn, so that a busy machine slows both. Prints medians and
the ratio reference / peftc. Before each timed call, memory is written to and given back (memory_at_hand): where a virtual
machine's host provides it at the first write only, that would be most of what is measured.

    python benchmarks/bench_torch_host.py [--layers 32] [--adapters 50] [--threads 2] [--quick]
"""

import argparse
import copy
import gc
import mmap
import statistics
import tempfile
import time
import warnings

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftc

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**more):
    return peft.LoraConfig(r=16, target_modules=TARGETS, **more)


def ia3():
    return peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"])


def adalora():
    return peft.AdaLoraConfig(init_r=16, target_modules=TARGETS, total_step=100, inference_mode=True)


def memory_at_hand(size=128 << 20):
    """Have the system keep pages that its host has backed: the next faults get those."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1


def timed(call):
    memory_at_hand()
    gc.collect()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


class Side:
    """One of the two implementations, with a model of its own."""

    def __init__(self, name, base, layers):
        self.name = name
        self.base = base
        self.model = None
        self.layers = layers
        self.times = {}

    def fresh(self):
        self.model = copy.deepcopy(self.base)

    def take(self, what, call):
        self.times.setdefault(what, []).append(timed(call))


def run(sides, rounds, adapters, folder):
    for _ in range(rounds):
        for side in sides:
            side.fresh()
            side.take("add_adapter, 1st", lambda s=side: s.model.add_adapter(lora(), "a0"))
            side.model.delete_adapter("a0")
            side.fresh()
            side.take("load_adapter, 1st", lambda s=side: s.model.load_adapter(folder, "a0"))
            side.fresh()
            side.take("IA3 add_adapter", lambda s=side: s.model.add_adapter(ia3(), "a0"))
            side.fresh()
            side.take("AdaLora add_adapter", lambda s=side: s.model.add_adapter(adalora(), "a0"))
    for side in sides:
        side.fresh()
    for i in range(adapters):
        for side in sides:
            if i == 20:
                for _ in range(3):
                    side.take("load_adapter, 20th", lambda s=side: s.model.load_adapter(folder, "loaded"))
                    side.model.delete_adapter("loaded")
            call = lambda s=side, n=f"a{i}": s.model.add_adapter(lora(), n)
            if i >= adapters - 3:
                side.take("add_adapter, last", call)
            else:
                call()
    last = adapters - 1
    for turn in range(5):
        for side in sides:
            model = side.model
            side.take("set_adapter, all loaded", lambda m=model, t=turn: m.set_adapter(f"a{t % last}"))
            side.take("disable_adapters", model.disable_adapters)
            side.take("enable_adapters", model.enable_adapters)
            side.take("get_adapter_state_dict", lambda m=model: m.get_adapter_state_dict("a1"))
    for side in sides:
        in_a_row(side, last)
    for turn in range(3):
        for side in sides:
            side.take("delete_adapter", lambda m=side.model, t=turn: m.delete_adapter(f"a{last - t}"))


def in_a_row(side, last, count=10):
    """Switching again and again, as a server does that has other work of its own kind only: no garbage collection between
    the calls, which would take what they need out of the CPU's caches."""
    gc.collect()
    for what, call in (
        ("set_adapter, ten in a row", lambda turn: side.model.set_adapter(f"a{turn % last}")),
        (
            "disable_adapters and enable_adapters, likewise",
            lambda turn: (side.model.disable_adapters(), side.model.enable_adapters()),
        ),
    ):
        call(count)
        begin = time.perf_counter()
        for turn in range(count):
            call(turn)
        side.times.setdefault(what, []).append((time.perf_counter() - begin) / count)


def per_token(model, ids, tokens=5):
    """Seconds of a forward pass of one token, the best of some in a row, as when text is generated."""
    taken = []
    for _ in range(tokens):
        begin = time.perf_counter()
        model(ids, use_cache=False)
        taken.append(time.perf_counter() - begin)
    return min(taken)


def one_layer(sides, plain, calls=200):
    """Seconds that an adapter adds to one layer, called again and again with one token."""
    x = torch.randn(1, 1, plain.config.hidden_size)
    layers = [model.model.layers[0].self_attn.q_proj for model in (plain, *(side.model for side in sides))]
    taken = []
    for layer in layers:
        begin = time.perf_counter()
        for _ in range(calls):
            layer(x)
        taken.append((time.perf_counter() - begin) / calls)
    for side, seconds in zip(sides, taken[1:], strict=True):
        side.times.setdefault("1 token, one layer again and again", []).append(seconds - taken[0])


def layer_cost(sides, base, rounds):
    """Seconds that one adapted layer adds to a forward pass of 1 × 1 token, active and disabled."""
    ids = torch.tensor([[1]])
    for side in sides:
        side.fresh()
        side.model.add_adapter(lora(), "a0")
        side.model.eval()
    plain = copy.deepcopy(base).eval()
    with torch.no_grad():
        for _ in range(rounds):
            floor = per_token(plain, ids)
            for side in sides:
                side.model.enable_adapters()
                active = per_token(side.model, ids)
                side.times.setdefault("1 token, per adapted layer", []).append((active - floor) / side.layers)
                side.model.disable_adapters()
                disabled = per_token(side.model, ids)
                side.times.setdefault("1 token, per disabled layer", []).append((disabled - floor) / side.layers)
                side.model.enable_adapters()
            one_layer(sides, plain)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="8 layers, 22 adapters")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.adapters = 8, 22
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        vocab_size=512,
    )
    base = LlamaForCausalLM(config)

    class Ours(peftc.PeftAdapterMixin, LlamaForCausalLM):
        pass

    ours = Ours(config)
    ours.load_state_dict(base.state_dict())
    targets = options.layers * len(TARGETS)
    sides = [Side("PEFT", base, targets), Side("peftc", ours, targets)]
    with tempfile.TemporaryDirectory() as folder:
        made = copy.deepcopy(base)
        made.add_adapter(lora(init_lora_weights=False))
        made.save_pretrained(folder)
        run(sides, 9, options.adapters, folder)
    layer_cost(sides, base, 60)
    print(f"{targets} linear layers, r=16, {options.adapters} adapters, {options.threads} threads; medians")
    print(f"{'':48}{'PEFT':>13}{'peftc':>13}{'ratio':>10}")
    for what in sides[0].times:
        theirs, mine = (statistics.median(side.times[what]) for side in sides)
        ratio = f"{theirs / mine:9.1f}x" if mine > 0 else "        -"
        print(f"{what:48}{theirs * 1e3:10.4f} ms{mine * 1e3:10.4f} ms{ratio}")


if __name__ == "__main__":
    main()
