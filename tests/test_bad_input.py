"""Objects that lie, change under our hands or call back: an exception each time, never a crash or a deadlock."""

from __future__ import annotations

import gc
import json
import warnings
from typing import Any

import numpy as np
import pytest

from peftc import _core, nn
from peftc._core import AdapterRegistry


def lora(*targets: str, **fields: Any) -> str:
    return json.dumps({"peft_type": "LORA", "r": 4, "target_modules": list(targets), **fields})


class Model(nn.Module):
    def __init__(self, width: int = 16, dtype: str = "float32") -> None:
        super().__init__()
        self.a = nn.Linear(width, width, dtype=dtype)
        self.b = nn.Linear(width, width, dtype=dtype)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.b(self.a(x))


def bound(width: int = 16, dtype: str = "float32") -> tuple[Model, AdapterRegistry]:
    model, registry = Model(width, dtype), AdapterRegistry()
    registry.bind([("", model), ("a", model.a), ("b", model.b)])
    return model, registry


# ----------------------------------------------------------------- a layer's memory


@pytest.mark.parametrize("to", ["float64", "float32", "float16"])
@pytest.mark.parametrize("start", ["float64", "float32", "float16"])
def test_model_is_converted_while_merged(start: str, to: str) -> None:
    """Merged weights keep the dtype that they were made in, whatever becomes of the base."""
    model, registry = bound(64, start)
    registry.add("t", lora("a", init_lora_weights=False))
    registry.activate(["t"])
    x = np.random.default_rng(0).standard_normal((5, 64)).astype("float32")
    want = model(x)
    registry.merge()
    model.to(to)
    assert np.allclose(model(x), want, atol=2e-2)


@pytest.mark.parametrize("to", ["float64", "float32", "float16"])
@pytest.mark.parametrize("start", ["float64", "float32", "float16"])
def test_model_is_converted_under_modules_to_save(start: str, to: str) -> None:
    model, registry = bound(64, start)
    registry.add("t", lora("a", modules_to_save=["b"]))
    registry.activate(["t"])
    x = np.random.default_rng(0).standard_normal((5, 64)).astype("float32")
    want = model(x)
    model.to(to)
    assert np.allclose(model(x), want, atol=2e-2)
    with np.errstate(over="ignore"):
        registry.state_dict("t")["b.weight"][:] = 0
    assert np.allclose(model(x), model.b.bias, atol=2e-2)


def test_model_is_converted_under_a_trained_bias() -> None:
    """A bias of one dtype over a weight of another: refused with the remedy."""
    model, registry = bound()
    registry.add("t", lora("a", bias="all"))
    registry.activate(["t"])
    model.double()
    with pytest.raises(ValueError, match="module a was converted .* F64 now and the other F32; convert it back"):
        model(np.ones((1, 16)))
    registry.enabled = False
    assert model(np.ones((1, 16))).dtype == np.float64


def test_array_of_a_parameter_is_resized() -> None:
    layer = nn.Linear(200, 200)
    layer.weight.data = np.ones((200, 200), "float32")
    layer.weight.data.resize((1,))
    with pytest.raises(RuntimeError, match="the weight of Linear was given another shape in place"):
        layer(np.ones((2, 200), "float32"))
    layer.weight = nn.Parameter(np.ones((200, 200), "float32"))
    assert layer(np.ones((2, 200), "float32")).shape == (2, 200)


def test_array_of_a_parameter_gets_new_memory() -> None:
    layer, x = nn.Linear(200, 200), np.ones((2, 200), "float32")
    layer(x)
    layer.bias.data.__setstate__((1, (2,), np.dtype("float32"), False, b"\0" * 8))
    with pytest.raises(RuntimeError, match="the bias of Linear was given another shape"):
        layer(x)


