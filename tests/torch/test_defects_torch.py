"""Defects of the plain stack (Transformers and PEFT as installed) on torch models, and peftc's right behaviour beside
each.  A reference test that fails one day means that the defect was repaired there: then drop it, and the entry on the
page about differences.  The numbers are those of tests/test_defects.py, which has the NumPy host's."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
import standin_hub

import peftc

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

V5 = int(version("transformers").split(".")[0]) >= 5
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

pytestmark = pytest.mark.filterwarnings("ignore")
only4 = pytest.mark.skipif(V5, reason="Transformers 4 only")
only5 = pytest.mark.skipif(not V5, reason="Transformers 5 only")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """PEFT asks the Hub about the base model when it saves; without a network it would ask again and again."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def patched():
    if V5:
        pytest.skip("peftc supports Transformers 4 so far")
    with peftc.patch_transformers() as handle:
        yield handle


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A BERT classifier of a few kilobytes, as a checkpoint folder."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(made)
    return made


@pytest.fixture
def make(folder):
    """Makes the model, adapted by whatever is under Transformers at the moment."""
    return lambda **how: transformers.BertForSequenceClassification.from_pretrained(folder, **how).eval()


def lora(targets=("query",), **fields):
    return peft.LoraConfig(target_modules=list(targets), **{"r": 2, "init_lora_weights": False, **fields})


def ia3(*targets):
    return peft.IA3Config(target_modules=list(targets), feedforward_modules=[])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.clone()


