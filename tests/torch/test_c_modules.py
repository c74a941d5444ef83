"""Making, listing and flagging torch's modules in C, against what torch does."""

from __future__ import annotations

import gc
import random
import weakref
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
    linear, dropout = nn.Linear(3, 2), nn.Dropout(0.5)
    made = _core.modules_like([linear, linear, dropout, linear])
    assert [type(module) for module in made] == [nn.Linear, nn.Linear, nn.Dropout, nn.Linear]
    assert len({id(module) for module in made}) == 4 and len({id(module._parameters) for module in made}) == 4
    assert made[2].p == 0.5 and made[3].weight is linear.weight
    assert _core.modules_like([]) == []
    with pytest.raises(TypeError, match="list of templates, not tuple"):
        _core.modules_like((linear,))
    with pytest.raises(AttributeError):
        _core.modules_like([linear, 5])


def test_trees_like_makes_children_too():
    template = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.ReLU()))
    template.register_module("none", None)
    one, other = _core.trees_like([template, template])
    assert str(one) == str(template) and one.none is None and list(one._modules) == ["0", "1", "none"]
    modules = [*one.modules(), *other.modules(), *template.modules()]
    assert len({id(module) for module in modules}) == len(modules) == 12
    assert one[0].weight is other[0].weight is template[0].weight
    ordered = nn.Module()
    ordered._modules = OrderedDict(b=nn.ReLU(), a=nn.ReLU())
    (made,) = _core.trees_like([ordered])
    assert list(made._modules) == ["b", "a"] and type(made._modules) is OrderedDict
    assert made.a is not ordered.a and made._modules["b"] is not ordered._modules["b"]
    with pytest.raises(TypeError, match="list of templates, not Sequential"):
        _core.trees_like(template)
    template[1].append(template)
    with pytest.raises(RecursionError):
        _core.trees_like([template])
    template[1]._modules["0"] = 5
    with pytest.raises(AttributeError, match="__dict__"):
        _core.trees_like([template])


@pytest.mark.parametrize("enabled", [True, False])
def test_listing_leaves_the_garbage_collector_as_it_was(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        _core.walk_modules(nn.Identity(), {nn.Identity: ()}, print)
        assert gc.isenabled() is enabled
        with pytest.raises(TypeError):
            _core.walk_modules(5, {int: ()}, print)
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


def listed(root: Any) -> list[tuple[str, Any]]:
    return _core.walk_modules(root, {nn.Linear: ()}, lambda cls: ("base_layer",) if issubclass(cls, Wrapper) else ())


def same(one: list[tuple[str, Any]], two: list[tuple[str, Any]]) -> bool:
    return [(name, id(module)) for name, module in one] == [(name, id(module)) for name, module in two]


def test_walk_without_wrappers_is_named_modules():
    shared = nn.Linear(2, 2)
    root = nn.Sequential(shared, nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared}), nn.Identity())
    root.none = None
    root.register_module("nothing", None)
    want = list(root.named_modules())
    assert same(listed(root), want)
    layer = nn.TransformerEncoderLayer(8, 2)
    assert same(listed(layer), list(layer.named_modules()))


def test_walk_keeps_the_order_of_an_ordered_dict():
    root = nn.Module()
    root._modules = OrderedDict(a=nn.Identity(), b=nn.Identity())
    root._modules.move_to_end("a")
    assert [name for name, _ in listed(root)] == ["", "b", "a"]


def test_a_base_stands_in_its_wrappers_place():
    base = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inner, outer = Wrapper(base), Derived(None)
    outer.base_layer = inner
    root = nn.ModuleDict({"a": nn.ModuleDict({"fc": outer, "plain": nn.Identity()}), "again": inner})
    want = [
        ("", root),
        ("a", root["a"]),
        ("a.fc", base),
        ("a.fc.0", base[0]),
        ("a.fc.1", base[1]),
        ("a.plain", root["a"]["plain"]),
    ]
    assert same(listed(root), want)
    assert same(listed(outer), [("", base), ("0", base[0]), ("1", base[1])])
    far = nn.Module()
    far.token_adapter = outer
    far_leads = {
        nn.Module: ("token_adapter", "base_layer", "base_layer"),
        nn.Sequential: (),
        nn.Linear: (),
        nn.ReLU: (),
    }
    assert same(_core.walk_modules(far, far_leads, print), [("", base), ("0", base[0]), ("1", base[1])])
    nested = Wrapper(nn.Sequential(Wrapper(nn.Identity())))
    assert [(name, type(module)) for name, module in listed(nested)] == [("", nn.Sequential), ("0", nn.Identity)]
    root["last"] = Wrapper(None)
    with pytest.raises(KeyError, match="last.*Wrapper has lost its base_layer"):
        listed(root)


