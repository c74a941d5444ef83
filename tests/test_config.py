"""Configs: the same objects, checks and files as PEFT 0.17.1, and strict about what comes from a file."""

import copy
import dataclasses
import json
import math
import os
import pickle
import random
import struct
import warnings
from pathlib import Path

import pytest

import peftc
from peftc import _core
from peftc.config import as_peftc_json

DATA = Path(__file__).parent / "data" / "real"
NAMES = ("LoraConfig", "IA3Config", "AdaLoraConfig")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def write(folder, text):
    path = folder / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["movies", "products", "news", "tweets"])
def test_real_files_come_back_byte_for_byte(name):
    text = (DATA / name / "adapter_config.json").read_text()
    assert _core.json_canonical(text) == text
    assert _core.json_loads(text) == json.loads(text)
    assert _core.config_check(text) == []


def number(rnd):
    kind = rnd.random()
    if kind < 0.3:
        return str(rnd.randint(-5, 20))
    if kind < 0.4:
        return str(rnd.randint(-(10**40), 10**40))
    if kind < 0.5:
        return rnd.choice(
            [
                "-0",
                "-0.0",
                "1e5",
                "1E400",
                "-1e400",
                "1e-400",
                "NaN",
                "Infinity",
                "-Infinity",
                "1e16",
                "1e15",
                "0.0001",
                "0.00001",
                "5e-324",
            ]
        )
    if kind < 0.6:
        return repr(2.0 ** rnd.randint(-1074, 1023))
    if kind < 0.8:
        return json.dumps(struct.unpack("d", rnd.randbytes(8))[0])
    return f"{rnd.gauss(0, 10 ** rnd.randint(-8, 8)):.{rnd.randint(1, 20)}g}"


def string(rnd):
    parts = [
        "a",
        "b",
        "é",
        "€",
        "😀",
        "\\n",
        "\\u0000",
        "\\u0001",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\udc00",
        '\\"',
        "\\\\",
    ]
    return '"' + "".join(rnd.choice([*parts, "\\/", "\x7f", " "]) for _ in range(rnd.randint(0, 3))) + '"'


def value(rnd, depth):
    kind = rnd.random()
    if depth == 0 or kind < 0.5:
        return rnd.choice([number, number, string, lambda r: r.choice(["true", "false", "null"])])(rnd)
    comma = "," + rnd.choice(["", " ", "\n", "\t\r "])
    if kind < 0.7:
        return "[" + comma.join(value(rnd, depth - 1) for _ in range(rnd.randint(0, 4))) + "]"
    return "{" + comma.join(f"{string(rnd)} :{value(rnd, depth - 1)}" for _ in range(rnd.randint(0, 5))) + "}"


@pytest.mark.parametrize("seed", range(3))
def test_json_is_read_and_written_as_python_does(seed):
    rnd = random.Random(seed)
    for _ in range(6000):
        text = list(value(rnd, 4))
        for _ in range(rnd.choice([0, 0, 1, 2])):  # damage
            text.insert(rnd.randint(0, len(text)), rnd.choice('{}[],:"0-.eEN\\u\x00\x01\ufeff\x0b tnIf'))
            del text[rnd.randrange(len(text))]
        text = "".join(text)
        try:
            expected = json.loads(text)
        except ValueError:
            with pytest.raises(ValueError, match="config"):
                _core.json_loads(text)
            continue
        assert repr(_core.json_loads(text)) == repr(expected), text
        assert _core.json_canonical(text) == json.dumps(expected, indent=2, sort_keys=True), text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b"", "a value is expected"),
        (b"{}\0", "after the end"),
        (b'{"a": 1,}', "double quotes"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": "x\ny"}', "control character"),
        (b"\x0b{}", "a value is expected"),
        (b"[" * 501 + b"]" * 501, "nested"),
        (b"[" * 1_000_000, "nested"),
        (b"[" + b"0," * 1_000_001 + b"0]", "million"),
        (b"1" * 5000, "4300 digits"),
        (b"[" * 400 + b"0," * 500_000 + b"0" + b"]" * 400, "64 MiB"),
    ],
)
def test_text_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        _core.json_canonical(text, label="file.json")
    assert "file.json" in str(caught.value)


def test_names_have_a_case_and_the_last_of_two_counts():
    assert _core.config_check('{"peft_type": "LORA", "R": 0, "Target_Modules": 3}') == ["R", "Target_Modules"]
    assert _core.config_check('{"peft_type": "IA3", "peft_type": "LORA", "r": 0, "r": 4}') == []
    with pytest.raises(ValueError, match="passed is 0"):
        _core.config_check('{"peft_type": "LORA", "r": 4, "r": 0}')
    assert _core.config_check('{"peft_type": "LORA", "\\u0072": 4, "x\\u0000": "\\ud800", "y": [NaN]}')[1:] == ["y"]


# ----------------------------------------------------------------- values


