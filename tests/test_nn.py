"""peftc.nn: layers against torch, the module tree, parameters, state dicts, copies."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn as tnn

import peftc
from peftc import nn
from peftc.nn import functional as F

RTOL = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3}
rng = np.random.default_rng(0)


def close(got, want, rtol=1e-5):
    """Equal relative to the largest value, with dtype and shape."""
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    scale = np.abs(want.astype(np.float64)).max(initial=1e-30)
    np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=0, atol=rtol * scale)


def draw(*shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def twin(ours, theirs):
    """Give torch's module our weights."""
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in ours.state_dict().items()})
    return theirs


def bad(layer, value, error, text):
    with pytest.raises(error) as caught:
        layer(value)
    assert text in str(caught.value)


# -------------------------------------------------------------------- against torch


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (2, 0, 7), (1, 7), (64, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, shape, bias):
    ours = nn.Linear(7, 5, bias=bias, dtype=dtype)
    theirs = twin(ours, tnn.Linear(7, 5, bias=bias, dtype=getattr(torch, dtype)))
    x = draw(*shape, dtype=dtype)
    close(ours(x), theirs(torch.from_numpy(x)), RTOL[dtype])


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    ours = nn.Conv1D(5, 7)
    assert ours.weight.shape == (7, 5)
    x = draw(2, 3, 7)
    close(ours(x), twin(ours, Conv1D(5, 7))(torch.from_numpy(x)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
        {"kernel_size": 3, "dilation": 2, "groups": 2, "bias": False},
        {"kernel_size": 5, "padding": "same"},
        {"kernel_size": 1, "padding": "valid", "groups": 4},
    ],
)
def test_conv2d(options):
    ours = nn.Conv2d(4, 8, **options)
    theirs = twin(ours, tnn.Conv2d(4, 8, **options))
    for shape in [(2, 4, 9, 8), (4, 9, 8), (0, 4, 9, 8)]:
        x = draw(*shape)
        close(ours(x), theirs(torch.from_numpy(x)))


