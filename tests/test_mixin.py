"""What PeftAdapterMixin promises on the NumPy host, method by method. No torch."""

import copy
import json
import logging
import os
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
from small_models import IDS, Net, adalora, ia3, lora, net, shake, snapshot, trainable

import peftc
from peftc import _core

LOGGER = "transformers.integrations.peft"


@pytest.fixture
def model():
    return net()


@pytest.fixture
def folder(tmp_path):
    """A saved adapter: query and value of both layers, and the head."""
    made = net()
    made.add_adapter(lora(modules_to_save=["head"]))
    shake(made, "default")
    made.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def same(a, b, atol=1e-12):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# ------------------------------------------------------------------------ add


def test_add_activates_and_is_listed(model):
    base = model(IDS)
    config = lora()
    model.add_adapter(config)
    assert model._hf_peft_config_loaded
    assert model.peft_config == {"default": config} and model.peft_config["default"] is config
    assert model.active_adapters() == ["default"]
    assert np.abs(model(IDS) - base).max() > 1e-4
    model.add_adapter(lora(), "second")
    assert model.active_adapters() == ["second"]
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("name", [None, "", "default"])
def test_default_name(model, name):
    model.add_adapter(lora(), name)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["keys", "lora_A", "weight", "ü", "a b", "layers", "0", "module", "__class__"])
def test_any_other_name_is_legal(model, name):
    model.add_adapter(lora(), name)
    shake(model, name)
    assert f"layers.0.query.lora_A.{name}.weight" in trainable(model)
    assert "layers.0.query.lora_A.weight" in model.get_adapter_state_dict(name)


def test_dot_in_name(model):
    before = snapshot(model)
    for call in (lambda: model.add_adapter(lora(), "a.b"), lambda: model.load_adapter("nowhere", "a.b")):
        with pytest.raises(ValueError, match=r"'a.b' contains a dot"):
            call()
    assert snapshot(model) == before


def test_name_is_taken(model, folder):
    model.add_adapter(lora())
    before = snapshot(model)
    text = "Adapter with name default already exists. Please use a different name."
    with pytest.raises(ValueError) as error:
        model.add_adapter(lora())
    assert str(error.value) == text
    with pytest.raises(ValueError) as error:
        model.load_adapter(folder)
    assert str(error.value) == text
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [None, {}, "lora", 3])
def test_not_a_config(model, config):
    before = snapshot(model)
    with pytest.raises(TypeError) as error:
        model.add_adapter(config)
    assert str(error.value) == f"adapter_config should be an instance of PeftConfig. Got {type(config)} instead."
    assert snapshot(model) == before
    assert not model._hf_peft_config_loaded


def test_no_target_found(model):
    model.add_adapter(lora(), "first")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Target modules .*nothing.* not found in the base model\."):
        model.add_adapter(lora(["nothing"]), "second")
    assert snapshot(model) == before


def test_refused_add_leaves_the_config_alone(model):
    config = peftc.LoraConfig(target_modules="all-linear", r=2, bias="all")
    model.add_adapter(lora(bias="lora_only"), "first")
    before = copy.deepcopy(config.to_dict())
    with pytest.raises(ValueError, match="adapter first has bias='lora_only'"):
        model.add_adapter(config, "second")
    assert config.to_dict() == before
    assert list(model.peft_config) == ["first"]


@pytest.mark.parametrize("first", [lora, ia3])
def test_second_trainable_adapter_beside_adalora(model, first):
    model.add_adapter(first(), "first")
    with pytest.raises(ValueError, match="AdaLora allows one trainable adapter"):
        model.add_adapter(adalora(), "second")
    model.add_adapter(adalora(inference_mode=True), "second")
    assert model.active_adapters() == ["second"]


def test_base_model_name_is_set_by_add_alone(model, folder):
    model.name_or_path = "some/base"
    config = lora()
    model.add_adapter(config)
    assert config.base_model_name_or_path == "some/base"
    model.load_adapter(folder, "loaded")
    assert model.peft_config["loaded"].base_model_name_or_path is None


