"""AdaLora's training on torch models: the same losses, ranks and weights as PEFT's, and a trained adapter's files."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from their_mixin import freeze_counts
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import peftc

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 14
FIELDS = {
    "target_modules": ["query", "value", "intermediate.dense"],
    "init_r": 6,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": STEPS,
    "lora_alpha": 16,
    "orth_reg_weight": 0.3,
    "task_type": "SEQ_CLS",  # PEFT adds the regularisation to the loss of models that it wraps for a task
    "modules_to_save": ["classifier"],
}


@pytest.fixture
def patched():
    with peftc.patch_transformers():
        yield


def bert(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).to(dtype)


def batches(steps=STEPS, rows=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, 60, (rows, 9), generator=generator)
        yield {"input_ids": ids, "labels": ids[:, 0] % 3}


def twins(dtype=torch.float32, **fields):
    """(PEFT's PeftModel, our model) with the same base and the same fresh adapter."""
    fields = {**FIELDS, **fields}
    base = bert(dtype=dtype)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.AdaLoraConfig(**fields), autocast_adapter_dtype=False)
    freeze_counts(theirs)
    base.add_adapter(peftc.AdaLoraConfig(**fields))
    values = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    return theirs, base


def train(model, allocate, start=0, stop=STEPS, optimizer=None):
    if optimizer is None:
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2, weight_decay=0.01)
    losses = []
    for step, batch in enumerate(batches()):
        if not start <= step < stop:
            continue
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
    return losses


def adapter_parameters(model):
    return {
        name.removeprefix("base_model.model."): p.detach() for name, p in model.named_parameters() if "lora_" in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_ranks_and_weights_are_those_of_peft(patched, dtype):
    theirs, ours = twins(dtype)
    expected = train(theirs, theirs.base_model.update_and_allocate)
    losses = train(ours, ours.update_and_allocate)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    ranks = {key: sum(mask) for key, mask in ours.peft_config["default"].rank_pattern.items()}
    assert sum(ranks.values()) == FIELDS["target_r"] * len(ranks)
    assert len(set(ranks.values())) > 1, "all layers have the same rank: this says little"
    want = adapter_parameters(theirs)
    for name, value in adapter_parameters(ours).items():
        torch.testing.assert_close(value, want[name], rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=tolerance)


@pytest.mark.parametrize(
    "fields",
    [
        {"tinit": 0, "tfinal": 0, "deltaT": 1},
        {"tinit": 5, "tfinal": 1, "deltaT": 3},
        {"beta1": 0.5, "beta2": 0.97},
        {"target_r": 0},
        {"target_r": 1, "total_step": 400},
        {"lora_alpha": 0},
    ],
    ids=str,
)
def test_other_schedules(patched, fields):
    theirs, ours = twins(torch.float64, **fields)
    expected = train(theirs, theirs.base_model.update_and_allocate)
    assert train(ours, ours.update_and_allocate) == pytest.approx(expected, rel=1e-9)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern


def test_bfloat16_keeps_its_averages_in_float32(patched):
    _, ours = twins(torch.bfloat16)
    train(ours, ours.update_and_allocate)
    pattern = ours.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == FIELDS["target_r"] * len(pattern)
    assert ours.adalora_state_dict()["bert.encoder.layer.0.attention.self.query.mask"].dtype == bool


def test_the_loss_has_the_regularisation_only_while_the_adapter_trains(patched, tmp_path):
    _, model = twins()
    batch = next(batches())
    whole = model(**batch).loss
    term = model.orthogonality_loss()
    assert term > 0
    torch.testing.assert_close(
        whole - term, torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"]), rtol=1e-5, atol=1e-6
    )
    model.disable_adapters()
    torch.testing.assert_close(
        model(**batch).loss, torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"])
    )
    model.enable_adapters()
    torch.testing.assert_close(copy.deepcopy(model)(**batch).loss, whole)
    model.save_adapter(tmp_path)
    model.delete_adapter("default")
    assert not model._forward_hooks
    model.load_adapter(str(tmp_path))
    out = model(**batch)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, batch["labels"]))


