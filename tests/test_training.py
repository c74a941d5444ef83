"""Training on the NumPy host: gradients by finite differences, the tape, bad input, optimizers."""

import gc
import weakref

import numpy as np
import pytest

import peftc
from peftc import nn
from peftc.nn import functional as F


class Host(peftc.PeftAdapterMixin, nn.Module):
    """Anything with a forward, to put adapters on."""


class Everything(Host):
    """Every kind of layer and function that has a gradient: ids (rows, length) → (rows, 3)."""

    def __init__(self, dim=8, heads=2, dtype="float64"):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(13, dim, padding_idx=0, dtype=dtype)
        self.query = nn.Linear(dim, dim, dtype=dtype)
        self.key = nn.Linear(dim, dim, dtype=dtype)
        self.value = nn.Conv1D(dim, dim, dtype=dtype)
        self.norm = nn.LayerNorm(dim, dtype=dtype)
        self.up = nn.Linear(dim, 12, dtype=dtype)
        self.down = nn.Linear(12, dim, bias=False, dtype=dtype)
        self.scale = nn.RMSNorm(dim, eps=1e-6, dtype=dtype)
        self.image = nn.Conv2d(2, 4, 3, padding=1, groups=2, dtype=dtype)
        self.head = nn.Linear(4, 3, dtype=dtype)
        self.shift = nn.Parameter(np.linspace(-1, 1, dim).astype(dtype))

    def forward(self, ids, mask=None):
        x = self.embed(ids) * self.shift
        attended = F.attention(self.query(x), self.key(x), self.value(x), self.heads, mask)
        x = self.norm(attended, x)
        x = x + self.down(F.gelu(self.up(x)))
        x = self.scale(x, F.silu(x))
        rows, length, dim = x.shape
        y = self.image(x.reshape(rows, 2, dim // 2, length))
        return self.head(F.tanh(y).mean(axis=(2, 3)))


IDS = np.array([[1, 2, 3, 0, 5], [7, 7, 0, 12, 4]])
MASK = np.array([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]])
TARGETS = ["embed", "query", "value", "up", "down", "image"]


def everything(seed=3, **shape):
    peftc.manual_seed(seed)
    model = Everything(**shape)
    model.embed.weight.data[...] = np.random.default_rng(seed).standard_normal(model.embed.weight.shape)
    return model


def adapted(config, **shape):
    model = everything(**shape)
    model.add_adapter(config)
    rng = np.random.default_rng(5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data[...] = 0.3 * rng.standard_normal(parameter.shape) + ("ia3_" in name or "magnitude" in name)
    return model.train()


def labels_of(ids):
    return ids[:, 0] % 3


def loss_of(model, ids=IDS):
    loss, gradient = F.cross_entropy(model(ids, MASK), labels_of(ids))
    return loss, gradient


def by_differences(model, parameter, step=1e-5):
    """The gradient of a few elements, by central differences."""
    flat = parameter.data.reshape(-1)
    some = np.unique(np.linspace(0, flat.size - 1, 7).astype(int))
    found = {}
    for i in some:
        before = flat[i]
        values = []
        for shift in (step, -step):
            flat[i] = before + shift
            with peftc.no_grad():
                values.append(loss_of(model)[0])
        flat[i] = before
        found[int(i)] = (values[0] - values[1]) / (2 * step)
    return found


def _is_padding(path, shape, i):
    """Row 0 of the table, column 0 of LoRA's A: what padding_idx leaves alone."""
    return i % shape[1] == 0 if "lora_embedding_A" in path else "weight" in path and i < shape[1]


CONFIGS = {
    "lora": lambda: peftc.LoraConfig(r=2, target_modules=list(TARGETS), bias="all", modules_to_save=["head"]),
    "lora_bias": lambda: peftc.LoraConfig(r=2, target_modules=["query", "value"], lora_bias=True),
    "ia3": lambda: peftc.IA3Config(target_modules=["query", "value", "down", "image"], feedforward_modules=["down"]),
    "adalora": lambda: peftc.AdaLoraConfig(
        init_r=3, target_modules=["query", "value", "up"], total_step=10, tinit=1, tfinal=1
    ),
    "saved": lambda: peftc.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["norm", "image", "scale", "embed"]
    ),
}


@pytest.mark.parametrize("name", [*CONFIGS, "base"])
def test_gradients_by_finite_differences(name):
    model = everything().train() if name == "base" else adapted(CONFIGS[name]())
    _, gradient = loss_of(model)
    model.backward(gradient)
    checked = 0
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        flat = parameter.grad.reshape(-1)
        for i, wanted in by_differences(model, parameter).items():
            if path.startswith("embed") and _is_padding(path, parameter.shape, i):
                assert flat[i] == 0
                continue
            assert abs(flat[i] - wanted) < 1e-7 + 1e-5 * abs(wanted), f"{path}[{i}]"
        checked += 1
    assert checked > 1


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_with_dropout(use_dora):
    """The same draws forward and back: the same seed gives the loss at a shifted weight. DoRA's norm is a constant."""
    model = adapted(peftc.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.4, use_dora=use_dora))

    def loss():
        peftc.manual_seed(11)
        return loss_of(model)

    _, gradient = loss()
    model.backward(gradient)
    checked = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (use_dora and "magnitude" not in name):
            continue
        flat, grad = parameter.data.reshape(-1), parameter.grad.reshape(-1)
        for i in range(0, flat.size, 5):
            before, values = flat[i], []
            for shift in (1e-5, -1e-5):
                flat[i] = before + shift
                with peftc.no_grad():
                    values.append(loss()[0])
            flat[i] = before
            wanted = (values[0] - values[1]) / 2e-5
            assert abs(grad[i] - wanted) < 1e-7 + 1e-5 * abs(wanted), f"{name}[{i}]"
            checked += 1
    assert checked >= 4


