"""Under Transformers 4 and under 5: each one's signatures, and the arguments of the other one taken, too."""

import inspect

import peft
import pytest
import torch
from their_mixin import PEFT, V5
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.integrations.peft import PeftAdapterMixin as Theirs

import peftc

only5 = pytest.mark.skipif(not V5, reason="the signature and the reports of Transformers 5")
ORIGINAL = {name: method for name, method in vars(Theirs).items() if inspect.isfunction(method)}
IDS = torch.arange(6)[None]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def patched():
    with peftc.patch_transformers():
        yield


def make(cls=LlamaForCausalLM):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 17,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    return cls(LlamaConfig(**shape)).eval()


def config(**fields):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **fields)


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture
def saved(tmp_path):
    model = make()
    model.add_adapter(config())
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model.eval())


@pytest.mark.parametrize("name", [name for name in ORIGINAL if not name.startswith("_")])
def test_signatures(name):
    """Names, order, kinds and defaults; annotations may be spelt otherwise ("str | None")."""
    mine, their = (
        [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for method in (getattr(make(), name), ORIGINAL[name].__get__(make()))
    )
    assert mine == their


def test_arguments_of_both(saved):
    folder, expected = saved
    for name, options in {
        "earlier": {"revision": None, "token": None, "device_map": "auto", "max_memory": None, "offload_folder": None},
        "later": {"hotswap": "auto", "local_files_only": True, "load_config": None},
        "swapped": {"hotswap": False, "adapter_kwargs": {}, "low_cpu_mem_usage": True},
    }.items():
        model = make()
        model.load_adapter(folder, adapter_name=name, **options)
        assert torch.equal(logits(model), expected)
    with pytest.raises(TypeError, match="nonsense"):
        make().load_adapter(folder, nonsense=1)


def test_hotswap_and_undo(saved):
    folder, expected = saved
    model = make()
    model.add_adapter(config(), "one")
    model.load_adapter(folder, "one", hotswap=True)
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(folder, "one")


@only5
def test_load_config(saved):
    from transformers.modeling_utils import LoadStateDictConfig

    folder, expected = saved
    given = LoadStateDictConfig(
        pretrained_model_name_or_path=str(folder), download_kwargs={"subfolder": "", "token": None}
    )
    before = dict(vars(given))
    model = make()
    model.load_adapter(load_config=given)
    assert torch.equal(logits(model), expected) and vars(given) == before
    model = make()
    model.load_adapter(pretrained_model_name_or_path=str(folder))  # a field of LoadStateDictConfig
    assert torch.equal(logits(model), expected)


@only5
def test_the_format_that_is_asked_for(saved):
    folder, expected = saved
    model = make()
    model.load_adapter(folder)
    other = {f"base_model.model.{k}": v.clone() + 1 for k, v in model.get_adapter_state_dict().items()}
    torch.save(other, folder / "adapter_model.bin")
    model = make()
    model.load_adapter(folder, use_safetensors=False)
    assert not torch.allclose(logits(model), expected)
    model = make()
    model.load_adapter(folder)
    assert torch.equal(logits(model), expected)


@only5
def test_what_is_returned(saved, caplog):
    folder, _ = saved
    model = make()
    info = model.load_adapter(folder)
    assert info.missing_keys == info.unexpected_keys == info.mismatched_keys == set()
    state = model.get_adapter_state_dict()
    absent = "model.layers.0.self_attn.q_proj.lora_A.weight"
    state = {**{key: value for key, value in state.items() if key != absent}, "odd.lora_A.weight": torch.zeros(1)}
    info = model.load_adapter(None, "two", peft_config=config(), adapter_state_dict=state)
    assert info.missing_keys == {absent.replace(".weight", ".two.weight")}  # none of the first adapter's
    assert info.unexpected_keys == {"odd.lora_A.two.weight"}
    assert type(info).__name__ == "LoadStateDictInfo" and info.error_msgs == []
    if hasattr(info, "to_dict"):  # not in 5.0
        assert set(info.to_dict()) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


@only5
def test_from_pretrained_gives_the_report(tmp_path, saved):
    folder, expected = saved
    make().save_pretrained(tmp_path / "base")
    peft_config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        peft_config.replace(
            '"base_model_name_or_path": null', f'"base_model_name_or_path": "{tmp_path / "base"}"'
        ).replace('"base_model_name_or_path": ""', f'"base_model_name_or_path": "{tmp_path / "base"}"')
    )
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    torch.testing.assert_close(logits(model), expected)


@only5
@pytest.mark.parametrize("trainable", [True, False])
def test_the_argument_decides_with_a_config(saved, trainable):
    model = make()
    model.add_adapter(config())
    state = {key: value.clone() for key, value in model.get_adapter_state_dict().items()}
    given = config(inference_mode=trainable)
    model.load_adapter(None, "two", peft_config=given, adapter_state_dict=state, is_trainable=trainable)
    assert given.inference_mode is not trainable
    assert all(p.requires_grad is trainable for name, p in model.named_parameters() if ".two." in name)
    unfit = config(inference_mode=trainable)
    with pytest.raises(ValueError):
        model.load_adapter(None, "two", peft_config=unfit, adapter_state_dict=state, is_trainable=trainable)
    assert unfit.inference_mode is trainable


