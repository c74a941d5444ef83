"""Small peftc models that the tests share."""

import numpy as np

import peftc


class Block(peftc.nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.query = peftc.nn.Linear(dim, dim)
        self.value = peftc.nn.Linear(dim, dim)
        self.up = peftc.nn.Linear(dim, hidden)
        self.down = peftc.nn.Linear(hidden, dim)

    def forward(self, x):
        x = x + np.tanh(self.query(x)) * self.value(x)
        return x + self.down(np.tanh(self.up(x)))


class Net(peftc.PeftAdapterMixin, peftc.nn.Module):
    """ids (rows, length) → logits (rows, length, 3)"""

    def __init__(self, layers=2, dim=8, hidden=12, vocab=11):
        super().__init__()
        self.embed = peftc.nn.Embedding(vocab, dim)
        self.layers = peftc.nn.ModuleList([Block(dim, hidden) for _ in range(layers)])
        self.subhead = peftc.nn.Linear(dim, 2)
        self.head = peftc.nn.Linear(dim, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 0]])


def net(seed=0, **shape):
    peftc.manual_seed(seed)
    return Net(**shape)


def lora(targets=("query", "value"), **fields):
    fields = {"r": 2, "init_lora_weights": False, **fields}
    return peftc.LoraConfig(target_modules=list(targets), **fields)


def ia3(targets=("value", "down"), feedforward=("down",), **fields):
    return peftc.IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward), **fields)


def adalora(targets=("query",), **fields):
    return peftc.AdaLoraConfig(
        target_modules=list(targets), init_r=3, total_step=10, tinit=1, tfinal=1, init_lora_weights=False, **fields
    )


def trainable(model):
    """name → array of what a training step would change now."""
    return {name: np.asarray(p) for name, p in model.named_parameters() if p.requires_grad}


def shake(model, name, seed=1, scale=0.5):
    """Give an adapter's tensors values that show in the output."""
    rng = np.random.default_rng(seed)
    for value in model.get_adapter_state_dict(name).values():
        value += (scale * rng.standard_normal(value.shape)).astype(value.dtype)


def snapshot(model):
    """Everything about a model that a refused call must leave as it was."""
    loaded = model._hf_peft_config_loaded
    return {
        "loaded": loaded,
        "has peft_config": "peft_config" in vars(model),
        "configs": {k: (id(v), v.to_dict()) for k, v in model.peft_config.items()} if loaded else None,
        "active": model.active_adapters() if loaded else None,
        "training": [m.training for m in model.modules()],
        "trainable": sorted(trainable(model)),
        "names": list(model.state_dict()),
        "output": model(IDS).tobytes(),
    }
