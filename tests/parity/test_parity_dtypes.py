"""Every initialisation in every dtype: saved by peftc, loaded again by peftc and by PEFT."""

import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from twins import OURS, Twins, text_net

import peftc

#: As many iterations as make the sketch, which PEFT draws anew at each load, immaterial.
INITS = [True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_600"]
#: Each torch operation rounds to the dtype; ours rounds once per layer.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("init", INITS)
def test_saved_and_loaded(init, dtype, tmp_path):
    twins = Twins(text_net, 9, dim=16, layers=2)
    theirs = twins.theirs.to(getattr(torch, dtype))
    ours = twins.ours.to(dtype)
    x = twins.inputs()
    peftc.manual_seed(4)
    targets = ["q_proj", "c_attn", "down"]
    if init == "olora":  # difference: PEFT decomposes the weight of a Conv1D as if it were that of a Linear
        targets.remove("c_attn")
    ours.add_adapter(peftc.LoraConfig(r=4, target_modules=targets, init_lora_weights=init))
    ours.eval()
    rng = np.random.default_rng(1)
    if dtype != "bfloat16":  # as if trained
        for value in ours.get_adapter_state_dict().values():
            value += (0.05 * rng.standard_normal(value.shape)).astype(value.dtype)
    expected = [np.array(y) for y in ours(x)]
    ours.save_adapter(tmp_path)
    file = load_file(tmp_path / WEIGHTS)
    assert {value.dtype for value in file.values()} == {getattr(torch, dtype)}

    again = text_net(OURS, dim=16, layers=2)
    again.load_state_dict(twins.base)
    again.to(dtype)
    again.load_adapter(tmp_path)
    for result, before in zip(again(x), expected, strict=True):
        np.testing.assert_array_equal(result, before)
    again.save_adapter(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()

    subtracts = isinstance(init, str) and init.startswith(("pissa", "olora"))
    if dtype == "float64" and subtracts:  # PEFT has no such decomposition in float64
        with pytest.raises(TypeError):
            peft.PeftModel.from_pretrained(theirs, tmp_path, autocast_adapter_dtype=False)
        return
    model = peft.PeftModel.from_pretrained(theirs, tmp_path, autocast_adapter_dtype=False).eval()
    loaded = get_peft_model_state_dict(model)
    assert set(loaded) == set(file)
    for key, value in file.items():
        assert torch.equal(loaded[key], value)
    with torch.no_grad():
        outputs = [y.to(torch.float64).numpy() for y in model(torch.from_numpy(x))]
    for result, theirs_out in zip(expected, outputs, strict=True):
        scale = max(1.0, float(np.abs(theirs_out).max()))
        np.testing.assert_allclose(result, theirs_out, rtol=0, atol=TOLERANCE[dtype] * scale)
