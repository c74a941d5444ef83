"""Telling the core what is in a torch model, finding the slots' places, and making tensors over an arena, in C."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch import nn
from torch.nn.utils import parametrize

from peftc import _core
from peftc._core import AdapterRegistry
from peftc.hosts import torch_adapter, torch_tree

# ----------------------------------------------------------------- describing


def described(model: nn.Module, **of_class: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """(rows, parameters, modules that were asked of)"""
    asked: list[Any] = []

    def row(module: Any) -> Any:
        asked.append(module)
        return (type(module).__name__, len(asked))

    known = {getattr(nn, name): value for name, value in of_class.items()}
    rows, parameters = _core.describe_modules(list(model.named_modules()), nn.Linear, known, row)
    return rows, parameters, asked


def test_linear_layers_that_are_alike_share_a_row():
    model = nn.Sequential(
        nn.Linear(3, 2),
        nn.Linear(3, 2),
        nn.Linear(3, 2, bias=False),
        nn.Linear(2, 3),
        nn.Linear(3, 2, dtype=torch.float64),
        nn.Linear(3, 2),
        nn.Linear(3, 2, bias=False),
    )
    rows, parameters, asked = described(model, Sequential="seen")
    assert rows[0] == ("", "seen") and [name for name, _ in rows[1:]] == [str(i) for i in range(7)]
    of = [row for _, row in rows[1:]]
    assert of[0] is of[1] is of[5] and of[2] is of[6] and len({id(row) for row in of}) == 4 and not asked
    assert of[0] == ("Linear", "Linear", "F32", 3, 2, None, None, True)
    assert of[2] == ("Linear", "Linear", "F32", 3, 2, None, None, False)
    assert of[3] == ("Linear", "Linear", "F32", 2, 3, None, None, True)
    assert of[4] == ("Linear", "Linear", "F64", 3, 2, None, None, True)
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]


def test_what_is_no_plain_linear_layer_is_asked_of_each_time():
    class Own(nn.Linear):
        pass

    packed = nn.Linear(2, 2)
    parametrize.register_parametrization(packed, "weight", nn.Identity())
    flat, bare, lost = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    flat.weight = nn.Parameter(torch.zeros(4))
    del bare._parameters["bias"]
    lost._parameters["weight"] = None
    many = [nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, dtype=torch.complex64), Own(2, 2), packed, flat, bare, lost]
    for module in many:
        _, _, asked = described(nn.Sequential(module, module.__class__(2, 2), module))
        assert sum(one is module for one in asked) == 1  # listed once
    twice = [nn.Linear(2, 2, device="meta") for _ in range(2)]
    _, _, asked = described(nn.Sequential(*twice))
    assert asked[1:] == twice


def test_more_forms_than_are_remembered():
    model = nn.Sequential(*(nn.Linear(1, i % 20 + 1) for i in range(60)))
    rows, _, asked = described(model)
    assert asked == [model] and [row[4] for _, row in rows[1:]] == [module.out_features for module in model]


def test_describing_refuses_what_is_no_list_of_modules():
    for args in (((), nn.Linear, {}, print), ([], nn.Linear, [], print), ([], nn.Linear, {}, 5), ([], nn.Linear, {})):
        with pytest.raises(TypeError, match="describe_modules"):
            _core.describe_modules(*args)
    for wrong in (5, ("a",), ("a", nn.Identity(), 3)):
        with pytest.raises(TypeError, match=r"modules\[1\] must be a tuple"):
            _core.describe_modules([("", nn.Identity()), wrong], nn.Linear, {}, lambda module: "row")
    with pytest.raises(ZeroDivisionError):
        _core.describe_modules([("", nn.Identity())], nn.Linear, {}, lambda module: 1 / 0)
    assert _core.describe_modules([("", 5)], None, {}, lambda module: "row") == ([("", "row")], [])


def test_the_hosts_rows():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 2), nn.Embedding(5, 4), nn.Conv2d(2, 4, 3, groups=2), nn.Linear(3, 2, device="meta")
    )
    modules = torch_tree.walk(model)
    plain, whole = torch_tree.describe(modules, False), torch_tree.describe(modules, True)
    assert [row[:5] for _, row in plain.rows] == [row[:5] for _, row in whole.rows]
    assert plain.rows[1][1] == ("Linear", "Linear", "F32", 3, 2, None, None, True)
    assert whole.rows[1][1][5:7] == (model[0].weight.data_ptr(), model[0].bias.data_ptr())
    assert list(plain.elsewhere.values()) == list(whole.elsewhere.values()) == [model[3]]
    assert not plain.holders and len(plain.parameters) == 7
    assert torch_tree.describe(modules, False).rows == plain.rows  # what is remembered of classes says the same


# --------------------------------------------------------------------- places


def test_find_places():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    model.add_module("é", nn.Sequential(nn.Linear(2, 2)))
    modules = dict(model.named_modules())
    paths = ["0.0", "1", "é.0", "0.1"]
    parents, keys, tops = _core.find_places(modules, paths)
    assert parents == [model[0], model, model[2], model[0]] and keys == ["0", "1", "0", "1"]
    assert all(top is modules[path] for top, path in zip(tops, paths, strict=True))
    assert _core.find_places(modules, []) == ([], [], [])
    with pytest.raises(KeyError, match=r"'2.0': there is no '2'"):
        _core.find_places(modules, ["2.0"])
    with pytest.raises(KeyError, match="'0.7' is not in its parent"):
        _core.find_places(modules, ["0.0", "0.7"])
    with pytest.raises(KeyError, match="is not in its parent"):
        _core.find_places({"a": 5}, ["a.b"])
    with pytest.raises(TypeError, match="must be a string, not int"):
        _core.find_places(modules, [5])
    for args in (([], paths), (modules, tuple(paths)), (modules,)):
        with pytest.raises(TypeError, match="a dict of modules"):
            _core.find_places(*args)


# -------------------------------------------------------------------- tensors


def layout(dtype: str = "F32", width: int = 3) -> Any:
    registry = AdapterRegistry()
    rows = [("", ("Model", "", "", 0, 0, None, None, False))]
    rows += [(name, ("Linear", "Linear", dtype, width, 5, None, None, False)) for name in ("a", "b")]
    registry.bind(rows)
    registry.add("x", json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["a", "b"]}), seed=1)
    return registry.layout("x")


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_tensors_over_an_arena(dtype):
    arena, *_, parameters, _, groups, _ = layout(dtype)
    tensors = _core.tensors_over(arena, groups, len(parameters))
    assert tensors is not None  # torch 2.13 has the table
    want: list[Any] = [None] * len(parameters)
    for _, kind, shape, offsets, indices in groups:
        made = torch_adapter._pieces(arena, torch_tree.FROM_NAME[kind], shape, offsets)
        for index, tensor in zip(indices, made, strict=True):
            want[index] = tensor
    for one, other in zip(tensors, want, strict=True):
        assert type(one) is torch.Tensor and one.shape == other.shape and one.stride() == other.stride()
        assert one.dtype == other.dtype and one.data_ptr() == other.data_ptr() and torch.equal(one, other)
        assert one.untyped_storage().nbytes() == one.numel() * one.element_size() and one.storage_offset() == 0
        assert one._version == 0 and one.is_leaf and not one.requires_grad
    tensors[0].add_(1)
    assert tensors[1]._version == 0 and torch.equal(tensors[0], want[0])


def test_tensors_keep_the_arena_and_let_go_of_it():
    arena, *_, parameters, _, groups, _ = layout(width=1 << 18)
    tensors = _core.tensors_over(arena, groups, len(parameters))
    kept = tensors[0].clone()
    del arena
    last = tensors[0]
    del tensors
    gc.collect()
    assert torch.equal(last, kept)
    last.zero_()


def test_tensors_without_elements():
    arena, *_, parameters, _, groups, _ = layout(width=0)
    tensors = _core.tensors_over(arena, groups, len(parameters))
    assert {tuple(tensor.shape) for tensor in tensors} == {(2, 0), (5, 2)}


def test_tensors_over_refuses_what_layout_did_not_say():
    arena, *_, parameters, _, groups, _ = layout()
    count = len(parameters)
    parameter, kind, shape, offsets, indices = groups[0]
    for args in (
        (arena, groups),
        (np.zeros(64, np.uint8), groups, count),
        (arena[:8], groups, count),
        (arena, groups, -1),
    ):
        with pytest.raises(TypeError, match="tensors_over"):
            _core.tensors_over(*args)
    with pytest.raises(ValueError, match=f"have {count} tensors, not {count + 1}"):
        _core.tensors_over(arena, groups, count + 1)
    wrong = [
        (parameter, kind, shape, [arena.nbytes], indices[:1]),
        (parameter, kind, shape, offsets[:1], [count]),
        (parameter, kind, shape, offsets[:1], [-1]),
        (parameter, kind, shape, offsets[:1] * 2, indices[:1] * 2),
        (parameter, kind, (1 << 40, 1 << 40), offsets[:1], indices[:1]),
        (parameter, kind, (-1, 2), offsets[:1], indices[:1]),
        (parameter, "I8", shape, offsets[:1], indices[:1]),
        (parameter, kind, shape, offsets, indices[:1]),
        (parameter, kind, (1,) * 9, offsets[:1], indices[:1]),
    ]
    for group in wrong:
        with pytest.raises(ValueError, match="group"):
            _core.tensors_over(arena, [group], 2)
    for group in (5, (parameter, kind, shape, offsets), (parameter, kind, list(shape), offsets, indices)):
        with pytest.raises(TypeError):
            _core.tensors_over(arena, [group], 1)
    with pytest.raises(OverflowError):
        _core.tensors_over(arena, groups, 1 << 80)


def test_a_torch_without_the_table(monkeypatch):
    arena, *_, parameters, _, groups, slots = layout("BF16")
    with_it = torch_adapter.Tensors.over(arena, groups, parameters, slots)
    monkeypatch.setattr(torch_adapter._core, "tensors_over", lambda *args: None)
    without = torch_adapter.Tensors.over(arena, groups, parameters, slots)
    for one, other in zip(with_it._tensors, without._tensors, strict=True):
        assert one.data_ptr() == other.data_ptr() and torch.equal(one, other) and one.dtype is other.dtype
