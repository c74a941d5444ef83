"""The tensors of an adapter: parts of one block of memory that know nothing of each other."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest

torch = pytest.importorskip("torch")

import peft
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.utils import parametrize

import peftc
from peftc.hosts import torch_collector


class Model(peftc.PeftAdapterMixin, nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


CONFIGS = {
    "lora": peftc.LoraConfig(target_modules=["0", "1", "2", "head"], init_lora_weights=False),
    "odd": peftc.LoraConfig(target_modules=["0", "1", "2", "head"], r=3, init_lora_weights=False),
    "dora": peftc.LoraConfig(target_modules=["0", "1", "2"], use_dora=True, init_lora_weights=False),
    "ia3": peftc.IA3Config(target_modules=["0", "1", "2", "head"], feedforward_modules=["1"]),
    "adalora": peftc.AdaLoraConfig(target_modules=["0", "1", "2"], total_step=10),
}


def adapted(method: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    model = Model().to(dtype)
    model.add_adapter(copy.deepcopy(CONFIGS[method]))
    return model


def adapter_parameters(model: Model) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "default" in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CONFIGS)
def test_one_block_of_disjoint_tensors(method, dtype):
    found = adapter_parameters(adapted(method, dtype))
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in found.values())
    assert spans[-1][1] - spans[0][0] <= sum(end - begin + 64 for begin, end in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    for name, p in found.items():
        assert type(p) is nn.Parameter and p.is_leaf and not p._is_view() and p.is_contiguous(), name
        assert p.data_ptr() % 64 == 0, name
        storage = p.untyped_storage()
        assert (storage.data_ptr(), storage.size()) == (p.data_ptr(), p.numel() * p.element_size()), name


@pytest.mark.parametrize("method", CONFIGS)
def test_writing_to_one_says_nothing_of_the_others(method):
    found = adapter_parameters(adapted(method))
    before = {name: (p._version, p.detach().clone()) for name, p in found.items()}
    first = next(iter(found))
    with torch.no_grad():
        found[first].add_(1)
    for name, p in found.items():
        version, values = before[name]
        assert (p._version != version) is (name == first), name
        assert torch.equal(p, values + 1 if name == first else values), name


@pytest.mark.parametrize("method", CONFIGS)
def test_each_parameter_may_be_stepped_in_the_backward_pass(method):
    """Optimizers that save memory step a parameter as soon as its gradient is there, before the others have theirs."""
    model, other = adapted(method), adapted(method)
    x = torch.randn(4, 16)
    stepped = []

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        stepped.append(parameter)

    for parameter in adapter_parameters(model).values():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(step)
    model(x).square().sum().backward()
    other(x).square().sum().backward()
    assert stepped
    for name, parameter in adapter_parameters(other).items():
        if parameter.grad is not None:
            want = parameter - 0.1 * parameter.grad
            torch.testing.assert_close(adapter_parameters(model)[name], want, msg=name)


@pytest.mark.parametrize("method", CONFIGS)
def test_parameters_take_what_torch_does_to_its_own(method):
    model = adapted(method)
    for parameter in adapter_parameters(model).values():
        values = parameter.detach().clone()
        parameter.data = values
        assert parameter.data_ptr() == values.data_ptr()
        with torch.no_grad():
            parameter.set_(torch.zeros(2, 3))
        assert parameter.shape == (2, 3)
    copied = copy.deepcopy(adapted(method))
    assert [type(p) for p in adapter_parameters(copied).values()].count(nn.Parameter) == len(adapter_parameters(copied))


def test_layers_have_the_extents_of_their_base():
    model = adapted("lora")
    assert (model.head.in_features, model.head.out_features) == (16, 5)
    assert not hasattr(peftc.hosts.torch_layers.AdaptedLayer.around([nn.Identity()], None)[0], "in_features")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CONFIGS)
def test_what_takes_one_storage_for_one_tensor_loses_none(method, dtype, tmp_path):
    """accelerate's checkpoints, and safetensors' functions for models, leave out tensors that share a storage."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted(method, dtype))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(tmp_path)
    accelerator.save_model(model, tmp_path / "model")
    save_model(model, tmp_path / "all.safetensors")
    save_file(model.state_dict(), tmp_path / "state.safetensors")

    def disturb():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()

    for load in (
        lambda: accelerator.load_state(tmp_path),
        lambda: load_model(model, tmp_path / "all.safetensors"),
        lambda: model.load_state_dict(load_file(tmp_path / "model" / "model.safetensors")),
        lambda: model.load_state_dict(load_file(tmp_path / "state.safetensors")),
    ):
        disturb()
        load()
        assert list(model.state_dict()) == list(state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_one_tensor_is_saved_alone(tmp_path):
    model = adapted("lora")
    torch.save(next(iter(adapter_parameters(model).values())).data, tmp_path / "one.pt")
    torch.save(model.get_adapter_state_dict(), tmp_path / "all.pt")
    one, every = ((tmp_path / name).stat().st_size for name in ("one.pt", "all.pt"))
    assert one < every / 3


def test_memory_stays_with_its_last_tensor():
    model = adapted("lora")
    last = next(iter(adapter_parameters(model).values())).data
    want = last.clone()
    model.delete_adapter("default")
    del model
    gc.collect()
    assert torch.equal(last, want)


def test_an_adapter_of_other_ranks_and_none():
    """What is not evenly spaced, and what has no elements."""
    model = Model()
    model.add_adapter(peftc.LoraConfig(target_modules=["0", "1", "2", "head"], r=3, rank_pattern={"1": 5}))
    for parameter in adapter_parameters(model).values():
        assert parameter.untyped_storage().size() == parameter.numel() * parameter.element_size() > 0
    model(torch.randn(2, 16)).sum().backward()


@pytest.fixture
def collector():
    gc.enable()
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def many() -> Model:
    model = Model()
    model.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(300)])
    gc.collect()
    return model