def test_without_a_task_the_term_is_for_the_caller_to_add(patched):
    theirs, model = twins(task_type=None)
    batch = next(batches())
    torch.testing.assert_close(model(**batch).loss, theirs(**batch).loss)
    model(**batch).loss.backward()
    with pytest.warns(UserWarning, match="task_type"):
        model.update_and_allocate(0)
    model.zero_grad()
    term = model.orthogonality_loss()
    term.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in grads} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("save", ["save_adapter", "save_pretrained"])
def test_a_trained_adapter_is_saved_with_the_ranks_that_are_left(patched, tmp_path, save):
    theirs, ours = twins()
    train(theirs, theirs.base_model.update_and_allocate)
    train(ours, ours.update_and_allocate)
    theirs.save_pretrained(tmp_path / "theirs")
    getattr(ours, save)(tmp_path / "ours")
    ours.eval()
    mine, want = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in want.items()}
    patterns = [
        json.loads((tmp_path / who / "adapter_config.json").read_text())["rank_pattern"] for who in ("ours", "theirs")
    ]
    assert patterns[0] == patterns[1]

    ours.eval()
    batch = {"input_ids": next(batches())["input_ids"]}
    expected = ours(**batch).logits
    fresh = bert()
    fresh.load_adapter(str(tmp_path / "ours"))
    torch.testing.assert_close(fresh(**batch).logits, expected)
    in_peft = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(in_peft(**batch).logits, expected)
    # the model that was trained goes on having all of them
    assert ours.bert.encoder.layer[0].attention.self.query.lora_A["default"].shape == (6, 24)


def test_an_edited_rank_pattern_is_refused(patched, tmp_path):
    _, ours = twins()
    train(ours, ours.update_and_allocate)
    pattern = ours.peft_config["default"].rank_pattern
    key = next(key for key, mask in pattern.items() if not all(mask))
    ours.peft_config["default"].rank_pattern = {**pattern, key: [True] * 6}
    with pytest.raises(ValueError, match="rank_pattern"):
        ours.save_adapter(tmp_path)


def test_a_loaded_adapter_goes_on_from_its_ranks(patched, tmp_path):
    _, ours = twins()
    train(ours, ours.update_and_allocate)
    ours.save_adapter(tmp_path)
    model = bert()
    model.load_adapter(str(tmp_path), is_trainable=True)
    model.peft_config["default"].target_r = 1
    train(model, model.update_and_allocate)
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == len(pattern)
    before = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for key, mask in pattern.items():  # what was dropped does not come back
        assert len(mask) == 6
        assert not any(new and not old for new, old in zip(mask, before[key.removesuffix(".default")], strict=True))
    model.save_adapter(tmp_path / "again")
    fresh = bert()
    fresh.load_adapter(str(tmp_path / "again"))
    batch = next(batches())
    torch.testing.assert_close(fresh(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("stop", [1, 4, 7, 11, 13])
def test_stopping_and_going_on_gives_the_same_weights(patched, stop):
    _, straight = twins()
    _, first = twins()
    train(straight, straight.update_and_allocate)

    optimizer = torch.optim.AdamW((p for p in first.parameters() if p.requires_grad), lr=2e-2, weight_decay=0.01)
    train(first, first.update_and_allocate, stop=stop, optimizer=optimizer)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), first.adalora_state_dict()))

    second = bert()
    second.add_adapter(peftc.AdaLoraConfig(**FIELDS))
    second.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW((p for p in second.parameters() if p.requires_grad), lr=2e-2, weight_decay=0.01)
    optimizer.load_state_dict(saved[1])
    second.load_adalora_state_dict(saved[2])
    train(second, second.update_and_allocate, start=stop, optimizer=optimizer)
    want = straight.state_dict()
    for name, value in second.state_dict().items():
        assert torch.equal(value, want[name]), name
    assert second.peft_config["default"].rank_pattern == straight.peft_config["default"].rank_pattern