def test_target_modules_all_linear(model):
    config = peftc.LoraConfig(target_modules="all-linear", r=1)
    model.add_adapter(config)
    assert isinstance(config.target_modules, set)
    assert {"head", "subhead", "layers.0.query", "layers.1.down"} <= config.target_modules
    assert "embed" not in config.target_modules


def test_all_linear_leaves_the_head_out(model):
    model.get_output_embeddings = lambda: model.head
    config = peftc.LoraConfig(target_modules="All-Linear", r=1)
    model.add_adapter(config)
    assert "head" not in config.target_modules and "subhead" in config.target_modules


def test_many_targets_become_few():
    model = net(layers=6)
    names = [f"layers.{i}.{part}" for i in range(6) for part in ("query", "value", "up", "down")]
    config = lora(names)
    model.add_adapter(config)
    assert config.target_modules == {"query", "value", "up", "down"}
    assert len(model.get_adapter_state_dict()) == 2 * len(names)


def test_default_targets_by_model_type(model):
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        model.add_adapter(peftc.LoraConfig())
    model.config = {"model_type": "bert"}
    config = peftc.LoraConfig()
    model.add_adapter(config)
    assert config.target_modules == {"query", "value"}
    with pytest.raises(ValueError, match="Please specify `feedforward_modules`"):
        net().add_adapter(peftc.IA3Config(target_modules=["query"]))


def test_default_targets_are_those_of_peft():
    constants = pytest.importorskip("peft.utils.constants")
    from peftc import _targets

    for method, table in _targets.TARGETS.items():
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
        assert {model: sorted(targets) for model, targets in table.items()} == {
            model: sorted(targets) for model, targets in theirs.items()
        }, method
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    assert {model: sorted(t) for model, t in _targets.FEEDFORWARD.items()} == {m: sorted(t) for m, t in theirs.items()}


def test_new_adapter_while_disabled_stays_disabled(model, folder):
    base = model(IDS)
    model.add_adapter(lora(), "first")
    model.disable_adapters()
    model.add_adapter(lora(), "second")
    same(model(IDS), base)
    model.load_adapter(folder, "third")
    same(model(IDS), base)
    model.enable_adapters()
    assert np.abs(model(IDS) - base).max() > 1e-4


def test_training_mode_is_the_models(model):
    model.eval()
    model.add_adapter(lora(lora_dropout=0.5))
    same(model(IDS), model(IDS))
    model.train()
    assert np.abs(model(IDS) - model(IDS)).max() > 0
    model.eval()
    same(model(IDS), model(IDS))


def test_not_a_model():
    class Lonely(peftc.PeftAdapterMixin):
        pass

    with pytest.raises(TypeError, match="peftc cannot put adapters on a .*Lonely"):
        Lonely().add_adapter(lora())


def test_config_of_peft_is_accepted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=2)
    model.add_adapter(config)
    assert model.peft_config["default"] is config


# ----------------------------------------------------------------------- load


def test_load_gives_what_was_saved(model, folder):
    assert model.load_adapter(folder) is None
    again = net()
    again.load_adapter(str(folder), adapter_name="x")
    same(model(IDS), again(IDS))
    state, other = model.get_adapter_state_dict(), again.get_adapter_state_dict("x")
    assert list(state) == list(other)
    for key in state:
        np.testing.assert_array_equal(state[key], other[key])


def test_load_freezes_and_goes_to_eval(model, folder):
    assert model.training
    model.load_adapter(folder)
    assert not any(m.training for m in model.modules())
    assert trainable(model) == {}
    assert model.peft_config["default"].inference_mode


def test_load_trainable(model, folder):
    model.load_adapter(folder, is_trainable=True)
    assert all(m.training for m in model.modules())
    names = set(trainable(model))
    assert "layers.0.query.lora_A.default.weight" in names
    assert "head.modules_to_save.default.weight" in names
    assert all("default" in name for name in names)
    assert not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("inference_mode", [True, False])
