"""Configs: the same objects, checks and files as PEFT 0.17.1, and strict about what comes from a file."""

import copy
import dataclasses
import json
import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from test_config_files import lora, write

import peftc
from peftc import _core
from peftc.config import as_peftc_json

DATA = Path(__file__).parent / "data" / "real"
NAMES = ("LoraConfig", "IA3Config", "AdaLoraConfig")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


# ---------------------------------------------------------------- objects


@pytest.mark.parametrize("name", ["PeftConfig", *NAMES])
def test_fields_and_defaults_are_those_of_peft(peft, name):
    ours, theirs = getattr(peftc, name), getattr(peft, name)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    fields = {"total_step": 10} if name == "AdaLoraConfig" else {}
    assert repr(ours(**fields)) == repr(theirs(**fields))
    assert ours("SEQ_CLS", **fields).task_type == theirs("SEQ_CLS", **fields).task_type == "SEQ_CLS"
    assert ours(**fields).to_dict() == theirs(**fields).to_dict()


def test_enums_are_those_of_peft(peft):
    for name in ("PeftType", "TaskType"):
        ours, theirs = getattr(peftc, name), getattr(peft, name)
        assert [(m.name, m.value) for m in ours] == [(m.name, m.value) for m in theirs]
        assert all(m == str.__str__(m) for m in ours)


CHOICES = {
    "task_type": [None, "SEQ_CLS", "CAUSAL_LM", "NO"],
    "inference_mode": [True, False],
    "base_model_name_or_path": [None, "gpt2", "é"],
    "r": [1, 8, 16, 0],
    "target_modules": [None, ["q", "v", "k"], ["q"], "all-linear", ".*q", {"a", "b"}],
    "exclude_modules": [None, ["q"], ".*q"],
    "lora_alpha": [8, 0.5, 1e-7, 32],
    "lora_dropout": [0.0, 0.1, 1e16],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [True, False],
    "modules_to_save": [None, ["classifier", "score"], []],
    "init_lora_weights": [True, False, "gaussian", "eva", "olora", "pissa", "pissa_niter_4"],
    "layers_to_transform": [None, None, [1, 2], 3],
    "layers_pattern": [None, None, None, "h", ["layers"]],
    "rank_pattern": [{}, {"b": 2, "a": 4}],
    "alpha_pattern": [{}, {"x.y": 0.1}],
    "loftq_config": [{}, {}, {"loftq_bits": 4}],
    "use_dora": [False, False, True],
    "lora_bias": [False, False, True],
    "target_parameters": [None, None, ["w"], "w"],
    "feedforward_modules": [None, ["q"], ["z"]],
    "init_ia3_weights": [True, False],
    "init_r": [12, 4],
    "tinit": [0, 5],
    "tfinal": [0, 5],
    "total_step": [None, 0, 10, 100],
    "beta1": [0.85, 0.3],
}


def test_what_stands_in_for_fields():
    config = peftc.IA3Config(target_modules=["a"])
    text = as_peftc_json(config, {"target_modules": {"c", "b"}, "layers_pattern": None})
    assert json.loads(text)["target_modules"] == ["b", "c"] and "layers_pattern" not in json.loads(text)
    assert config.target_modules == {"a"}
    config.to_dict = lambda: {"peft_type": "IA3", "target_modules": ["own"]}
    assert json.loads(as_peftc_json(config))["target_modules"] == ["own"]


def with_own_to_dict(config: Any) -> Any:
    """The same config, of a class that replaces to_dict."""
    cls = type(config)
    config = copy.copy(config)
    config.__class__ = type("Own", (cls,), {"to_dict": lambda self: cls.to_dict(self)})
    return config


