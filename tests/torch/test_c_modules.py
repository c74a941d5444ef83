"""Making, listing and flagging torch's modules in C, against what torch does."""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from peftc import _core


class Wrapper(nn.Module):
    def __init__(self, base: nn.Module | None) -> None:
        super().__init__()
        if base is not None:
            self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2)})


class Derived(Wrapper):
    pass


# --------------------------------------------------------------------- making


def test_module_like_shares_what_is_no_container():
    template = nn.Linear(3, 2)
    template.register_forward_hook(print)
    template.extra, template.names, template.order = [1, [2]], {"a"}, OrderedDict(b=1, a=2)
    made = _core.module_like(template)
    assert type(made) is nn.Linear and made is not template
    assert list(made.__dict__) == list(template.__dict__)
    for name, value in template.__dict__.items():
        assert type(made.__dict__[name]) is type(value), name
        if type(value) in (dict, OrderedDict, list, set):
            assert made.__dict__[name] is not value, name
            assert made.__dict__[name] == value, name
        else:
            assert made.__dict__[name] is value, name
    assert made.weight is template.weight and made.extra[1] is template.extra[1]
    assert list(made.order) == ["b", "a"]
    made.weight = nn.Parameter(torch.zeros(2, 3))
    made.child = nn.Identity()
    assert template.weight is not made.weight and not hasattr(template, "child")
    assert made(torch.ones(1, 3)).shape == (1, 2)
    assert list(made.state_dict()) == ["weight", "bias"]


def test_modules_like_makes_many():
    template = nn.Linear(3, 2)
    made = _core.modules_like(template, 100)
    assert len({id(module) for module in made}) == 100 and {type(module) for module in made} == {nn.Linear}
    assert len({id(module._parameters) for module in made}) == 100
    assert _core.modules_like(template, 0) == []
    with pytest.raises(ValueError, match="negative"):
        _core.modules_like(template, -1)
    with pytest.raises(TypeError):
        _core.modules_like(template, "3")
    with pytest.raises(TypeError, match="2 positional"):
        _core.modules_like(template)


@pytest.mark.parametrize("enabled", [True, False])
def test_modules_like_leaves_the_garbage_collector_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        _core.modules_like(nn.Identity(), 3)
        assert gc.isenabled() is enabled
        with pytest.raises(AttributeError):
            _core.modules_like(5, 3)
        assert gc.isenabled() is enabled
        _core.walk_modules(nn.Identity(), None)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_made_modules_are_collected():
    class Kept(nn.Module):
        pass

    made = _core.module_like(Kept())
    made.itself = [made]
    del made
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Kept]


def test_what_cannot_be_a_template():
    class Slotted:
        __slots__ = ("a",)

    class Picky:
        def __new__(cls, needed):
            return super().__new__(cls)

    for thing in (5, None, Slotted()):
        with pytest.raises(AttributeError, match="__dict__"):
            _core.module_like(thing)
    with pytest.raises(TypeError):
        _core.module_like(nn.Linear)
    with pytest.raises(TypeError):
        _core.module_like(Picky(1))


# ---------------------------------------------------------------------- flags


def test_set_requires_grad():
    parameters = [nn.Parameter(torch.zeros(2)), torch.zeros(2), nn.Parameter(torch.zeros(3))]
    _core.set_requires_grad(parameters, True)
    assert all(parameter.requires_grad for parameter in parameters)
    _core.set_requires_grad(tuple(parameters), False)
    assert not any(parameter.requires_grad for parameter in parameters)
    _core.set_requires_grad([], True)


def test_set_requires_grad_falls_back_to_setting_the_attribute():
    class Plain:
        pass

    class Own(torch.Tensor):
        def __setattr__(self, name: str, value: Any) -> None:
            seen.append((name, value))

    seen: list[tuple[str, Any]] = []
    plain, own = Plain(), torch.zeros(2).as_subclass(Own)
    _core.set_requires_grad([plain, own, nn.Parameter(torch.zeros(1))], True)
    assert plain.requires_grad is True and seen == [("requires_grad", True)]


