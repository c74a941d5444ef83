"""What users call on `PeftModel.base_model` and on adapted layers, beside PEFT's: the same results, numbers and errors."""

from __future__ import annotations

import copy
import functools
import warnings

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft_cases import MLP
from their_mixin import PEFT
from torch import nn
from transformers import BertConfig, BertModel

import peftc

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

CONFIGS = {
    "LORA": lambda library, **more: library.LoraConfig(**{"target_modules": ["lin0", "lin1"], "r": 4, **more}),
    "IA3": lambda library, **more: library.IA3Config(
        target_modules=["lin0", "lin1"], feedforward_modules=["lin1"], **more
    ),
    "ADALORA": lambda library, **more: library.AdaLoraConfig(
        **{"target_modules": ["lin0", "lin1"], "init_r": 4, "total_step": 20, **more}
    ),
}
METHODS = pytest.mark.parametrize("method", CONFIGS)


class Everything(nn.Module):
    """A layer of each kind that LoRA knows by itself."""

    def __init__(self):
        super().__init__()
        self.emb, self.lin, self.conv = nn.Embedding(10, 8), nn.Linear(8, 6), nn.Conv2d(3, 4, 3)


def pair(method, base=MLP, **more):
    """(PEFT's model, ours) with the same values, in eval mode."""
    torch.manual_seed(1)
    model = base()
    models = [
        library.get_peft_model(one, CONFIGS[method](library, **more)).eval()
        for library, one in ((peft, copy.deepcopy(model)), (peftc, model))
    ]
    follow(*models)
    return models


def follow(theirs, ours, name="default"):
    """Values far from where training begins, the same in both."""
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if f".{name}" in key and "ranknum" not in key:
                parameter.copy_(torch.randn_like(parameter))
    state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
    own = peftc.get_peft_model_state_dict(ours, adapter_name=name)
    peftc.set_peft_model_state_dict(ours, {key: state[key] for key in own}, adapter_name=name)


def alike(theirs, ours):
    batch = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs(batch), atol=1e-5, rtol=1e-5)


def both(theirs, ours, call):
    """Result, or exception, of a call on each."""
    results = []
    for model in (theirs, ours):
        try:
            results.append(call(model))
        except Exception as error:  # noqa: BLE001
            results.append((type(error), str(error)))
    return results


# ------------------------------------------------------------------------ the model


#: what neither has a use on an adapter of peftc, nor is documented: how PEFT makes its layers
OF_PEFTS_MAKING = {"target_module_mapping", "tuner_layer_cls", "uses_shared_state"}


@METHODS
def test_nothing_public_is_missing(method):
    theirs, ours = pair(method)
    missing = {name for name in dir(theirs.base_model) if name[0] != "_" and not hasattr(ours.base_model, name)}
    assert missing - OF_PEFTS_MAKING == ({"rankallocator"} if method == "ADALORA" else set())
    assert {name for name in dir(theirs) if name[0] != "_" and not hasattr(ours, name)} == set()


def test_config_of_the_model():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    theirs = peft.get_peft_model(BertModel(config), peft.LoraConfig(target_modules=["query"]))
    ours = peftc.get_peft_model(BertModel(config), peftc.LoraConfig(target_modules=["query"]))
    for one in (BertModel(config), MLP()):
        got = ours.base_model.get_model_config(one)
        assert got == theirs.base_model.get_model_config(one)
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names
    assert ours.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names == []


@pytest.mark.skipif(PEFT >= (0, 18), reason="PEFT has no such method any more")
@METHODS
@pytest.mark.parametrize("inference", [False, True])
def test_configs_as_dict(method, inference):
    theirs, ours = pair(method)
    for model, library in ((theirs, peft), (ours, peftc)):
        if method != "ADALORA":
            model.add_adapter("other", CONFIGS[method](library, target_modules=["lin1"]) if method == "LORA" else
                              CONFIGS[method](library))  # fmt: skip
    got = ours.base_model.get_peft_config_as_dict(inference)
    assert got == theirs.base_model.get_peft_config_as_dict(inference=inference)
    assert got["inference_mode"] is inference