def test_conv2d_refuses():
    conv = nn.Conv2d(4, 8, 3)
    bad(conv, draw(2, 3, 9, 9), ValueError, "(batch, 4, height, width)")
    bad(conv, draw(2, 4, 2, 2), ValueError, "")
    for options in [{"groups": 3}, {"stride": 0}, {"padding": -1}, {"padding": "full"}, {"stride": (1, 2, 3)}]:
        with pytest.raises(ValueError):
            nn.Conv2d(4, 8, 3, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_embedding(dtype):
    ours = nn.Embedding(11, 6, padding_idx=-1, dtype=dtype)
    theirs = twin(ours, tnn.Embedding(11, 6, padding_idx=-1, dtype=getattr(torch, dtype)))
    assert ours.padding_idx == theirs.padding_idx == 10
    assert not ours.weight.data[10].any()
    for ids in [rng.integers(0, 11, (3, 4)), np.array(5), np.empty((2, 0), np.int64)]:
        close(ours(ids), theirs(torch.from_numpy(np.asarray(ids))), 0)
    for kind in ["int8", "int32", "uint8", "uint64"]:
        close(ours(np.arange(5, dtype=kind)), theirs(torch.arange(5)), 0)
    close(ours([[1, 2], [3, 4]]), theirs(torch.tensor([[1, 2], [3, 4]])), 0)


def test_embedding_refuses():
    table = nn.Embedding(11, 6)
    bad(table, np.array([3, 11]), IndexError, "id 11 is not in a table of 11 rows")
    bad(table, np.array([-1]), IndexError, "id -1")
    bad(table, np.array([1.0]), TypeError, "ids must be integers")
    bad(table, np.array([True]), TypeError, "ids must be integers")
    with pytest.raises(ValueError, match="padding_idx"):
        nn.Embedding(4, 2, padding_idx=4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("affine,bias", [(True, True), (True, False), (False, False)])
def test_layer_norm(dtype, affine, bias):
    kind = getattr(torch, dtype)
    ours = nn.LayerNorm(9, eps=1e-6, elementwise_affine=affine, bias=bias, dtype=dtype)
    theirs = tnn.LayerNorm(9, eps=1e-6, elementwise_affine=affine, bias=bias, dtype=kind)
    for p in ours.parameters():
        p.data = draw(9, dtype=dtype)
    twin(ours, theirs)
    x, residual = draw(2, 5, 9, dtype=dtype), draw(2, 5, 9, dtype=dtype)
    close(ours(x), theirs(torch.from_numpy(x)), RTOL[dtype])
    close(ours(x, residual), theirs(torch.from_numpy(x + residual)), RTOL[dtype])
    assert ours(x[:0]).shape == (0, 5, 9)
    bad(ours, x[..., :8], ValueError, "(..., 9)")
    with pytest.raises(ValueError, match="different shapes"):
        ours(x, residual[0])


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm(eps):
    ours = nn.RMSNorm(9, eps=eps)
    ours.weight = draw(9)
    theirs = twin(ours, tnn.RMSNorm(9, eps=eps))
    x, residual = draw(4, 9), draw(4, 9)
    close(ours(x), theirs(torch.from_numpy(x)))
    close(ours(x, residual), theirs(torch.from_numpy(x + residual)))


def test_functional():
    x = draw(3, 4, 6)
    t = torch.from_numpy(x)
    close(F.gelu(x), tnn.functional.gelu(t))
    close(F.gelu(x, "tanh"), tnn.functional.gelu(t, approximate="tanh"))
    close(F.relu(x), tnn.functional.relu(t))
    close(F.silu(x), tnn.functional.silu(t))
    close(F.tanh(x), torch.tanh(t))
    for dim in (-1, 0, 1):
        close(F.softmax(x * 50, dim), tnn.functional.softmax(t * 50, dim))
    w, b = draw(5, 6), draw(5)
    close(F.linear(x, w, b), tnn.functional.linear(t, torch.from_numpy(w), torch.from_numpy(b)))
    close(F.layer_norm(x), tnn.functional.layer_norm(t, (6,)))
    assert F.gelu(x.astype(np.float16)).dtype == np.float16
    for wrong in (np.arange(3), np.array([True]), np.array([1j]), "x"):
        with pytest.raises((TypeError, ValueError)):
            F.gelu(wrong)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention(dtype):
    q, k, v = draw(2, 5, 8, dtype=dtype), draw(2, 7, 8, dtype=dtype), draw(2, 7, 8, dtype=dtype)
    mask = rng.random((2, 7)) < 0.6
    mask[:, 0] = True

    def split(t):
        return torch.from_numpy(t).view(2, -1, 2, 4).transpose(1, 2)

    for m in (None, mask, mask.astype(np.int64)):
        bias = None if m is None else torch.from_numpy(mask)[:, None, None, :]
        want = tnn.functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=bias)
        close(F.attention(q, k, v, 2, m), want.transpose(1, 2).reshape(2, 5, 8), RTOL[dtype])
    nobody = F.attention(q, k, v, 2, np.zeros((2, 7)))
    close(nobody, np.broadcast_to(v.mean(1, keepdims=True), nobody.shape), 1e-5)
    for args in [(q, k, v[:, :3], 2), (q, k, v, 3), (q, k, v, 0), (q[0], k[0], v[0], 2), (q, k, v, 2, mask[:1])]:
        with pytest.raises(ValueError):
            F.attention(*args)


def test_dropout():
    x = np.ones((100, 1000), np.float32)
    peftc.manual_seed(1)
    y = F.dropout(x, 0.25)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.01
    peftc.manual_seed(1)
    assert np.array_equal(F.dropout(x, 0.25), y)
    assert not F.dropout(x, 1.0).any()
    assert F.dropout(x, 0.5, training=False) is x
    layer = nn.Dropout(0.5)
    assert not np.array_equal(layer(x), x)
    assert layer.eval()(x) is x
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            nn.Dropout(p)


# ------------------------------------------------------------------ input of any kind


def test_memory_layouts():
    """Strides, byte order and read-only memory change nothing."""
    layer = nn.Linear(6, 4)
    x = draw(5, 6)
    want = layer(x)
    wide = np.zeros((10, 12), np.float32)
    wide[::2, ::2] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for same in (np.asfortranarray(x), wide[::2, ::2], x[::-1][::-1], frozen, x.astype(">f4"), unaligned, x.tolist()):
        got = layer(same)
        assert np.array_equal(got, want)
        assert got.dtype == np.float32


def test_dtypes_in_and_out():
    """The result has the input's dtype; float64 on either side means float64."""
    x = draw(5, 6)
    want = nn.Linear(6, 4)
    for weights in ("float32", "float16", "float64", "bfloat16"):
        layer = nn.Linear(6, 4, dtype=weights)
        layer.load_state_dict(want.state_dict())
        for dtype in ("float16", "float32", "float64"):
            expected = "float64" if weights == "float64" else dtype
            got = layer(x.astype(dtype))
            assert got.dtype == expected
            np.testing.assert_allclose(got.astype("f8"), want(x), atol=5e-2)
        assert layer(x.tolist()).dtype == ("float64" if weights == "float64" else "float32")


def test_bfloat16_input():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = draw(5, 6).astype(ml_dtypes.bfloat16)
    layer = nn.Linear(6, 4)
    got = layer(x)
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(got.astype("f4"), layer(x.astype("f4")), atol=0.02)


def test_linear_refuses():
    layer = nn.Linear(6, 4)
    bad(layer, np.ones((2, 6), int), TypeError, "int64; convert it with .astype")
    bad(layer, [[1, 2, 3, 4, 5, 6]], TypeError, "int64")
    bad(layer, np.ones((2, 6), bool), TypeError, "bool")
    bad(layer, np.ones((2, 6), complex), TypeError, "complex128")
    bad(layer, np.array(["a"] * 6), TypeError, "Linear: expected an input")
    bad(layer, None, TypeError, "Linear: expected an input")
    bad(layer, draw(2, 5), ValueError, "Linear: expected an input of shape (..., 6), got (2, 5)")
    bad(layer, np.float32(1), ValueError, "got ()")
    for wrong in [(), (draw(2, 6), 1)]:
        with pytest.raises(TypeError):
            layer(*wrong)
    for arguments in [(-1, 4), (6, -1), ("6", 4), (6,), (6, 4, True, "int8"), (6, 4, True, "float12")]:
        with pytest.raises((TypeError, ValueError)):
            nn.Linear(*arguments)
    with pytest.raises(ValueError, match="too large"):
        nn.Linear(1 << 40, 1 << 40)
    with pytest.raises(RuntimeError, match="initialised already"):
        layer.__init__(6, 4)
    with pytest.raises(RuntimeError, match=r"super\(\).__init__"):
        nn.Linear.__new__(nn.Linear)(draw(2, 6))


def test_zero_widths():
    assert nn.Linear(0, 3)(np.empty((2, 0), "f4")).shape == (2, 3)
    assert nn.Linear(3, 0)(draw(2, 3)).shape == (2, 0)


# ------------------------------------------------------------------------ parameters


def test_parameter_like_an_array():
    layer = nn.Linear(3, 2)
    w = layer.weight
    assert layer.weight is w
    assert isinstance(w, nn.Parameter)
    assert (w.shape, w.dtype, w.ndim, w.size, len(w)) == ((2, 3), np.float32, 2, 6, 2)
    assert w.requires_grad and w.grad is None
    a = w.data
    assert a is w.data and np.shares_memory(np.asarray(w), a)
    assert np.array_equal(w + 1, a + 1) and np.array_equal(2 * w, 2 * a) and np.array_equal(a @ w.T, a @ a.T)
    assert np.array_equal(-w, -a) and np.array_equal(w - w, a - a) and np.array_equal(w**2, a**2)
    assert np.array_equal(np.exp(w), np.exp(a)) and w.mean() == a.mean() and np.array_equal(w[0], a[0])
    assert np.asarray(w, np.float64).dtype == np.float64
    w[0] = 7
    assert (a[0] == 7).all()
    w.grad = np.ones((2, 3))
    assert w.grad.shape == (2, 3)
    w.grad = None
    assert w.grad is None
    with pytest.raises(ValueError, match="gradient"):
        w.grad = np.ones(3)
    with pytest.raises(AttributeError):
        w.nothing  # noqa: B018
    assert "Parameter containing" in repr(w)


def test_assigning_weights():
    layer = nn.Linear(3, 2)
    w = layer.weight
    x = draw(4, 3)
    for value in (draw(2, 3), draw(3, 2).T, draw(2, 3, dtype="f8").astype("f4"), [[1.0, 2, 3], [4, 5, 6]]):
        layer.bias = np.zeros(2, np.asarray(value).dtype)
        layer.weight = value
        assert layer.weight is w
        np.testing.assert_allclose(layer(x), x @ np.asarray(value).T, rtol=1e-5, atol=1e-6)
    frozen = draw(2, 3)
    frozen.flags.writeable = False
    layer.weight = frozen
    assert w.data is frozen
    for value, error in [
        (draw(3, 3), ValueError),
        (np.ones((2, 3), int), TypeError),
        (None, TypeError),
        ("x", TypeError),
    ]:
        with pytest.raises(error):
            layer.weight = value
    assert w.data is frozen
    w.data = draw(2, 3)
    with pytest.raises(TypeError, match="the same dtype"):
        layer.bias = np.zeros(2, "f8")
        layer(x)
    layer.bias = None
    assert layer.bias is None and "bias=False" in repr(layer)
    np.testing.assert_allclose(layer(x), x @ w.data.T, rtol=1e-5, atol=1e-6)
    layer.bias = np.ones(2, "f4")
    np.testing.assert_allclose(layer(x), x @ w.data.T + 1, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError):
        nn.Embedding(3, 2).bias = np.zeros(2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.words.weight


def test_tied_parameters():
    """A Parameter assigned to a second layer is shared, and counted once."""
    model = Tied()
    assert [n for n, _ in model.named_parameters()] == ["words.weight"]
    assert list(model.state_dict()) == ["words.weight", "head.weight"]
    model.words.weight.data = np.ones((5, 3), "f4")
    assert model.head(np.ones(3, "f4")).tolist() == [3.0] * 5
    again = pickle.loads(pickle.dumps(model))
    assert again.head.weight is again.words.weight
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        nn.Linear(4, 5).weight = model.words.weight


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_short_dtypes(dtype):
    """bfloat16 needs no NumPy type of its own until somebody asks for the array."""
    layer = nn.Linear(6, 4)
    x = draw(5, 6)
    exact = torch.from_numpy(layer.weight.data.copy())
    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    want = tnn.functional.linear(torch.from_numpy(x), exact.to(kind).float(), None)
    layer.bias = None
    layer.to(dtype)
    close(layer(x), want)
    close(copy.deepcopy(layer)(x), want)
    close(pickle.loads(pickle.dumps(layer))(x), want)
    assert layer.weight.shape == (4, 6) and layer.weight._dtype_name == dtype
    assert layer.float().weight.dtype == np.float32
    close(layer(x), want)
    fresh = nn.Linear(6, 4, bias=False, dtype=dtype)
    fresh.load_state_dict({"weight": exact})
    close(fresh(x), want)


def test_bfloat16_arrays():
    layer = nn.Linear(6, 4, dtype="bfloat16")
    try:
        import ml_dtypes
    except ImportError:
        with pytest.raises(TypeError, match="pip install ml_dtypes"):
            layer.weight.data  # noqa: B018
        return
    assert layer.weight.data.dtype == ml_dtypes.bfloat16
    layer.weight.data[:] = 1
    assert (layer.weight._raw == 0x3F80).all()


def test_default_initialisation():
    """torch's distributions."""
    peftc.manual_seed(0)
    w = nn.Linear(100, 300).weight.data
    assert np.abs(w).max() <= 0.1 and abs(w.std() - 0.1 / 3**0.5) < 1e-3
    bias = nn.Linear(100, 3000).bias.data
    assert np.abs(bias).max() <= 0.1 and abs(bias.std() - 0.1 / 3**0.5) < 3e-3
    assert np.abs(nn.Conv2d(4, 50, 5).weight.data).max() <= 0.1
    e = nn.Embedding(300, 100).weight.data
    assert abs(e.std() - 1) < 0.01 and abs(e.mean()) < 0.02
    c = nn.Conv1D(300, 100)
    assert abs(c.weight.data.std() - 0.02) < 1e-3 and not c.bias.any()
    n = nn.LayerNorm(4)
    assert (n.weight.data == 1).all() and not n.bias.any()


def test_seed_fixes_weights():
    """Whatever is looked at first, and with any number of threads."""

    def make(threads, backwards):
        peftc.set_num_threads(threads)
        peftc.manual_seed(7)
        layers = [nn.Linear(300, 300), nn.Embedding(100, 90), nn.Linear(5, 5)]
        for layer in reversed(layers) if backwards else layers:
            layer.weight.data  # noqa: B018
        return [layer.weight.data for layer in layers]

    before = peftc.get_num_threads()
    try:
        first, second = make(1, False), make(2, True)
    finally:
        peftc.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0][:5, :5], first[2])