def test_set_requires_grad_raises_what_torch_raises():
    with pytest.raises(RuntimeError, match="floating point"):
        _core.set_requires_grad([torch.zeros(2, dtype=torch.int64)], True)
    result = nn.Parameter(torch.zeros(2)) * 2
    with pytest.raises(RuntimeError, match="leaf"):
        _core.set_requires_grad([result], False)
    with pytest.raises(AttributeError):
        _core.set_requires_grad([5], True)
    with pytest.raises(TypeError, match="list or tuple"):
        _core.set_requires_grad({1}, True)


# -------------------------------------------------------------------- listing


def listed(root: Any, stop: type | None = Wrapper) -> list[tuple[str, Any]]:
    return _core.walk_modules(root, stop)


def same(one: list[tuple[str, Any]], two: list[tuple[str, Any]]) -> bool:
    return [(name, id(module)) for name, module in one] == [(name, id(module)) for name, module in two]


def test_walk_without_wrappers_is_named_modules():
    shared = nn.Linear(2, 2)
    root = nn.Sequential(shared, nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared}), nn.Identity())
    root.none = None
    root.register_module("nothing", None)
    want = list(root.named_modules(remove_duplicate=False))
    assert same(listed(root), want) and same(listed(root, None), want)
    layer = nn.TransformerEncoderLayer(8, 2)
    assert same(listed(layer), list(layer.named_modules(remove_duplicate=False)))


def test_walk_keeps_the_order_of_an_ordered_dict():
    root = nn.Module()
    root._modules = OrderedDict(a=nn.Identity(), b=nn.Identity())
    root._modules.move_to_end("a")
    assert [name for name, _ in listed(root)] == ["", "b", "a"]


def test_a_wrapper_stands_for_its_base():
    base = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inner, outer = Wrapper(base), Derived(None)
    outer.base_layer = inner
    root = nn.ModuleDict({"a": nn.ModuleDict({"fc": outer, "plain": nn.Identity()}), "last": Wrapper(None)})
    want = [
        ("", root),
        ("a", root["a"]),
        ("a.fc", outer),
        ("a.fc.0", base[0]),
        ("a.fc.1", base[1]),
        ("a.plain", root["a"]["plain"]),
        ("last", root["last"]),
    ]
    assert same(listed(root), want)
    assert same(listed(outer), [("", outer), ("0", base[0]), ("1", base[1])])
    nested = Wrapper(nn.Sequential(Wrapper(nn.Identity())))
    assert [name for name, _ in listed(nested)] == ["", "0"]


@pytest.mark.parametrize("where", ["child", "grandchild", "base", "chain"])
def test_cycles_are_refused(where):
    root = nn.Sequential(nn.Sequential(nn.Identity()))
    if where == "child":
        root.again = root
    elif where == "grandchild":
        root[0].again = root
    elif where == "base":
        root[0].again = Wrapper(root)
    else:
        one = Wrapper(nn.Sequential())
        one.base_layer.base_layer = nn.Sequential()
        one.base_layer.base_layer.base_layer = one.base_layer
        root.again = one
    with pytest.raises(RecursionError, match="again"):
        listed(root)


def test_too_deep_is_an_exception():
    root = top = nn.Module()
    for _ in range(5000):
        top.a = nn.Module()
        top = top.a
    try:
        with pytest.raises(RecursionError):
            listed(root)
    finally:  # or the recursion would be in its destruction
        while root is not None:
            root = root._modules.pop("a", None)


def test_what_is_no_module_is_named():
    root = nn.Sequential(nn.Identity())
    root._modules["0"] = 5
    with pytest.raises(TypeError, match="'0' is no torch module: int"):
        listed(root)
    root._modules = {7: nn.Identity()}
    with pytest.raises(TypeError, match="must be strings, not int"):
        listed(root)
    root._modules = [1]
    with pytest.raises(TypeError, match="must be a dict, not list"):
        listed(root)
    with pytest.raises(TypeError, match="a module, and a type"):
        listed(root, 5)