@METHODS
def test_several_adapters_and_their_modules(method):
    theirs, ours = pair(method)
    more = {} if method != "ADALORA" else {"inference_mode": True}
    for model, library in ((theirs, peft), (ours, peftc)):
        model.add_adapter("other", CONFIGS[method](library, **more))
    assert ours.base_model.targeted_module_names == list(dict.fromkeys(theirs.base_model.targeted_module_names))


@pytest.mark.skipif(PEFT < (0, 21), reason="PEFT has no such arguments yet")
@METHODS
def test_gradients_by_name(method):
    theirs, ours = pair(method)
    more = {} if method != "ADALORA" else {"inference_mode": True}
    for model, library in ((theirs, peft), (ours, peftc)):
        model.add_adapter("other", CONFIGS[method](library, **more))

    def flags(model):
        return {name: p.requires_grad for name, p in model.named_parameters() if "ranknum" not in name}

    for do in (
        lambda model: model.set_requires_grad("default", False),
        lambda model: model.base_model.set_requires_grad(["default", "other", "nobody"]),
        lambda model: model.set_adapter("other", inference_mode=True),
        lambda model: model.set_requires_grad("other"),
        lambda model: model.base_model.set_adapter(["default", "other"], inference_mode=True),
        lambda model: model.set_adapter("default"),
    ):
        both(theirs, ours, do)
        assert flags(ours) == flags(theirs)


@pytest.mark.parametrize("cast", [None, True, False])
def test_dtype_of_a_second_adapter(cast):
    if cast is not None and PEFT < (0, 19):
        pytest.skip("PEFT has no such argument yet")
    models = [
        library.get_peft_model(MLP().bfloat16(), CONFIGS["LORA"](library)) for library in (peft, peftc)
    ]  # fmt: skip
    for model, library in zip(models, (peft, peftc), strict=True):
        model.add_adapter(
            "other", CONFIGS["LORA"](library), **({} if cast is None else {"autocast_adapter_dtype": cast})
        )
    theirs, ours = ({name: p.dtype for name, p in model.named_parameters()} for model in models)
    assert ours == theirs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_become_lora(init, rslora):
    theirs, ours = pair("LORA", init_lora_weights=init, use_rslora=rslora, target_modules=["lin0"])
    first = peft.get_peft_model_state_dict(theirs)
    # PEFT takes the first values under another name out of the base weights once more: that is no part of this call.
    for model, library in ((theirs, peft), (ours, peftc)):
        model.add_adapter("first", CONFIGS["LORA"](library, use_rslora=rslora, target_modules=["lin0"]))
        library.set_peft_model_state_dict(model, dict(first), adapter_name="first")
    follow(theirs, ours)
    trained = peft.get_peft_model_state_dict(theirs)
    want = theirs.base_model.subtract_mutated_init(trained, "first", {})
    for kwargs in ({}, None, {"state_dict": ours.base_model.state_dict()}):
        got = ours.base_model.subtract_mutated_init(trained, "first", kwargs)
        assert list(got) == list(want)
        for key, tensor in got.items():
            assert torch.equal(tensor, want[key])
    with pytest.raises(ValueError, match="adapter first has no tensor"):
        ours.base_model.subtract_mutated_init({"base_model.model.x.lora_A.weight": torch.zeros(1)}, "first")


# ------------------------------------------------------------------------ AdaLora