def shake(model, name):
    """Train adapter `name`, as far as a test can tell."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if name in path.split(".") and parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trace(model):
    """All that a refused call must leave as it was."""
    return {
        "modules": [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "state": list(model.state_dict()),
        "loaded": model._hf_peft_config_loaded,
        "configs": list(getattr(model, "peft_config", {})),
        "logits": logits(model).tolist(),
    }


# ------------------------------------------------- 1: names matched as substrings


@only4
def test_1_reference(make):
    model = make()
    for name in ("ad", "ad2"):
        model.add_adapter(lora(), name)
    assert any("lora_A2" in key for key in model.get_adapter_state_dict("ad"))


def test_1_state_dict_is_of_one_adapter(patched, make):
    model = make()
    names = ("ad", "ad2", "a", "d", "y", "layer", "query", "lora", "0")
    for name in names:
        model.add_adapter(lora(), name)
    expected = {f"bert.encoder.layer.{i}.attention.self.query.lora_{x}.weight" for i in (0, 1) for x in "AB"}
    for name in names:
        assert set(model.get_adapter_state_dict(name)) == expected
        model.set_adapter(name)
        assert len(trainable(model)) == len(expected)


# ----------------------------------------- 2: IA3's state dict has all IA3 adapters


def two_ia3(model):
    model.add_adapter(ia3("key"), "one")
    model.add_adapter(ia3("query"), "two")
    return model.get_adapter_state_dict("two")


@only4
def test_2_reference(make):
    assert any(".key." in key for key in two_ia3(make()))


def test_2_ia3_state_dict(patched, make):
    expected = {f"bert.encoder.layer.{i}.attention.self.query.ia3_l" for i in (0, 1)}
    assert set(two_ia3(make())) == expected


# --------------------------------------------- 3: a trained AdaLora cannot be loaded


@pytest.fixture
def trained_adalora(make, tmp_path):
    """(folder, logits) of an AdaLora adapter with a learned rank_pattern."""
    from trained_adalora import train_adalora

    return train_adalora(make(), tmp_path, shake, logits)


def test_3_reference(make, trained_adalora):
    with pytest.raises(RuntimeError if V5 else AttributeError):
        make().load_adapter(trained_adalora[0])


def test_3_trained_adalora(make, trained_adalora, patched):
    model = make()
    model.load_adapter(trained_adalora[0])
    torch.testing.assert_close(logits(model), trained_adalora[1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------ 4: lora_only's biases are not saved


@only4
def test_4_reference(make):
    model = make()
    model.add_adapter(lora(bias="lora_only"))
    assert any(name.endswith("bias") for name in trainable(model))
    assert not any(key.endswith("bias") for key in model.get_adapter_state_dict())


def test_4_biases_are_saved(patched, make, tmp_path):
    model = make()
    base = logits(model)
    model.add_adapter(lora(bias="lora_only"))
    biases = {name for name in trainable(model) if name.endswith("bias")}
    assert {key for key in model.get_adapter_state_dict() if key.endswith("bias")} == biases
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).add_(1.0)
    model.eval()
    model.save_pretrained(tmp_path)
    again = make()
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.disable_adapters()
    assert torch.equal(logits(again), base)


# --------------------------------------- 5: modules_to_save after enable, load, delete


def off_and_on(model):
    """Logits of the base model, adapted, disabled and enabled again."""
    base = logits(model)
    model.add_adapter(lora(modules_to_save=["classifier"]))
    model.eval()
    shake(model, "default")
    seen = [base, logits(model)]
    model.disable_adapters()
    seen.append(logits(model))
    model.enable_adapters()
    return [*seen, logits(model)]


@only4
def test_5_reference(make):
    _, adapted, _, enabled = off_and_on(make())
    assert (enabled - adapted).abs().max() > 1e-3  # the head is still the base model's


def test_5_modules_to_save_follow(patched, make, tmp_path):
    model = make()
    base, adapted, disabled, enabled = off_and_on(model)
    assert torch.equal(disabled, base) and torch.equal(enabled, adapted)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert torch.equal(logits(model), base)
    model.load_adapter(tmp_path)
    assert trainable(model) == set()
    assert torch.equal(logits(model), adapted)


# ------------------------- 6: without modules_to_save after with; refusals leave traces


@only4
def test_6_reference(make):
    model = make()
    model.add_adapter(lora(modules_to_save=["classifier"]), "with")
    with pytest.raises(ValueError, match="without not found in"):
        model.add_adapter(lora(), "without")
    assert any("without" in name for name, _ in model.named_parameters())


def test_6_reference_flag(make):
    model = make()
    with pytest.raises(ValueError):
        model.add_adapter(lora(["nothing"]))
    assert model._hf_peft_config_loaded


def test_6_with_and_without_modules_to_save(patched, make):
    model = make()
    base = logits(model)
    model.add_adapter(lora(modules_to_save=["classifier"]), "with")
    shake(model, "with")
    model.add_adapter(lora(init_lora_weights=True), "without")
    model.eval()
    assert model.active_adapters() == ["without"]
    assert torch.equal(logits(model), base)
    model.set_adapter("with")
    assert (logits(model) - base).abs().max() > 1e-3


REFUSED = {
    "no such module": lambda model: model.add_adapter(lora(["nothing"]), "new"),
    "no config": lambda model: model.add_adapter("config", "new"),
    "negative rank": lambda model: model.add_adapter(lora(r=-1), "new"),
    "dot in the name": lambda model: model.add_adapter(lora(), "a.b"),
    "odd rank": lambda model: model.add_adapter(lora(r=3, init_lora_weights="orthogonal"), "new"),
    "name taken": lambda model: model.add_adapter(lora(), "first"),
    "a kind of layer without an adapter": lambda model: model.add_adapter(lora(["query", "LayerNorm"]), "new"),
    "no file": lambda model: model.load_adapter("no/such/folder", "new"),
    "nothing to load": lambda model: model.load_adapter(adapter_name="new"),
    "set: one unknown": lambda model: model.set_adapter(["first", "unknown"]),
    "delete: one unknown": lambda model: model.delete_adapter(["first", "unknown"]),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("loaded", [False, True], ids=["bare", "adapted"])
def test_6_refused_calls_leave_no_trace(patched, make, call, loaded):
    model = make()
    if loaded:
        model.add_adapter(lora(modules_to_save=["classifier"]), "first")
        shake(model, "first")
        model.eval()
    elif call is REFUSED["name taken"]:
        pytest.skip("no name is taken there")
    before = trace(model)
    with pytest.raises((ValueError, TypeError, OSError, KeyError)):
        call(model)
    assert trace(model) == before


@pytest.mark.parametrize("loaded", [False, True], ids=["bare", "adapted"])
def test_6_a_refused_load_leaves_no_trace(patched, make, loaded, tmp_path):
    """Shapes do not fit: found out only when the file is read."""
    made = make()
    made.add_adapter(lora(r=4))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    model = make()
    if loaded:
        model.add_adapter(lora(), "first")
        model.eval()
    before = trace(model)
    with pytest.raises((ValueError, RuntimeError)):
        model.load_adapter(tmp_path, "new")
    assert trace(model) == before


# ------------------------------------------------ 7: a model partly offloaded to disk


def offloaded(make, adapter, scratch):
    """Logits of the model with the adapter, half of it on disk."""
    places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk",
              "bert.pooler": "cpu", "classifier": "cpu"}  # fmt: skip
    model = make(device_map=places, offload_folder=scratch)
    # Transformers 5 takes the places from the model.
    model.load_adapter(adapter, **({} if V5 else {"device_map": places, "offload_folder": scratch}))
    return logits(model)


@pytest.fixture
def whole(make, tmp_path):
    """(folder, logits) of an adapter, from a model that is in memory."""
    model = make()
    model.add_adapter(lora(["query", "value"]))
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@only4
def test_7_reference(make, whole, tmp_path):
    with pytest.raises((ValueError, RuntimeError, NotImplementedError, KeyError)):
        offloaded(make, whole[0], tmp_path / "disk")


@only5
def test_7_reference_silently_wrong(make, whole, tmp_path):
    assert not torch.allclose(offloaded(make, whole[0], tmp_path / "disk"), whole[1], atol=1e-4)  # wrong, or NaN


def test_7_offloaded(patched, make, whole, tmp_path):
    torch.testing.assert_close(offloaded(make, whole[0], tmp_path / "disk"), whole[1], atol=1e-6, rtol=1e-6)


# -------------------------------------------------- 8: a Hub subfolder while offline
# (Hotswap of different ranks, the other half of this one, is in test_transformers_suite.py.)

OFFLINE = """
import sys, transformers
if {patch}:
    import peftc
    peftc.patch_transformers()
