"""What users write, for type checkers: `mypy --strict` must find nothing here, and every `assert_type` holds.

tests/test_stubs.py runs mypy on it. It is never executed.
"""

import numpy as np
from typing_extensions import assert_type

import peftc
from peftc import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftType, TaskType, nn, safetensors


class Classifier(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.norm = nn.LayerNorm((width,), eps=1e-12)
        self.blocks = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(2)])
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.GELU(), nn.Linear(width, labels))

    def forward(self, x: np.ndarray) -> np.ndarray:
        x = self.norm.forward(self.query.forward(x), x)
        for block in self.blocks:
            x = block(x)
        logits: np.ndarray = self.classifier(x)
        return logits


def layers() -> None:
    layer = nn.Linear(4, 8, dtype="float16")
    assert_type(layer.in_features, int)
    assert_type(layer.weight, nn.Parameter)
    assert_type(layer.bias, nn.Parameter | None)
    assert_type(layer.weight.data, np.ndarray)
    layer.weight = np.zeros((8, 4))
    layer.in_features = 3  # type: ignore[misc]  # read-only
    assert_type(layer.forward(np.ones((2, 4))), np.ndarray)
    assert_type(layer.to("float32").eval(), nn.Linear)
    assert_type(nn.functional.gelu(np.ones(3), approximate="tanh"), np.ndarray)
    assert_type(layer.state_dict(), dict[str, np.ndarray])
    print(sum(parameter.size for parameter in layer.parameters() if parameter.requires_grad))


def adapters(folder: str) -> None:
    model = Classifier(8, 2).eval()
    assert_type(model, Classifier)
    config = LoraConfig(r=8, target_modules=["query"], lora_alpha=16, bias="none", task_type=TaskType.SEQ_CLS)
    model.add_adapter(config, adapter_name="a")
    model.add_adapter(IA3Config(target_modules={"query"}, feedforward_modules=set()), "b")
    model.add_adapter(AdaLoraConfig(target_modules="query", total_step=100), "c")
    model.load_adapter(folder, adapter_name="d", is_trainable=True, adapter_kwargs={"subfolder": "x"})
    arrays = peftc.load_adapter_weights(folder)
    assert_type(arrays, dict[str, np.ndarray])
    model.load_adapter(peft_config=config.to_dict(), adapter_state_dict=arrays, adapter_name="e")
    model.set_adapter(["a", "b"])
    model.disable_adapters()
    model.enable_adapters()
    assert_type(model.active_adapters(), list[str])
    model.save_adapter(folder, "a")
    model.merge_adapter(["a"], safe_merge=True)
    model.unmerge_adapter()
    model.delete_adapter("a")
    for name, tensor in model.get_adapter_state_dict("b").items():
        print(name, tensor.shape)
    loaded = PeftConfig.from_pretrained(folder)
    assert_type(loaded, PeftConfig)
    print(loaded.peft_type == PeftType.LORA, peftc.get_num_threads())
    LoraConfig(rank=8)  # type: ignore[call-arg]  # no such field


def models(folder: str) -> None:
    assert_type(peftc.models.BertModel.from_pretrained(folder), peftc.models.BertModel)
    model = peftc.models.from_pretrained(folder, num_labels=3)
    print(model(np.zeros((1, 2), np.int64)).logits, model.config.hidden_size)


def files(path: str) -> None:
    tensors = safetensors.load_file(path)
    assert_type(tensors, dict[str, np.ndarray])
    safetensors.save_file(tensors, path, metadata={"format": "np"})
    with safetensors.safe_open(path, framework="np") as file:
        assert_type(file.keys(), list[str])
        assert_type(file.metadata(), dict[str, str] | None)
        assert_type(file.get_slice("w")[:2], np.ndarray)
    print(peftc.no_such_name)  # type: ignore[attr-defined]