def attention_model(dropout):
    class Model(Host):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            y = F.attention(self.q(x), self.k(x), self.v(x), 2, None, None, dropout if self.training else 0.0)
            return self.dropout(y)

    peftc.manual_seed(1)
    return Model().double()


def test_gradients_through_dropout_of_attention():
    model = attention_model(0.5).train()
    x = np.random.default_rng(0).standard_normal((2, 70, 8))

    def run():
        peftc.manual_seed(4)
        return model(x)

    weights = np.random.default_rng(1).standard_normal((2, 70, 8))
    model.backward(weights, run())
    for parameter in (model.q.weight, model.k.weight, model.v.weight):
        flat, grad = parameter.data.reshape(-1), parameter.grad.reshape(-1)
        for i in range(0, flat.size, 13):
            before, values = flat[i], []
            for shift in (1e-5, -1e-5):
                flat[i] = before + shift
                with peftc.no_grad():
                    values.append(float((run() * weights).sum()))
            flat[i] = before
            wanted = (values[0] - values[1]) / 2e-5
            assert abs(grad[i] - wanted) < 1e-6 + 1e-5 * abs(wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float32_follows_float64(dtype):
    """Attention longer than a block of rows, widths that are no whole vectors, many rows."""
    x = np.random.default_rng(0).standard_normal((3, 131, 12))

    class Model(Host):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
            self.norm = nn.LayerNorm(12)

        def forward(self, values):
            mask = np.ones(values.shape[:2])
            mask[:, 100:] = 0
            return self.norm(F.attention(self.q(values), self.k(values), self.v(values), 4, mask))

    def gradients(kind):
        peftc.manual_seed(2)
        model = Model()
        model.requires_grad_(True).to(kind).train()
        y = model(x.astype(kind))
        model.backward(np.cos(np.arange(y.size)).reshape(y.shape).astype(kind), y)
        return [p.grad for p in model.parameters()]

    for got, wanted in zip(gradients(dtype), gradients("float64"), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_of_16_bits_train(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    model = everything(dtype="float32").to(dtype)
    model.add_adapter(peftc.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    model.train()
    optimizer = peftc.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss, gradient = loss_of(model)
        losses.append(loss)
        model.backward(gradient)
        assert all(p.grad.dtype == np.float32 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_results_do_not_depend_on_the_number_of_threads():
    def run(threads):
        peftc.set_num_threads(threads)
        model = attention_model(0.2).float().train()
        x = np.random.default_rng(0).standard_normal((8, 64, 8)).astype("float32")
        peftc.manual_seed(6)
        y = model(x)
        model.backward(np.ones_like(y), y)
        return [np.array(y), *(p.grad.copy() for p in model.parameters())]

    before = peftc.get_num_threads()
    try:
        for one, three in zip(run(1), run(3), strict=True):
            assert np.array_equal(one, three)
    finally:
        peftc.set_num_threads(before)


# ------------------------------------------------------------------------- the tape


def test_frozen_layers_keep_nothing():
    model = everything().eval()
    assert type(model(IDS, MASK)) is np.ndarray
    model.requires_grad_(False).train()
    assert type(model(IDS, MASK)) is np.ndarray
    model.add_adapter(peftc.LoraConfig(r=2, target_modules=["down"]))
    model.train()
    x = model.embed(IDS) * model.shift.data
    assert type(model.query(x)) is np.ndarray  # below the first trainable layer
    assert isinstance(model(IDS, MASK), nn.Tensor)
    model.eval()
    assert type(model(IDS, MASK)) is np.ndarray


def test_no_grad_saves_nothing_and_nests():
    model = adapted(CONFIGS["lora"]())
    with peftc.no_grad():
        with peftc.no_grad():
            pass
        y = model(IDS, MASK)
    assert type(y) is np.ndarray
    with pytest.raises(RuntimeError, match="no_grad"):
        model.backward(np.zeros_like(y))
    assert isinstance(model(IDS, MASK), nn.Tensor)


def test_what_nobody_takes_the_gradient_of_is_let_go():
    model = adapted(CONFIGS["lora"]())
    out = model(IDS, MASK)
    kept = weakref.ref(out)
    del out
    gc.collect()
    assert kept() is None
    model(IDS, MASK)
    assert model._outputs[0].shape == (2, 3)


def test_a_gradient_goes_through_once():
    model = adapted(CONFIGS["lora"]())
    _, gradient = loss_of(model)
    model.backward(gradient)
    with pytest.raises(RuntimeError, match="second time"):
        model.backward(gradient)


def test_backward_needs_a_forward_pass_in_train_mode():
    model = adapted(CONFIGS["lora"]())
    with pytest.raises(RuntimeError, match="without a forward pass"):
        model.backward(np.zeros((2, 3)))
    model.eval()
    model(IDS, MASK)
    with pytest.raises(RuntimeError, match="eval mode"):
        model.backward(np.zeros((2, 3)))


def test_backward_of_what_is_frozen():
    model = everything().requires_grad_(False).train()
    model(IDS, MASK)
    with pytest.raises(RuntimeError, match="nothing in the last call is trainable"):
        model.backward(np.zeros((2, 3)))


@pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3, 1), ()])
def test_gradients_of_a_wrong_shape(shape):
    model = adapted(CONFIGS["lora"]())
    out = model(IDS, MASK)
    with pytest.raises(ValueError, match="shape"):
        model.backward(np.zeros(shape))
    with pytest.raises(ValueError, match="shape"):
        model.backward(np.zeros(shape), out)
    assert all(p.grad is None for p in model.parameters())
    model.backward(np.zeros((2, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = adapted(CONFIGS["lora"]())
    model(IDS, MASK)
    gradient = np.zeros((2, 3))
    gradient[1, 2] = bad
    with pytest.raises(FloatingPointError, match="element 5"):
        model.backward(gradient)
    assert all(p.grad is None for p in model.parameters())


def test_which_result_a_gradient_belongs_to():
    class Two(Host):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return {"a": self.a(x), "b": [self.b(x), None]}

    model = Two().train()
    x = np.ones((2, 4), "float32")
    out = model(x)
    with pytest.raises(ValueError, match="say which one"):
        model.backward(np.ones((2, 3)))
    model.backward(np.ones((2, 3)), out["b"][0])
    assert model.a.weight.grad is None
    assert model.b.weight.grad is not None
    first, second = model(x), model(2 * x)
    model.zero_grad()
    _, gradient = F.mse_loss(first["a"], np.zeros((2, 3)))
    model.backward(gradient / 2)  # of an earlier call: a loss's gradient knows
    with pytest.raises(RuntimeError, match="second time"):
        model.backward(gradient)
    model.backward((np.ones((2, 3)), np.ones((2, 3))), (second["a"], second["b"][0]))
    with pytest.raises(ValueError, match="1 gradients for 2"):
        model.backward((np.ones((2, 3)),), (second["a"], second["b"][0]))


def test_operations_that_are_not_recorded_are_noticed():
    class Careless(Host):
        def __init__(self, function):
            super().__init__()
            self.a, self.b, self.function = nn.Linear(4, 4), nn.Linear(4, 2), function

        def forward(self, x):
            return self.b(self.function(self.a(x)))

    x = np.ones((3, 4), "float32")
    for function in (
        np.sin,
        lambda t: np.cumsum(t, axis=1),
        np.asarray,
        lambda t: np.asarray(t)[:, ::1],
        np.sort,
        np.cos,
    ):
        with pytest.raises(RuntimeError, match="does not differentiate"):
            Careless(function).train()(x)
        Careless(function).eval()(x)
    cut = Careless(lambda t: t.detach()).train()
    y = cut(x)
    cut.backward(np.ones_like(y), y)
    assert cut.a.weight.grad is None
    assert cut.b.weight.grad is not None


def test_recorded_arrays_are_not_changed_in_place():
    model = adapted(CONFIGS["lora"]())
    y = model(IDS, MASK)
    with pytest.raises(ValueError, match="in place"):
        y[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(y)[0] = 1
    with pytest.raises(ValueError, match="in place"):
        np.add(y, 1, out=y)
    z = y
    z += 1
    assert z is not y
    y.detach()[0] = 1


NUMPY_OPERATIONS = {
    "arithmetic": lambda x, w: (x * 2 - w) / (w * w + 2) + (-x) ** 2,
    "broadcasting": lambda x, w: x * w[0] + w[:, :1] - w.sum(),
    "functions": lambda x, w: np.exp(-np.square(w)) + np.sqrt(np.absolute(w) + 1) * np.tanh(w) + np.log(w * w + 1),
    "shapes": lambda x, w: (
        np.concatenate([w.T, x.T], axis=0).T[:, :4]
        + np.stack([w, w * 3], axis=1)[:, 1]
        + w.reshape(2, -1).transpose(1, 0).reshape(3, 4)
    ),
    "choices": lambda x, w: np.where(x > 0, w, 2 * w) + np.maximum(w, x) + np.minimum(w, 0.1),
    "products": lambda x, w: (w @ x.T) @ w + np.swapaxes(w, 0, 1).T,
    "reductions": lambda x, w: w.mean(axis=0, keepdims=True) * w + w.sum(1)[:, None] + np.mean(w),
    "indices": lambda x, w: w[[0, 2, 2]] + w[::-1] + np.expand_dims(w, 0)[0] + w[..., ::-1],
    "softmax": lambda x, w: F.softmax(w) * x + F.softmax(w, dim=0),
    "relu": lambda x, w: F.relu(w) + F.gelu(w, "tanh") + F.silu(w),
    "norm": lambda x, w: F.layer_norm(x, w[0], w[1], residual=w),
    "linear": lambda x, w: F.linear(w, np.concatenate([w, x[:1]]), w[0]),
    "copies": lambda x, w: w.copy() + w.astype("float64") * np.broadcast_to(w[:1], (3, 4)) + np.ravel(w).reshape(3, 4),
}


@pytest.mark.parametrize("name", NUMPY_OPERATIONS)
def test_numpy_operations_are_recorded(name):
    operation = NUMPY_OPERATIONS[name]

    class Model(Host):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(np.random.default_rng(8).standard_normal((3, 4)))

        def forward(self, x):
            return operation(x, self.w * 1.0)

    model = Model().train()
    x = np.random.default_rng(9).standard_normal((3, 4))
    y = model(x)
    weights = np.random.default_rng(10).standard_normal(y.shape)
    model.backward(weights, y)
    flat, grad = model.w.data.reshape(-1), model.w.grad.reshape(-1)
    for i in range(flat.size):
        before, values = flat[i], []
        for shift in (1e-6, -1e-6):
            flat[i] = before + shift
            with peftc.no_grad():
                values.append(float((model(x) * weights).sum()))
        flat[i] = before
        wanted = (values[0] - values[1]) / 2e-6
        assert abs(grad[i] - wanted) < 1e-6 + 1e-6 * abs(wanted)


def test_parameters_in_numpy_functions():
    class Model(Host):
        def __init__(self):
            super().__init__()
            self.w, self.linear = nn.Parameter(np.linspace(0.1, 1, 4)), nn.Linear(4, 2, dtype="float64")

        def forward(self, x):
            wide = np.concatenate([np.exp(self.w), np.tanh(self.w)]) * 2 - np.stack([self.w, -self.w]).reshape(8)
            return (x * self.w + self.w[::-1]).sum() + (1 / self.w).mean() + self.w.sum() + wide.sum()

    model = Model().train()
    x = np.arange(8.0).reshape(2, 4)
    y = model(x)
    model.backward(np.ones(()), y)
    for i in range(4):
        values = []
        for shift in (1e-6, -1e-6):
            model.w.data[i] += shift
            with peftc.no_grad():
                values.append(float(model(x)))
            model.w.data[i] -= shift
        assert model.w.grad[i] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)

    class Careless(Model):
        def forward(self, x):
            return self.linear(np.asarray(self.w))

    careless = Careless().train()
    assert type(np.asarray(careless.w)) is np.ndarray
    with pytest.raises(RuntimeError, match="does not differentiate"):
        careless(x)


def test_a_deep_model_can_be_let_go():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3000))).train()
    y = model(np.ones((1, 2), "float32"))
    del y
    model(np.ones((1, 2), "float32"))
    del model
    gc.collect()


# ---------------------------------------------------------------------- parameters


def test_the_gradient_of_an_adapter_tensor():
    model = adapted(CONFIGS["lora"]())
    parameter = dict(model.named_parameters())["query.lora_A.default.weight"]
    assert parameter.grad is None
    assert parameter.name == "query.lora_A.default.weight"
    _, gradient = loss_of(model)
    model.backward(gradient)
    before = parameter.grad.copy()
    _, gradient = loss_of(model)
    model.backward(gradient)
    np.testing.assert_allclose(parameter.grad, 2 * before)
    parameter.grad = before
    np.testing.assert_array_equal(parameter.grad, before)
    parameter.grad *= 2
    np.testing.assert_array_equal(parameter.grad, 2 * before)
    with pytest.raises(ValueError, match="shape"):
        parameter.grad = before[:1]
    parameter.grad = None
    assert parameter.grad is None
    kept = parameter
    model.delete_adapter("default")
    assert kept.grad is None  # its memory lives as long as the parameter


def test_a_deleted_adapter_between_forward_and_backward():
    model = adapted(CONFIGS["lora"]())
    _, gradient = loss_of(model)
    model.delete_adapter("default")
    model.backward(gradient)
    assert all(p.grad is None for p in model.parameters())


def test_what_is_merged_or_disabled_does_not_learn():
    model = adapted(peftc.LoraConfig(r=2, target_modules=["query", "embed"]))
    model.merge_adapter()
    assert type(model(IDS, MASK)) is np.ndarray
    model.unmerge_adapter()
    model.disable_adapters()
    assert type(model(IDS, MASK)) is np.ndarray
    model.enable_adapters()
    assert isinstance(model(IDS, MASK), nn.Tensor)


def test_empty_batches():
    model = adapted(peftc.LoraConfig(r=2, target_modules=["query", "up", "embed"]))
    hidden = model.embed(np.zeros((0, 3), int))
    model.embed.backward(np.zeros(hidden.shape), hidden)
    assert float(np.abs(dict(model.named_parameters())["embed.lora_embedding_B.default"].grad).sum()) == 0


def test_switching_between_forward_and_backward():
    model = adapted(CONFIGS["lora"]())
    model.add_adapter(peftc.LoraConfig(r=2, target_modules=["query"]), "other")
    model.set_adapter("default")
    model.train()
    _, gradient = loss_of(model)
    model.set_adapter("other")
    model.backward(gradient)  # of what was active then
    model.set_adapter("default")
    assert dict(model.named_parameters())["query.lora_A.default.weight"].grad is not None
    assert dict(model.named_parameters())["query.lora_A.other.weight"].grad is None


# ------------------------------------------------------------------------- losses


def test_losses_refuse_what_they_cannot_use():
    logits = np.zeros((2, 3), "float32")
    with pytest.raises(IndexError, match="label 3 of row 1"):
        F.cross_entropy(logits, [0, 3])
    with pytest.raises(TypeError, match="integers"):
        F.cross_entropy(logits, [0.0, 1.0])
    with pytest.raises(ValueError, match="do not fit"):
        F.cross_entropy(logits, [0])
    with pytest.raises(ValueError, match="reduction"):
        F.mse_loss(logits, logits, reduction="none")
    with pytest.raises(ValueError, match="shape"):
        F.mse_loss(logits, logits[:1])
    with pytest.raises(ValueError, match="label_smoothing"):
        F.cross_entropy(logits, [0, 1], label_smoothing=2)
    assert np.isnan(F.cross_entropy(logits, [-100, -100])[0])


# --------------------------------------------------------------------- optimizers


def parameter(values, grad):
    made = nn.Parameter(np.array(values, "float64"))
    made.grad = np.array(grad, "float64")
    return made


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1}, {"weight_decay": -1}, {"lr": np.nan}])
def test_adamw_refuses(bad):
    with pytest.raises(ValueError, match="Invalid"):
        peftc.optim.AdamW([parameter([1.0], [1.0])], **bad)