@only5
def test_names_of_the_model_without_head(saved):
    """An adapter of LlamaModel fits LlamaForCausalLM and the other way round; so do files of PEFT's PeftModel of it."""
    folder, expected = saved
    body = make(LlamaModel)
    whole = make()
    body.load_state_dict(whole.model.state_dict())
    body.load_adapter(folder)
    whole.load_adapter(folder)
    torch.testing.assert_close(body(IDS)[0], whole.model(IDS)[0])
    body.save_pretrained(folder / "body")
    again = make()
    again.load_adapter(folder / "body")
    torch.testing.assert_close(logits(again), expected)


@only5
def test_renamings_of_from_pretrained(saved):
    folder, expected = saved
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = make()
    model.load_adapter(folder)
    state = {key.replace("self_attn", "attention"): value for key, value in model.get_adapter_state_dict().items()}
    model = make()
    mapping = get_model_conversion_mapping(model, key_mapping={"attention": "self_attn"})
    model.load_adapter(None, peft_config=config(), adapter_state_dict=state, weight_mapping=mapping)
    assert torch.equal(logits(model), expected)


def test_a_deleted_head_leaves_nothing_in_the_tree():
    model = make()
    names, base = set(model.state_dict()), logits(model)
    for _ in range(2):
        model.add_adapter(config(modules_to_save=["lm_head"]), "one")
        assert "one" in model.lm_head.modules_to_save
        model.delete_adapter("one")
        assert isinstance(model.lm_head, torch.nn.Linear) and set(model.state_dict()) == names
        assert torch.equal(logits(model), base)
        if V5:  # code that was written for PEFT's emptied wrapper looks there
            assert "one" not in model.lm_head.modules_to_save and not model.lm_head.modules_to_save
        assert [name for name, _ in model.named_modules()] == [name for name, _ in make().named_modules()]


def test_options_of_later_versions_of_peft_are_pefts(tmp_path):
    """peftc's classes have the fields of PEFT 0.17.1; a later one that is set goes to PEFT, unset it means nothing."""
    if not hasattr(peft.LoraConfig(), "alora_invocation_tokens"):
        pytest.skip("not in this version of PEFT")
    model = make()
    model.add_adapter(config(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"))
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("peft.")
    model = make()
    model.add_adapter(config())
    model.save_pretrained(tmp_path)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peftc.PeftConfig.from_pretrained(tmp_path).r == 2


def mixture(seed=0):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**shape, **heads)).eval()


def one_lora_for_each_expert():
    """The tensors of an adapter that was made under Transformers 4, where experts are modules."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (16, 24), "w2": (24, 16), "w3": (16, 24)}
    places = {f"block_sparse_moe.experts.{i}.{name}": shape for i in range(3) for name, shape in shapes.items()}
    return {
        f"base_model.model.model.layers.{layer}.{place}.{factor}.weight": torch.randn(shape, generator=generator)
        for layer in range(2)
        for place, (inputs, outputs) in {**places, "self_attn.q_proj": (16, 16)}.items()
        for factor, shape in (("lora_A", (4, inputs)), ("lora_B", (outputs, 4)))
    }


@only5
@pytest.mark.skipif(PEFT < (0, 20), reason="PEFT cannot load them with every Transformers that takes it")
def test_experts_of_transformers_4(tmp_path):
    def fields():
        return peft.LoraConfig(r=4, target_modules=["w1", "w2", "w3", "q_proj"])

    reference = mixture()
    ORIGINAL["load_adapter"](reference, adapter_state_dict=one_lora_for_each_expert(), peft_config=fields())
    expected = logits(reference)
    model = mixture()
    kinds, base = [(name, type(module)) for name, module in model.named_modules()], logits(model)
    info = model.load_adapter(adapter_state_dict=one_lora_for_each_expert(), peft_config=fields())
    assert info.missing_keys == info.unexpected_keys == set()
    assert torch.equal(logits(model), expected) and not torch.allclose(expected, base)
    model.save_pretrained(tmp_path)  # with one tensor for all experts
    again = mixture()
    info = again.load_adapter(tmp_path)
    assert info.missing_keys == info.unexpected_keys == set()
    assert torch.equal(logits(again), expected)
    reference = mixture()
    ORIGINAL["load_adapter"](reference, tmp_path)
    assert torch.equal(logits(reference), expected)
    model.delete_adapter("default")
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="Cannot convert PEFT target"):
        model.add_adapter(peft.LoraConfig(target_modules=["w1"]))
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))
    assert model.peft_config["default"].target_parameters == {"gate.weight", "gate_up_proj", "down_proj"}


@only5
def test_a_wrong_shape_changes_nothing(saved):
    model = make()
    model.load_adapter(saved[0])
    state = {key: value[:1] for key, value in model.get_adapter_state_dict().items()}
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"self_attn\.[qv]_proj\.lora_"):
        model.load_adapter(None, "two", peft_config=config(), adapter_state_dict=state)
    assert list(model.state_dict()) == names and list(model.peft_config) == ["default"]
