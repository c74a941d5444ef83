"""Training adapters on torch models: the losses and weights of PEFT, in every way of training that torch users have."""

from __future__ import annotations

import copy
import io
import os
import socket

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from their_mixin import PEFT, V5
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.peft import PeftAdapterMixin as TheirMixin

import peftc
from peftc.optim import loraplus_groups

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": (peft.LoraConfig, {"r": 4, "target_modules": TARGETS}),
    "rslora": (peft.LoraConfig, {"r": 4, "target_modules": TARGETS, "use_rslora": True}),
    "dropout": (peft.LoraConfig, {"r": 4, "target_modules": TARGETS, "lora_dropout": 0.2}),
    "dora": (peft.LoraConfig, {"r": 4, "target_modules": TARGETS, "use_dora": True}),
    "ia3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "target_modules": TARGETS, "total_step": 50}),
}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def adapted(ours: bool, method="lora", dtype=torch.float32):
    """A model with a fresh adapter; the same values with PEFT's mixin and with peftc's."""
    model = llama(dtype)
    kind, fields = CONFIGS[method]
    if ours:
        with peftc.patch_transformers():
            model.add_adapter(kind(**fields))
    else:
        model.add_adapter(kind(**fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and "magnitude" not in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(noise + (1 if "ia3_" in name else 0))
    return model.train()


def batches(steps=STEPS, rows=4):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(0, 40, (rows, 10), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def loop(model, optimizer=None, start=0, steps=STEPS):
    optimizer = optimizer or adam(model)
    losses = []
    for step, batch in enumerate(batches()):
        if start <= step < steps:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def same(ours, theirs, tolerance):
    mine, want = trained(ours), trained(theirs)
    assert mine.keys() == want.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, want[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_plain_loop(method):
    theirs, ours = adapted(False, method), adapted(True, method)
    torch.manual_seed(3)
    expected = loop(theirs)
    torch.manual_seed(3)
    assert loop(ours) == pytest.approx(expected, rel=1e-5)
    same(ours, theirs, 2e-4)


def test_accumulated_and_clipped():
    results = []
    for model in (adapted(False), adapted(True)):
        optimizer = adam(model)
        norms = []
        for i, batch in enumerate(batches()):
            (model(**batch).loss / 2).backward()
            if i % 2:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
                optimizer.step()
                optimizer.zero_grad()
        results.append((norms, model))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    same(results[1][1], results[0][1], 2e-4)


@pytest.mark.parametrize("method", ["lora", "ia3", "adalora"])
def test_bfloat16_weights(method):
    theirs, ours = adapted(False, method, torch.bfloat16), adapted(True, method, torch.bfloat16)
    expected = loop(theirs)
    assert all(p.dtype == torch.bfloat16 for p in trained(ours).values())
    assert loop(ours) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("method", ["lora", "dropout", "ia3", "adalora"])
def test_autocast_and_scaled_gradients(method):
    """float32 weights, bfloat16 operations, a scaled loss; a step whose gradients overflow is left out."""
    results = []
    for model in (adapted(False, method), adapted(True, method)):
        torch.manual_seed(4)
        optimizer, scale, losses = adam(model), 1024.0, []
        for i, batch in enumerate(batches()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            (loss * (float("inf") if i == 2 else scale)).backward()
            parameters = [p for p in model.parameters() if p.grad is not None]
            for parameter in parameters:
                parameter.grad /= scale
            if all(torch.isfinite(p.grad).all() for p in parameters):
                optimizer.step()
            else:
                assert i == 2
                scale /= 2
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append((losses, model))
    assert results[1][0] == pytest.approx(results[0][0], rel=2e-3)
    same(results[1][1], results[0][1], 3e-2)


def test_grad_scaler():
    results = []
    for model in (adapted(False), adapted(True)):
        optimizer, scaler = adam(model), torch.amp.GradScaler("cpu", init_scale=256.0)
        for batch in batches():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(model)
    same(results[1], results[0], 3e-2)


# --------------------------------------------------------------------- memory


def peak(model, batch) -> int:
    """Most bytes of torch's memory at once in a step, above what was there before."""
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model(**batch).loss.backward()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "torch's profiler tells nothing about memory here"
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("method", ["lora", "rslora", "ia3", "adalora"])
def test_no_more_memory_than_pefts(method):
    batch = next(batches(rows=64))
    theirs, ours = (peak(adapted(who, method), batch) for who in (False, True))
    assert ours <= theirs * 1.01


def test_a_layer_makes_no_temporaries_of_full_size():
    """PEFT makes B's output, its scaled copy and the sum: three times the output. Here the sum is all there may be."""
    torch.manual_seed(0)
    rows, width, out = 512, 64, 256

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(width, out)

        def forward(self, x):
            return self.layer(x)

    class Ours(peftc.PeftAdapterMixin, Base):
        pass

    model = Ours()
    model.add_adapter(peftc.LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(rows, width)
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            y = model(x)
    made = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    full = y.numel() * y.element_size()
    assert sum(size >= full for size in made) <= 2, made
    assert not any(full // 4 <= size < full for size in made), made


# ---------------------------------------------------------------- LoRA+ groups


def test_loraplus_groups():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    base = BertForSequenceClassification(config)
    fields = {
        "r": 2,
        "target_modules": ["query", "dense", "word_embeddings"],
        "modules_to_save": ["classifier", "LayerNorm"],
        "bias": "lora_only",
        "use_dora": True,
    }
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    with peftc.patch_transformers():
        base.add_adapter(peft.LoraConfig(**fields))
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    optimizer = torch.optim.AdamW(loraplus_groups(base, 1e-3, 8.0, weight_decay=0.1))
    names = {p: n.removeprefix("base_model.model.") for n, p in theirs.named_parameters()}
    ours = {p: n for n, p in base.named_parameters()}
    assert len(optimizer.param_groups) == len(reference.param_groups) == 4
    if PEFT >= (0, 21):  # has a learning rate of its own for embeddings, asked or not
        embeddings = [{p for p in group["params"] if "lora_embedding" in names[p]} for group in reference.param_groups]
        assert [len(found) for found in embeddings] == [0, 2, 0, 0]
        reference.param_groups[0]["params"] += reference.param_groups[1]["params"]
        reference.param_groups[1]["params"] = []
    for mine, want in zip(optimizer.param_groups, reference.param_groups, strict=True):
        assert (mine["lr"], mine["weight_decay"]) == (want["lr"], want["weight_decay"])
        assert {ours[p] for p in mine["params"]} == {names[p] for p in want["params"]}
    groups = loraplus_groups(base, 1e-3, 8.0, lr_embedding=1e-6)
    assert {ours[p].split(".")[3] for p in groups[1]["params"]} == {"lora_embedding_A", "lora_embedding_B"}
    assert groups[1]["lr"] == 1e-6


# ----------------------------------------------------------- stopping, going on


@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "ia3"])
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_stopping_and_going_on_gives_the_same_weights(method, stop):
    straight, first = adapted(True, method), adapted(True, method)
    torch.manual_seed(5)
    loop(straight)
    torch.manual_seed(5)
    optimizer = adam(first)
    loop(first, optimizer, steps=stop)
    file = io.BytesIO()
    torch.save((first.get_adapter_state_dict(), optimizer.state_dict(), torch.get_rng_state()), file)
    file.seek(0)
    state, moments, rng = torch.load(file)
    second = llama()
    kind, fields = CONFIGS[method]
    with peftc.patch_transformers():
        # inference_mode is False: it is loaded to be trained; in Transformers 5 the argument says so.
        config = kind(**fields)
        second.load_adapter(peft_config=config, adapter_state_dict=state, **({"is_trainable": True} if V5 else {}))
    second.train()
    optimizer = adam(second)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(rng)
    loop(second, optimizer, start=stop)
    want = trained(straight)
    for name, value in trained(second).items():
        assert torch.equal(value, want[name]), name


# -------------------------------------------------------------------- Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = [ids for batch in batches() for ids in batch["input_ids"]]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def with_trainer(model, folder, resume=None, **fields):
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        **{"save_strategy": "no", **fields},
    )
    run = Trainer(model, arguments, train_dataset=Rows())
    run.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "fields",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.05}],
    ids=str,
)
@pytest.mark.parametrize("method", ["lora", "dropout", "ia3"])
def test_the_trainer(tmp_path, method, fields):
    theirs, ours = adapted(False, method), adapted(True, method)
    expected = with_trainer(theirs, tmp_path, **fields)
    with peftc.patch_transformers():
        losses = with_trainer(ours, tmp_path, **fields)
    assert losses == pytest.approx(expected, abs=1e-2 if "bf16" in fields else 2e-4)
    same(ours, theirs, 3e-2 if "bf16" in fields else 3e-4)


@pytest.mark.parametrize("method", ["dropout", "ia3"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_the_trainer_resumes_exactly(tmp_path, method, stop):
    with peftc.patch_transformers():
        straight = adapted(True, method)
        with_trainer(straight, tmp_path / "straight", save_strategy="steps", save_steps=stop)
        model = llama()
        kind, fields = CONFIGS[method]
        model.add_adapter(kind(**fields))
        with_trainer(model, tmp_path / "again", resume=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    want = trained(straight)
    for name, value in trained(model).items():
        assert torch.equal(value, want[name]), name


# ------------------------------------------------------------------- accelerate


def _in_process(rank, world, port, folder):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    from accelerate import Accelerator

    # said in full: a Trainer with bf16 leaves ACCELERATE_MIXED_PRECISION behind in the environment of its process
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    assert accelerator.num_processes == world
    model = adapted(True)
    rows = 4 // world
    loader = torch.utils.data.DataLoader(Rows(), batch_size=rows, shuffle=False)
    # SGD: Adam divides by the size of a gradient, and so turns the rounding of small ones into steps of full size
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        plain = accelerator.unwrap_model(model)
        torch.save(trained(plain), os.path.join(folder, f"{world}.pt"))
    accelerator.end_training()


def _train_with(world: int, folder: str) -> bool:
    """Run the processes; did all of them end well?"""
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [context.Process(target=_in_process, args=(r, world, port, folder)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes == [0] * world


def test_two_processes_of_accelerate_give_the_weights_of_one(tmp_path):
    for world in (1, 2):
        # A port that was free may be taken a moment later, by whatever else runs on the machine: then another one.
        assert any(_train_with(world, str(tmp_path)) for _ in range(3))
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for name, value in two.items():
        # Halves of a batch are summed in another order: rounding of float32, beside the largest weight.
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-5 * float(one[name].abs().max()))
    start = trained(adapted(True))
    assert max((value - start[name]).abs().max() for name, value in two.items()) > 1e-3


def test_the_reference_is_pefts():
    assert TheirMixin.add_adapter.__module__ == "transformers.integrations.peft"