MASKS = {"lin0": [True, False, True, False], "lin1": [False, False, False, True]}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("tail", ["", ".default"])
def test_resizing_modules(tail, as_tensor):
    theirs, ours = pair("ADALORA")
    pattern = {
        f"{name}.lora_E{tail}": torch.tensor(mask).view(-1, 1) if as_tensor else mask for name, mask in MASKS.items()
    }
    if PEFT < (0, 21):
        theirs.base_model.resize_modules_by_rank_pattern(pattern, "default")
    else:  # there PEFT hands a config to the layer where it wants numbers
        for name, mask in MASKS.items():
            layer = theirs.base_model.model.get_submodule(name)
            for field in ("lora_A", "lora_B", "lora_E"):
                tensor = getattr(layer, field)["default"].data
                getattr(layer, field)["default"] = nn.Parameter(tensor[:, mask] if field == "lora_B" else tensor[mask])
            layer.r["default"] = sum(mask)
    ours.base_model.resize_modules_by_rank_pattern(pattern, "default")
    alike(theirs, ours)
    want = {name: (p.shape, p.requires_grad) for name, p in theirs.named_parameters() if "ranknum" not in name}
    assert {name: (p.shape, p.requires_grad) for name, p in ours.named_parameters() if "ranknum" not in name} == want
    assert [ours.base_model.model.get_submodule(name).r for name in MASKS] == [{"default": 2}, {"default": 1}]
    assert [theirs.base_model.model.get_submodule(name).r for name in MASKS] == [{"default": 2}, {"default": 1}]
    loss = ours(torch.randn(2, 10)).sum()
    loss.backward()
    assert ours.base_model.model.lin0.lora_E["default"].grad.shape == (2, 1)


