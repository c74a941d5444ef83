"""peftc.get_peft_model against peft.get_peft_model: making, loading, switching, merging, mixed batches, saving.

Both work on the same kind of model in one process and in turn, so that a busy machine slows both. Prints medians and the
ratio PEFT / peftc.

    python benchmarks/bench_peft_model.py [--layers 32] [--adapters 20] [--rounds 5] [--threads 2]
"""

import argparse
import copy
import gc
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftc

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**more):
    return peft.LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM", **more)


class Side:
    """One of the two packages, with the times that it took."""

    def __init__(self, package, base):
        self.package, self.base = package, base
        self.times = {}

    def take(self, what, call):
        gc.collect()
        begin = time.perf_counter()
        result = call()
        self.times.setdefault(what, []).append(time.perf_counter() - begin)
        return result

    def one_adapter(self, folder, other):
        base = copy.deepcopy(self.base)
        model = self.take("get_peft_model", lambda: self.package.get_peft_model(base, lora(init_lora_weights=False)))
        self.take("save_pretrained", lambda: model.save_pretrained(other))
        self.take("get_peft_model_state_dict", lambda: self.package.get_peft_model_state_dict(model))
        self.take("merge_and_unload", model.merge_and_unload)
        base = copy.deepcopy(self.base)
        model = self.take("PeftModel.from_pretrained", lambda: self.package.PeftModel.from_pretrained(base, folder))
        self.take("load_adapter, 2nd", lambda: model.load_adapter(folder, "second"))

    def many(self, adapters):
        self.plain = copy.deepcopy(self.base).eval()
        self.model = self.package.get_peft_model(copy.deepcopy(self.base), lora(), "a0").eval()
        for i in range(1, adapters):
            self.model.add_adapter(f"a{i}", lora())
        self.model.eval()

    def switch(self, adapters, turn):
        self.take("set_adapter, all loaded", lambda: self.model.set_adapter(f"a{turn % adapters}"))

        def disabled():
            with self.model.disable_adapter():
                pass

        self.take("with disable_adapter()", disabled)
        ids = torch.arange(1, 9)[:, None]
        names = [f"a{i}" for i in range(8)]
        whole, alone = "8 adapters in a batch of 8 × 1 token", "the same without adapters"
        with torch.no_grad():
            self.take(whole, lambda: self.model(ids, adapter_names=names))
            self.take(alone, lambda: self.plain(ids))
        self.times.setdefault("what the adapters add to it", []).append(self.times[whole][-1] - self.times[alone][-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            vocab_size=512,
        )
    )
    sides = [Side(peft, base), Side(peftc, base)]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=False)).save_pretrained(made)
        for _ in range(options.rounds):
            for side in sides:
                side.one_adapter(made, Path(folder) / "saved")
    for side in sides:
        side.many(options.adapters)
    for turn in range(2 * options.rounds):
        for side in sides:
            side.switch(options.adapters, turn)
    count = options.layers * len(TARGETS)
    print(f"{count} linear layers, r=16, {options.adapters} adapters, {options.threads} threads; medians")
    print(f"{'':40}{'PEFT':>12}{'peftc':>12}{'ratio':>10}")
    for what in sides[0].times:
        theirs, mine = (statistics.median(side.times[what]) for side in sides)
        print(f"{what:40}{theirs * 1e3:9.2f} ms{mine * 1e3:9.2f} ms{theirs / mine:9.1f}x")


if __name__ == "__main__":
    main()