# --------------------------------------------------------------------------- the tree


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(np.ones(4, "f4"))

    def forward(self, x):
        return self.norm(self.lin(x)) * self.scale


class TorchBlock(tnn.Module):
    def __init__(self):
        super().__init__()
        self.lin = tnn.Linear(4, 4)
        self.norm = tnn.LayerNorm(4)
        self.scale = tnn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.norm(self.lin(x)) * self.scale


def trees():
    ours = nn.Sequential(Block(), nn.ModuleList([nn.Embedding(3, 4), nn.ReLU()]), nn.ModuleDict({"a": Block()}))
    theirs = tnn.Sequential(
        TorchBlock(), tnn.ModuleList([tnn.Embedding(3, 4), tnn.ReLU()]), tnn.ModuleDict({"a": TorchBlock()})
    )
    return ours, theirs


def test_names_are_torchs():
    ours, theirs = trees()
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    assert [n for n, _ in ours[0].named_parameters(prefix="x")] == [
        n for n, _ in theirs[0].named_parameters(prefix="x")
    ]
    assert len(list(ours.modules())) == len(list(theirs.modules()))
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    x = draw(2, 4)
    twin(ours, theirs)
    close(ours[0](x), theirs[0](torch.from_numpy(x)))
    assert ours.get_submodule("2.a.lin") is ours[2]["a"].lin
    assert ours.get_submodule("") is ours
    assert ours.get_parameter("2.a.scale") is ours[2]["a"].scale
    with pytest.raises(AttributeError, match="'linear'"):
        ours.get_submodule("2.a.linear")
    with pytest.raises(AttributeError):
        ours.get_parameter("2.a")


