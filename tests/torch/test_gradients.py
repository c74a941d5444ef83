"""Gradients of every method on every layer kind: against finite differences in float64, and against PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from their_mixin import OnCpu, freeze_counts
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv1d": (lambda: Conv1D(4, 5), (3, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 5)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=2), None),
}
METHODS = {
    "lora": ("LORA", {"r": 2, "lora_alpha": 4}),
    "rslora": ("LORA", {"r": 4, "use_rslora": True}),
    "lora_bias": ("LORA", {"r": 2, "lora_bias": True}),
    "dora": ("LORA", {"r": 2, "use_dora": True}),
    "bias": ("LORA", {"r": 2, "bias": "lora_only"}),
    "ia3": ("IA3", {"feedforward_modules": []}),
    "ia3 feedforward": ("IA3", {"feedforward_modules": ["layer"]}),
    "adalora": ("ADALORA", {"init_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1}),
}
CONFIGS = {
    "LORA": (peft.LoraConfig, peftc.LoraConfig),
    "IA3": (peft.IA3Config, peftc.IA3Config),
    "ADALORA": (peft.AdaLoraConfig, peftc.AdaLoraConfig),
}


def supported(method: str, layer: str) -> bool:
    if layer == "embedding":
        return method in ("lora", "rslora", "dora")
    if layer.startswith("conv2d"):
        return method != "adalora" and not (method == "dora" and "groups" in layer)  # peftc refuses that
    return not (method == "bias" and "without bias" in layer)


CASES = [(method, layer) for method in METHODS for layer in LAYERS if supported(method, layer)]


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Theirs(OnCpu, Net):
    pass


class Ours(peftc.PeftAdapterMixin, Net):
    pass


def make(cls: type, method: str, layer: str, dtype: torch.dtype, names=("one",), seed: int = 0):
    """(model with adapters of random values, input). The same for either class, up to what the classes do."""
    torch.manual_seed(seed)
    build, shape = LAYERS[layer]
    model = cls(build())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.to(dtype)
    kind, fields = METHODS[method]
    for name in names:
        fields = copy.deepcopy(fields)
        if len(names) > 1:
            fields.pop("bias", None)
        config = CONFIGS[kind][cls is Ours](target_modules=["layer"], inference_mode=name != names[-1], **fields)
        model.add_adapter(config, name)
    model.set_adapter(list(names))
    freeze_counts(model)
    for path, parameter in model.named_parameters():
        if "magnitude" in path:
            parameter.requires_grad = (
                True  # difference: in PEFT those of convolutions and embeddings ignore set_adapter
            )
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in sorted(model.named_parameters()):
        if "ranknum" not in path and (parameter.requires_grad or set(names) & set(path.split("."))):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
            parameter.data.copy_(noise + (1 if "ia3_" in path or "magnitude" in path else 0))
    if shape is None:
        return model, torch.tensor([[0, 2, 3], [6, 3, 1]])
    return model, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def backward(model: nn.Module, x: torch.Tensor):
    """Output, gradient of the input (None for token ids), and path → gradient."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    (y.double() * weights).sum().backward()
    return y.detach(), x.grad, {path: p.grad for path, p in model.named_parameters()}


def close(theirs: torch.Tensor, ours: torch.Tensor, relative: float, what: str) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    scale = max(float(theirs.double().abs().max()), 1e-6)
    difference = float((theirs.double() - ours.double()).abs().max())
    assert difference <= relative * scale, f"{what}: differs by {difference / scale} of the largest value"


@pytest.mark.parametrize(("method", "layer"), CASES)
def test_gradcheck(method, layer):
    """DoRA's norm is a constant for the gradient, in PEFT's definition: it is checked against PEFT below only."""
    model, x = make(Ours, method, layer, torch.float64)
    if layer == "embedding":
        x = x.masked_fill(x == 2, 1)  # the column of padding_idx counts and gets no gradient, as in torch and PEFT
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert parameters
    if method == "dora":
        parameters = {path: p for path, p in parameters.items() if "magnitude" in path}

    def function(*values):
        given = dict(zip(parameters, values[: len(parameters)], strict=True))
        return torch.func.functional_call(model, given, (values[-1] if x.is_floating_point() else x,))

    arguments = [p.detach().clone().requires_grad_() for p in parameters.values()]
    if x.is_floating_point():
        arguments.append(x.clone().requires_grad_(method != "dora"))
    assert torch.autograd.gradcheck(function, arguments)


