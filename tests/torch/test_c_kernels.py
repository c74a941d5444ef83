"""The C functions that work on torch tensors, against torch's own operations, and what they leave to torch."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from peftc import _core

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WIDTHS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 48, 49, 64, 100, 130, 257, 300]
RANKS = [1, 2, 3, 4, 7, 8, 12, 16, 17, 32, 49, 64, 130]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def spread(shape: tuple[int, ...], dtype: torch.dtype, rng: random.Random) -> torch.Tensor:
    """Random numbers whose rows may lie further apart than their length."""
    *lead, cols = shape
    if rng.random() < 0.5:
        return torch.randn(shape).to(dtype)
    begin = rng.randrange(4)
    return torch.randn(*lead, cols + begin + rng.randrange(1, 5)).to(dtype)[..., begin : begin + cols]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """`want` in float64."""
    error = (got.double() - want).abs() / (1 + want.abs())
    assert got.dtype == dtype
    assert error.numel() == 0 or error.max().item() <= TOLERANCE[dtype], (got.shape, error.max())


def term(k: int, n: int, dtype: torch.dtype, rng: random.Random) -> tuple:
    r = rng.choice(RANKS)
    a, b = torch.randn(r, k).to(dtype) / k**0.5, torch.randn(n, r).to(dtype) / r**0.5
    e = rng.choice([None, torch.randn(r).to(dtype), torch.randn(r, 1).to(dtype)])
    bias = rng.choice([None, torch.randn(n).to(dtype)])
    return torch.nn.Parameter(a, requires_grad=rng.random() < 0.5), b, rng.choice([0.5, -1.25, 2]), e, bias


def expected(x: torch.Tensor, y: torch.Tensor, terms: tuple) -> torch.Tensor:
    out = y.double().clone()
    for a, b, scaling, e, bias in terms:
        h = x.double() @ a.detach().double().T
        if e is not None:
            h = h * e.double().flatten()
        out += scaling * (h @ b.double().T)
        if bias is not None:
            out += scaling * bias.double()
    return out


@pytest.fixture(params=[1, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest):
    before = _core.get_num_threads()
    _core.set_num_threads(request.param)
    yield request.param
    _core.set_num_threads(before)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lead = rng.choice([(), (1,), (2,), (3,), (4,), (5,), (2, 3), (16,), (2, 9), (67,), (3, 50), (1, 1)])
    k, n = rng.choice(WIDTHS), rng.choice(WIDTHS)
    x, y = spread((*lead, k), dtype, rng), spread((*lead, n), dtype, rng)
    terms = tuple(term(k, n, dtype, rng) for _ in range(rng.choice([1, 1, 1, 2, 3])))
    want = expected(x, y, terms)
    out = rng.choice([y, torch.full((*lead, n), torch.nan).to(dtype)])
    assert _core.lowrank_forward(x, y, out, terms) is True
    close(out, want, dtype)


def test_forward_of_many_rows_is_the_same_for_any_number_of_threads():
    x, y = torch.randn(1000, 300), torch.randn(1000, 200)
    terms = ((torch.randn(16, 300), torch.randn(200, 16), 0.5, None, None),)
    results = []
    before = _core.get_num_threads()
    for n in (1, 2, 4):
        _core.set_num_threads(n)
        out = torch.empty_like(y)
        assert _core.lowrank_forward(x, y, out, terms)
        results.append(out)
    _core.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_forward_rounds_once(dtype):
    """Two terms that cancel leave y as it was, though each alone would round it."""
    x, y = torch.randn(5, 64).to(dtype), torch.randn(5, 32).to(dtype)
    a, b = torch.randn(8, 64).to(dtype), torch.randn(32, 8).to(dtype)
    out = torch.empty_like(y)
    assert _core.lowrank_forward(x, y, out, ((a, b, 1.0, None, None), (a, b, -1.0, None, None)))
    assert torch.allclose(out, y, atol=1e-4, rtol=0) or torch.equal(out, y)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lead = rng.choice([(1,), (2,), (3,), (5,), (2, 3), (16,), (67,), (3, 50), (200,)])
    k, n = rng.choice(WIDTHS), rng.choice(WIDTHS)
    x, grad = spread((*lead, k), dtype, rng), spread((*lead, n), dtype, rng)
    a, b, scaling, e, _ = term(k, n, dtype, rng)
    a = a.detach()
    wide = [t.double().requires_grad_() for t in (x, a, b)] + [None if e is None else e.double().requires_grad_()]
    h = wide[0] @ wide[1].T
    result = ((h if e is None else h * wide[3].flatten()) @ wide[2].T) * scaling
    result.backward(grad.double())
    outs = [torch.full(t.shape, torch.nan).to(dtype) for t in (x, a, b)]
    outs.append(None if e is None else torch.full(e.shape, torch.nan).to(dtype))
    wanted = [t if t is None or rng.random() < 0.7 else None for t in outs]
    hidden = base = None
    if rng.random() < 0.5 and dtype is not torch.float64:
        hidden = torch.full((a.shape[0], x.numel() // k), torch.nan)
        out = torch.empty_like(grad)
        assert _core.lowrank_forward(x, grad, out, ((a, b, scaling, e, None),), hidden) is True
        assert torch.allclose(hidden.double(), (x.double() @ a.double().T).reshape(-1, len(a)).T, atol=1e-4)
    if rng.random() < 0.5 and wanted[0] is not None:
        base = spread((*lead, k), dtype, rng)
        wide[0].grad += base.double()
        if rng.random() < 0.5:
            base = wanted[0].copy_(base)
    assert _core.lowrank_backward(grad, x, a, b, e, scaling, hidden, base, *wanted) is True
    for got, leaf in zip(wanted, wide, strict=True):
        if got is not None:
            # the sums over rows grow with their number: compare relative to the largest
            scale = max(1.0, leaf.grad.abs().max().item())
            close(got / scale, leaf.grad / scale, dtype)
    for out in set(map(id, outs)) - set(map(id, wanted)):
        assert all(torch.isnan(t).all() for t in outs if id(t) == out and t is not None)


def test_backward_is_the_same_for_any_number_of_threads():
    grad, x, a, b = torch.randn(700, 200), torch.randn(700, 300), torch.randn(16, 300), torch.randn(200, 16)
    results = []
    before = _core.get_num_threads()
    for n in (1, 2, 4):
        _core.set_num_threads(n)
        outs = [torch.empty_like(x), torch.empty_like(a), torch.empty_like(b), torch.empty(16)]
        assert _core.lowrank_backward(grad, x, a, b, torch.ones(16), 0.5, None, None, *outs)
        results.append(outs)
    _core.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adding_to_a_weight(dtype, transpose, seed, threads):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    k, n = rng.choice(WIDTHS), rng.choice(WIDTHS)
    a, b, scaling, e, _ = term(k, n, dtype, rng)
    shape = (k, n) if transpose else (n, k)
    w = spread(shape, dtype, rng)
    delta = scaling * ((b.double() if e is None else b.double() * e.double().flatten()) @ a.detach().double())
    want = w.double() + (delta.T if transpose else delta)
    out = rng.choice([w, torch.full(shape, torch.nan).to(dtype)])
    assert _core.add_lowrank_to_weight(w, a, b, scaling, e, transpose, out) is True
    close(out, want, dtype)


def test_adding_to_a_weight_leaves_other_tensors_to_torch():
    w, a, b, e = torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3), torch.randn(3)
    before = w.clone()
    for args in (
        (w, a, b, 0.5, e, True, w),
        (w, b, a, 0.5, e, False, w),
        (w, a, b, 0.5, e[:2], False, w),
        (w, a, b, torch.tensor(0.5), e, False, w),
        (w, a, b, 0.5, e, False, w[:, :7]),
        (w, a, b, 0.5, e, False, w.double()),
        (w, a, b, 0.5, e, False, None),
        (w, a, b, 0.5, e, False, torch.empty(1, 8).expand(6, 8)),
        (w.T.contiguous().T, a, b, 0.5, e, False, w),
        (w.view(6, 4, 2), a, b, 0.5, e, False, w),
        (w[:3], a, b[:3], 0.5, None, False, a),
        (w[:5], a, b[:5], 0.5, e, False, w[1:]),
        (w, a.to("meta"), b, 0.5, e, False, w),
    ):
        assert _core.add_lowrank_to_weight(*args) is False
    assert torch.equal(w, before)
    with pytest.raises(TypeError, match="takes 7"):
        _core.add_lowrank_to_weight(w)


def test_no_rows():
    x, y = torch.empty(0, 8), torch.empty(0, 6)
    a, b = torch.randn(4, 8), torch.randn(6, 4)
    assert _core.lowrank_forward(x, y, y, ((a, b, 1.0, None, None),)) is True
    da, db = torch.ones_like(a), torch.ones_like(b)
    assert _core.lowrank_backward(y, x, a, b, None, 1.0, torch.empty(4, 0), None, None, da, db, None) is True
    assert not da.any() and not db.any()


def test_not_finite_stays_in_its_row():
    x, y = torch.randn(6, 32), torch.randn(6, 20)
    x[2, 5] = torch.inf
    out = torch.empty_like(y)
    assert _core.lowrank_forward(x, y, out, ((torch.ones(4, 32), torch.ones(20, 4), 1.0, None, None),))
    assert torch.isinf(out[2]).all() and torch.isfinite(out[[0, 1, 3, 4, 5]]).all()


# ------------------------------------------------------------------- refusals


class Subclass(torch.Tensor):
    pass


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def fake(t: torch.Tensor) -> torch.Tensor:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(t)


REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "None": lambda t: None,
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "type": lambda t: torch.Tensor,
    "other dtype": lambda t: t.double(),
    "16 bits": lambda t: t.half(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "columns": lambda t: t.t().contiguous().t(),
    "too wide": lambda t: torch.cat([t, t[:, :1]], 1),
    "too narrow": lambda t: t[:, :-1].contiguous(),
    "too long": lambda t: torch.cat([t, t[:1]]),
    "too short": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "scalar": lambda t: torch.tensor(1.0),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "subclass": lambda t: t.as_subclass(Subclass),
    "freed": freed,
    "fake": fake,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape),
    "imaginary part": lambda t: torch.complex(t, t).conj().imag,
    "uninitialised": lambda t: torch.nn.UninitializedParameter(),
    "misaligned": lambda t: (
        torch.frombuffer(bytearray(4 * t.numel() + 5), dtype=torch.uint8)[1:][: 4 * t.numel()]
        .view(torch.uint8)
        .reshape(t.shape[0], -1)
    ),
}


def forward_case() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(6, 8), "y": torch.randn(6, 5), "out": torch.randn(6, 5), "a": torch.randn(3, 8),
            "b": torch.randn(5, 3), "e": torch.randn(3, 1), "bias": torch.randn(1, 5)}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["x", "y", "out", "a", "b", "e"])
@pytest.mark.parametrize("kind", REFUSED)
def test_forward_leaves_other_tensors_to_torch(kind, where):
    case = forward_case()
    try:
        case[where] = REFUSED[kind](case[where])
    except IndexError:
        pytest.skip("a column cannot be made so")
    if (where, kind) in {("e", "None"), ("e", "columns"), ("e", "imaginary part")}:
        pytest.skip("a column of one stays one")
    before = {name: value.clone() for name, value in case.items() if type(value) is torch.Tensor and kind != "freed"
              and value.device.type == "cpu" and not value.is_sparse}  # fmt: skip
    terms = ((case["a"], case["b"], 0.5, case["e"], None),)
    assert _core.lowrank_forward(case["x"], case["y"], case["out"], terms) is False
    for name, value in before.items():
        assert torch.equal(case[name], value), name


@pytest.mark.parametrize("where", range(12))
@pytest.mark.parametrize(
    "kind", ["list", "other dtype", "columns", "too long", "too short", "meta", "subclass", "freed"]
)
def test_backward_leaves_other_tensors_to_torch(kind, where):
    grad, x, a, b = torch.randn(6, 5), torch.randn(6, 8), torch.randn(3, 8), torch.randn(5, 3)
    args: list = [grad, x, a, b, torch.randn(3, 1), 0.5, torch.randn(3, 6), torch.randn(6, 8)]
    args += [*(torch.zeros_like(t) for t in (x, a, b)), torch.zeros(3, 1)]
    if where == 5:
        args[5] = torch.tensor(0.5)
    elif kind == "columns" and where in (4, 11):
        pytest.skip("a column of one stays one")
    else:
        args[where] = REFUSED[kind](args[where])
    assert _core.lowrank_backward(*args) is False
    for i in range(8, 12):
        if i != where:
            assert not args[i].any()


def test_negative_views_are_not_read_as_they_lie():
    case = forward_case()
    terms = ((case["a"], case["b"], 0.5, None, None),)
    for name in ("x", "y", "out"):
        changed = {**case, name: torch._neg_view(case[name])}
        assert _core.lowrank_forward(changed["x"], changed["y"], changed["out"], terms) is False
    column = torch.complex(torch.randn(6), torch.randn(6)).conj().imag.unsqueeze(-1)
    terms = ((torch.randn(3, 1), case["b"], 0.5, None, None),)
    assert column.stride(-1) == 1 and column.is_neg()
    assert _core.lowrank_forward(column, case["y"], case["out"], terms) is False


def test_overlapping_memory_is_refused():
    whole = torch.randn(6, 20)
    x, a, b = torch.randn(6, 5), torch.randn(3, 5), torch.randn(5, 3)
    terms = ((a, b, 1.0, None, None),)
    y, shifted = whole[:, :5], whole[:, 1:6]
    assert _core.lowrank_forward(x, y, shifted, terms) is False
    assert _core.lowrank_forward(x, y, x, terms) is False
    assert _core.lowrank_forward(x, x, x, terms) is False
    assert _core.lowrank_forward(x, y, torch.randn(1, 5).expand(6, 5), terms) is False
    assert _core.lowrank_forward(a, y[:3], a, ((a, b, 1.0, None, None),)) is False
    assert _core.lowrank_backward(y, x, a, b, None, 1.0, None, None, x, None, None, None) is False
    same = torch.randn(3, 5)
    assert _core.lowrank_backward(y, x, a, b, None, 1.0, None, None, None, same, same.view(5, 3), None) is False
    wide = torch.randn(6, 10)  # what else dx consists of: dx itself, or apart from it
    args = (y, x, a, b, None, 1.0, None, wide[:, :5])
    assert _core.lowrank_backward(*args, wide[:, 1:6], None, None, None) is False
    assert _core.lowrank_backward(*args, wide[:, :5], None, None, None) is True
    hidden = torch.empty(3, 6)
    assert _core.lowrank_forward(x, y, torch.empty(6, 5), terms, hidden) is True
    assert _core.lowrank_forward(x, y, torch.empty(6, 5), (*terms, *terms), hidden) is False
    assert _core.lowrank_forward(x, y, torch.empty(6, 5), terms, hidden[:2]) is False
    assert _core.lowrank_forward(x, y, torch.empty(6, 5), terms, hidden.double()) is False
    assert _core.lowrank_forward(x, y, hidden.view(-1)[:15].view(3, 5).expand(3, 5), terms, hidden) is False
    row = torch.randn(1, 5).expand(6, 5)  # reading one row six times is fine
    out = torch.empty(6, 5)
    assert _core.lowrank_forward(row, y, out, terms) is True
    close(out, expected(row, y, terms), torch.float32)


def test_terms_of_another_form_are_refused():
    case = forward_case()
    a, b = case["a"], case["b"]
    good = (a, b, 0.5, None, None)
    for terms in ([good], (list(good),), (good[:4],), ((*good, 1),), ((a, b, "1", None, None),), ((b, a, 1, None, None),),
                  ((a, b, 10**400, None, None),), (good,) * 33, None, ((a, b, 1, None, torch.randn(4)),),
                  ((a, b, 1, torch.randn(4), None),), ((a, b, 1, torch.randn(1, 3), None),)):  # fmt: skip
        assert _core.lowrank_forward(case["x"], case["y"], case["out"], terms) is False
    assert _core.lowrank_forward(case["x"], case["y"], case["out"], ()) is True
    assert torch.equal(case["out"], case["y"])
    with pytest.raises(TypeError, match=r"lowrank_forward\(\) takes 4"):
        _core.lowrank_forward(case["x"])
    with pytest.raises(TypeError, match=r"lowrank_backward\(\) takes 12"):
        _core.lowrank_backward(case["x"])
    huge = 5000
    many = ((torch.zeros(huge, 8), torch.zeros(5, huge), 1.0, None, None),)
    assert _core.lowrank_forward(case["x"], case["y"], case["out"], many) is False


def test_wrapped_tensors_are_left_to_torch():
    """vmap, grad and functionalize wrap tensors in objects of the plain type that have no memory of their own."""
    a, b, seen = torch.randn(3, 8), torch.randn(5, 3), []

    def probe(x):
        y = torch.zeros(6, 5)
        seen.append(_core.lowrank_forward(x, y, torch.empty(6, 5), ((a, b, 1.0, None, None),)))
        return x.sum()

    torch.vmap(probe)(torch.randn(2, 6, 8))
    torch.func.grad(probe)(torch.randn(6, 8))
    torch.func.functionalize(probe)(torch.randn(6, 8))
    assert seen == [False] * len(seen) and len(seen) == 3


@pytest.mark.parametrize("how", ["removed", "newer", "not a capsule"])
def test_without_the_exchange_interface(how):
    """A torch without the table of functions, or with one that we do not know, gives the same results."""
    code = f"""