def test_shared_modules_are_listed_once():
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, inner)
    assert [n for n, _ in model.named_modules()] == ["", "0"]
    assert [n for n, _ in model.named_modules(remove_duplicate=False)] == ["", "0", "1"]
    assert len(list(model.parameters())) == 2


def test_modes_and_flags():
    ours, _ = trees()
    assert ours.training and ours[0].lin.training
    assert ours.eval() is ours and not ours[2]["a"].norm.training
    assert ours.train()[2]["a"].norm.training
    ours.requires_grad_(False)
    assert not any(p.requires_grad for p in ours.parameters())
    assert ours.num_parameters(only_trainable=True) == 0
    seen = []
    ours.apply(seen.append)
    assert seen[-1] is ours and len(seen) == len(list(ours.modules()))


def test_repr_is_torchs():
    ours, theirs = trees()
    fix = repr(theirs).replace("TorchBlock", "Block").replace("bias=True)", "bias=True)")
    assert repr(ours) == fix
    assert repr(nn.Sequential()) == repr(tnn.Sequential())
    assert repr(nn.Conv2d(4, 8, 3, padding=1, bias=False)) == repr(tnn.Conv2d(4, 8, 3, padding=1, bias=False))


def test_containers():
    items = nn.ModuleList([nn.ReLU()])
    items.append(nn.Tanh()).extend([nn.SiLU(), nn.GELU()])
    assert [type(m).__name__ for m in items] == ["ReLU", "Tanh", "SiLU", "GELU"]
    assert len(items) == 4 and isinstance(items[-1], nn.GELU) and len(items[1:3]) == 2
    items[0] = nn.Identity()
    assert isinstance(items[0], nn.Identity) and next(n for n, _ in items.named_children()) == "0"
    for index in (4, -5):
        with pytest.raises(IndexError):
            items[index]
    with pytest.raises(TypeError):
        items.append(3)
    with pytest.raises(NotImplementedError):
        items(draw(2))
    named = nn.Sequential({"first": nn.ReLU(), "second": nn.Identity()})
    assert [n for n, _ in named.named_children()] == ["first", "second"] and isinstance(named[1], nn.Identity)
    table = nn.ModuleDict({"x": nn.ReLU()})
    assert "x" in table and list(table) == ["x"] and len(table) == 1
    del table["x"]
    with pytest.raises(KeyError):
        table["x"]
    for name in ("", "a.b", "forward", 3):
        with pytest.raises(KeyError):
            table[name] = nn.ReLU()


