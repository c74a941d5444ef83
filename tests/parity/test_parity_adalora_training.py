"""AdaLora trained on NumPy against PEFT on torch: losses at every step, and the ranks of every layer at the end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peftc
from peftc.nn import functional as F

torch.set_num_threads(1)

STEPS = 50
FIELDS = {
    "target_modules": ["query", "value", "intermediate.dense"],
    "init_r": 8,
    "target_r": 4,
    "tinit": 5,
    "tfinal": 10,
    "deltaT": 3,
    "total_step": STEPS,
    "lora_alpha": 16,
    "task_type": "SEQ_CLS",
    "modules_to_save": ["classifier"],
}


@pytest.fixture(scope="module", params=["small", "minilm"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    if request.param == "minilm":
        path = tmp_path_factory.mktemp("minilm")
        shutil.copytree(request.getfixturevalue("minilm"), path, dirs_exist_ok=True)
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
        config = json.loads((path / "config.json").read_text()) | still
        (path / "config.json").write_text(json.dumps(config))
        transformers.BertForSequenceClassification.from_pretrained(path).save_pretrained(path)
        return path
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    path = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    return path


def batches():
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        ids = rng.integers(1, 60, (8, 10))
        yield ids, (np.arange(10) < rng.integers(4, 11, 8)[:, None]).astype(np.int64), ids[:, 0] % 2


def test_losses_and_ranks(folder, tmp_path):
    base = transformers.BertForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, peft.AdaLoraConfig(**FIELDS)).train()
    theirs.save_pretrained(tmp_path)
    ours = peftc.models.BertForSequenceClassification.from_pretrained(folder)
    ours.load_adapter(str(tmp_path), is_trainable=True)
    ours.train()

    settings = {"lr": 1e-2, "weight_decay": 0.01}
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    our_optimizer = peftc.optim.AdamW([p for p in ours.parameters() if p.requires_grad], **settings)
    for step, (ids, mask, labels) in enumerate(batches()):
        loss = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
        loss.backward()
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()

        value, gradient = F.cross_entropy(ours(ids, attention_mask=mask).logits, labels)
        ours.backward(gradient)
        value += ours.orthogonality_loss()
        our_optimizer.step()
        ours.update_and_allocate(step)
        our_optimizer.zero_grad()
        assert abs(value - loss.item()) < 1e-3, step
        now = [m.peft_config["default"].rank_pattern or {} for m in (ours, theirs)]
        assert now[0] == now[1], f"other masks at step {step}"

    mine, want = (m.peft_config["default"].rank_pattern for m in (ours, theirs))
    assert mine == want
    ranks = [sum(mask) for mask in mine.values()]
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1

    ours.eval().save_adapter(tmp_path / "trained")
    loaded = peft.PeftModel.from_pretrained(
        transformers.BertForSequenceClassification.from_pretrained(folder), tmp_path / "trained"
    ).eval()
    ids, mask, _ = next(batches())
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    np.testing.assert_allclose(ours(ids, attention_mask=mask).logits, logits, rtol=1e-4, atol=1e-5)