def random_tree(rng: random.Random, count: int) -> nn.Module:
    """Modules of many kinds below each other: shared ones, cycles, wrappers, gaps, dicts with an order of their own."""
    made: list[Any] = [nn.Module()]
    for _ in range(count):
        parent = rng.choice(made)
        kind = rng.randrange(8)
        child: Any = [nn.Module, nn.Sequential, nn.Identity][kind % 3]() if kind < 6 else Wrapper(rng.choice(made))
        if kind == 5:
            child = rng.choice(made)
        parent._modules[f"m{rng.randrange(4 * count)}"] = child if rng.random() < 0.95 else None
        if rng.random() < 0.02:
            parent._modules = OrderedDict(reversed(parent._modules.items()))
        if rng.random() < 0.05:
            parent.__dict__ = dict(reversed(parent.__dict__.items()))
        if kind == 6:
            child.lora_A["default"].again = made[0]
        if child is not None and kind != 5:
            made.append(child)
    return made[0]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_known_of_classes_changes_nothing(seed):
    """Of classes that are known, modules are read ahead."""
    ways = {
        nn.Module: (),
        nn.Sequential: (),
        nn.Identity: (),
        nn.Linear: (),
        nn.ModuleDict: (),
        Wrapper: ("base_layer",),
    }
    root = random_tree(random.Random(seed), [30, 300, 6000][seed % 3])

    def outcome(known: dict[Any, Any]) -> Any:
        try:
            return [(name, id(module)) for name, module in _core.walk_modules(root, known, ways.get)]
        except RecursionError:  # wrappers around each other
            return "too deep"

    want = outcome({})
    assert outcome(ways) == want
    assert outcome({nn.Module: (), Wrapper: ("base_layer",)}) == want
    if want == "too deep":
        return
    rows = [("", module) for _, module in _core.walk_modules(root, ways, print)]
    parameters = _core.describe_modules(rows, nn.Linear, {}, lambda module: "row")[1]
    assert [id(p) for p in parameters] == [id(p) for _, module in rows for p in module._parameters.values()]


def test_each_module_is_listed_once_whatever_the_cycles():
    root = nn.Sequential(nn.Sequential(nn.Identity()))
    root[0].again = root
    root[0].wrapped = Wrapper(root)
    assert [name for name, _ in listed(root)] == ["", "0", "0.0"]
    one = Wrapper(None)
    one.base_layer = one
    root.again = one
    with pytest.raises(RecursionError, match="again.*contain each other"):
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
    root._modules = {}
    with pytest.raises(TypeError, match="what leads from a Sequential must be a tuple, not NoneType"):
        _core.walk_modules(root, {}, lambda cls: None)
    for leads, find in (((), print), ({}, 5)):
        with pytest.raises(TypeError, match="a module, a dict of leads"):
            _core.walk_modules(root, leads, find)


# ---------------------------------------------------------------------- places