def lora(**fields):
    return json.dumps({"peft_type": "LORA", **fields})


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{}", ValueError, "no peft_type"),
        ('{"r": 8}', TypeError, "no peft_type"),
        ('{"peft_type": "lora"}', KeyError, "known are LORA, IA3, ADALORA"),
        ('{"peft_type": null}', KeyError, "null"),
        ('{"peft_type": "WHAT"}', KeyError, "WHAT"),
        ('{"peft_type": "PROMPT_TUNING"}', ValueError, "cannot be injected"),
        ('{"peft_type": "CPT"}', ValueError, "cannot be injected"),
        ('{"peft_type": "LOHA"}', NotImplementedError, "LOHA"),
        ("[]", ValueError, "must hold a JSON object"),
        (lora(r=0), ValueError, "0"),
        (lora(r=-1), ValueError, "-1"),
        (lora(r="8"), ValueError, 'r must be an integer, got "8"'),
        (lora(r=math.nan), ValueError, "NaN"),
        (lora(r=2.5), ValueError, "2.5"),
        (lora(r=True), ValueError, "true"),
        (lora(r=None), ValueError, "null"),
        (lora(r=2**70), ValueError, "r must be"),
        (lora(lora_alpha=math.nan), ValueError, "lora_alpha must be a finite number, got NaN"),
        (lora(lora_alpha="x"), ValueError, "lora_alpha"),
        (lora(lora_dropout=1.5), ValueError, "lora_dropout"),
        (lora(lora_dropout=None), ValueError, "lora_dropout"),
        (lora(use_rslora="yes"), ValueError, "use_rslora must be true or false"),
        (lora(target_modules="a("), ValueError, "unterminated subpattern"),
        (lora(target_modules=[1]), ValueError, "target_modules"),
        (lora(target_modules={}), ValueError, "target_modules"),
        (lora(target_modules=["a\0b"]), ValueError, "NUL"),
        (lora(exclude_modules="["), ValueError, "exclude_modules"),
        (lora(rank_pattern={"a(": 1}), ValueError, "rank_pattern"),
        (lora(rank_pattern={"a": 0}), ValueError, 'rank_pattern\\["a"\\]'),
        (lora(rank_pattern={"a": 1.5}), ValueError, "1.5"),
        (lora(rank_pattern={"(?i)a": 1}), ValueError, "global flags"),
        (lora(alpha_pattern={"a": "1"}), ValueError, "alpha_pattern"),
        (lora(rank_pattern=[1]), ValueError, "rank_pattern"),
        (lora(bias="some"), NotImplementedError, "Requested bias: some, is not implemented"),
        (lora(bias=None), NotImplementedError, "Requested bias"),
        (lora(task_type="CHESS"), ValueError, "Invalid task type: 'CHESS'"),
        (lora(init_lora_weights="zeros"), ValueError, "zeros"),
        (lora(init_lora_weights=3), ValueError, "init_lora_weights"),
        (lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), NotImplementedError, "loftq"),
        (lora(init_lora_weights="corda"), NotImplementedError, "corda"),
        (lora(layer_replication=[[0, 4]]), NotImplementedError, "layer_replication"),
        (lora(megatron_config={"a": 1}), NotImplementedError, "megatron_config"),
        (lora(use_qalora=True), NotImplementedError, "use_qalora"),
        (lora(trainable_token_indices=[0]), NotImplementedError, "trainable_token_indices"),
        (lora(target_parameters=["w"]), NotImplementedError, "target_parameters"),
        (lora(target_modules="a", layers_to_transform=[0]), ValueError, "`layers_to_transform` cannot be used"),
        (lora(target_modules="a", layers_pattern="h"), ValueError, "`layers_pattern` cannot be used"),
        (lora(layers_pattern="h"), ValueError, "`layers_to_transform` must also"),
        (lora(layers_to_transform=["0"]), ValueError, "layers_to_transform"),
        (lora(modules_to_save=3), ValueError, "modules_to_save"),
        ('{"peft_type": "ADALORA"}', ValueError, "total_step"),
        ('{"peft_type": "ADALORA", "total_step": 0}', ValueError, "total_step"),
        ('{"peft_type": "ADALORA", "total_step": 9, "tinit": 4, "tfinal": 5}', ValueError, "budgeting phase"),
        ('{"peft_type": "ADALORA", "total_step": 9, "rank_pattern": {"a": ["x"]}}', ValueError, "rank_pattern"),
        ('{"peft_type": "IA3", "target_modules": ["a"], "feedforward_modules": ["b"]}', ValueError, "subset"),
    ],
)
def test_what_cannot_work_is_refused_with_field_value_and_file(tmp_path, text, error, words):
    with pytest.raises(error, match=words) as caught:
        _core.config_check(text, label="some/file.json")
    assert "some/file.json" in str(caught.value)
    path = write(tmp_path, text)
    with pytest.raises(error, match=words) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftc.PeftConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8.0},
        {"use_rslora": None, "fan_in_fan_out": 1},
        {"layer_replication": None, "megatron_config": {}, "target_parameters": [], "use_qalora": False},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"target_modules": "ALL-linear"},
        {"target_modules": ["a", "a", "b"], "layers_to_transform": 3, "layers_pattern": "h"},
        {"bias": "lora_only", "modules_to_save": ["x"]},
        {"rank_pattern": None, "alpha_pattern": {r"layer\.5\.x": 0.5}},
    ],
)
def test_what_works_in_peft_passes(fields):
    assert _core.config_check(lora(**fields)) == []


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


def test_files_that_are_no_text_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        _core.config_read(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        _core.config_read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        _core.config_read(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * (16 * 1024 * 1024 + 1))
    with pytest.raises(ValueError, match="larger than"):
        _core.config_read(tmp_path / "large")