def test_array_of_a_parameter_gets_another_dtype() -> None:
    layer = nn.Linear(200, 200)
    layer.weight.data = np.ones((200, 200), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.weight.data.dtype = np.float16
    for use in (lambda: layer.weight._convert("float64"), lambda: layer(np.ones((1, 200))), lambda: layer.weight + 1):
        with pytest.raises(RuntimeError, match="another dtype or memory layout in place"):
            use()


def test_value_replaces_the_parameter_it_is_assigned_to() -> None:
    layer = nn.Linear(300, 300)

    class Value:
        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            layer.weight = nn.Parameter(np.zeros((300, 300), "float32"))
            gc.collect()
            return np.ones((300, 300), "float32")

    old = layer.weight
    layer.weight = Value()
    assert layer.weight is not old and np.all(np.asarray(layer.weight) == 0)


# ------------------------------------------------------------------------ layer types


def test_layer_of_two_kinds() -> None:
    class Both(_core.Embedding, _core.Linear):
        pass

    class Other(_core.Linear, _core.Embedding):
        pass

    with pytest.raises(TypeError, match="was made as a Embedding"):
        _core.Linear.forward(Both(10, 16), np.full((4, 10), 1e30, "float32"))
    with pytest.raises(TypeError, match="was made as a Linear"):
        _core.Embedding.forward(Other(1000, 16), np.zeros(10000, "int64"))


def test_layer_of_a_new_class() -> None:
    layer = nn.Linear(16, 16)
    layer.__class__ = nn.Embedding
    with pytest.raises(TypeError, match="was made as a Linear"):
        layer(np.zeros(10000, "int64"))


@pytest.mark.parametrize(
    ("kind", "args", "name"),
    [(_core.Conv2d, (64, 64, 3), "stride"), (_core.Embedding, (64, 64), "padding_idx"), (_core.RMSNorm, (64,), "eps")],
)
def test_argument_initialises_the_layer_first(kind: type, args: tuple[int, ...], name: str) -> None:
    layer = kind.__new__(kind)

    class Argument:
        def __index__(self) -> int:
            layer.__init__(*[4] * len(args))
            return 1

        __float__ = __index__

    class Real:
        def __float__(self) -> float:
            return float(Argument().__index__())

    with pytest.raises(RuntimeError, match="initialised already"):
        layer.__init__(*args, **{name: Real() if name == "eps" else Argument()})
    assert layer.weight.shape[0] == 4


def test_bias_before_init() -> None:
    layer = _core.Linear.__new__(_core.Linear)
    with pytest.raises(RuntimeError, match="was not initialised"):
        layer.bias = np.zeros(0, "float32")
    layer.__init__(8, 5000, False)
    assert layer.bias is None and not layer.forward(np.zeros((1, 8), "float32")).any()


def test_parameter_subclass_with_its_own_negative() -> None:
    class Mine(nn.Parameter):
        def __neg__(self) -> str:
            return "minus"

    mine = Mine(np.ones(3, "float32"))
    assert (mine + 1).tolist() == [2, 2, 2] and (1 - mine).tolist() == [0, 0, 0] and -mine == "minus"


def test_dtype_that_is_not_of_numpy() -> None:
    get = getattr(np._core._multiarray_umath, "_get_sfloat_dtype", None)
    if get is None:
        pytest.skip("this NumPy has no such dtype to test with")
    x = np.ones(16).view(get()(1.0))
    _, registry = bound()
    for use in (
        lambda: nn.Linear(16, 16)(x),
        lambda: nn.Parameter(x),
        lambda: _core.gelu(x),
        lambda: nn.Linear(2, 2, dtype=x.dtype),
        lambda: registry.load("t", lora("a"), {"x": x}),
    ):
        with pytest.raises(TypeError, match="ScaledFloat"):
            use()
    with pytest.raises(_core.SafetensorError, match="ScaledFloat"):
        _core.safetensors_save({"x": x}, None)


# ----------------------------------------------------------------------- the registry


def test_repr_of_a_wrong_argument_calls_back() -> None:
    _, registry = bound()

    class Wrong:
        def __repr__(self) -> str:
            registry.bind([])
            registry.unmerge()
            return "wrong"

    for call in (registry.bind, registry.merge, registry.activate):
        with pytest.raises(TypeError, match="got wrong"):
            call([Wrong()])
    with pytest.raises(TypeError, match="got wrong"):
        registry.remove(Wrong())


def test_names_to_merge_come_from_code_that_calls_back() -> None:
    _, registry = bound()
    registry.add("t", lora("a"))

    def names() -> Any:
        registry.unmerge()
        registry.add("u", lora("b"))
        yield "t"

    registry.merge(names())
    assert registry.merged() == ["t"] and registry.names() == ["t", "u"]


def test_finalizer_changes_the_registry() -> None:
    """What a replaced module runs as it goes away cannot wait for the lock that its own thread holds."""
    _, registry = bound()
    seen = []

    class Loud:
        def __del__(self) -> None:
            try:
                registry.remove("t")
            except RuntimeError as error:
                seen.append(str(error))

    registry.bind([("loud", Loud())])
    registry.bind([("loud", object())])
    assert len(seen) == 1 and "are being changed" in seen[0]
    registry.add("t", lora("a"))
    assert registry.names() == ["t"]


def test_array_changes_the_registry_while_it_loads() -> None:
    _, registry = bound()
    registry.add("old", lora("a"))
    tensors: dict[str, Any] = {}

    class Tensor:
        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            registry.remove("old")
            registry.add("other", lora("b"))
            tensors.clear()
            return np.ones((4, 16), "float32")

    tensors |= {"a.lora_A.weight": Tensor(), "a.lora_B.weight": np.ones((16, 4), "float32")}
    assert registry.load("t", lora("a"), tensors) == ([], [])
    assert registry.names() == ["other", "t"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_array_is_interrupted_while_it_loads(kind: type[BaseException]) -> None:
    _, registry = bound()

    class Tensor:
        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        registry.load("t", lora("a"), {"a.lora_A.weight": Tensor()})
    assert registry.names() == []


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((4, 16, 1, 1, 1), "float32"),
        np.zeros((1,) * 64, "float32"),
        np.zeros((4, 16), "int32"),
        np.zeros((4, 16), "complex64"),
        np.zeros((4, 16), object),
        np.zeros((4, 16), [("a", "float32")]),
        np.zeros((4, 16), "S4"),
        np.zeros((4, 16), "longdouble"),
        np.zeros((0, 16), "float32"),
        np.float32(1),
        None,
        "text",
    ],
    ids=lambda value: f"{getattr(value, 'dtype', value)}-{getattr(value, 'ndim', '')}",
)
def test_tensor_that_does_not_fit(value: Any) -> None:
    _, registry = bound()
    with pytest.raises((TypeError, ValueError), match=r"a\.lora_A\.weight"):
        registry.load("t", lora("a"), {"a.lora_A.weight": value, "a.lora_B.weight": np.zeros((16, 4), "float32")})
    assert registry.names() == []


