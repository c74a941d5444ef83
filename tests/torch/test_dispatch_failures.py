"""A model spread by accelerate whose re-dispatch fails half-way is as it was; what `offload_index` says is believed."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import peft
import pytest
import torch
from limits import small_disk
from safetensors.torch import save_file
from test_dispatch import ELSEWHERE, HALF, folders, logits, on_disk, patched, spread  # noqa: F401
from transformers import GPT2LMHeadModel

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def room(size):
    """Within: no file grows beyond `size` bytes, as on a full disk; a write that would raises OSError."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def state(model):
    """Everything that a re-dispatch or an adapter could change, down to the objects."""
    rows = []
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = [
            (type(one), id(one), sorted(vars(one))) for one in (hook, *getattr(hook, "hooks", ())) if one is not None
        ]
        own = {key for key in vars(module) if key not in ("_peftc_attachment", "_hf_peft_config_loaded")}
        rows.append((path, id(module), type(module), module.training, sorted(own), list(module._modules), hooks))
        rows.append(
            [
                (name, id(p), p.data_ptr(), p.device, p.requires_grad)
                for name, p in module._parameters.items()
                if p is not None
            ]
        )
        rows.append([(name, id(b), b.data_ptr(), b.device) for name, b in module._buffers.items() if b is not None])
    return [*rows, dict(model.hf_device_map), getattr(model, "peft_config", None), model._hf_peft_config_loaded]


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def unchanged(model, folder, call, error, match):
    """The call is refused, and then all is as before: the model, its outputs, the files in the folder."""
    outputs, before, files = logits(model), state(model), files_of(folder)
    with pytest.raises(error, match=match):
        call()
    assert state(model) == before and files_of(folder) == files
    assert torch.equal(logits(model), outputs)


# ------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("bytes_left", [0, 100, 3000])
def test_no_room_on_the_disk(folders, bytes_left):  # noqa: F811
    """Small files still fit, larger ones do not: it fails at the first tensor, or in the middle."""
    model = spread(folders)
    for parameter in model.transformer.wte.parameters():
        parameter.requires_grad_(False)
    model.transformer.ln_f.train()

    def load():
        with room(bytes_left):
            model.load_adapter(str(folders / "adapter"), device_map=ELSEWHERE, offload_folder=str(folders / "second"))

    unchanged(model, folders / "second", load, OSError, r"transformer\.h\.0\..*offload_folder with more room")
    assert (
        model.transformer.ln_f.training
        and not model.transformer.wte.weight.requires_grad
        and model.lm_head.weight.requires_grad
    )
    # with room it works
    model.eval()
    model.load_adapter(str(folders / "adapter"), device_map=ELSEWHERE, offload_folder=str(folders / "second"))
    assert on_disk(model) == ["0", "2"]
    whole = GPT2LMHeadModel.from_pretrained(folders / "model").eval()
    whole.load_adapter(str(folders / "adapter"))
    assert torch.allclose(logits(model), logits(whole), atol=1e-6)


FULL = """
import errno, os, sys
sys.path[:0] = {paths!r}
from test_dispatch import ELSEWHERE, logits, on_disk, spread
from test_dispatch_failures import state
from pathlib import Path
import peftc
folders = Path(sys.argv[1])
with peftc.patch_transformers():
    model = spread(folders)
    outputs, before = logits(model), state(model)
    second = folders / "small" / "second"
    try:
        model.load_adapter(str(folders / "adapter"), device_map=ELSEWHERE, offload_folder=str(second))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    else:
        raise SystemExit("it fitted")
    assert state(model) == before and (logits(model) == outputs).all() and on_disk(model) == ["1", "2"]
    assert not list(second.glob("*")), list(second.glob("*"))
print("as it was")
"""


