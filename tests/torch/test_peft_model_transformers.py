"""`peftc.PeftModel` around models of Transformers: tasks, generate, tied weights, the Trainer, AdaLora, real adapters."""

from __future__ import annotations

import copy
import filecmp
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import peftc

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 13).view(2, 6)
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}


def bert(cls=BertForSequenceClassification):
    torch.manual_seed(0)
    return cls(BertConfig(**BERT, num_labels=2)).eval()


def gpt2(**options):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, pad_token_id=0, **options)
    ).eval()


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    ).eval()


TASKS = {
    "SEQ_CLS": (bert, {}, "logits"),
    "TOKEN_CLS": (lambda: bert(BertForTokenClassification), {}, "logits"),
    "QUESTION_ANS": (lambda: bert(BertForQuestionAnswering), {}, "start_logits"),
    "FEATURE_EXTRACTION": (lambda: bert(BertModel), {}, "last_hidden_state"),
    "CAUSAL_LM": (gpt2, {}, "logits"),
    "SEQ_2_SEQ_LM": (t5, {"decoder_input_ids": IDS}, "logits"),
}


def twins(base, config):
    """(PEFT's model, ours) with the same values, in eval mode."""
    twin = copy.deepcopy(base)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, copy.deepcopy(config)).eval()
    ours = peftc.get_peft_model(twin, copy.deepcopy(config)).eval()
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("task", TASKS)
def test_tasks(task, tmp_path):
    make, inputs, output = TASKS[task]
    config = peft.LoraConfig(task_type=task, init_lora_weights=False)
    theirs, ours = twins(make(), config)
    assert type(ours).__name__ == type(theirs).__name__ and isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if task not in ("TOKEN_CLS", "QUESTION_ANS"):
        assert trainable(ours) == trainable(theirs)
    assert ours.modules_to_save == theirs.modules_to_save
    with torch.no_grad():
        found = ours(IDS, attention_mask=torch.ones_like(IDS), **inputs)
        expected = theirs(IDS, attention_mask=torch.ones_like(IDS), **inputs)
        torch.testing.assert_close(found[output], expected[output])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        assert filecmp.cmp(file, tmp_path / "ours" / file.name, shallow=False), file.name
    again = peftc.PeftModel.from_pretrained(make(), tmp_path / "theirs")
    assert type(again) is type(ours)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, **inputs)[output], expected[output])
    assert trainable(again) == set() and again.peft_config["default"].modules_to_save == (
        ours.peft_config["default"].modules_to_save
    )
    ours.add_adapter("second", copy.deepcopy(config))
    ours.set_adapter("second")
    assert set(ours.modules_to_save or ()) == set(theirs.modules_to_save or ())


def test_generate_as_in_peft():
    theirs, ours = twins(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    for options in ({}, {"num_beams": 3}, {"max_new_tokens": 3}):
        options = {"max_new_tokens": 6, **options}
        assert torch.equal(ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options))
    assert torch.equal(ours.generate(IDS, max_new_tokens=4), theirs.generate(IDS, max_new_tokens=4))
    ours.generation_config = copy.deepcopy(ours.generation_config)
    ours.generation_config.max_new_tokens = 2
    assert ours.generate(IDS).shape == (2, 8)
    theirs, ours = twins(t5(), peft.LoraConfig(task_type="SEQ_2_SEQ_LM", init_lora_weights=False))
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "num_beams": beams}
        assert torch.equal(ours.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_an_adapter_for_each_row(task, beams):
    config = peft.LoraConfig(task_type=task, init_lora_weights=False)
    theirs, ours = twins(TASKS[task][0](), config)
    for model in (theirs, ours):
        model.add_adapter("second", copy.deepcopy(config))
        model.eval()
    peftc.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs, adapter_name="second"), "second")
    ids = torch.arange(1, 19).view(3, 6)
    names = ["default", "second", "__base__"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams}
    found = ours.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(found, theirs.generate(input_ids=ids, adapter_names=names, **options))
    for row, name in enumerate(names[:2]):
        ours.set_adapter(name)
        assert torch.equal(found[row : row + 1], ours.generate(input_ids=ids[row : row + 1], **options))
    with ours.disable_adapter():
        assert torch.equal(found[2:], ours.generate(input_ids=ids[2:], **options))
    assert not any(module._forward_pre_hooks for module in ours.modules())
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        ours(ids[:2], adapter_names=names)
    assert ours.base_model._registry.switch.rows is None


def test_tied_weights_are_warned_about():
    model = gpt2()
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model.embed_tokens = None
    with pytest.warns(UserWarning) as caught:
        wrapped = peftc.get_peft_model(model, config)
    assert any("tie_word_embeddings=True" in str(w.message) for w in caught)
    with pytest.warns(UserWarning, match="tied_target_modules=\\['lm_head'\\]"):
        wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    assert wrapped.base_model.model.lm_head.weight is wrapped.base_model.model.transformer.wte.weight


