"""The same model twice: in torch with real PEFT on it, and in peftc. Same module tree, names, weights, forward code."""

import copy
from types import SimpleNamespace

import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from transformers.pytorch_utils import Conv1D

import peftc

# For matrices this small torch's threads only wait for one another: 600 iterations of PiSSA's start took 6 s, now 0.05 s.
torch.set_num_threads(1)

CONFIGS = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "ADALORA": peft.AdaLoraConfig}
OUR_CONFIGS = {"LORA": peftc.LoraConfig, "IA3": peftc.IA3Config, "ADALORA": peftc.AdaLoraConfig}

TORCH = SimpleNamespace(
    Module=torch.nn.Module,
    Linear=torch.nn.Linear,
    Conv1D=Conv1D,
    Conv2d=torch.nn.Conv2d,
    Embedding=torch.nn.Embedding,
    LayerNorm=torch.nn.LayerNorm,
    ModuleList=torch.nn.ModuleList,
    tanh=torch.tanh,
    mixins=(),
)
OURS = SimpleNamespace(
    Module=peftc.nn.Module,
    Linear=peftc.nn.Linear,
    Conv1D=peftc.nn.Conv1D,
    Conv2d=peftc.nn.Conv2d,
    Embedding=peftc.nn.Embedding,
    LayerNorm=peftc.nn.LayerNorm,
    ModuleList=peftc.nn.ModuleList,
    tanh=np.tanh,
    mixins=(peftc.PeftAdapterMixin,),
)


def text_net(lib, *, vocab=19, dim=12, hidden=20, layers=3, bias=True, padding_idx=None):
    """Embedding → blocks of attention-like and feed-forward-like linears and a Conv1D → norm → two heads."""

    class Attention(lib.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = lib.Linear(dim, dim, bias=bias)
            self.v_proj = lib.Linear(dim, dim, bias=bias)
            self.c_attn = lib.Conv1D(dim, dim)

        def forward(self, x):
            return lib.tanh(self.q_proj(x)) + self.v_proj(x) * 0.5 + self.c_attn(x) * 0.25

    class Mlp(lib.Module):
        def __init__(self):
            super().__init__()
            self.up = lib.Linear(dim, hidden, bias=bias)
            self.down = lib.Linear(hidden, dim, bias=bias)

        def forward(self, x):
            return self.down(lib.tanh(self.up(x)))

    class Block(lib.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.mlp = Mlp()
            self.norm = lib.LayerNorm(dim)

        def forward(self, x):
            x = x + self.attn(x)
            return self.norm(x + self.mlp(x))

    class Encoder(lib.Module):
        def __init__(self):
            super().__init__()
            self.layers = lib.ModuleList([Block() for _ in range(layers)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class TextNet(*lib.mixins, lib.Module):
        def __init__(self):
            super().__init__()
            self.embed = lib.Embedding(vocab, dim, padding_idx=padding_idx)
            self.encoder = Encoder()
            self.head = lib.Linear(dim, 5)
            self.score = lib.Linear(dim, 3)

        def forward(self, ids):
            x = self.encoder(self.embed(ids))
            return self.head(x), self.score(x)

    return TextNet()


def image_net(lib, *, kernel=3, stride=1, padding=1, dilation=1, groups=1):
    class ImageNet(*lib.mixins, lib.Module):
        def __init__(self):
            super().__init__()
            self.first = lib.Conv2d(4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
            self.second = lib.Conv2d(6, 4, 1)

        def forward(self, x):
            return (self.second(lib.tanh(self.first(x))),)

    return ImageNet()


class Twins:
    """A torch model and ours with the same weights.

    Args:
        build: text_net or image_net.
        dtype: "float32" or "float64", of weights and results.
    """

    def __init__(self, build=text_net, seed=0, dtype="float32", **shape):
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.theirs = build(TORCH, **shape).to(getattr(torch, dtype)).eval()
        for parameter in self.theirs.parameters():  # norms and biases that are not 1 and 0
            torch.nn.init.normal_(parameter, std=0.35)
        if shape.get("padding_idx") is not None:
            self.theirs.embed.weight.data[shape["padding_idx"]] = 0
        self.base = {key: value.detach().numpy().copy() for key, value in self.theirs.state_dict().items()}
        self.ours = build(OURS, **shape)
        self.ours.load_state_dict(self.base)
        if dtype == "float64":
            self.ours.double()
            self.ours.load_state_dict(self.base)
        self.ours.eval()

    # ------------------------------------------------------------ adapters

    def inject(self, config, name="default", scale=0.3):
        """Put a PEFT adapter on the torch model with random values; returns what PEFT would save of it."""
        generator = torch.Generator().manual_seed(int(self.rng.integers(2**31)))
        peft.inject_adapter_in_model(config, self.theirs, name)
        for path, parameter in self.theirs.named_parameters():
            if name in path.split(".") and "ranknum" not in path:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
                parameter.data = (1.0 if "ia3_" in path or "magnitude" in path else 0.0) + scale * noise
            elif path.endswith({"all": "bias", "lora_only": "base_layer.bias"}.get(getattr(config, "bias", ""), "-")):
                parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.theirs.eval()
        return self.saved(name)

    def saved(self, name="default"):
        """What PEFT would save. Names of adapters must not be parts of other names, nor of each other: PEFT matches
        them as substrings, and its IA3 state dict has every adapter's tensors."""
        others = set(self.theirs.peft_config) - {name}
        return {
            key: value.detach().numpy().copy()
            for key, value in get_peft_model_state_dict(self.theirs, adapter_name=name).items()
            if others.isdisjoint(key.split("."))
        }

    def add(self, method, name="default", *, scale=0.3, **fields):
        """The same adapter on both; returns its state dict."""
        state = self.inject(CONFIGS[method](**fields), name, scale)
        config = OUR_CONFIGS[method](**{**fields, "inference_mode": True})
        self.ours.load_adapter(adapter_name=name, peft_config=config, adapter_state_dict=state)
        return state

    def set(self, names):
        for module in self.theirs.modules():
            if isinstance(module, (BaseTunerLayer, peft.utils.ModulesToSaveWrapper)):
                module.set_adapter(names)
        self.ours.set_adapter(names)

    def enable(self, on):
        for module in self.theirs.modules():
            if isinstance(module, (BaseTunerLayer, peft.utils.ModulesToSaveWrapper)):
                module.enable_adapters(on)
        (self.ours.enable_adapters if on else self.ours.disable_adapters)()

    # ------------------------------------------------------------- comparing

    def inputs(self, rows=(2, 7)):
        if hasattr(self.theirs, "embed"):
            return self.rng.integers(0, self.theirs.embed.weight.shape[0], rows)
        return self.rng.standard_normal((2, 4, 9, 8)).astype(self.dtype)

    def outputs(self, x=None):
        """(theirs, ours): lists of arrays."""
        x = self.inputs() if x is None else x
        with torch.no_grad():
            theirs = [y.numpy() for y in self.theirs(torch.from_numpy(x))]
        return theirs, [np.asarray(y) for y in self.ours(x)]

    def check(self, x=None, rtol=None):
        """Both give the same, up to `rtol` of the largest value."""
        rtol = rtol or {"float32": 1e-5, "float64": 1e-12}[self.dtype]
        for theirs, ours in zip(*self.outputs(x), strict=True):
            assert ours.dtype == theirs.dtype
            scale = max(1.0, float(np.abs(theirs).max()))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * scale)
        return True


def without(fields, *names):
    fields = copy.deepcopy(fields)
    for name in names:
        fields.pop(name, None)
    return fields