def test_tensor_of_any_memory_layout() -> None:
    _, registry = bound()
    want = np.arange(64, dtype="float32").reshape(4, 16)
    frozen = want.copy()
    frozen.flags.writeable = False
    shifted = np.frombuffer(b"\0" + want.tobytes(), "uint8")[1:].view("float32").reshape(4, 16)
    for value in (
        want.astype(">f4"),
        np.asfortranarray(want),
        np.repeat(want, 2, 1)[:, ::2],
        frozen,
        shifted,
        want[::-1][::-1],
    ):
        assert registry.load("t", lora("a"), {"a.lora_A.weight": value}) == (["a.lora_B.weight"], [])
        assert np.array_equal(registry.state_dict("t")["a.lora_A.weight"], want)
        registry.remove("t")


@pytest.mark.parametrize("name", ["", "a.b", "a\0b", "\ud800", 5, None])
def test_adapter_name_that_cannot_be(name: Any) -> None:
    _, registry = bound()
    with pytest.raises((TypeError, ValueError)):
        registry.add(name, lora("a"))
    assert len(registry) == 0


def test_names_of_a_megabyte() -> None:
    registry, name = AdapterRegistry(), "x" * 10**6
    registry.bind([("", nn.Module()), (name, nn.Linear(2, 2))])
    registry.add(name, lora(name))
    registry.activate([name])
    assert registry.active() == [name] and registry.adapted_modules(name) == [name]
    assert list(registry.state_dict(name)) == [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
    with pytest.raises(ValueError, match="already exists"):
        registry.add(name, lora(name))
    with pytest.raises(ValueError, match="not found"):
        registry.activate(["é" * 10**6])


# -------------------------------------------------------- modules that change places


def test_tied_module_gets_its_own() -> None:
    first, second, registry = nn.Linear(4, 4), nn.Linear(4, 4), AdapterRegistry()
    registry.bind([("", nn.Module()), ("x", first), ("y", first)])
    registry.bind([("y", second)])
    registry.add("t", lora("y"))
    assert registry.adapted_modules("t") == ["y"] and second._bound_name == "y" and first._bound_name == "x"


def test_first_of_tied_modules_is_replaced() -> None:
    first, second, registry = nn.Linear(4, 4), nn.Linear(4, 4), AdapterRegistry()
    registry.bind([("", nn.Module()), ("x", first), ("y", first), ("z", first)])
    registry.bind([("x", second)])
    assert first._bound_name == "y" and second._bound_name == "x"
    registry.add("t", lora("x", "y", "z"))
    assert registry.adapted_modules("t") == ["x", "y"]


def test_modules_swap_places() -> None:
    model, registry = bound()
    a, b = model.a, model.b
    registry.bind([("a", b), ("b", a)])
    assert (a._bound_name, b._bound_name) == ("b", "a")
    registry.add("t", lora("a", init_lora_weights=False))
    x = np.ones((1, 16), "float32")
    plain_a, plain_b = a(x), b(x)
    registry.activate(["t"])
    assert np.array_equal(a(x), plain_a) and not np.array_equal(b(x), plain_b)


def test_module_of_another_model_with_adapters() -> None:
    model, registry = bound()
    registry.add("t", lora("a"))
    _, other = bound()
    for name in ("a", "new"):
        with pytest.raises(ValueError, match="already belongs to another model"):
            other.bind([(name, model.a)])
    assert model.a.registry is registry
