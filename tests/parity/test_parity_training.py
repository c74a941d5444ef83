"""Training on the NumPy host against PEFT on torch: the same weights, batches and settings give the same losses."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peftc

torch.set_num_threads(1)

LABELS = 2


@pytest.fixture(scope="module")
def still(minilm, tmp_path_factory):
    """MiniLM as a classifier without dropout, its classifier in the file."""
    folder = tmp_path_factory.mktemp("minilm")
    shutil.copytree(minilm, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def batches(count, rows=8, length=16):
    rng = np.random.default_rng(3)
    for _ in range(count):
        ids = rng.integers(1000, 30000, (rows, length))
        mask = (np.arange(length) < rng.integers(4, length + 1, rows)[:, None]).astype(np.int64)
        yield ids, mask, ids[:, 0] % LABELS


CONFIGS = {
    "lora": ("LoraConfig", {"target_modules": ["query", "value"], "r": 8, "lora_alpha": 16}),
    "lora-saved": (
        "LoraConfig",
        {"target_modules": ["query", "dense"], "r": 4, "use_rslora": True, "modules_to_save": ["classifier"]},
    ),
    "dora": ("LoraConfig", {"target_modules": ["query", "value"], "r": 4, "use_dora": True}),
    "bias": ("LoraConfig", {"target_modules": ["key", "value"], "r": 4, "bias": "lora_only"}),
    "ia3": (
        "IA3Config",
        {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
    ),
    "adalora": (
        "AdaLoraConfig",
        {"target_modules": ["query", "value"], "init_r": 6, "target_r": 3, "tinit": 5, "tfinal": 10, "total_step": 100},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_agree_with_peft_at_every_step(still, name, tmp_path):
    kind, fields = CONFIGS[name]
    theirs = transformers.BertForSequenceClassification.from_pretrained(still)
    torch.manual_seed(1)
    theirs.add_adapter(getattr(peft, kind)(**fields))
    theirs.train()
    theirs.save_pretrained(tmp_path)
    ours = peftc.models.BertForSequenceClassification.from_pretrained(still)
    ours.load_adapter(str(tmp_path), is_trainable=True)
    ours.train()

    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    their_steps = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **settings)
    our_steps = peftc.optim.AdamW((p for p in ours.parameters() if p.requires_grad), **settings)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    for step, (ids, mask, labels) in enumerate(batches(50)):
        logits = theirs(torch.tensor(ids), torch.tensor(mask)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        loss.backward()
        loss = loss.item()
        their_steps.step()
        their_steps.zero_grad()

        out = ours(ids, mask)
        ours_loss, gradient = peftc.nn.functional.cross_entropy(out.logits, labels)
        ours.backward(gradient)
        our_steps.step()
        our_steps.zero_grad()
        assert abs(ours_loss - loss) < 1e-3, f"step {step}: {ours_loss} and {loss}"