def outcome(make, arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = make(**arguments)
        except Exception as error:  # noqa: BLE001 - whatever PEFT raises is compared
            return None, (type(error), str(error)), len(caught)
    return config, None, [str(w.message)[:60] for w in caught]


@pytest.mark.parametrize("name", NAMES)
def test_random_configs_are_made_refused_and_saved_as_in_peft(peft, tmp_path, name):
    ours, theirs = getattr(peftc, name), getattr(peft, name)
    known = [f.name for f in dataclasses.fields(ours) if f.name in CHOICES]
    rnd = random.Random(name)
    saved = 0
    saved_as = {"pretrained_model_name_or_path": tmp_path / "theirs"}
    for _ in range(300):
        fields = {key: rnd.choice(CHOICES[key]) for key in rnd.sample(known, rnd.randint(0, 6))}
        if name == "AdaLoraConfig" and rnd.random() < 0.8:
            fields["total_step"] = 100
        mine, my_error, my_warnings = outcome(ours, copy.deepcopy(fields))
        other, other_error, other_warnings = outcome(theirs, copy.deepcopy(fields))
        assert my_error == other_error, fields
        assert my_warnings == other_warnings, fields
        if mine is None:
            continue
        assert repr(mine) == repr(other)
        assert mine.to_dict() == other.to_dict()
        mine.save_pretrained(tmp_path / "ours")
        other.save_pretrained(tmp_path / "theirs")
        text = (tmp_path / "ours" / "adapter_config.json").read_bytes()
        assert text == (tmp_path / "theirs" / "adapter_config.json").read_bytes()
        assert _core.json_canonical(text).encode() == text
        assert json.loads(as_peftc_json(mine)) == json.loads(as_peftc_json(other))
        assert as_peftc_json(other) == as_peftc_json(with_own_to_dict(other))
        saved += 1
        try:
            unknown = _core.config_check(text)
        except (ValueError, NotImplementedError):
            continue  # what PEFT refuses later, we refuse now
        assert unknown == []
        again, again_error, _ = outcome(peftc.PeftConfig.from_pretrained, saved_as)
        assert again_error is None, fields
        theirs_again, _, _ = outcome(peft.PeftConfig.from_pretrained, saved_as)
        assert repr(again) == repr(theirs_again)
    assert saved > 30


def test_unknown_fields_are_warned_about_by_name(tmp_path):
    write(tmp_path, lora(r=4, new_thing=1, other=None))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new_thing', 'other'\] for class LoraConfig"):
        config = peftc.PeftConfig.from_pretrained(tmp_path)
    assert config == peftc.LoraConfig(r=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        peftc.LoraConfig(foo=1)


def test_runtime_config_in_a_file_is_ignored(tmp_path):
    write(tmp_path, lora(runtime_config={"ephemeral_gpu_offload": True}))
    with pytest.warns(UserWarning, match="runtime_config"):
        assert peftc.PeftConfig.from_pretrained(tmp_path) == peftc.LoraConfig()


def test_where_the_file_is_looked_for(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", lora(r=3))
    assert peftc.LoraConfig.from_pretrained(tmp_path, subfolder="sub").r == 3
    assert peftc.IA3Config.from_pretrained(str(tmp_path / "sub"), inference_mode=True).inference_mode
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at"):
        peftc.PeftConfig.from_pretrained(tmp_path)
    write(tmp_path, '{"r": 5}')
    assert peftc.LoraConfig.from_pretrained(tmp_path).r == 5
    with pytest.raises(TypeError, match="no peft_type"):
        peftc.PeftConfig.from_pretrained(tmp_path)


def test_methods_without_code_are_refused():
    with pytest.raises(ValueError, match="cannot be injected"):
        peftc.PeftConfig.from_peft_type(peft_type=peftc.PeftType.PREFIX_TUNING)
    with pytest.raises(NotImplementedError, match="LOKR"):
        peftc.PeftConfig.from_peft_type(peft_type="LOKR")
    with pytest.raises(KeyError, match="known are"):
        peftc.PeftConfig.from_peft_type(peft_type="X")


def test_configs_are_ordinary_objects(tmp_path):
    config = peftc.LoraConfig(target_modules=["q", "v"], rank_pattern={"q": 2})
    single = peftc.LoraConfig(target_modules=["q"], rank_pattern={"q": 2})
    for again in (copy.copy, copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))):
        assert again(config) == config
        # Only one target: a set rebuilt by pickle may list colliding names in another order.
        assert again(single) == single and repr(again(single)) == repr(single)
    config.r = 4
    assert config != peftc.LoraConfig(target_modules=["q", "v"], rank_pattern={"q": 2})
    assert config != object() and peftc.IA3Config() != peftc.LoraConfig()
    assert not config.is_prompt_learning and not config.is_adaption_prompt
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)


def test_what_json_cannot_hold_is_named(tmp_path):
    config = peftc.LoraConfig(lora_alpha=object())
    with pytest.raises(TypeError, match="lora_alpha"):
        config.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(TypeError, match="peft_type and to_dict"):
        as_peftc_json({"r": 1})


def test_saving_keeps_the_old_file_when_it_fails(tmp_path):
    peftc.LoraConfig(r=3).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    with pytest.raises(TypeError):
        peftc.LoraConfig(r=object()).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["adapter_config.json"]
    with pytest.raises(AssertionError, match="should be a directory"):
        peftc.LoraConfig().save_pretrained(tmp_path / "adapter_config.json")
