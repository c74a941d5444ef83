"""The demo's adapters against PEFT: trained on the same sentences in the same order, with the same settings and start.

Prints the accuracy of both on the held-out sentences. Dropout differs from run to run in either, so a few tenths of a point
do too. Takes as long as the demo, and PEFT's part longer.

    python benchmarks/demo_accuracy.py [--sentences 1600] [--epochs 2] [--threads 2] [domain …]
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "examples"))
import demo
import sentences

import peftc
from peftc.training import _lengths, _order


def in_peft(folder, base, data, *, steps, batch_size, lr, warmup=0.1, seed=0):
    """Train the fresh adapter in `folder` as `peftc.train` would, with PEFT on torch. Returns the model."""
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps)
    count = len(data["labels"])
    per_epoch = math.ceil(count / batch_size)
    for step in range(steps):
        order = _order(seed, step // per_epoch, count, batch_size, _lengths(data))
        rows = order[step % per_epoch * batch_size :][:batch_size]
        width = int(data["attention_mask"][rows].sum(1).max())
        batch = {name: torch.from_numpy(data[name][rows, :width]) for name in ("input_ids", "attention_mask")}
        model(**batch, labels=torch.from_numpy(data["labels"][rows])).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if model.peft_config["default"].peft_type == "ADALORA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits_of(model, data, batch_size=32):
    """(rows, 2) as an array."""
    return np.concatenate(
        [
            model(
                **{
                    name: torch.from_numpy(data[name][start : start + batch_size])
                    for name in ("input_ids", "attention_mask")
                }
            ).logits.numpy()
            for start in range(0, len(data["labels"]), batch_size)
        ]
    )


def pair(base_folder, domain, learned, held_out, *, epochs, batch_size=32, **overrides):
    """(logits of ours, logits of PEFT's) on the held-out sentences after the same training from the same start."""
    steps = round(epochs * math.ceil(len(learned["labels"]) / batch_size))
    config, settings = demo.recipes(steps)[domain]
    peftc.manual_seed(0)
    ours = peftc.models.BertForSequenceClassification.from_pretrained(base_folder, num_labels=2, **overrides)
    ours.add_adapter(config)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_adapter(folder)
        peftc.train(ours, learned, max_steps=steps, batch_size=batch_size, progress=False, **settings)
        base = transformers.BertForSequenceClassification.from_pretrained(base_folder, num_labels=2, **overrides)
        theirs = in_peft(folder, base, learned, steps=steps, batch_size=batch_size, **settings)
    return demo.predictions(ours, held_out), logits_of(theirs, held_out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domains", nargs="*", default=list(sentences.DOMAINS))
    parser.add_argument("--sentences", type=int, default=demo.SENTENCES)
    parser.add_argument("--epochs", type=float, default=demo.EPOCHS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    tokenizer = peftc.models.WordPieceTokenizer.from_pretrained(str(demo.MODEL_DIR))
    rated = sentences.read()
    print(f"{'':10}{'peftc':>8}{'PEFT':>8}{'points':>8}{'same':>8}")
    for domain in options.domains:
        learned, held_out = (
            demo.encoded(tokenizer, rows) for rows in sentences.split(rated[domain], options.sentences)
        )
        start = time.perf_counter()
        ours, theirs = pair(str(demo.MODEL_DIR), domain, learned, held_out, epochs=options.epochs)
        a, b = ((logits.argmax(1) == held_out["labels"]).mean() for logits in (ours, theirs))
        same = (ours.argmax(1) == theirs.argmax(1)).mean()
        took = time.perf_counter() - start
        print(f"{domain:10}{a:8.1%}{b:8.1%}{(a - b) * 100:+8.1f}{same:8.1%}  ({took:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