import ctypes, torch
how = {how!r}
if how == "removed":
    del torch.Tensor.__dlpack_c_exchange_api__
elif how == "not a capsule":
    torch.Tensor.__dlpack_c_exchange_api__ = 7
else:
    class Table(ctypes.Structure):
        _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p),
                    ("rest", ctypes.c_void_p * 5)]
    table, name = Table(2, 0, None), b"dlpack_exchange_api"
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    torch.Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(table), name, None)
from peftc import _core
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    x, y, a, b = (torch.randn(s).to(dtype) for s in ((2, 3, 8), (2, 3, 5), (3, 8), (5, 3)))
    out = torch.empty_like(y)
    terms = ((torch.nn.Parameter(a), b, 0.5, None, None),)
    assert _core.lowrank_forward(x, y, out, terms) is True
    assert torch.allclose(out, y + 0.5 * (x @ a.T @ b.T), atol=0.1)
    for bad in (x.to("meta"), x.to_sparse(), x.int(), x[..., None, None, None, None, None, None, None, :], 5,
                torch._neg_view(x), x.transpose(0, 1)):
        assert _core.lowrank_forward(bad, y, out, terms) is False, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_before_torch_is_imported():
    code = """
import sys
from peftc import _core
assert "torch" not in sys.modules
assert _core.lowrank_forward(1, 2, 3, ((4, 5, 6, None, None),)) is False
assert "torch" not in sys.modules
import torch
x, y, a, b = torch.randn(6, 8), torch.randn(6, 5), torch.randn(3, 8), torch.randn(5, 3)
assert _core.lowrank_forward(x, y, y, ((a, b, 1.0, None, None),)) is True
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_several_threads_at_once():
    x, a, b = torch.randn(200, 300), torch.randn(16, 300), torch.randn(100, 16)
    y = torch.randn(200, 100)
    want = torch.empty_like(y)
    terms = ((a, b, 0.5, None, None),)
    assert _core.lowrank_forward(x, y, want, terms)
    good = []

    def work():
        for _ in range(50):
            out = torch.empty_like(y)
            good.append(_core.lowrank_forward(x, y, out, terms) and torch.equal(out, want))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(good) == 200 and all(good)


# ------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_noise_is_what_torch_draws(dtype, p):
    generator = torch.Generator()
    value = torch.ones((), dtype=dtype).div_(1 - p).item()
    for seed, count in enumerate([1, 2, 311, 312, 313, 624, 625, 5000]):
        generator.manual_seed(seed)
        torch.rand(seed * 37, generator=generator)  # not from the first word on
        state = generator.get_state()
        want = torch.empty(count, dtype=dtype).bernoulli_(1 - p, generator=generator).div_(1 - p)
        out = torch.full((count,), torch.nan).to(dtype)
        assert _core.dropout_noise(state.numpy(), 1 - p, value, out) is True
        assert torch.equal(out, want) and torch.equal(state, generator.get_state())


def test_dropout_noise_leaves_other_states_to_torch():
    state = torch.Generator().manual_seed(3).get_state().numpy()
    out = torch.zeros(10)
    none: list = [state.tolist(), state[:-1], state[::2], state.astype("int8"), None]
    for damage in ({8: 0}, {11: 255}, {8: 5}, {16: 255, 17: 255}):  # left and next that do not go together
        other = state.copy()
        for at, byte in damage.items():
            other[at] = byte
        none.append(other)
    for one in none:
        assert _core.dropout_noise(one, 0.5, 1.0, out) is False
    for keep, value, to in ((2.0, 1.0, out), (0.5, "1", out), (0.5, 1.0, torch.zeros(4, 4).T[1:]), (0.5, 1.0, [1.0])):
        assert _core.dropout_noise(state, keep, value, to) is False
    assert not out.any()
    assert _core.dropout_noise(state, 0.5, 1.0, torch.empty(0)) is True
    with pytest.raises(TypeError, match="takes 4"):
        _core.dropout_noise(state)