model = transformers.AutoModelForCausalLM.from_pretrained({base!r})
model.load_adapter({adapter!r}, adapter_kwargs={{"subfolder": "test_subfolder"}})
print(model.active_adapters())
"""


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return standin_hub.make(tmp_path_factory.mktemp("hub"))


def offline(hub, patch):
    code = OFFLINE.format(patch=patch, base=standin_hub.BASE, adapter=standin_hub.REVISIONS)
    environment = standin_hub.environment(hub)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@only4
def test_8_reference(hub):
    assert offline(hub, patch=False).returncode != 0


def test_8_subfolder_offline(patched, hub):
    done = offline(hub, patch=True)
    assert done.stdout.strip() == "['default']", done.stderr


# ------------------------------------------ 9: the Trainer on models that use the mixin


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"input_ids": torch.arange(index, index + 4), "labels": index % 3}


def trainer(model, folder, steps, best):
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=4, save_steps=2, eval_steps=2, logging_steps=2,
        save_strategy="steps", eval_strategy="steps", load_best_model_at_end=best, learning_rate=0.05,
        report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())


def resumed(make, folder, **how):
    """The model after two steps, a checkpoint, and two more steps of a new model and Trainer."""
    model = make(**how)
    model.add_adapter(lora())
    trainer(model, folder, 2, best=False).train()
    again = make(**how)
    again.add_adapter(lora())
    trainer(again, folder, 4, best=False).train(resume_from_checkpoint=True)
    return again.eval()


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_9_reference_resume(make, tmp_path):
    with pytest.raises((ValueError, RuntimeError, OSError)):
        resumed(make, tmp_path)


def test_9_resume(patched, make, tmp_path):
    torch.manual_seed(5)
    model = make(**NO_DROPOUT)
    model.add_adapter(lora(init_lora_weights=True))
    start = {key: value.clone() for key, value in model.get_adapter_state_dict().items()}
    trainer(model, tmp_path / "through", 4, best=False).train()

    def fresh():
        made = make(**NO_DROPOUT)
        made.add_adapter(lora(init_lora_weights=True))
        for key, value in made.get_adapter_state_dict().items():
            value.data.copy_(start[key])
        return made

    # The same length of training, so the same schedule; stopped half way, its last checkpoint taken away.
    trainer(fresh(), tmp_path / "twice", 4, best=False).train()
    (last,) = [path for path in (tmp_path / "twice").iterdir() if path.name == "checkpoint-4"]
    last.rename(tmp_path / "removed")
    again = fresh()
    trainer(again, tmp_path / "twice", 4, best=False).train(resume_from_checkpoint=True)
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()), atol=1e-6, rtol=1e-6)


def best_at_end(model, folder):
    model.add_adapter(lora())
    runner = trainer(model, folder, 4, best=True)
    runner.train()
    return runner


def test_9_reference_best_model(make, tmp_path, caplog):
    """It does not say so by an exception: what was trained last stays, with a warning."""
    model = make()
    try:
        runner = best_at_end(model, tmp_path)
    except (ValueError, RuntimeError, OSError):
        return
    best = make()
    best.load_adapter(runner.state.best_model_checkpoint)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert str(last) != runner.state.best_model_checkpoint
    assert not torch.equal(logits(model.eval()), logits(best.eval()))


def test_9_best_model(patched, make, tmp_path):
    model = make()
    runner = best_at_end(model, tmp_path)
    best = make()
    best.load_adapter(runner.state.best_model_checkpoint)
    assert torch.equal(logits(model.eval()), logits(best.eval()))


# --------------------------------------- 10: a report about other adapters at each load


def second_load_log(make, adapter):
    from transformers.testing_utils import CaptureLogger
    from transformers.utils import logging

    model = make()
    model.load_adapter(adapter, "one")
    with CaptureLogger(logging.get_logger("transformers.integrations.peft")) as log:
        model.load_adapter(adapter, "two")
    return log.out


@only5
def test_10_reference(make, whole):
    assert "MISSING" in second_load_log(make, whole[0])


def test_10_nothing_is_missing(patched, make, whole):
    assert second_load_log(make, whole[0]) == ""