@pytest.mark.parametrize("wanted", ["auto", True, False])
def test_embeddings_in_the_state_dict(wanted):
    for targets in (["c_attn"], ["lm_head", "c_attn"]):
        theirs, ours = twins(gpt2(tie_word_embeddings=False), peft.LoraConfig(target_modules=targets))
        expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=wanted)
        found = peftc.get_peft_model_state_dict(ours, save_embedding_layers=wanted)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_resized_embeddings_are_saved_and_come_back(tmp_path):
    gpt2().save_pretrained(tmp_path / "base")

    def resized():
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        torch.manual_seed(5)
        model.resize_token_embeddings(70)
        return model

    theirs, ours = twins(resized(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    with pytest.warns(UserWarning, match="has been resized"):
        ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert filecmp.cmp(tmp_path / "ours" / name, tmp_path / "theirs" / name, shallow=False)
    fresh = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    torch.manual_seed(6)
    fresh.resize_token_embeddings(70)
    again = peftc.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS + 57).logits, theirs(IDS + 57).logits)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peftc.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "ours")


def test_gradient_checkpointing():
    base = gpt2()
    base.gradient_checkpointing_enable()
    theirs, ours = twins(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    gradients = []
    for model in (theirs, ours):
        model.train()
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def arguments(folder, **more):
    return TrainingArguments(
        folder, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, **more
    )


def test_the_trainer(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.arange(1, 49).view(8, 6)]
    losses = []
    for kind, model in zip(("theirs", "ours"), twins(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM")), strict=True):
        trainer = Trainer(model, arguments(tmp_path / kind, max_steps=4, save_steps=2, seed=3), train_dataset=data)
        trainer.train()
        losses.append([log["train_loss"] for log in trainer.state.log_history if "train_loss" in log])
        assert (tmp_path / kind / "checkpoint-2" / "adapter_model.safetensors").is_file()
        if kind == "ours":
            before = copy.deepcopy(peftc.get_peft_model_state_dict(model))
            trainer.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-2"))
            after = peftc.get_peft_model_state_dict(model)
            assert all(torch.allclose(value, after[key], atol=1e-6) for key, value in before.items())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    saved = peftc.load_adapter_weights(tmp_path / "ours" / "checkpoint-4")
    expected = peftc.load_adapter_weights(tmp_path / "theirs" / "checkpoint-4")
    assert list(saved) == list(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(saved[key], value, atol=1e-4)


def test_adalora_prunes_as_in_peft(tmp_path):
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_proj"],
        init_r=6,
        target_r=2,
        tinit=1,
        tfinal=3,
        total_step=10,
    )
    theirs, ours = twins(gpt2(), config)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(10):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
    expected, found = peft.get_peft_model_state_dict(theirs), peftc.get_peft_model_state_dict(ours)
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = ours(IDS).logits
        for package in (peft, peftc):
            again = package.PeftModel.from_pretrained(gpt2(), tmp_path)
            torch.testing.assert_close(again(IDS).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("domain", ["movies", "products", "news", "tweets"])
def test_real_adapters(domain, real, minilm):
    expected = np.load(real / "expected.npz")
    base = BertForSequenceClassification.from_pretrained(minilm, num_labels=2)
    model = peftc.PeftModel.from_pretrained(base, real / domain)
    rows = slice(0, 40)
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(expected[f"{domain}_input_ids"][rows].astype(np.int64)),
            attention_mask=torch.from_numpy(expected[f"{domain}_attention_mask"][rows].astype(np.int64)),
        ).logits
    np.testing.assert_allclose(logits.numpy(), expected[f"{domain}_logits"][rows], atol=2e-4)


# ------------------------------------------------------------------ what is imported when


def run(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


MAKE = "import torch, peftc; model = peftc.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), "


def test_isinstance_holds_when_peft_comes_later():
    code = MAKE + "peftc.LoraConfig(target_modules=['0'])); import sys; print('peft' in sys.modules)\n"
    code += "import peft; print(isinstance(model, peft.PeftModel), isinstance(model.base_model, peft.LoraModel))\n"
    code += "print(isinstance(model.base_model.model[0], peft.tuners.lora.LoraLayer), model.active_adapters)"
    assert run(code) == ["False", "True", "True", "True", "['default']"]


def test_without_peft_and_transformers():
    hide = "import sys; sys.modules['peft'] = sys.modules['transformers'] = None\n"
    code = hide + MAKE + "peftc.LoraConfig(target_modules=['0']))\n"
    code += "print(*model.state_dict(), type(model.merge_and_unload()).__name__)"
    names = ["weight", "bias"]
    layer = "base_model.model.0."
    assert run(code) == [
        *(f"{layer}base_layer.{name}" for name in names),
        f"{layer}lora_A.default.weight",
        f"{layer}lora_B.default.weight",
        "Sequential",
    ]
    code = hide + "import torch, peftc\nconfig = peftc.PeftConfig(peft_type='LOHA')\n"
    code += "try: peftc.get_peft_model(torch.nn.Linear(1, 1), config)\nexcept NotImplementedError as e: print(e)"
    text = " ".join(run(code))
    assert "LOHA" in text and "pip install peft" in text


def test_one_line_in_a_script():
    code = "import peftc.auto\nfrom transformers import BertConfig, BertModel\n"
    code += f"model = BertModel(BertConfig(**{BERT}))\nimport peftc\n"
    code += "model.add_adapter(peftc.LoraConfig(target_modules=['query']))\n"
    code += "print(type(model.encoder.layer[0].attention.self.query).__module__)\n"
    code += "peftc.auto.patch.undo(); print(BertModel.add_adapter.__module__)"
    assert run(code) == ["peftc.hosts.torch_lora", "transformers.integrations.peft"]