def test_put_items():
    layers = [Wrapper(nn.Linear(2, 2)) for _ in range(3)]
    new = [nn.Identity() for _ in layers]
    where = ("_modules", "lora_A", "_modules")
    _core.put_items(layers, ((where, "other", new), ((), "r", [1, 2, 3]), ((), "shared", new[0])))
    assert [layer.r for layer in layers] == [1, 2, 3] and all(layer.__dict__["shared"] is new[0] for layer in layers)
    assert [layer.lora_A["other"] for layer in layers] == new and list(layers[0].lora_A) == ["default", "other"]
    ordered = nn.Module()
    ordered._modules = OrderedDict(a=nn.Identity())
    _core.put_items([ordered], ((("_modules",), "b", [new[0]]),))
    assert list(ordered._modules) == ["a", "b"]
    _core.put_items([], ((where, "other", []),))
    del layers[1].lora_A
    with pytest.raises(KeyError, match="Wrapper has nothing at"):
        _core.put_items(layers, ((where, "third", new),))
    assert "third" in layers[0].lora_A and "third" not in layers[2].lora_A
    with pytest.raises(TypeError, match="int is neither a dict nor an object with a __dict__"):
        _core.put_items([{"a": 5}], ((("a",), "b", [1]),))
    for puts in (((where, "other", new[:2]),), ((list(where), "other", new),), ((where, "other"),), (5,)):
        with pytest.raises(TypeError, match="as long as"):
            _core.put_items(layers, puts)
    with pytest.raises(TypeError, match="a tuple of puts"):
        _core.put_items(layers, [])
    with pytest.raises(TypeError, match="unhashable"):
        _core.put_items(layers[:1], ((where, [], new[:1]),))


def test_drop_adapter():
    layers = [Wrapper(nn.Linear(2, 2)) for _ in range(3)]
    for layer in layers:
        layer.r = {"default": 2, "other": 3}
        layer.lora_E = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2))})
        layer.lora_dropout = nn.ModuleDict({"default": nn.Identity(), "other": nn.Identity()})
    layers[1].lora_A["other"] = nn.Linear(2, 2)
    layers[2]._modules["lora_E"] = None
    going = [weakref.ref(layers[0].lora_A["default"]), weakref.ref(layers[0].lora_dropout["default"])]
    fields = ("lora_A", "lora_E", "nothing"), ("r", "lora_dropout"), ("lora_E",)
    assert _core.drop_adapter(layers, *fields, "default") == [0, 2]
    # The second holds "other", and so do all as a rank and a dropout, which is not holding.
    assert [ref() for ref in going] == [None, None]
    assert layers[0].r == {"other": 3} and list(layers[0].lora_dropout) == ["other"]
    assert list(layers[1].lora_A) == ["other"] and not layers[0].lora_A and not hasattr(layers[0], "lora_E")
    assert _core.drop_adapter(layers, *fields, "default") == [0, 2]
    left = layers[1].lora_A["other"]
    assert _core.drop_adapter(layers, *fields, "other") == [0, 1, 2]
    assert isinstance(left, nn.Linear) and not layers[1].lora_A and not layers[1].r
    assert _core.drop_adapter([], (), (), (), "default") == []


def test_what_is_dropped_goes_when_all_is_out():
    """A finalizer sees every layer without the adapter."""
    layers = [Wrapper(nn.Linear(2, 2)) for _ in range(3)]
    seen = []
    for layer in layers:
        weakref.finalize(layer.lora_A["default"], lambda: seen.append([len(one.lora_A) for one in layers]))
    assert _core.drop_adapter(layers, ("lora_A",), (), (), "default") == [0, 1, 2]
    assert seen == [[0, 0, 0]] * 3


def test_drop_adapter_of_ordered_dicts_and_of_no_layers():
    layer = nn.Module()
    layer.lora_A = nn.Module()
    layer.lora_A._modules = OrderedDict(a=nn.Identity(), b=nn.Identity())
    assert _core.drop_adapter([layer], ("lora_A",), (), (), "a") == []
    assert list(layer.lora_A._modules) == ["b"] and len(layer.lora_A._modules) == 1
    with pytest.raises(TypeError, match="neither a dict nor an object"):
        _core.drop_adapter([5], ("lora_A",), (), (), "a")
    with pytest.raises(TypeError, match="three tuples of fields"):
        _core.drop_adapter([layer], ["lora_A"], (), (), "a")
    with pytest.raises(TypeError, match="unhashable"):
        _core.drop_adapter([layer], ("lora_A",), (), (), [])


