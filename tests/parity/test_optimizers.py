"""AdamW, SGD, losses, clipping and schedules against torch and Transformers: the same numbers."""

import numpy as np
import pytest
import torch
import transformers

import peftc
from peftc import nn
from peftc.nn import functional as F

SETTINGS = {
    "adamw": ("AdamW", {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw, maximize": ("AdamW", {"lr": 0.03, "maximize": True}),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "sgd, nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_steps(name, dtype):
    kind, options = SETTINGS[name]
    rng = np.random.default_rng(0)
    shapes = [(3,), (5, 7), (600, 40), (1,)]
    start = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    ours = [nn.Parameter(value.copy()) for value in start]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in start]
    a, b = getattr(peftc.optim, kind)(ours, **options), getattr(torch.optim, kind)(theirs, **options)
    for step in range(12):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            skip = i == 2 and step % 3 == 1  # now and then without a gradient
            gradient = rng.standard_normal(p.shape).astype(dtype)
            p.grad = None if skip else gradient
            q.grad = None if skip else torch.tensor(gradient)
        a.step()
        b.step()
    tolerance = 2e-6 if dtype == "float32" else 1e-13
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"weight": True, "label_smoothing": 0.2}]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy(options, dtype):
    rng = np.random.default_rng(1)
    logits = (5 * rng.standard_normal((4, 6, 9))).astype(dtype)
    labels = rng.integers(0, 9, (4, 6))
    labels[1, 2:4] = -100
    options = dict(options)
    weight = rng.random(9).astype(dtype) if options.pop("weight", None) else None
    loss, gradient = F.cross_entropy(logits, labels, weight, **options)
    x = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(
        x.reshape(-1, 9), torch.tensor(labels).reshape(-1), None if weight is None else torch.tensor(weight), **options
    )
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_other_losses(name, reduction):
    rng = np.random.default_rng(2)
    values, target = 4 * rng.standard_normal((5, 3)), rng.random((5, 3))
    loss, gradient = getattr(F, name)(values, target, reduction)
    x = torch.tensor(values, requires_grad=True)
    wanted = getattr(torch.nn.functional, name)(x, torch.tensor(target), reduction=reduction)
    wanted.backward()
    assert loss == pytest.approx(wanted.item())
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("kind", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm(kind):
    rng = np.random.default_rng(3)
    gradients = [rng.standard_normal(shape) for shape in [(3,), (20, 30), (1, 1)]]
    ours = [nn.Parameter(np.zeros(g.shape)) for g in gradients]
    theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in gradients]
    for p, q, g in zip(ours, theirs, gradients, strict=True):
        p.grad, q.grad = g.copy(), torch.tensor(g)
    total = peftc.optim.clip_grad_norm_(ours, 0.7, kind)
    assert total == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, 0.7, kind)))
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.grad, q.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("name, arguments", [("linear", (3, 12)), ("cosine", (2, 15)), ("constant", (4,))])
def test_schedules(name, arguments):
    ours = peftc.optim.SGD([nn.Parameter(np.zeros(2))], lr=0.5)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
    a = getattr(peftc.optim.lr_scheduler, f"get_{name}_schedule_with_warmup")(ours, *arguments)
    b = getattr(transformers, f"get_{name}_schedule_with_warmup")(theirs, *arguments)
    for _ in range(18):
        assert a.get_last_lr() == pytest.approx(b.get_last_lr(), abs=1e-15)
        theirs.step()
        a.step()
        b.step()
