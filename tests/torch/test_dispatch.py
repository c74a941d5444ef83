"""Models that accelerate has spread over memory and disk: what load_adapter's device_map and the like do to them."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from their_mixin import V5
from transformers import GPT2Config, GPT2LMHeadModel

import peftc

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(6)[None]
HALF = {
    "transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.drop": "cpu", "transformer.h.0": "cpu",
    "transformer.h.1": "disk", "transformer.h.2": "disk", "transformer.ln_f": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def patched():
    with peftc.patch_transformers():
        yield


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    model.add_adapter(
        peft.LoraConfig(target_modules=["c_attn", "c_fc"], init_lora_weights=False, modules_to_save=["lm_head"]), "one"
    )
    with torch.no_grad():
        model.lm_head.modules_to_save["one"].weight.mul_(1.5)
    model.save_adapter(tmp_path / "adapter", "one")
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.clone()


@pytest.fixture
def expected(folders):
    whole = GPT2LMHeadModel.from_pretrained(folders / "model").eval()
    base = logits(whole)
    whole.load_adapter(str(folders / "adapter"))
    return base, logits(whole)


def spread(folders, places=HALF):
    model = GPT2LMHeadModel.from_pretrained(
        folders / "model", device_map=dict(places), offload_folder=str(folders / "first")
    )
    assert model.transformer.h[1].mlp.c_fc.weight.device.type == "meta"
    return model.eval()


def on_disk(model):
    return sorted({n.split(".")[2] for n, p in model.named_parameters() if p.device.type == "meta" and ".h." in n})


ELSEWHERE = {**HALF, "transformer.h.0": "disk", "transformer.h.1": "cpu"}
CASES = {
    "as it was": ({"device_map": HALF}, ["1", "2"]),
    "left alone": ({"device_map": None}, ["1", "2"]),
    "auto": ({}, ["1", "2"] if V5 else []),  # Transformers 5 leaves models where they are
    "auto within a limit": ({"max_memory": {"cpu": "30KB"}, "offload_folder": "second"}, None),
    "sequential": ({"device_map": "sequential", "max_memory": {"cpu": 30_000}, "offload_folder": "second"}, None),
    "one goes, one comes": ({"device_map": ELSEWHERE, "offload_folder": "second"}, ["0", "2"]),
    "all in memory": ({"device_map": {"": "cpu"}}, []),
    "a device": ({"device_map": torch.device("cpu")}, []),
    "everything on disk": ({"device_map": dict.fromkeys(HALF, "disk"), "offload_folder": "second"}, ["0", "1", "2"]),
}


@pytest.mark.parametrize(("options", "disk"), CASES.values(), ids=CASES)
def test_same_logits(folders, expected, options, disk):
    model = spread(folders)
    assert torch.allclose(logits(model), expected[0], atol=1e-6)
    if "offload_folder" in options:
        options = {**options, "offload_folder": str(folders / options["offload_folder"])}
    model.load_adapter(str(folders / "adapter"), **options)
    assert torch.allclose(logits(model), expected[1], atol=1e-6)
    if disk is not None:
        assert on_disk(model) == disk
    else:
        assert on_disk(model)
    assert {"cpu"} == {p.device.type for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    if options.get("device_map") is not None and isinstance(options["device_map"], dict):
        assert model.hf_device_map == options["device_map"]
    # A second adapter moves nothing.
    before = on_disk(model)
    model.load_adapter(str(folders / "adapter"), "two", device_map={"": "cpu"})
    assert on_disk(model) == before and torch.allclose(logits(model), expected[1], atol=1e-6)
    model.disable_adapters()
    assert torch.allclose(logits(model), expected[0], atol=1e-6)
    model.delete_adapter(["default", "two"])
    assert torch.allclose(logits(model), expected[0], atol=1e-6)
    assert not [n for n, _ in model.named_modules() if "lora" in n or "base_layer" in n]
    # and again
    model.load_adapter(str(folders / "adapter"), "three", device_map=HALF, offload_folder=str(folders / "third"))
    assert on_disk(model) == ["1", "2"] and torch.allclose(logits(model), expected[1], atol=1e-6)


def test_head_on_disk(folders, expected):
    """modules_to_save: an adapter's copy of a head that is on disk is in memory."""
    model = spread(folders, {**HALF, "lm_head": "disk"})
    model.load_adapter(str(folders / "adapter"), device_map=None)
    assert torch.allclose(logits(model), expected[1], atol=1e-6)
    model.add_adapter(peft.LoraConfig(target_modules=["c_fc"], modules_to_save=["lm_head"]), "fresh")
    assert torch.allclose(logits(model), expected[0], atol=1e-6)


def test_tied(folders, tmp_path):
    torch.manual_seed(1)
    whole = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, n_positions=16)).eval()
    whole.save_pretrained(tmp_path / "tied")
    whole.add_adapter(peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False), "one")
    whole.save_adapter(tmp_path / "small", "one")
    places = {**HALF, "transformer.wte": "disk", "lm_head": "disk"}
    model = GPT2LMHeadModel.from_pretrained(
        tmp_path / "tied", device_map=places, offload_folder=str(tmp_path / "x")
    ).eval()
    model.load_adapter(str(tmp_path / "small"))
    assert torch.allclose(logits(model), logits(whole), atol=1e-6)
    assert V5 or model.lm_head.weight is model.transformer.wte.weight


def test_refused(folders, expected):
    model = spread(folders)
    with pytest.raises(ValueError, match="transformer.h.0.* to disk: pass offload_folder"):
        model.load_adapter(str(folders / "adapter"), device_map=ELSEWHERE)
    assert not model._hf_peft_config_loaded and on_disk(model) == ["1", "2"]
    for config in (
        peft.LoraConfig(target_modules=["c_fc"], use_dora=True),
        peft.VeraConfig(target_modules=["c_fc"], save_projection=False),
    ):
        with pytest.raises(ValueError, match="not in memory|does not support PeftType.VERA"):
            model.add_adapter(config, "new")
        assert not model._hf_peft_config_loaded
    assert torch.allclose(logits(model), expected[0], atol=1e-6)
    model.load_adapter(str(folders / "adapter"), device_map=None)
    with pytest.raises(ValueError, match="merging changes them"):
        model.merge_adapter()
    assert torch.allclose(logits(model), expected[1], atol=1e-6)


PEAK = """
import json, sys, threading, torch, peft, peftc
from torch import nn

class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4096, 4096, bias=False)
        self.head = nn.Linear(4096, 512, bias=False)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

folder, made_with, low = sys.argv[1:]
model = Model()
small = peft.LoHaConfig if made_with == "peft" else peft.LoraConfig
def load(name):
    model.load_adapter(folder, name, low_cpu_mem_usage=low == "low")
if made_with == "write":
    model.add_adapter(peft.LoraConfig(r=1024, target_modules=["fc"], modules_to_save=["head"]), "a")
    model.save_adapter(folder, "a")
    sys.exit()
load("warm")
model.delete_adapter("warm")
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
load("a")
done = True
thread.join()
size = sum(t.numel() * t.element_size() for t in model.get_adapter_state_dict("a").values())
print(json.dumps([size, peak - before, anonymous() - before]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the kernel's count")
@pytest.mark.parametrize("low", ["low", "not"])
def test_a_load_holds_each_weight_once(tmp_path, low):
    """Sized by its anonymous memory: pages of the file that are looked at are not the process's own."""

    def run(*args):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), *args], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write", low)
    size, peak, after = json.loads(run("load", low))
    assert size > 40e6 and after < 1.15 * size and peak < 1.3 * size, (size, peak, after)
