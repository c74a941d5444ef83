"""bfloat16 adapters on NumPy models: with ml_dtypes, which gives NumPy the type, and without it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftc
from peftc import nn
from peftc.safetensors import safe_open

CONFIGS: dict[str, Any] = {
    "lora": lambda: peftc.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False),
    "dora": lambda: peftc.LoraConfig(r=4, target_modules=["a", "b"], init_lora_weights=False, use_dora=True),
    "pissa": lambda: peftc.LoraConfig(r=4, target_modules=["a"], init_lora_weights="pissa"),
    "head": lambda: peftc.LoraConfig(r=4, target_modules=["a"], modules_to_save=["b"], bias="all"),
    "ia3": lambda: peftc.IA3Config(target_modules=["a", "b"], feedforward_modules=["a"], init_ia3_weights=False),
    "adalora": lambda: peftc.AdaLoraConfig(target_modules=["a", "b"], total_step=10, init_r=4),
}
METHODS = pytest.mark.parametrize("method", CONFIGS)


class Net(peftc.PeftAdapterMixin, nn.Module):
    """Weights that bfloat16 holds exactly, in any dtype."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        self.a, self.b = nn.Linear(48, 48), nn.Linear(48, 8)
        for layer in (self.a, self.b):
            layer.weight = rng.integers(-64, 64, layer.weight.shape).astype("float32") / 256
            layer.bias = rng.integers(-64, 64, layer.bias.shape).astype("float32") / 256
        self.to(dtype).eval()

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.b(self.a(x))


X = np.random.default_rng(0).standard_normal((5, 48)).astype("float32")


def close(got: Any, want: Any, tolerance: float = 1e-2) -> None:
    assert np.abs(np.asarray(got, "float32") - want).max() <= tolerance * np.abs(want).max()


@METHODS
def test_forward_files_and_back(method: str, tmp_path: Any) -> None:
    """What is saved has the adapter's own values; other models compute the same with them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    model = Net("bfloat16")
    base = model(X)
    model.add_adapter(CONFIGS[method]())
    state = {key: array.copy() for key, array in model.get_adapter_state_dict().items()}
    assert {array.dtype for array in state.values()} == {np.dtype(ml_dtypes.bfloat16)}
    model.save_adapter(tmp_path)
    with safe_open(str(tmp_path / "adapter_model.safetensors"), framework="np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    want = model(X)
    for dtype in ("bfloat16", "float32", "float64"):
        for how in ({"peft_model_id": str(tmp_path)}, {"adapter_state_dict": state, "peft_config": CONFIGS[method]()}):
            other = Net(dtype)
            other.load_adapter(**how)
            got = other.get_adapter_state_dict()
            for key, array in state.items():
                assert np.array_equal(got[key].astype("float32"), array.astype("float32")), key
            close(other(X), want)
            if dtype == "bfloat16":
                assert np.array_equal(other(X), want)
    exact = Net("float64")
    exact.load_adapter(str(tmp_path))
    close(want, exact(X.astype("float64")))
    model.registry.merge()
    close(model(X), want)
    model.registry.unmerge()
    assert np.array_equal(model(X), want)
    model.disable_adapters()
    assert np.array_equal(model(X), base)
    model.enable_adapters()
    model.delete_adapter("default")
    assert np.array_equal(model(X), base)


@METHODS
def test_training_is_that_of_float32(method: str) -> None:
    """From the same values, with averages in float32: losses stay together as far as 8 bits of a weight go."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    start = Net("bfloat16")
    start.add_adapter(CONFIGS[method]())
    state = {key: array.copy() for key, array in start.get_adapter_state_dict().items()}
    target = np.random.default_rng(3).standard_normal((5, 8)).astype("float32")
    losses = {}
    for dtype in ("bfloat16", "float32"):
        model = Net(dtype)
        model.load_adapter(adapter_state_dict=state, peft_config=CONFIGS[method](), is_trainable=True)
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert {p.data.dtype for p in parameters} == {
            np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else "float32")
        }
        optimizer = peftc.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
        losses[dtype] = []
        for _ in range(30):
            y = model(X)
            loss, grad = nn.functional.mse_loss(y, target)
            losses[dtype].append(float(loss))
            optimizer.zero_grad()
            model.backward(grad)
            optimizer.step()
        assert all(np.isfinite(p.data.astype("float32")).all() for p in parameters)
    short, exact = losses["bfloat16"], losses["float32"]
    assert short[-1] < 0.8 * short[0]
    close(short, np.array(exact), 0.15)


@METHODS
def test_without_ml_dtypes(method: str, tmp_path: Any) -> None:
    """All but what shows arrays works; that says what to install, and leaves everything as it was."""
    program = f"""
        import sys
        sys.modules["ml_dtypes"] = None
        import numpy as np
        import pytest
        from pathlib import Path
        from test_bfloat16 import CONFIGS, Net, X, close, nn, peftc

        peftc.manual_seed(0)
        folder = Path({str(tmp_path)!r})
        model = Net("bfloat16")
        base = model(X)
        model.add_adapter(CONFIGS[{method!r}]())
        want = model(X)
        model.save_adapter(folder)
        for show in (
            model.get_adapter_state_dict,
            model.state_dict,
            lambda: list(model.parameters()),
            lambda: peftc.safetensors.load_file(str(folder / "adapter_model.safetensors")),
        ):
            with pytest.raises(TypeError, match="NumPy has no type for BF16; install ml_dtypes"):
                show()
        assert np.array_equal(model(X), want)
        for dtype in ("bfloat16", "float32"):
            other = Net(dtype)
            other.load_adapter(str(folder))
            close(other(X), want)
        assert other.get_adapter_state_dict()
        model.registry.merge()
        close(model(X), want)
        model.registry.unmerge()
        assert np.array_equal(model(X), want)
        model.delete_adapter("default")
        assert np.array_equal(model(X), base)
        # The remedy without it: the same adapter in float32 can be trained.
        trained = Net("float32")
        trained.load_adapter(str(folder), is_trainable=True)
        trained.train()
        optimizer = peftc.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.002)
        y = trained(X)
        loss, grad = nn.functional.mse_loss(y, np.zeros_like(y))
        trained.backward(grad)
        optimizer.step()
        y = trained(X)
        assert nn.functional.mse_loss(y, np.zeros_like(y))[0] < loss
        print("good")
    """
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.stdout == "good\n", done.stderr[-3000:]