@pytest.mark.parametrize("names", [("one",), ("one", "two")], ids=["one", "two"])
@pytest.mark.parametrize(("method", "layer"), CASES)
def test_gradients_are_pefts(method, layer, names):
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        theirs = backward(*make(Theirs, method, layer, dtype, names))
        ours = backward(*make(Ours, method, layer, dtype, names))
        close(theirs[0], ours[0], relative, "output")
        if theirs[1] is not None:
            close(theirs[1], ours[1], relative, "gradient of the input")
        assert list(ours[2]) == list(theirs[2])
        for path, gradient in theirs[2].items():
            assert (gradient is None) == (ours[2][path] is None), path
            if gradient is not None:
                close(gradient, ours[2][path], relative, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "layer"), CASES)
def test_gradients_in_half_precision(method, layer, dtype):
    """No further from the exact gradients, up to a factor, than PEFT's in the same type."""
    exact = backward(*make(Ours, method, layer, torch.float64))
    theirs = backward(*make(Theirs, method, layer, dtype))
    ours = backward(*make(Ours, method, layer, dtype))
    unit = torch.finfo(dtype).eps
    for path, gradient in exact[2].items():
        assert (gradient is None) == (ours[2][path] is None), path
        if gradient is None:
            continue
        assert ours[2][path].dtype == theirs[2][path].dtype == dtype, path
        scale = max(float(gradient.abs().max()), 1e-6)
        error, their_error = (float((side[2][path].double() - gradient).abs().max()) / scale for side in (ours, theirs))
        assert error <= max(2 * their_error, 8 * unit), (path, error, their_error)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (2, 1, 3, 5), (4, 3, 5)])
def test_any_batch_shape(shape):
    for method in ("lora", "dora", "ia3", "adalora"):
        sides = []
        for cls in (Theirs, Ours):
            model, _ = make(cls, method, "linear", torch.float32)
            x = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()].reshape(shape)
            sides.append(backward(model, x))
        output = sides[0][0]
        if method == "dora" and len(shape) == 1:
            output = output[0]  # difference: in PEFT DoRA's output for a vector has a batch dimension
        assert output.shape == sides[1][0].shape
        if output.numel():
            close(output, sides[1][0], 1e-5, method)
        for path, gradient in sides[0][2].items():
            if gradient is not None and sides[0][0].numel():
                close(gradient, sides[1][2][path], 1e-5, f"{method} {path}")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_inputs_of_any_strides(layout):
    base = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    x = {"transposed": base[:5].T, "sliced": base[::2, ::2], "expanded": base[0, :5].expand(4, 5)}[layout]
    for method in ("lora", "dora", "ia3 feedforward", "adalora"):
        theirs, ours = (backward(make(cls, method, "linear", torch.float32)[0], x) for cls in (Theirs, Ours))
        close(theirs[0], ours[0], 1e-5, method)
        close(theirs[1], ours[1], 1e-5, f"{method}: gradient of the input")


def test_second_derivatives():
    model, x = make(Ours, "lora", "linear", torch.float64)
    parameters = {path: p for path, p in model.named_parameters() if p.requires_grad}

    def function(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    arguments = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradgradcheck(function, arguments)


def test_frozen_parameters_get_no_gradient():
    model, x = make(Ours, "lora", "linear", torch.float32, ("one", "two"))
    model.set_adapter("two")
    _, _, gradients = backward(model, x)
    assert {path for path, g in gradients.items() if g is not None} == {
        path for path in gradients if "two" in path.split(".")
    }
