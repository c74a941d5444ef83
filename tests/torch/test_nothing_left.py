"""After the last adapter is deleted nothing of it is left: modules, parameters, buffers, flags, attributes, memory."""

import gc
import weakref

import peft
import pytest
import torch
from test_mixed import FOREIGN
from test_mixed import Net as MixedNet
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftc
from peftc._core import AdapterRegistry
from peftc.hosts import torch_registry

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(MixedNet):
    """Every kind of layer that takes an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = Conv1D(8, 8)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.room = nn.Conv3d(1, 2, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(self.fc(x)) + self.up(x) + self.quantized(x) + self.experts(x) + self.c_attn(x)
        x = x + self.line(x.mT).mT + self.image(x[:, None]).mean(1) + self.room(x[:, None, None]).mean((1, 2))
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(x))


class Model(peftc.PeftAdapterMixin, Net):
    pass


EVERY = ["embed", "fc", "up", "c_attn", "line", "image", "room", "attention"]
LINEAR = ["fc", "up", "c_attn"]
OURS = {
    "lora": lambda: peft.LoraConfig(target_modules=EVERY, init_lora_weights=False),
    "lora, biases": lambda: peft.LoraConfig(target_modules=EVERY, bias="all", init_lora_weights=False),
    "lora, bias of B": lambda: peft.LoraConfig(target_modules=LINEAR, lora_bias=True, init_lora_weights=False),
    "lora, head": lambda: peft.LoraConfig(target_modules=["fc"], modules_to_save=["head", "norm"]),
    "dora": lambda: peft.LoraConfig(target_modules=[*LINEAR, "image", "embed"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=LINEAR, init_lora_weights="pissa"),
    "ia3": lambda: peft.IA3Config(target_modules=[*LINEAR, "image"], feedforward_modules=["up"]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, init_r=2, total_step=9, inference_mode=True),
}
ALONE = OURS | FOREIGN
TOGETHER = {
    "all of peftc": list(OURS),
    # VeRA and RandLoRA come first; SHiRA and BOFT cannot be on a layer with another method of PEFT
    "all of PEFT": sorted(
        set(FOREIGN) - {"parameters", "token rows", "quantized", "layer norm", "tokens", "shira", "boft"},
        key=lambda kind: (kind not in ("vera", "randlora"), kind),
    ),
    "by turns": ["lora", "vera", "lora, head", "loha", "ia3", "parameters", "adalora", "lokr", "pissa"],
    "tokens beside all": ["token rows", "lora", "loha", "dora", "ia3"],
}
IDS = torch.arange(12).reshape(2, 6)


def run(model):
    with torch.no_grad():
        return model(IDS)


def everything(model):
    """What can be seen of a model without adapters, down to the objects and their memory."""
    rows = []
    for path, module in model.named_modules():
        own = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        for field in ("_peftc_attachment", "_hf_peft_config_loaded"):  # an empty registry, and False
            own.pop(field, None)
        rows.append((path, id(module), type(module), list(module._modules), sorted(own, key=str), module.training))
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    rows.append((path, name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor.tolist()))
    return rows


def exercise(model, names):
    """Forward, backward, switch, merge: whatever may leave something behind."""
    for name in names:
        model.set_adapter(name)
        run(model)
        model(IDS).sum().backward()
    model.zero_grad()
    model.disable_adapters()
    run(model)
    model.enable_adapters()
    model.merge_adapter()
    run(model)
    model.unmerge_adapter()


@pytest.mark.parametrize("kinds", [[kind] for kind in ALONE] + list(TOGETHER.values()), ids=[*ALONE, *TOGETHER])
def test_nothing_is_left(kinds):
    kinds = [kind for kind in kinds if kind in ALONE]
    torch.manual_seed(0)
    model = Model().eval()
    before, base = everything(model), run(model)
    names = [f"a{i}" for i in range(len(kinds))]
    tensors = []
    for name, kind in zip(names, kinds, strict=True):
        model.add_adapter(ALONE[kind](), name)
        tensors += [weakref.ref(tensor) for tensor in model.parameters() if tensor.requires_grad]
    originals = {row[2] for row in before}
    exercise(model, names)
    # half by name, half as a list; the first first
    for name in names[: len(names) // 2]:
        model.delete_adapter(name)
    model.delete_adapter(names[len(names) // 2 :])
    assert everything(model) == before
    assert torch.equal(run(model), base)
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")
    registry = model._peftc_attachment.registry
    assert not registry.names() and not registry.active() and not registry.merged() and registry.enabled
    gc.collect()
    left = [ref() for ref in tensors if ref() is not None and id(ref()) not in originals]
    assert not left, [tensor.shape for tensor in left]


class Failing:
    """A registry of the core in which the values of an adapter cannot be made in the end."""

    def __init__(self) -> None:
        self._registry = AdapterRegistry()

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def finish(self):
        raise MemoryError("there is no memory for that")


def held(model):
    """What can be seen of a model with adapters: everything, flags, and what the layers note of each adapter."""
    notes = [
        (path, field, list(value) if isinstance(value, dict) else value)
        for path, module in model.named_modules()
        for field, value in sorted(module.__dict__.items())
        if isinstance(value, dict) and value and field not in ("_parameters", "_buffers", "_modules")
    ]
    return [(name, id(p), p.requires_grad) for name, p in model.named_parameters()], notes, everything(model)


@pytest.mark.parametrize("first", [None, "lora", "ia3"])
@pytest.mark.parametrize("kind", OURS)
def test_nothing_is_left_of_one_that_fails_at_the_end(kind, first, monkeypatch):
    torch.manual_seed(0)
    model = Model().eval()
    if first is not None:
        model.add_adapter(OURS[first](), "first")
    output, before = run(model), held(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch_registry, "AdapterRegistry", Failing)
        with pytest.raises(MemoryError, match="no memory for that"):
            model.add_adapter(OURS[kind](), "second")
    now = held(model)
    for mine, want in zip(now, before, strict=True):
        assert [row for row in mine if row not in want] == [row for row in want if row not in mine] == []
    assert now == before
    assert torch.equal(run(model), output)
    assert list(getattr(model, "peft_config", {})) == ([] if first is None else ["first"])
    model.add_adapter(OURS[kind](), "third")
    exercise(model, ["third"] if first is None else ["first", "third"])


def test_memory_returns():
    """Megabytes of adapters, of both kinds, come and go."""

    class Large(peftc.PeftAdapterMixin, nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))

    def resident():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

    model = Large()
    sizes = []
    for _ in range(6):
        for i in range(3):
            model.add_adapter(peft.LoraConfig(r=512, target_modules="all-linear"), f"ours{i}")
            model.add_adapter(peft.LoHaConfig(r=128, target_modules="all-linear"), f"pefts{i}")
        model.delete_adapter(list(model.peft_config))
        gc.collect()
        sizes.append(resident())
    assert max(sizes[2:]) < sizes[1] + 20, sizes  # an adapter of ours has 16 MB, one of PEFT's 16