def test_optimizers_refuse_what_is_no_list_of_parameters():
    p = parameter([1.0], [1.0])
    with pytest.raises(ValueError, match="empty"):
        peftc.optim.AdamW([])
    with pytest.raises(TypeError, match="Parameters"):
        peftc.optim.SGD([np.zeros(3)])
    with pytest.raises(TypeError, match="iterable"):
        peftc.optim.SGD(p)
    with pytest.raises(ValueError, match="twice"):
        peftc.optim.SGD([p, p])
    with pytest.raises(ValueError, match="Nesterov"):
        peftc.optim.SGD([p], nesterov=True)


@pytest.mark.parametrize("make", [peftc.optim.AdamW, lambda p: peftc.optim.SGD(p, momentum=0.9)])
def test_a_bad_gradient_keeps_every_weight(make):
    model = adapted(CONFIGS["lora"]())
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        _, gradient = loss_of(model)
        model.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
    before = [p.data.copy() for p in model.parameters()]
    _, gradient = loss_of(model)
    model.backward(gradient)
    dict(model.named_parameters())["up.lora_B.default.weight"].grad[0, 0] = np.nan
    with pytest.raises(FloatingPointError, match=r"step 3: the gradient of up\.lora_B\.default\.weight"):
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        np.testing.assert_array_equal(old, new.data)