def test_gradients_that_are_not_finite_are_reported_and_forgotten(patched):
    _, model = twins()
    train(model, model.update_and_allocate, stop=3)
    before = copy.deepcopy(model.adalora_state_dict())
    model(**next(batches())).loss.backward()
    query = model.bert.encoder.layer[1].attention.self.query
    query.lora_B["default"].grad[0, 0] = float("nan")
    with pytest.warns(
        RuntimeWarning, match=r"step 3: the gradient of bert.encoder.layer.1.attention.self.query.lora_B"
    ):
        model.update_and_allocate(3)
    for key, value in model.adalora_state_dict().items():
        assert (value == before[key]).all(), key


def test_what_is_refused(patched):
    model = bert()
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.update_and_allocate(0)
    model.add_adapter(peftc.LoraConfig(target_modules=["query"]), "lora")
    with pytest.raises(ValueError, match="no AdaLora adapter is being trained"):
        model.update_and_allocate(0)
    model.delete_adapter("lora")
    model.add_adapter(peftc.AdaLoraConfig(**FIELDS))
    with pytest.raises(ValueError, match="has a gradient at step 0"):
        model.update_and_allocate(0)
    with pytest.raises(ValueError, match="none were allocated"):
        model.update_and_allocate(STEPS)
    with pytest.raises(ValueError, match="beta1"):
        other = bert()
        other.add_adapter(peftc.AdaLoraConfig(**{**FIELDS, "beta1": 1.0}))
        other.update_and_allocate(0)
    with pytest.raises(ValueError, match="x.mask is not part"):
        model.load_adalora_state_dict({"x.mask": [True]})


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = [
            {"input_ids": ids, "labels": label}
            for batch in batches()
            for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(model, folder, **fields):
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **fields},
    )
    return Trainer(model, arguments, train_dataset=Rows())


def test_the_trainer_with_the_callback(patched, tmp_path):
    theirs, ours = twins()

    class Theirs(peftc.AdaLoraCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step)

    logs = []
    for model, callback in ((theirs, Theirs()), (ours, peftc.AdaLoraCallback())):
        run = trainer(model, str(tmp_path))
        run.add_callback(callback)
        run.train()
        logs.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert logs[1] == pytest.approx(logs[0], abs=2e-4)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern


@pytest.mark.parametrize("stop", [3, 6, 12])
def test_the_trainer_resumes_exactly(patched, tmp_path, stop):
    _, straight = twins()
    run = trainer(straight, str(tmp_path / "straight"), save_strategy="steps", save_steps=stop)
    run.add_callback(peftc.AdaLoraCallback)
    run.train()
    model = bert()
    model.add_adapter(peftc.AdaLoraConfig(**FIELDS))
    run = trainer(model, str(tmp_path / "again"))
    run.add_callback(peftc.AdaLoraCallback)
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    want = straight.state_dict()
    for name, value in model.state_dict().items():
        if "lora_" in name:
            assert torch.equal(value, want[name]), name
    # saving has taken the adapter's name out of the names in the other's pattern, as in PEFT
    patterns = [
        {k.removesuffix(".default"): v for k, v in m.peft_config["default"].rank_pattern.items()}
        for m in (model, straight)
    ]
    assert patterns[0] == patterns[1]


@pytest.mark.parametrize("wrong", ["shape", "lacking"])
def test_tensors_of_another_rank_that_do_not_go_together_are_refused(wrong):
    def make():
        model = peftc.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(6, 5)), peft.AdaLoraConfig(init_r=4, target_modules=["0"], total_step=9)
        )
        model.peft_config["default"].rank_pattern = {"0.lora_E": [True, True, False, False]}
        return model

    state = {
        key: (value[:, :2] if key.endswith("lora_B") else value[:2]).clone()
        for key, value in peftc.get_peft_model_state_dict(make()).items()
    }
    key = next(key for key in state if key.endswith("lora_A"))
    if wrong == "shape":
        state[key] = state[key][:, :3]
    else:
        del state[key]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.0\.lora_E\.default"):
        peftc.set_peft_model_state_dict(model, state)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
