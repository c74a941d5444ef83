"""Config files: JSON as Python reads it, refusals that name field, value and file, thousands of damaged files.

Nothing here needs PEFT, so that all of it runs on the sanitized extension, too."""

import json
import math
import os
import random
import re
import struct
import warnings
from pathlib import Path

import pytest
from limits import bounded_memory, one_file

import peftc
from peftc import _core

DATA = Path(__file__).parent / "data" / "real"


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
            with pytest.raises(ValueError, match="config"), one_file(text):
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
    with bounded_memory(), one_file(text[:100]), pytest.raises(ValueError, match=reason) as caught:
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


# ---------------------------------------------------------- damaged files

ODD = [*"{}[],:\"\\", "null", "true", "-1", "0", "1e999", "NaN", '""', '"LORA"', '"ADALORA"', '"all-linear"', '"(a+)+$"',
       "[]", "{}", "[[]]", '{"a":{}}', "9" * 400, '"\\ud800"', '"\x00"', "\ufeff", '"r":', '"rank_pattern":{"(":1},']  # fmt: skip


def damaged(rnd, text):
    """A config of which some tokens were exchanged, repeated, removed or replaced, or some characters."""
    parts = re.findall(r'"(?:\\.|[^"\\])*"|[\w.+-]+|\s+|.', text, re.DOTALL)
    for _ in range(rnd.choice([1, 1, 2, 4])):
        a, b = rnd.randrange(len(parts)), rnd.randrange(len(parts))
        kind = rnd.randrange(6)
        if kind == 0:
            parts[a] = rnd.choice(ODD)
        elif kind == 1:
            parts.insert(a, rnd.choice(ODD))
        elif kind == 2 and len(parts) > 1:
            del parts[a]
        elif kind == 3:
            parts[a], parts[b] = parts[b], parts[a]
        elif kind == 4:
            parts[a:a] = parts[b : b + rnd.randint(1, 8)]
        else:
            at = rnd.randrange(len(parts[a]))
            parts[a] = parts[a][:at] + chr(rnd.choice([0, 1, 34, 92, 0x7F, 0xE9, 0x1F600])) + parts[a][at + 1 :]
    return "".join(parts).encode()


@pytest.mark.parametrize("name", ["movies", "products", "news", "tweets"])
def test_damaged_configs(name):
    """Accepted or refused with the file's name, whatever was done to it, in 5 s of work and 1 GiB of memory.

    What is accepted is JSON to Python, too.
    """
    rnd = random.Random(name)
    config = json.loads((DATA / name / "adapter_config.json").read_text())
    if name == "news":  # long, and all alike
        config["rank_pattern"] = dict(list(config["rank_pattern"].items())[:2])
    text = json.dumps(config, indent=2, ensure_ascii=rnd.random() < 0.5)
    accepted = 0
    with bounded_memory():
        for _ in range(1500):
            raw = damaged(rnd, text)
            with one_file(raw):
                try:
                    _core.config_check(raw, label="x.json")
                except (ValueError, TypeError, KeyError, NotImplementedError) as error:
                    assert "x.json" in str(error), raw
                else:
                    accepted += 1
                    json.loads(raw)
    assert accepted > 20