def test_a_rank_pattern_that_does_not_fit_changes_nothing():
    theirs, ours = pair("ADALORA")
    before = {name: parameter for name, parameter in ours.named_parameters()}
    want, got = both(
        theirs, ours, lambda model: model.base_model.resize_modules_by_rank_pattern({"lin0.lora_E": 3}, "default")
    )
    assert got[1] == want[1] == "Unexpected type of rank_idx"
    assert got[0] is ValueError and want[0] in (ValueError, TypeError)  # of 0.17, of 0.21
    for pattern, text in (
        ({"lin0.lora_E": MASKS["lin0"], "lin1.lora_E": [True] * 3}, "for 3 triplets, of which there are 4"),
        ({"lin0.lora_E": MASKS["lin0"], "lin7.lora_E": [True] * 4}, "adapts no module lin7"),
    ):
        with pytest.raises(ValueError, match=text):
            ours.base_model.resize_modules_by_rank_pattern(pattern, "default")
    with pytest.raises(KeyError, match="nobody"):
        ours.base_model.resize_modules_by_rank_pattern({}, "nobody")
    after = dict(ours.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@pytest.mark.parametrize("tail", ["", ".default"])
def test_resizing_a_state_dict(tail):
    theirs, ours = pair("ADALORA")
    pattern = {f"{name}.lora_E{tail}": mask for name, mask in MASKS.items()}
    want = theirs.base_model.resize_state_dict_by_rank_pattern(pattern, dict(theirs.state_dict()), "default")
    state = dict(theirs.state_dict())
    got = ours.base_model.resize_state_dict_by_rank_pattern(pattern, state, "default")
    assert got is state and list(got) == list(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    before = dict(state)
    again = ours.base_model.resize_state_dict_by_rank_pattern(pattern, state, "default")  # it has these ranks
    assert all(again[key] is before[key] for key in before)
    whole = dict(ours.state_dict())
    with pytest.raises(KeyError, match="lin9"):
        ours.base_model.resize_state_dict_by_rank_pattern(
            {**pattern, "lin9.lora_E": [True]}, whole, "default"
        )  # fmt: skip
    assert whole["base_model.model.lin0.lora_E.default"].shape == (4, 1)


# ------------------------------------------------------------------------ layers


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["LORA", "ADALORA"])
def test_scaling_of_layers(method, rslora):
    if method == "ADALORA" and rslora:
        pytest.skip("no such field")
    theirs, ours = pair(method, **({"use_rslora": True} if rslora else {}))
    was = dict(ours.base_model.model.lin0.scaling)
    for do in (
        lambda layer: layer.scale_layer(3),
        lambda layer: layer.scale_layer(1),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.set_scale("nobody", 3.0),
    ):
        for model in (theirs, ours):
            do(model.base_model.model.lin0)
        assert ours.base_model.model.lin0.scaling == pytest.approx(theirs.base_model.model.lin0.scaling)
        alike(theirs, ours)
    layer = ours.base_model.model.lin0
    layer.unscale_layer()
    assert layer.scaling == pytest.approx(was)
    layer.set_scale("default", 2)
    assert layer.scaling == pytest.approx({"default": 2 * was["default"]})
    if method == "LORA" and (PEFT >= (0, 21) or not rslora):  # else PEFT forgets what the config says
        for do in (lambda layer: layer.unscale_layer(), lambda layer: layer.set_scale("default", 2)):
            for model in (theirs, ours):
                do(model.base_model.model.lin0)
            assert layer.scaling == pytest.approx(theirs.base_model.model.lin0.scaling)


def test_inactive_adapters_are_not_scaled():
    theirs, ours = pair("LORA")
    for model, library in ((theirs, peft), (ours, peftc)):
        model.add_adapter("other", CONFIGS["LORA"](library, r=2))
        model.base_model.model.lin0.scale_layer(5)
    assert ours.base_model.model.lin0.scaling == theirs.base_model.model.lin0.scaling


def test_pefts_helpers():
    theirs, ours = pair("LORA")
    for model in (theirs, ours):
        model.factor = rescale_adapter_scale(model, 0.25)
        model.factor.__enter__()
    alike(theirs, ours)
    for model in (theirs, ours):
        model.factor.__exit__(None, None, None)
        del model.factor
    alike(theirs, ours)
    batch = torch.randn(3, 10).double()
    with disable_input_dtype_casting(ours), pytest.raises(RuntimeError, match="dtype"):
        ours.base_model.model.lin0.lora_A["default"].double()
        ours(batch)
    assert ours.base_model.model.lin0.cast_input_dtype_enabled is True


@pytest.mark.parametrize("init", [True, False, "gaussian", "nonsense"])
def test_drawing_values_anew(init):
    def made(library):
        torch.manual_seed(0)
        config = library.LoraConfig(r=3, target_modules=["emb", "lin", "conv"])
        return library.get_peft_model(Everything(), config)

    theirs, ours = made(peft), made(peftc)
    follow(theirs, ours)

    def draw(name, model):
        torch.manual_seed(5)
        getattr(model.base_model.model, name).reset_lora_parameters("default", init)
        getattr(model.base_model.model, name).reset_lora_parameters("nobody", init)

    for name in ("emb", "lin", "conv"):
        want, got = both(theirs, ours, functools.partial(draw, name))
        assert got == want
    state, want = (peft.get_peft_model_state_dict(theirs), peftc.get_peft_model_state_dict(ours))
    assert all(torch.equal(state[key], want[key]) for key in want)


def test_drawing_values_anew_of_other_methods():
    theirs, ours = pair("ADALORA")
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.base_model.model.lin1.reset_lora_parameters("default")
    alike(theirs, ours)
    theirs, ours = pair("IA3")
    for model in (theirs, ours):
        model.base_model.model.lin1.reset_ia3_parameters("default")
    alike(theirs, ours)


def test_drawing_leaves_the_room_of_adapters_that_can_be_swapped():
    model = MLP()
    from peftc.hosts import torch_hotswap
    from peftc.hosts.torch_inject import attachment

    ours = peftc.get_peft_model(model, CONFIGS["LORA"](peftc))
    torch_hotswap.make_room(attachment(model).registry, "default", 8)
    layer = ours.base_model.model.lin0
    layer.reset_lora_parameters("default", True)
    weight = layer.lora_A["default"].weight
    assert weight.shape[0] == 8 and weight[:4].abs().min() > 0 and not weight[4:].any()
    scaling = layer.scaling["default"]
    layer.scale_layer(2)
    assert layer.scaling["default"] is scaling and scaling == 2 * 8 / 4
    layer.unscale_layer()
    assert layer.scaling["default"] is scaling and scaling == 8 / 4


@METHODS
def test_flags_of_one_layer(method):
    _, ours = pair(method)
    layer = ours.base_model.model.lin0
    layer.set_requires_grad(["default", "nobody"], False)
    assert not any(p.requires_grad for p in layer.parameters())
    assert any(p.requires_grad for p in ours.base_model.model.lin1.parameters())
    layer.set_requires_grad("default")
    assert any(p.requires_grad for p in layer.parameters())


@METHODS
def test_what_is_the_models_state_says_so(method):
    _, ours = pair(method)
    layer = ours.base_model.model.lin0
    for call, instead in (
        (lambda: layer.set_adapter("default"), "set_adapter"),
        (lambda: layer.enable_adapters(False), "disable_adapters"),
        (lambda: layer.delete_adapter("default"), "delete_adapter"),
        (lambda: layer.merge(), "merge_adapter"),
        (lambda: layer.unmerge(), "unmerge_adapter"),
        (lambda: layer.update_layer("x", 2), "add_adapter"),
    ):
        with pytest.raises(NotImplementedError, match=f"Call .*{instead}.* of the model"):
            call()


@METHODS
def test_what_layers_know(method):
    theirs, ours = pair(method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for field in ("in_features", "out_features", "fan_in_fan_out", "is_target_conv_1d_layer", "active_adapters",
                      "merged", "disable_adapters", "merged_adapters"):  # fmt: skip
            if hasattr(theirs.base_model.model.lin0, field):
                got, want = (getattr(model.base_model.model.lin0, field) for model in (ours, theirs))
                assert got == want, field


@pytest.mark.skipif(PEFT < (0, 21), reason="PEFT has no conversion yet")
@pytest.mark.parametrize("dora", [False, True])
def test_conversion_to_lora(dora):
    theirs, ours = pair("LORA", use_dora=dora)
    want, got = (peft.convert_to_lora(model, rank=2)[1] for model in (theirs, ours))
    assert list(got) == list(want)
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-4)
    for method, targets in (("LORA", ["lin0"]), ("IA3", None), ("ADALORA", ["lin0"])):
        theirs, ours = pair(method, **({"target_modules": targets} if targets else {}))
        assert ours.supports_lora_conversion() is theirs.supports_lora_conversion() is (method == "LORA")
        assert ours.has_active_enabled_adapter is theirs.has_active_enabled_adapter is True
        with ours.disable_adapter(), theirs.disable_adapter():
            assert ours.has_active_enabled_adapter is theirs.has_active_enabled_adapter is False


@pytest.mark.parametrize("fields", [
    {"target_modules": ["lin7"]},
    {"target_modules": "lin7"},
    {"target_modules": []},
    {"target_modules": ["lin0"], "exclude_modules": ["lin0"]},
    {"target_modules": ["lin0", "lin7"], "exclude_modules": ["lin0"]},
    {"target_modules": ["lin0"], "exclude_modules": "lin.*"},
])  # fmt: skip
def test_what_would_adapt_nothing(fields):
    """Errors are of PEFT's class for it, where PEFT has one."""
    for call in ("get_peft_model", "inject_adapter_in_model"):
        errors = []
        for library in (peft, peftc):
            arguments = (MLP(), library.LoraConfig(**fields))
            with pytest.raises(ValueError, match="odules") as info:
                getattr(library, call)(*(arguments if call == "get_peft_model" else arguments[::-1]))
            errors.append(info)
        assert errors[0].type is errors[1].type
        assert str(errors[0].value) == str(errors[1].value)


def test_files_that_are_not_there(tmp_path):
    """ValueError that begins as PEFT's, wherever they were looked for."""
    theirs, ours = pair("LORA")
    (tmp_path / "empty").mkdir()
    ours.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    for folder in ("nowhere", "empty"):
        path = str(tmp_path / folder)
        for library, model in ((peft, theirs), (peftc, ours)):
            for call in (
                lambda m=model, p=path: m.load_adapter(p, "other"),
                lambda lib=library, p=path: lib.PeftModel.from_pretrained(MLP(), p),
            ):
                with pytest.raises(ValueError, match=f"^Can't find 'adapter_config.json' at '{path}'"):
                    call()
    for path in (str(tmp_path / "nowhere"), str(tmp_path / "bare")):
        for library, model in ((peft, theirs), (peftc, ours)):
            with pytest.raises(ValueError):
                model.load_adapter(path, "default")
            with pytest.raises(ValueError):
                library.PeftModel.from_pretrained(MLP(), path, config=CONFIGS["LORA"](library))
    with pytest.raises(ValueError, match="^Can't find weights for .*bare.* has neither"):
        ours.load_adapter(str(tmp_path / "bare"), "other")
    assert list(ours.peft_config) == ["default"]