# --------------------------------------------------------------- state dicts and copies


def test_load_state_dict():
    ours, theirs = trees()
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    result = ours.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert all(np.array_equal(v, state[k]) for k, v in ours.state_dict().items())
    before = {k: v.copy() for k, v in ours.state_dict().items()}
    wrong = dict(state, more=np.zeros(1, "f4"))
    wrong["0.lin.weight"] = np.zeros((4, 5), "f4")
    del wrong["0.lin.bias"]
    with pytest.raises(RuntimeError) as caught:
        ours.load_state_dict(wrong)
    torch_error = None
    try:
        theirs.load_state_dict({k: torch.from_numpy(v) for k, v in wrong.items()})
    except RuntimeError as error:
        torch_error = str(error)
    for text in ('Unexpected key(s) in state_dict: "more"', 'Missing key(s) in state_dict: "0.lin.bias"'):
        assert text in str(caught.value) and text in torch_error
    assert "size mismatch for 0.lin.weight" in str(caught.value)
    assert all(np.array_equal(v, before[k]) for k, v in ours.state_dict().items())
    del wrong["0.lin.weight"]
    result = ours.load_state_dict(wrong, strict=False)
    assert result == (["0.lin.weight", "0.lin.bias"], ["more"])
    with pytest.raises(TypeError):
        ours.load_state_dict([1])
    with pytest.raises(TypeError):
        ours.load_state_dict(dict(state, **{"0.lin.bias": np.zeros(4, int)}))