def test_parameters_of_one_adapter():
    layer = Wrapper(nn.Linear(2, 2))
    layer.lora_E = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2)), "other": nn.Parameter(torch.zeros(1))})
    layer.r = {"default": 2}
    bare = Wrapper(None)
    bare.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)})
    found = _core.parameters_of([layer, bare], ("lora_A", "lora_E", "r", "nothing"), "default")
    inner = layer.lora_A["default"]
    want = [inner.weight, inner.bias, layer.lora_E["default"], bare.lora_A["default"].weight]
    assert [id(one) for one in found] == [id(one) for one in want]
    assert _core.parameters_of([layer], ("lora_A", "lora_E"), "other")[0] is layer.lora_E["other"]
    assert _core.parameters_of([layer], ("lora_A",), "none") == [] and _core.parameters_of([], (), "default") == []
    with pytest.raises(TypeError, match="neither a dict nor an object"):
        _core.parameters_of([5], ("lora_A",), "default")
    with pytest.raises(TypeError, match="a list of layers"):
        _core.parameters_of(layer, ("lora_A",), "default")


def test_parameters_of_layers_that_have_grown_differently():
    """A name is at another place in each container, or in none, or in one whose dict is of another kind."""
    layers = [Wrapper(nn.Linear(2, 2)) for _ in range(40)]
    for i, layer in enumerate(layers):
        for other in range(i % 5):
            layer.lora_A[f"other{other}"] = nn.Linear(2, 2)
        layer.lora_A["this"] = nn.Linear(2, 2, bias=i % 2 == 0)
        if i % 3 == 0:
            del layer.lora_A["default"]  # its entry stays, empty
        if i % 7 == 0:
            del layer.lora_A["this"]
        if i % 11 == 0:
            layer.lora_A._modules = OrderedDict(reversed(layer.lora_A._modules.items()))
        if i % 13 == 5:
            layer.lora_A._modules["this"] = None
    want = []
    for layer in layers:
        child = layer.lora_A._modules.get("this")
        want += [] if child is None else list(child._parameters.values())
    found = _core.parameters_of(layers, ("lora_A",), "this")
    assert [id(one) for one in found] == [id(one) for one in want if one is not None]
    found = _core.parameters_of(layers, ("lora_A",), str(b"this", "ascii"))  # equal, and another string
    assert [id(one) for one in found] == [id(one) for one in want if one is not None]


def test_own_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.ReLU())
    found = _core.own_parameters([model, *model])
    assert [id(one) for one in found] == [id(one) for one in model.parameters()]
    with pytest.raises(TypeError, match="list of modules"):
        _core.own_parameters(model)


# ------------------------------------------------------------------------ eval


class OwnWay(nn.Module):
    def train(self, mode: bool = True) -> OwnWay:
        self.called = mode
        return self


KINDS = {nn.Sequential: 0, nn.Linear: 0, nn.ModuleDict: 0, Wrapper: 1}


def test_put_in_eval():
    model = nn.Sequential(nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), OwnWay(), nn.Sequential(nn.Linear(1, 1)))
    model.register_module("none", None)
    asked = []
    _core.put_in_eval(model, dict(KINDS), lambda cls: asked.append(cls) or 2)
    assert asked == [OwnWay] and model[2].called is False and model[2].training is True
    assert not any(module.training for module in model.modules() if type(module) is not OwnWay)


def test_put_in_eval_passes_over_layers_that_sleep():
    layer = Wrapper(nn.Linear(2, 2)).eval()
    layer.lora_A.train()
    layer.base_layer.train()
    _core.put_in_eval(layer, KINDS, print)
    assert layer.lora_A.training and not layer.base_layer.training
    layer._awake = True
    _core.put_in_eval(layer, KINDS, print)
    assert not layer.lora_A.training
    layer.train()
    _core.put_in_eval(layer, KINDS, print)
    assert not any(module.training for module in layer.modules())


def test_put_in_eval_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="no torch module"):
        _core.put_in_eval(Exception(), {Exception: 0}, print)
    with pytest.raises(ValueError, match="a Linear is plain"):
        _core.put_in_eval(nn.Linear(1, 1), {}, lambda cls: 7)
    with pytest.raises(TypeError, match="a dict of kinds"):
        _core.put_in_eval(nn.Linear(1, 1), (), print)
    top = nn.Sequential()
    top.append(top)
    with pytest.raises(RecursionError):
        _core.put_in_eval(top, KINDS, print)