def train(model, optimizer, steps, schedule=None):
    rng = np.random.default_rng(77)
    for _ in range(steps):
        ids = rng.integers(1, 13, (4, 5))
        loss, gradient = F.cross_entropy(model(ids), labels_of(ids))
        model.backward(gradient)
        peftc.optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_going_on_from_a_state_dict_is_exact(kind):
    def start():
        model = adapted(
            peftc.LoraConfig(r=3, target_modules=["query", "up", "embed"], lora_dropout=0.1), dtype="float32"
        )
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = peftc.optim.AdamW(params) if kind == "adamw" else peftc.optim.SGD(params, 0.1, momentum=0.9)
        return model, optimizer, peftc.optim.lr_scheduler.get_cosine_schedule_with_warmup(optimizer, 2, 20)

    def seeded(seed, *args):
        peftc.manual_seed(seed)
        return train(*args)

    model, optimizer, schedule = start()
    seeded(1, model, optimizer, 5, schedule)
    weights = {n: p.data.copy() for n, p in model.named_parameters()}
    state, where = optimizer.state_dict(), schedule.state_dict()
    seeded(2, model, optimizer, 5, schedule)

    again, fresh, second = start()
    again.load_state_dict(weights)
    fresh.load_state_dict(state)
    second.load_state_dict(where)
    seeded(2, again, fresh, 5, second)
    for (name, wanted), got in zip(model.named_parameters(), again.parameters(), strict=True):
        np.testing.assert_array_equal(got.data, wanted.data, err_msg=name)
    with pytest.raises(ValueError, match="groups"):
        peftc.optim.AdamW([parameter([1.0], [1.0])]).load_state_dict(state)