def test_state_dict_shares_memory_and_read_only_weights_are_replaced():
    layer = nn.Linear(3, 2)
    layer.state_dict()["weight"][:] = 1
    assert (layer.weight.data == 1).all()
    frozen = np.zeros((2, 3), "f4")
    frozen.flags.writeable = False
    layer.weight = frozen
    layer.load_state_dict({"weight": np.ones((2, 3)), "bias": np.ones(2)})
    assert layer.weight.data.dtype == np.float32 and (layer.weight.data == 1).all() and not frozen.any()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(how):
    layers = nn.Sequential(
        nn.Linear(4, 3, bias=False, dtype="float64"),
        nn.Conv1D(3, 4),
        nn.Conv2d(2, 4, (3, 1), stride=2, padding=1, groups=2),
        nn.Embedding(5, 3, padding_idx=1),
        nn.LayerNorm(4, eps=1e-3, bias=False),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4),
        nn.Dropout(0.3),
        Block(),
    )
    layers[0].weight.requires_grad = False
    layers[0].note = "kept"
    layers[3].eval()
    again = how(layers)
    assert repr(again) == repr(layers)
    for (name, a), (other, b) in zip(layers.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and a.requires_grad == b.requires_grad
        assert np.array_equal(a.data, b.data) and not np.shares_memory(a.data, b.data)
    assert again[0].note == "kept" and not again[3].training and again[2].training
    assert again[3].padding_idx == 1 and again[4].eps == 1e-3
    with pytest.raises(TypeError):
        nn.Module(3)


# -------------------------------------------------------------------- memory and threads


def test_modules_are_collected():
    model = nn.Sequential(Block(), nn.Linear(3, 3))
    model.cycle = [model]
    alive = [weakref.ref(m) for m in model.modules()] + [weakref.ref(model[1].weight)]
    model[1](draw(2, 3))
    del model
    gc.collect()
    assert not any(ref() for ref in alive)


def test_weights_replaced_while_others_compute():
    """A forward pass uses the weights it began with, to the end."""
    layer = nn.Linear(256, 256, bias=False)
    x = np.ones((64, 256), "f4")
    layer.weight = np.zeros((256, 256), "f4")
    stop = threading.Event()
    wrong = []

    def run():
        while not stop.is_set():
            y = layer(x)
            if not (y == y[0, 0]).all() or y[0, 0] % 256:
                wrong.append(y)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(200):
        layer.weight = np.full((256, 256), i % 3, "f4")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_subclass_and_overridden_forward():
    class Scaled(nn.Linear):
        def __init__(self, n):
            super().__init__(n, n)
            self.scale = 2.0

        def forward(self, x):
            return super().forward(x) * self.scale

    layer = Scaled(3)
    x = draw(2, 3)
    assert np.array_equal(layer(x), nn.Linear.forward(layer, x) * 2)
    assert layer.kind == "Linear"
    assert np.array_equal(copy.deepcopy(layer)(x), layer(x))


def test_fused_activation():
    layer = nn.Linear(6, 5)
    x = draw(40, 6)
    for name, function in [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", F.tanh)]:
        np.testing.assert_allclose(layer.forward_act(x, name), function(layer(x)), rtol=1e-5, atol=1e-6)
    assert np.array_equal(layer.forward_act(x, "none"), layer(x))
    with pytest.raises(ValueError, match="gelu_tanh"):
        layer.forward_act(x, "selu")