def test_with_a_config_its_inference_mode_decides(model, folder, inference_mode):
    state = peftc.load_adapter_weights(folder)
    config = lora(modules_to_save=["head"], inference_mode=inference_mode)
    model.load_adapter(peft_config=config, adapter_state_dict=state, is_trainable=inference_mode)
    assert model.peft_config["default"] is config
    assert model.training is not inference_mode
    assert bool(trainable(model)) is not inference_mode


def test_config_as_a_dict(model, folder):
    """The documented annotation is dict[str, Any]; the reference takes objects only. Ours takes both."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    kept = copy.deepcopy(fields)
    model.load_adapter(peft_config=fields, adapter_state_dict=peftc.load_adapter_weights(folder))
    assert fields == kept
    assert isinstance(model.peft_config["default"], peftc.LoraConfig)
    with pytest.raises(ValueError, match='without "peft_type"'):
        model.load_adapter(adapter_name="x", peft_config={"r": 2}, adapter_state_dict={})
    with pytest.raises(TypeError, match="peft_config should be an instance of PeftConfig"):
        model.load_adapter(adapter_name="x", peft_config=3, adapter_state_dict={})


def test_config_argument_with_weights_from_a_folder(model, folder):
    model.load_adapter(folder, peft_config=lora(modules_to_save=["head"], lora_alpha=16, inference_mode=True))
    reference = net()
    reference.load_adapter(folder)
    assert model.peft_config["default"].lora_alpha == 16
    assert np.abs(model(IDS) - reference(IDS)).max() > 1e-4


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_state_dict_prefix(model, folder, prefix):
    state = {prefix + k.removeprefix("base_model.model."): v for k, v in peftc.load_adapter_weights(folder).items()}
    model.load_adapter(peft_config=lora(modules_to_save=["head"], inference_mode=True), adapter_state_dict=state)
    reference = net()
    reference.load_adapter(folder)
    same(model(IDS), reference(IDS))


def test_state_dict_is_copied(model, folder):
    state = peftc.load_adapter_weights(folder)
    model.load_adapter(peft_config=lora(modules_to_save=["head"], inference_mode=True), adapter_state_dict=state)
    before = model(IDS)
    for value in state.values():
        value[...] = 0
    same(model(IDS), before)


@pytest.mark.parametrize(
    "arguments", [{}, {"peft_config": lora()}, {"adapter_state_dict": {}}], ids=["nothing", "config", "weights"]
)
def test_nothing_to_load(model, arguments):
    with pytest.raises(ValueError, match="You should either pass a `peft_model_id` or a `peft_config`"):
        model.load_adapter(**arguments)
    assert not model._hf_peft_config_loaded


def test_key_mapping(model, folder):
    state = peftc.load_adapter_weights(folder)
    renamed = {k.replace("layers.", "blocks."): v for k, v in state.items()}
    kwargs = {"key_mapping": {r"^nothing": "x", r"^blocks\.": "layers.", r"layers": "never"}, "device": "cpu"}
    kept = copy.deepcopy(kwargs)
    model.load_adapter(
        peft_config=lora(modules_to_save=["head"], inference_mode=True),
        adapter_state_dict=renamed,
        adapter_kwargs=kwargs,
    )
    assert kwargs == kept
    reference = net()
    reference.load_adapter(folder)
    same(model(IDS), reference(IDS))


def test_key_mapping_from_file(model, folder, tmp_path):
    state = {k.replace("layers.", "blocks."): v for k, v in peftc.load_adapter_weights(folder).items()}
    peftc.safetensors.save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.load_adapter(folder, adapter_kwargs={"key_mapping": {"^blocks": "layers"}})
    assert np.abs(model.get_adapter_state_dict()["layers.0.query.lora_B.weight"]).max() > 0


def test_revision_given_twice(model, folder, caplog):
    with caplog.at_level(logging.ERROR, LOGGER):
        model.load_adapter(folder, "a", revision="x", adapter_kwargs={"revision": "x"})
        assert not caplog.records
        model.load_adapter(folder, "b", revision="x", adapter_kwargs={"revision": "y"})
    assert "You passed a `revision` argument both in `adapter_kwargs` and as a standalone argument." in caplog.text
    assert caplog.records[0].name == LOGGER


def test_callers_dict_is_left_alone(model, folder):
    kwargs = {"key_mapping": {}, "device": "cpu", "token": None, "revision": "main", "subfolder": "adapter"}
    kept = dict(kwargs)
    model.load_adapter(folder.parent, adapter_kwargs=kwargs)
    assert kwargs == kept


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0, "mps", {"": "cuda:0"}, {"head": 1}, "disk", "xpu:0"])
def test_devices_that_are_not_there(model, folder, device):
    before = snapshot(model)
    for arguments in ({"device_map": device}, {"adapter_kwargs": {"device": device}}):
        with pytest.raises(ValueError, match="device"):
            model.load_adapter(folder, **arguments)
    assert snapshot(model) == before


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0", None, {"": "cpu"}, "balanced", "sequential"])
def test_devices_that_mean_the_cpu(model, folder, device):
    model.load_adapter(
        folder,
        device_map=device,
        max_memory={"cpu": "1GB"},
        offload_folder="unused",
        offload_index=0,
        low_cpu_mem_usage=True,
    )
    assert model.active_adapters() == ["default"]
    assert not Path("unused").exists()


def test_unexpected_and_missing_keys(model, folder, caplog):
    state = peftc.load_adapter_weights(folder)
    del state["base_model.model.layers.0.query.lora_A.weight"]
    del state["base_model.model.layers.1.value.lora_B.weight"]
    state["base_model.model.layers.7.query.lora_A.weight"] = np.zeros((2, 8), np.float32)
    state["base_model.model.other"] = np.zeros(3, np.float32)
    with caplog.at_level(logging.WARNING, LOGGER):
        model.load_adapter(adapter_name="ad", peft_config=lora(modules_to_save=["head"]), adapter_state_dict=state)
    (record,) = caplog.records
    assert record.name == LOGGER
    unexpected, missing = record.getMessage().split(". Loading")
    assert unexpected.startswith(
        "Loading adapter weights from state_dict led to unexpected keys not found in the model: "
    )
    assert set(unexpected.partition("model: ")[2].split(", ")) == {"layers.7.query.lora_A.ad.weight", "other"}
    assert missing.startswith(" adapter weights from state_dict led to missing keys in the model: ")
    assert set(missing.partition("model: ")[2].split(", ")) == {
        "layers.0.query.lora_A.ad.weight",
        "layers.1.value.lora_B.ad.weight",
    }


def test_missing_module_to_save_is_an_error(model, folder):
    state = peftc.load_adapter_weights(folder)
    del state["base_model.model.head.weight"]
    before = snapshot(model)
    with pytest.raises(KeyError, match="head.weight"):
        model.load_adapter(peft_config=lora(modules_to_save=["head"]), adapter_state_dict=state)
    assert snapshot(model) == before


def test_wrong_shape(model, folder):
    state = peftc.load_adapter_weights(folder)
    state["base_model.model.layers.0.query.lora_A.weight"] = np.zeros((3, 8), np.float32)
    model.load_adapter(folder, "good")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.query\.lora_A"):
        model.load_adapter(peft_config=lora(modules_to_save=["head"]), adapter_state_dict=state)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "state", [3, [1, 2], {"layers.0.query.lora_A.weight": "text"}, {1: np.zeros(2)}, {"a": np.zeros(2, complex)}]
)
def test_state_dict_of_wrong_types(model, state):
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError)):
        model.load_adapter(peft_config=lora(), adapter_state_dict=state)
    assert snapshot(model) == before


def test_unknown_fields_are_named_and_ignored(model, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    with pytest.warns(UserWarning, match="of_the_future"):
        model.load_adapter(folder)
    assert model.active_adapters() == ["default"]


def test_damaged_files(model, folder, tmp_path):
    model.load_adapter(folder, "good")
    before = snapshot(model)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(peftc.safetensors.SafetensorError, match="adapter_model.safetensors"):
        model.load_adapter(folder)
    weights.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json"):
        model.load_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter model file not found in"):
        model.load_adapter(folder)
    assert snapshot(model) == before


def test_safetensors_wins_over_bin(model, folder):
    (folder / "adapter_model.bin").write_bytes(b"not a pickle")
    model.load_adapter(folder)
    assert model.active_adapters() == ["default"]


def test_load_leaves_the_other_family_active(model, folder):
    model.add_adapter(ia3(), "scale")
    model.load_adapter(folder, "first")
    assert model.active_adapters() == ["scale", "first"]
    model.load_adapter(folder, "second")
    assert model.active_adapters() == ["scale", "second"]
    model.add_adapter(lora(), "third")
    assert model.active_adapters() == ["third"]


def test_load_deactivates_what_replaces_the_same_module(model, folder):
    model.add_adapter(ia3(modules_to_save=["head"]), "scale")
    model.load_adapter(folder, "first")
    assert model.active_adapters() == ["first"]


def test_prompt_methods_are_refused(model, folder):
    for method in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "NO_SUCH"):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({"peft_type": method, "num_virtual_tokens": 4}))
        before = snapshot(model)
        with pytest.raises((ValueError, KeyError, NotImplementedError), match=method):
            model.load_adapter(folder)
        assert snapshot(model) == before


# --------------------------------------------------------------- set, enable


def test_order_of_the_list_is_kept(model):
    for name in "abc":
        model.add_adapter(lora(), name)
    model.set_adapter(["c", "a"])
    assert model.active_adapters() == ["c", "a"]
    model.active_adapters().append("b")
    assert model.active_adapters() == ["c", "a"]
    names = ["b"]
    model.set_adapter(names)
    names.append("a")
    assert model.active_adapters() == ["b"]


def test_set_none(model):
    base = model(IDS)
    model.add_adapter(lora())
    model.set_adapter([])
    assert model.active_adapters() == []
    same(model(IDS), base)
    with pytest.raises(IndexError):
        model.get_adapter_state_dict()
    with pytest.warns(FutureWarning), pytest.raises(IndexError):
        model.active_adapter()


def test_several_add_up(model):
    base = model(IDS)
    model.add_adapter(lora(["head"]), "a")
    one = model(IDS) - base
    model.add_adapter(lora(["head"]), "b")
    two = model(IDS) - base
    model.set_adapter(["a", "b"])
    same(model(IDS) - base, one + two, 1e-5)


@pytest.mark.parametrize("wrong", ["x", None, ("a",), 3, "A"])
def test_set_unknown(model, wrong):
    model.add_adapter(lora(), "a")
    before = snapshot(model)
    with pytest.raises(ValueError, match="not found. Please pass the correct adapter name among"):
        model.set_adapter(wrong)
    with pytest.raises(ValueError) as error:
        model.set_adapter(["a", "x"])
    assert str(error.value).startswith("Following adapter(s) could not be found: x.")
    assert snapshot(model) == before


def test_set_checks_first(model):
    """Two adapters that replace the same module: nothing is switched."""
    for name in ("a", "b"):
        model.add_adapter(lora(modules_to_save=["head"]), name)
    before = snapshot(model)
    with pytest.raises(ValueError, match="modules_to_save"):
        model.set_adapter(["a", "b"])
    assert snapshot(model) == before


def test_gradients_follow_set_enable_disable(model):
    model.add_adapter(lora(), "a")
    model.add_adapter(lora(), "b")

    def who():
        return sorted({name.split(".")[-2] for name in trainable(model)})

    assert who() == ["b"]
    model.set_adapter("a")
    assert who() == ["a"]
    model.set_adapter(["a", "b"])
    assert who() == ["a", "b"]
    model.disable_adapters()
    assert who() == []
    base = model(IDS)
    model.set_adapter("a")  # says what is to be trained, and has no effect yet
    assert who() == ["a"] and model.active_adapters() == ["a"]
    np.testing.assert_array_equal(model(IDS), base)
    model.disable_adapters()
    assert who() == []
    model.enable_adapters()
    assert who() == ["a"]


def test_gradients_of_what_comes_while_disabled(model, folder):
    """Added, loaded for training, or left when the active one is deleted: marked as trainable, and off."""
    base = model(IDS)
    model.add_adapter(lora(), "a")
    model.disable_adapters()

    def who():
        np.testing.assert_array_equal(model(IDS), base)
        return sorted({name.split(".")[-2] for name in trainable(model)})

    assert who() == []
    model.add_adapter(lora(), "b")
    assert who() == ["b"]
    model.load_adapter(folder, "c")
    assert who() == []
    model.load_adapter(folder, "d", is_trainable=True)
    assert who() == ["d"]
    with pytest.warns(UserWarning, match="active adapter to a"):
        model.delete_adapter("d")
    assert who() == ["a"]
    model.set_adapter(["a", "b"])
    model.disable_adapters()
    model.delete_adapter("a")
    assert who() == []


def test_disable_and_enable(model, folder):
    base = model(IDS)
    model.load_adapter(folder)
    adapted = model(IDS)
    model.disable_adapters()
    np.testing.assert_array_equal(model(IDS), base)
    assert model.active_adapters() == ["default"]
    model.enable_adapters()
    np.testing.assert_array_equal(model(IDS), adapted)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.set_adapter("a"),
        lambda m: m.set_adapter([]),
        lambda m: m.disable_adapters(),
        lambda m: m.enable_adapters(),
        lambda m: m.active_adapters(),
        lambda m: m.get_adapter_state_dict(),
        lambda m: m.delete_adapter("a"),
        lambda m: m.delete_adapter([]),
        lambda m: m.save_adapter("nowhere"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
    ],
)
def test_without_an_adapter(model, call):
    with pytest.raises(ValueError) as error:
        call(model)
    assert str(error.value) == "No adapter loaded. Please load an adapter first."
    assert not Path("nowhere").exists()


def test_active_adapter_is_deprecated(model):
    model.add_adapter(lora(), "a")
    with pytest.warns(FutureWarning, match="`active_adapter` method is deprecated"):
        assert model.active_adapter() == "a"


# --------------------------------------------------------------------- delete


def test_delete_gives_the_base_model_back(model, folder):
    base = model(IDS)
    model.load_adapter(folder)
    model.delete_adapter("default")
    np.testing.assert_array_equal(model(IDS), base)
    assert not model._hf_peft_config_loaded
    assert not hasattr(model, "peft_config")
    model.load_adapter(folder)
    assert model.active_adapters() == ["default"]


def test_delete_keeps_the_other_active_ones(model):
    for name in "abcd":
        model.add_adapter(lora(), name)
    model.set_adapter(["d", "a", "c"])
    model.delete_adapter(["a", "b", "a"])
    assert model.active_adapters() == ["d", "c"] and list(model.peft_config) == ["c", "d"]


def test_delete_the_only_active_one(model):
    for name in "cba":
        model.add_adapter(lora(), name)
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted. Setting active adapter to a."):
        model.delete_adapter("b")
    assert model.active_adapters() == ["a"]
    assert all(".a." in name for name in trainable(model))


def test_delete_an_inactive_one_is_silent(model):
    model.add_adapter(lora(), "a")
    model.add_adapter(lora(), "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("a")
        model.delete_adapter([])
    assert model.active_adapters() == ["b"]


def test_delete_nothing_when_one_is_unknown(model):
    model.add_adapter(lora(), "a")
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        model.delete_adapter(["a", "x", "y"])
    assert str(error.value) == "The following adapter(s) are not present and cannot be deleted: x, y"
    assert snapshot(model) == before


def test_deleting_the_last_forgets_disable(model):
    base = model(IDS)
    model.add_adapter(lora())
    model.disable_adapters()
    model.delete_adapter("default")
    model.add_adapter(lora())
    assert np.abs(model(IDS) - base).max() > 1e-4


def test_name_can_be_used_again(model):
    """A re-added name starts afresh: DoRA does not linger."""
    model.add_adapter(lora(use_dora=True), "a")
    model.delete_adapter("a")
    model.add_adapter(lora(), "a")
    assert not any("magnitude" in key for key in model.get_adapter_state_dict("a"))


def test_views_outlive_the_adapter(model):
    model.add_adapter(lora())
    state = model.get_adapter_state_dict()
    kept = {k: v.copy() for k, v in state.items()}
    model.delete_adapter("default")
    del model
    for key, value in kept.items():
        np.testing.assert_array_equal(state[key], value)


# ------------------------------------------------------------ state, saving


def test_state_dict_shares_memory(model):
    model.add_adapter(lora(["head"], modules_to_save=["subhead"]))
    before = model(IDS)
    state = model.get_adapter_state_dict()
    assert set(state) == {"head.lora_A.weight", "head.lora_B.weight", "subhead.weight", "subhead.bias"}
    state["head.lora_B.weight"][...] = 0
    assert np.abs(model(IDS) - before).max() > 1e-4


def test_state_dict_from_a_state_dict(model):
    model.add_adapter(lora(modules_to_save=["head"]), "a")
    model.add_adapter(lora(["up"]), "a2")
    full = {name: array * 2 for name, array in model.state_dict().items()}
    doubled = model.get_adapter_state_dict("a", state_dict=full)
    plain = model.get_adapter_state_dict("a")
    assert list(doubled) == list(plain)
    for key in plain:
        np.testing.assert_array_equal(doubled[key], plain[key] * 2)
    assert model.get_adapter_state_dict("a", state_dict={}) == {}


def test_state_dict_errors(model):
    model.add_adapter(lora(), "a")
    with pytest.raises(KeyError, match="x"):
        model.get_adapter_state_dict("x")


def test_save_writes_two_files(model, tmp_path):
    model.add_adapter(lora(), "a")
    model.save_adapter(tmp_path / "deep" / "er")
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "deep" / "er" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["peft_type"] == "LORA"
    assert not model.peft_config["a"].inference_mode
    assert list(config) == sorted(config)
    weights = peftc.safetensors.load_file(tmp_path / "deep" / "er" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in weights)


def test_save_refusals(model, tmp_path):
    model.add_adapter(lora(), "a")
    model.add_adapter(lora(), "b")
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"several adapters are active \(a, b\)"):
        model.save_adapter(tmp_path / "x")
    model.save_adapter(tmp_path / "x", "b")
    with pytest.raises(KeyError, match="c"):
        model.save_adapter(tmp_path / "y", "c")
    with pytest.raises(ValueError, match="safe_serialization"):
        model.save_adapter(tmp_path / "y", "a", safe_serialization=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_adapter(tmp_path / "file", "a")
    assert not (tmp_path / "y").exists()


def test_failed_save_leaves_the_old_files(model, folder, monkeypatch):
    model.load_adapter(folder)
    shake(model, "default")
    old = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    write = _core.config_write

    def on_a_full_disk(*args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(_core, "config_write", on_a_full_disk)
    with pytest.raises(OSError, match=r"adapter_config\.json.*File too large"):
        model.save_adapter(folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == sorted(old)
    assert (folder / "adapter_config.json").read_bytes() == old["adapter_config.json"]


def test_saved_files_obey_the_umask(model, tmp_path):
    model.add_adapter(lora())
    old = os.umask(0o027)
    try:
        model.save_adapter(tmp_path)
    finally:
        os.umask(old)
    for name in os.listdir(tmp_path):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name


# -------------------------------------------------------------------- merging


def test_merge_and_unmerge(model, folder):
    base = model(IDS)
    model.load_adapter(folder)
    adapted = model(IDS)
    model.merge_adapter()
    same(model(IDS), adapted, 1e-5 * np.abs(adapted).max())
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.disable_adapters()
    same(model(IDS), base)
    model.enable_adapters()
    model.unmerge_adapter()
    np.testing.assert_array_equal(model(IDS), adapted)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        model.unmerge_adapter()


def test_merge_errors(model):
    model.add_adapter(lora(["head"]), "a")
    with pytest.raises(ValueError, match="adapter_names should be a list of strings, got 'a'."):
        model.merge_adapter("a")
    with pytest.raises(ValueError, match=r"Following adapter\(s\) could not be found: x"):
        model.merge_adapter(["a", "x"])
    model.get_adapter_state_dict()["head.lora_B.weight"][0, 0] = np.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert snapshot(model) == before


def test_what_unmerges(model):
    model.add_adapter(lora(["head"]), "a")
    one = model(IDS)
    model.add_adapter(lora(["head"]), "b")
    two = model(IDS)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="b was merged and is unmerged now"):
        model.set_adapter("a")
    np.testing.assert_array_equal(model(IDS), one)
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="a was merged"), pytest.warns(UserWarning, match="Adapter a was active"):
        model.delete_adapter("a")
    np.testing.assert_array_equal(model(IDS), two)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="b was merged"):
        model.add_adapter(lora(["head"]), "c")


def test_sub_model_and_model_do_not_mix():
    class Outer(peftc.PeftAdapterMixin, peftc.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, ids):
            return self.inner(ids)

    outer = Outer()
    outer.inner.add_adapter(lora())
    with pytest.raises(ValueError, match="another model that has adapters"):
        outer.add_adapter(lora())
    assert not outer._hf_peft_config_loaded
    outer.inner.delete_adapter("default")
    outer.add_adapter(lora())
    assert "inner.layers.0.query.lora_A.weight" in outer.get_adapter_state_dict()


@pytest.mark.parametrize(
    ("make", "field", "value", "match"),
    [
        (lora, "r", 4, r"peft_config\['a'\]\.r is 4, but the adapter was made with 2"),
        (lora, "lora_alpha", 99, "lora_alpha is 99"),
        (lora, "use_rslora", True, "use_rslora is True, but the adapter was made with False"),
        (lora, "target_modules", {"query"}, r"target_modules is \['query'\], but .* \['query', 'value'\]"),
        (lora, "rank_pattern", {"query": 5}, "rank_pattern"),
        (lora, "modules_to_save", ["head"], "modules_to_save"),
        (lora, "bias", "all", "bias"),
        (lora, "init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        (lora, "use_dora", True, "use_dora"),
        (ia3, "feedforward_modules", set(), "feedforward_modules"),
        (adalora, "init_r", 5, "init_r is 5, but the adapter was made with 3"),
    ],
)
def test_save_refuses_a_config_of_another_adapter(model, tmp_path, make, field, value, match):
    """An edited config would make a folder that does not load, or loads as something else; nothing is written."""
    config = make()
    model.add_adapter(config, "a")
    kept = getattr(config, field)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=match):
        model.save_adapter(tmp_path / "out", "a")
    assert not (tmp_path / "out").exists()
    setattr(config, field, kept)
    model.save_adapter(tmp_path / "out", "a")


def test_save_takes_other_edits(model, tmp_path):
    """What says nothing about the tensors may change, and so may the spelling of the same."""
    config = lora()
    model.add_adapter(config, "a")
    config.task_type = "SEQ_CLS"
    config.base_model_name_or_path = "somewhere"
    config.lora_dropout = 0.5
    config.init_lora_weights = "gaussian"
    config.target_modules = ["value", "query"]
    config.exclude_modules = []
    model.save_adapter(tmp_path, "a")
    model.load_adapter(tmp_path, "b")
    np.testing.assert_array_equal(*[model.get_adapter_state_dict(n)["layers.0.query.lora_A.weight"] for n in "ab"])
    model.delete_adapter("a")
    model.add_adapter(lora(r=3), "a")  # the name again, with another config
    model.save_adapter(tmp_path / "again", "a")