def test_a_disk_that_is_really_full(folders):  # noqa: F811
    """In a process of its own: accelerate's way of writing ends it with SIGBUS."""
    with small_disk(folders / "small", "8k"):
        here = os.path.dirname(__file__)
        code = FULL.format(paths=[here, os.path.dirname(here), os.getcwd()])
        done = subprocess.run([sys.executable, "-c", code, folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "as it was" in done.stdout, (done.returncode, done.stderr)


def test_what_comes_back_cannot_be_read(folders, monkeypatch):  # noqa: F811
    from accelerate.utils import offload

    model = spread(folders)
    read = offload.OffloadedWeightsLoader.__getitem__
    outputs, before = logits(model), state(model)

    def damaged(loader, key):
        if key == "transformer.h.1.mlp.c_fc.bias":
            raise OSError("the disk is gone")
        return read(loader, key)

    monkeypatch.setattr(offload.OffloadedWeightsLoader, "__getitem__", damaged)
    with pytest.raises(OSError, match="the disk is gone"):
        model.load_adapter(str(folders / "adapter"), device_map={"": "cpu"})
    assert state(model) == before
    monkeypatch.undo()
    assert torch.equal(logits(model), outputs)


def test_accelerate_refuses(folders, monkeypatch):  # noqa: F811
    """A device_map without a part of the model; files that were written already are gone again."""
    model = spread(folders)
    places = {name: place for name, place in ELSEWHERE.items() if name != "lm_head"}

    def load():
        model.load_adapter(str(folders / "adapter"), device_map=places, offload_folder=str(folders / "second"))

    unchanged(model, folders / "second", load, ValueError, "lm_head")


def test_a_config_that_was_given_is_as_it_was(folders):  # noqa: F811
    model = spread(folders)
    config = peft.LoraConfig(target_modules="all-linear", inference_mode=True)
    tensors = {}
    fields = dict(vars(config))

    def load():
        with room(0):
            model.load_adapter(
                peft_config=config,
                adapter_state_dict=tensors,
                device_map=ELSEWHERE,
                offload_folder=str(folders / "second"),
            )

    unchanged(model, folders / "second", load, OSError, "offload_folder")
    assert vars(config) == fields


def test_biases_on_disk_are_refused(folders):  # noqa: F811
    """They take the place of the base's, which are not there; c_proj of the layers in memory has some."""
    model = spread(folders)
    before = logits(model)
    for bias in ("all", "lora_only"):
        with pytest.raises(ValueError, match=r"transformer\.h\.1.*not in memory.*bias='"):
            model.add_adapter(peft.LoraConfig(target_modules=["c_fc"], bias=bias), "new")
    assert not model._hf_peft_config_loaded and torch.equal(logits(model), before)
    model.add_adapter(peft.LoraConfig(target_modules=["h.0.mlp.c_fc"], bias="lora_only"), "new")
    assert model.transformer.h[0].mlp.c_fc.bias.requires_grad


# ------------------------------------------------------------------------------------------- offload_index


def stored_elsewhere(folders, names, how):  # noqa: F811
    """Write a model's tensors as accelerate would find them; returns offload_index."""
    whole = GPT2LMHeadModel.from_pretrained(folders / "model")
    tensors = {name: p.detach().clone() for name, p in whole.named_parameters() if any(part in name for part in names)}
    if how == "safetensors":
        path = folders / "weights.safetensors"
        save_file({f"their.{name}": tensor for name, tensor in tensors.items()}, path)
        return {
            name: {"safetensors_file": str(path), "weight_name": f"their.{name}", "dtype": "float32"}
            for name in tensors
        }
    (folders / "second").mkdir()
    for name, tensor in tensors.items():
        tensor.numpy().tofile(folders / "second" / f"{name}.dat")
    return {name: {"dtype": "float32", "shape": list(tensor.shape)} for name, tensor in tensors.items()}


@pytest.mark.parametrize("how", ["safetensors", "files"])
def test_what_the_index_has_is_not_written(folders, how):  # noqa: F811
    """h.0 goes to disk, where it is already; h.2 stays there and is found in the new place."""
    index = stored_elsewhere(folders, (".h.0.", ".h.2."), how)
    model = spread(folders)
    files = {path: path.stat().st_mtime_ns for path in folders.rglob("*.dat")}
    model.load_adapter(
        str(folders / "adapter"),
        device_map=ELSEWHERE,
        offload_index=index,
        offload_folder=None if how == "safetensors" else str(folders / "second"),
    )
    assert on_disk(model) == ["0", "2"]
    assert {path: path.stat().st_mtime_ns for path in folders.rglob("*.dat")} == files
    whole = GPT2LMHeadModel.from_pretrained(folders / "model").eval()
    whole.load_adapter(str(folders / "adapter"))
    assert torch.allclose(logits(model), logits(whole), atol=1e-6)
    json.dumps(index)  # the caller's, unchanged


def test_the_index_is_believed(folders):  # noqa: F811
    """Other values there are the model's from then on, as accelerate has it."""
    name = "transformer.h.2.mlp.c_fc.bias"
    index = {name: {"safetensors_file": str(folders / "other.safetensors"), "weight_name": "x", "dtype": "float32"}}
    save_file({"x": torch.full((64,), 0.5)}, folders / "other.safetensors")
    model = spread(folders)
    model.load_adapter(str(folders / "adapter"), device_map=HALF, offload_index=index)
    whole = GPT2LMHeadModel.from_pretrained(folders / "model").eval()
    with torch.no_grad():
        whole.transformer.h[2].mlp.c_fc.bias.fill_(0.5)
    whole.load_adapter(str(folders / "adapter"))
    assert torch.allclose(logits(model), logits(whole), atol=1e-6)


def test_an_index_that_leads_nowhere(folders):  # noqa: F811
    model = spread(folders)
    name = "transformer.h.0.mlp.c_fc.bias"
    cases = [
        ({name: {"safetensors_file": str(folders / "none.safetensors")}}, ValueError, "which is not there"),
        ({name: {"dtype": "float32", "shape": [64]}}, ValueError, "pass offload_folder"),
        ({name: "somewhere"}, ValueError, r"offload_index\['transformer.h.0"),
        (3, TypeError, "offload_index is a dict"),
    ]
    for index, error, match in cases:
        unchanged(
            model,
            folders / "second",
            lambda index=index: model.load_adapter(str(folders / "adapter"), device_map=ELSEWHERE, offload_index=index),
            error,
            match,
        )