def test_clipping():
    a, b = parameter([0.0, 0.0], [3.0, 0.0]), parameter([0.0], [4.0])
    assert peftc.optim.clip_grad_norm_([a, b], 10.0) == pytest.approx(5.0)
    assert a.grad[0] == 3.0
    assert peftc.optim.clip_grad_norm_([a, b], 1.0) == pytest.approx(5.0)
    assert float(np.sqrt(a.grad[0] ** 2 + b.grad[0] ** 2)) == pytest.approx(1.0, rel=1e-5)
    assert peftc.optim.clip_grad_norm_([a, b], 9.0, np.inf) == pytest.approx(0.8, rel=1e-5)
    b.grad[0] = np.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        peftc.optim.clip_grad_norm_([a, b], 1.0, error_if_nonfinite=True)
    peftc.optim.clip_grad_value_([a, b], 0.25)
    assert b.grad[0] == 0.25


def test_weights_that_are_mapped_from_a_file_can_be_trained(tmp_path):
    values = np.arange(4, dtype="float32")
    np.save(tmp_path / "w.npy", values)
    mapped = nn.Parameter(np.load(tmp_path / "w.npy", mmap_mode="r"))
    mapped.grad = np.ones(4, "float32")
    peftc.optim.SGD([mapped], lr=1.0).step()
    np.testing.assert_array_equal(mapped.data, values - 1)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), values)
