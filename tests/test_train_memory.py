"""What a forward pass keeps for the backward pass, in bytes: the figures of docs/training.md."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import peftc
from peftc.models import BertForSequenceClassification, ModelConfig

WIDTH, INNER, ROWS, LENGTH = 32, 96, 64, 16


def kept(targets, layers):
    """Bytes per token that the result of a call holds on to."""
    config = ModelConfig(
        model_type="bert",
        vocab_size=30,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    model = BertForSequenceClassification(config)
    model.add_adapter(peftc.LoraConfig(r=2, target_modules=targets))
    model.train()
    ids = np.ones((ROWS, LENGTH), np.int64)
    model(ids)  # what is made once is made now
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        out = model(ids)
        held = tracemalloc.get_traced_memory()[0] - before
        del out
    finally:
        tracemalloc.stop()
    return held / (ROWS * LENGTH)


@pytest.mark.parametrize(
    ("targets", "documented"),
    [
        (["query", "value"], 4 * (6 * WIDTH + INNER)),
        (["query", "key", "value", "dense"], 4 * (8 * WIDTH + 2 * INNER)),
    ],
    ids=["query and value", "all linears"],
)
def test_bytes_per_token_and_block(targets, documented):
    per_block = (kept(targets, 5) - kept(targets, 3)) / 2
    assert per_block == pytest.approx(documented, rel=0.05)