CONFIG = peftc.LoraConfig(target_modules=r"layers\..*", r=2)


def test_the_garbage_collector_does_not_look_at_what_is_made(collector):
    model, garbage = many(), nn.Identity()
    garbage.itself = [garbage]  # young garbage is collected as ever
    watched = weakref.ref(garbage)
    del garbage
    looked: list[int] = []
    count = lambda phase, info: looked.append(info["generation"])
    gc.callbacks.append(count)
    try:
        model.add_adapter(copy.deepcopy(CONFIG))
        young = {id(thing) for generation in (0, 1) for thing in gc.get_objects(generation)}
    finally:
        gc.callbacks.remove(count)
    assert 2 not in looked and watched() is None and gc.isenabled()
    layers = [module for name, module in model.named_modules() if name.endswith(("lora_A", "lora_A.default"))]
    assert len(layers) == 600 and young.isdisjoint(map(id, layers))
    assert gc.get_freeze_count() == 0


def test_full_collections_still_come(collector):
    """What is alive while an adapter comes, and garbage later, is found although objects skip the young generations."""
    model, left = many(), []
    before = gc.get_stats()[2]["collections"]
    for _ in range(400):
        kept = nn.Identity()
        kept.itself = [kept]
        left.append(weakref.ref(kept))
        model.add_adapter(copy.deepcopy(CONFIG))
        del kept
        model.delete_adapter("default")
    assert gc.get_stats()[2]["collections"] > before
    assert sum(ref() is not None for ref in left) < 200


def test_the_garbage_collector_is_left_as_it_was(collector, monkeypatch):
    monkeypatch.setattr(torch_collector, "promotions", torch_collector.Promotions())
    gc.disable()
    many().add_adapter(copy.deepcopy(CONFIG))
    assert not gc.isenabled()
    gc.enable()
    with pytest.raises(ValueError):
        many().add_adapter(peftc.LoraConfig(target_modules="nothing"))
    assert gc.isenabled()
    model = many()
    gc.freeze()
    frozen = gc.get_freeze_count()
    model.add_adapter(copy.deepcopy(CONFIG))  # what is frozen stays so
    assert gc.get_freeze_count() >= frozen - 100
    assert not torch_collector.promotions.due()  # and is not counted again


def test_classes_that_are_made_for_a_module_go_with_it():
    model = Model()
    parametrize.register_parametrization(model.layers[0], "weight", nn.Tanh())
    model.part = torch.fx.symbolic_trace(nn.Sequential(nn.Tanh()))
    norm = model.norm = nn.LayerNorm(4)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    gone = [weakref.ref(type(module)) for module in (model.layers[0], model.part, norm)] + [weakref.ref(norm)]
    model.add_adapter(peft.LoraConfig(target_modules=["head"], inference_mode=True))
    model.load_adapter(
        peft_config=peft.LoraConfig(target_modules=["head"]), adapter_state_dict={}, adapter_name="other"
    )
    del model, norm
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
