"""Models in bf16 and f16: float32 adapters in them (PEFT's default) compute bit for bit as in PEFT, and dtypes can change."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft_cases import CASES, Case
from their_mixin import freeze_counts
from torch import nn

import peftc

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
X = torch.linspace(-1, 1, 24).view(3, 8)


def twins(case, dtype):
    base = case.base().to(dtype)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    more = {"lora_dropout": 0.0} if "lora_dropout" in case.options else {}
    theirs = peft.get_peft_model(copy.deepcopy(base), case.config(**more))
    ours = peftc.get_peft_model(copy.deepcopy(base), case.config(**more))
    freeze_counts(theirs)
    own = peftc.get_peft_model_state_dict(ours)
    state = {key: value for key, value in peft.get_peft_model_state_dict(theirs).items() if key in own}
    peftc.set_peft_model_state_dict(ours, state)
    return theirs, ours


@HALVES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_float32_adapters_compute_as_in_peft(case, training, dtype):
    theirs, ours = (model.train(training) for model in twins(case, dtype))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    try:
        expected = theirs(case.batch())
    except RuntimeError:  # its layer does not take this dtype
        return
    found = ours(case.batch())
    assert found.dtype == expected.dtype
    if case.model == "attention":  # PEFT rounds the sum of weight and product to the weight's dtype
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)
        return
    assert torch.equal(found, expected)
    if case.model not in ("mlp", "mlp without bias"):
        return
    gradients = []
    for model, result in ((theirs, expected), (ours, found)):
        result.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


@HALVES
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_loading_keeps_pefts_dtypes(dtype, autocast, stored, tmp_path):
    case = Case("mlp", "LORA", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]})
    made = peft.get_peft_model(case.base().to(stored), case.config(), autocast_adapter_dtype=False)
    made.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.base().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    ours = peftc.PeftModel.from_pretrained(case.base().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    for model in (theirs, ours):
        model.load_adapter(tmp_path, "second", autocast_adapter_dtype=autocast)
    expected = dict(theirs.named_parameters())
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in expected.items()}
    for name, parameter in ours.named_parameters():
        if "second" not in name:  # of a second load PEFT rounds what becomes float32 to half first
            assert torch.equal(parameter, expected[name]), name
    with torch.no_grad():
        found, wanted = ours.eval()(case.batch()), theirs.eval()(case.batch())
    if autocast:
        assert torch.equal(found, wanted)
    else:  # in one dtype peftc adds in float32 and rounds once
        torch.testing.assert_close(found, wanted, atol=0.01, rtol=0.01)


# ------------------------------------------------------------------------------------- another dtype

CHANGES = {
    "double": (lambda model: model.double(), torch.float64, 1e-6),
    "half": (lambda model: model.half(), torch.float16, 1e-2),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16, 5e-2),
    "to": (lambda model: model.to(torch.float64), torch.float64, 1e-6),
}
OPTIONS = {
    "lora": {"init_lora_weights": False},
    "dora": {"init_lora_weights": False, "use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"init_lora_weights": False, "bias": "all", "lora_bias": True},
}


class Net(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(x)))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", OPTIONS)
def test_another_dtype(options, change, merged):
    """What belongs to an adapter and is no parameter follows: what pissa started from, weights that are merged."""
    to, dtype, tolerance = CHANGES[change]
    model = Net().eval()
    model.add_adapter(peftc.LoraConfig(target_modules=["fc"], r=2, **OPTIONS[options]), "one")
    model.add_adapter(peft.LoHaConfig(target_modules=["fc"], r=2, init_weights=False), "two")
    model.set_adapter(["one", "two"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "one" in name:
                parameter.add_(0.1)
        expected = model(X).to(dtype)
        if merged:
            model.merge_adapter()
        to(model)
        torch.testing.assert_close(model(X.to(dtype)), expected, atol=tolerance, rtol=tolerance)
        if merged:
            model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = model(X.to(dtype))  # with gradients it takes another way
    torch.testing.assert_close(found.detach(), expected, atol=tolerance, rtol=tolerance)
    found.sum().backward()
    model.delete_adapter(["one", "two"])
    assert torch.equal(model(X.to(dtype)), to(Net())(X.to(dtype)))
