"""`hotswap`: a LoRA adapter gets the weights of another under its own name, on NumPy models."""

import inspect

import numpy as np
import pytest
from small_models import IDS as X
from small_models import net

import peftc

CONFIGS = {
    "same rank": {"r": 4, "lora_alpha": 8},
    "other rank": {"r": 2, "lora_alpha": 5},
    "fewer modules": {"r": 4, "lora_alpha": 3, "target_modules": ["query"]},
}


def config(**changes):
    return peftc.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["query", "embed"], **changes})


def adapter(seed, **changes):
    """(config, tensors) of an adapter whose tensors are all different from zero."""
    model = net()
    peftc.manual_seed(seed)
    model.add_adapter(config(init_lora_weights=False, **changes))
    return config(**changes, inference_mode=True), {k: v.copy() for k, v in model.get_adapter_state_dict().items()}


def load(model, name, which, **options):
    settings, tensors = which
    model.load_adapter(None, name, peft_config=settings, adapter_state_dict=tensors, **options)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_files_are_the_other_ones(changes, tmp_path):
    first, second = adapter(1), adapter(2, **changes)
    alone = net()
    load(alone, "one", second)
    model = net()
    load(model, "one", first)
    load(model, "two", adapter(3))
    model.set_adapter(["two", "one"])
    load(model, "one", second, hotswap=True)
    assert model.active_adapters() == ["two", "one"] and list(model.peft_config) == ["one", "two"]
    assert model.peft_config["one"] is second[0]
    model.set_adapter("one")
    np.testing.assert_array_equal(model(X), alone(X))
    state = model.get_adapter_state_dict("one")
    assert state.keys() == second[1].keys()
    for key, array in state.items():
        np.testing.assert_array_equal(array, second[1][key])
    names = model.state_dict()
    assert all(".one." in f"{name}." for _, name, *_ in model._peftc_attachment.registry.tensors("one"))
    assert model.get_adapter_state_dict("one", names).keys() <= second[1].keys()
    model.save_adapter(tmp_path, "one")
    swapped = net()
    load(swapped, "one", first)
    swapped.hotswap(tmp_path, "one")
    np.testing.assert_array_equal(swapped(X), alone(X))
    again = net()
    again.load_adapter(tmp_path)
    np.testing.assert_array_equal(again(X), alone(X))
    model.delete_adapter(["one", "two"])
    np.testing.assert_array_equal(model(X), net()(X))


def test_a_merged_adapter_is_unmerged():
    first, second = adapter(1), adapter(2)
    model = net()
    load(model, "one", first)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="got other weights"):
        load(model, "one", second, hotswap=True)
    alone = net()
    load(alone, "one", second)
    np.testing.assert_array_equal(model(X), alone(X))


def test_automatic_after_enable():
    first, second = adapter(1), adapter(2)
    model = net()
    load(model, "one", first)
    with pytest.raises(ValueError, match="already exists"):
        load(model, "one", second)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        model.enable_peft_hotswap(8)
    model.enable_peft_hotswap(8, check_compiled="ignore")
    load(model, "one", second)
    load(model, "two", first)
    assert list(model.peft_config) == ["one", "two"]
    with pytest.raises(ValueError, match="already exists"):
        load(model, "one", second, hotswap=False)
    for wrong in (0, -1, "8"):
        with pytest.raises(ValueError, match="target_rank"):
            model.enable_peft_hotswap(wrong, check_compiled="ignore")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"target_modules": ["query", "head"]}, RuntimeError),
        ({"r": 0}, ValueError),
        ({"target_modules": ["nowhere"]}, ValueError),
    ],
)
def test_refused_changes_nothing(changes, error):
    model = net()
    load(model, "one", adapter(1))
    before = model(X)
    settings, tensors = adapter(2)
    for field, value in changes.items():
        setattr(settings, field, value)
    old = model.peft_config["one"]
    with pytest.raises(error):
        load(model, "one", (settings, tensors), hotswap=True)
    np.testing.assert_array_equal(model(X), before)
    assert model.peft_config == {"one": old} and model.active_adapters() == ["one"]


def test_only_lora_and_only_what_is_there():
    model = net()
    with pytest.raises(ValueError, match="there must already be an existing adapter with the same adapter name"):
        load(model, "one", adapter(1), hotswap=True)
    model.add_adapter(peftc.IA3Config(target_modules=["query"], feedforward_modules=[]), "ia3")
    with pytest.raises(ValueError, match="only supported for LoRA"):
        load(model, "ia3", adapter(1), hotswap=True)
    load(model, "one", adapter(1))
    ia3 = peftc.IA3Config(target_modules=["query"], feedforward_modules=[])
    with pytest.raises(ValueError, match="only supported for LoRA"):
        load(model, "one", (ia3, {}), hotswap=True)


def test_arguments_of_transformers_5_are_taken_and_not_shown(tmp_path):
    model = net()
    model.add_adapter(config(init_lora_weights=False))
    model.save_adapter(tmp_path)
    other = net()
    other.load_adapter(tmp_path, local_files_only=True, hotswap=False, load_config=None)
    np.testing.assert_array_equal(other(X), model(X))
    assert "hotswap" not in inspect.signature(model.load_adapter).parameters
