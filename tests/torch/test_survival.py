"""What people do to torch models, done to one with adapters: peftc's must come through as the reference's does.

Every scenario is a function of the model that returns what is to be compared. It runs on the model with Transformers'
mixin and PEFT, then on its twin with peftc; where the reference raises, ours may work.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket

import lockstep_models as models
import peft
import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import peftc

LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up"]}
MIXED = [
    ("one", "LORA", {**LORA, "modules_to_save": ["head"]}),
    ("two", "LORA", {**LORA, "use_dora": True}),
    ("three", "IA3", {"target_modules": ["c_attn", "down"], "feedforward_modules": ["down"]}),
]
CONFIGS = {"LORA": (peft.LoraConfig, peftc.LoraConfig), "IA3": (peft.IA3Config, peftc.IA3Config)}
IDS = models.inputs("text", 0)


def adapted(ours: bool, adapters=MIXED, active=("one",)) -> nn.Module:
    """A text model with these adapters; either class gets the same values."""
    model = models.build("text", ours, 5).eval()
    for name, method, fields in adapters:
        if ours or name == adapters[0][0] or "modules_to_save" not in adapters[0][2]:
            model.add_adapter(CONFIGS[method][ours](**copy.deepcopy(fields)), name)
        else:
            add_beside_head(model, peft_config := CONFIGS[method][0](**copy.deepcopy(fields)), name)
            del peft_config
    generator = torch.Generator().manual_seed(1)
    names = {name for name, *_ in adapters}
    for path, parameter in sorted(model.named_parameters()):
        if names & set(path.split(".")):
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(noise + (1 if "ia3_" in path or "magnitude" in path else 0))
    set_active(model, ours, list(active))
    return model.eval()


def add_beside_head(model, config, name):
    """The reference's add_adapter raises when another adapter has modules_to_save and this one has not."""
    peft.inject_adapter_in_model(config, model, name)


def set_active(model, ours, names):
    if ours:
        model.set_adapter(names)
        return
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter(names)
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            heads = [name for name in names if name in module.modules_to_save]
            module._active_adapter = heads or ["-"]
            for name, head in module.modules_to_save.items():
                head.requires_grad_(name in heads)


def logits(model, ids=IDS):
    with torch.no_grad():
        return [y.clone() for y in model(ids)]


def gradients(model, ids=IDS, forward=None):
    model.zero_grad()
    sum((y.double() ** 2).mean() for y in (model if forward is None else forward)(ids)).backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def flags(model):
    return {path: (p.requires_grad, p.dtype, str(p.device), tuple(p.shape)) for path, p in model.named_parameters()}


def compare(theirs, ours, tolerance=2e-5, where="result"):
    if isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        scale = max(1.0, float(theirs.double().abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=0, atol=tolerance * scale, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            compare(value, ours[key], tolerance, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            compare(value, ours[i], tolerance, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def side_by_side(scenario, *, tolerance=2e-5, **options):
    """Run a scenario on both and compare. What the reference cannot do, ours must only do without damage."""
    try:
        theirs = scenario(adapted(False, **options))
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        pytest.fail(f"the scenario does not work with the reference: {error!r}")
    compare(theirs, scenario(adapted(True, **options)), tolerance)


ACTIVE = pytest.mark.parametrize("active", [("one",), ("two",), ("one", "three"), ("two", "three")])


# ------------------------------------------------------------------- types


@ACTIVE
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)]
)
def test_to_dtype(active, dtype, tolerance):
    def scenario(model):
        model.to(dtype)
        first = logits(model), flags(model), gradients(model)
        return first, flags(model.float())

    if dtype == torch.float64:  # values that were float32 all along
        side_by_side(scenario, tolerance=1e-6, active=active)
    else:
        side_by_side(scenario, tolerance=tolerance, active=active)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_half_and_friends(method):
    side_by_side(lambda model: (flags(getattr(model, method)()), logits(model)), tolerance=6e-2)


def test_to_meta():
    def scenario(model):
        model.to("meta")
        return flags(model), [tuple(y.shape) + (str(y.device),) for y in model(IDS.to("meta"))]

    side_by_side(scenario)


def test_to_empty_and_load():
    def scenario(model):
        state = {path: tensor.clone() for path, tensor in model.state_dict().items()}
        model.to("meta")
        model.to_empty(device="cpu")
        model.load_state_dict(state)
        return logits(model), gradients(model)

    side_by_side(scenario)


def test_load_state_dict_assign():
    def scenario(model):
        state = {path: tensor.clone() * 1.5 for path, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        return logits(model), flags(model)

    side_by_side(scenario)


def test_swapped_parameters():
    """torch's other way of converting modules: whole tensors are exchanged."""

    def scenario(model):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        return logits(model), flags(model)

    side_by_side(scenario)


# -------------------------------------------------------------------- copies


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


@ACTIVE
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_independent(how, active):
    def scenario(model):
        copied = COPIES[how](model)
        for parameter in model.parameters():
            parameter.data.fill_(3.0)
        first = logits(copied), flags(copied), list(copied.peft_config), gradients(copied)
        copied.disable_adapters()
        return first, logits(copied)

    side_by_side(scenario, active=active)


@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_working(how):
    """A copy is a model like any other: adapters can be added, set and deleted, and the original does not notice."""
    model = adapted(True, [MIXED[0]])
    before = logits(model)
    copied = COPIES[how](model)
    copied.add_adapter(peftc.LoraConfig(**LORA), "more")
    copied.set_adapter(["one", "more"])
    copied.delete_adapter("one")
    assert model.active_adapters() == ["one"] and list(model.peft_config) == ["one"]
    compare(before, logits(model))
    copied.delete_adapter("more")
    compare(logits(models.build("text", True, 5).eval()), logits(copied), 0.0)


def test_copy_of_a_layer():
    def scenario(model):
        layer = copy.deepcopy(model.blocks.layers[0].attn.q_proj)
        x = torch.linspace(-1, 1, 16).reshape(2, 8)
        return layer(x).detach(), [path for path, _ in layer.named_parameters()]

    side_by_side(scenario)


def test_state_dict_round_trip():
    def scenario(model):
        state = {path: tensor.clone() for path, tensor in model.state_dict().items()}
        for parameter in model.parameters():
            parameter.data.zero_()
        result = model.load_state_dict(state)
        return list(state), str(result), logits(model)

    side_by_side(scenario)


def test_saved_state_dict_has_no_more_than_its_tensors(tmp_path):
    model = adapted(True)
    state = model.get_adapter_state_dict("one")
    torch.save(state, tmp_path / "state.pt")
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert (tmp_path / "state.pt").stat().st_size < size + 600 * len(state) + 2000


# --------------------------------------------------------- what is hung on layers


def test_parametrize():
    class Twice(nn.Module):
        def forward(self, x):
            return x * 2

    def scenario(model):
        layer = model.blocks.layers[0].attn.q_proj
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Twice())
        nn.utils.parametrize.register_parametrization(layer.lora_A["one"], "weight", Twice())
        first = logits(model), gradients(model), [path for path, _ in model.named_parameters()]
        nn.utils.parametrize.remove_parametrizations(layer.base_layer, "weight")
        return first, logits(model)

    side_by_side(scenario)


def test_hooks():
    def scenario(model):
        seen = []
        layer = model.blocks.layers[0].attn.q_proj
        handles = [
            layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,)),
            layer.register_forward_hook(lambda m, args, y: y + 0.25),
            layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone())),
            layer.lora_A["one"].register_forward_hook(lambda m, args, y: y * 2),
            layer.lora_B["one"].register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
            layer.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone())),
        ]
        first = logits(model), gradients(model), list(seen)
        for handle in handles:
            handle.remove()
        return first, logits(model)

    side_by_side(scenario)


def test_replaced_inner_modules():
    """Somebody puts a module of their own in place of ours."""

    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) / 2

    def scenario(model):
        for path, module in list(model.named_modules()):
            if path.endswith("q_proj.base_layer"):
                model.get_submodule(path.rpartition(".")[0]).base_layer = Halved(module)
        return logits(model), [path for path, _ in model.named_parameters()]

    side_by_side(scenario)


def test_replaced_parameters():
    def scenario(model):
        layer = model.blocks.layers[1].attn.v_proj
        layer.lora_A["one"].weight = nn.Parameter(torch.full_like(layer.lora_A["one"].weight, 0.1))
        layer.lora_B["one"].weight.data = torch.full_like(layer.lora_B["one"].weight, 0.2)
        layer.base_layer.weight.data = layer.base_layer.weight.data * 2
        return logits(model), gradients(model)

    side_by_side(scenario)


def test_functional_call():
    def scenario(model):
        values = {path: p.detach() * 1.1 for path, p in model.named_parameters()}
        first = torch.func.functional_call(model, values, (IDS,))
        return [y.detach() for y in first], logits(model)

    side_by_side(scenario)


# --------------------------------------------------------------- processes


def test_share_memory():
    def scenario(model):
        model.share_memory()
        assert all(parameter.is_shared() for parameter in model.parameters())
        return logits(model), gradients(model)

    side_by_side(scenario)


class WithModel(torch.utils.data.Dataset):
    """Runs the model where the items are made: in the worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.model((IDS[:1] + i) % 13)[0].detach()


def test_workers_after_fork():
    def scenario(model):
        logits(model)  # threads of ours, if any, are there before the fork
        loader = torch.utils.data.DataLoader(
            WithModel(model), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        return list(loader)

    side_by_side(scenario)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _in_process(rank, ours, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = adapted(ours, [("one", "LORA", LORA)]).train()
        parallel = nn.parallel.DistributedDataParallel(model)
        optimiser = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            sum((y.double() ** 2).mean() for y in parallel((IDS + rank) % 13)).backward()
            optimiser.step()
        with torch.no_grad():
            results = [y.numpy() for y in parallel(IDS)]
        if rank == 0:
            queue.put(results)
    except Exception as error:  # noqa: BLE001  (shown by the parent)
        if rank == 0:
            queue.put(repr(error))
    finally:
        torch.distributed.destroy_process_group()


def distributed(ours):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = free_port()
    processes = [context.Process(target=_in_process, args=(rank, ours, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        result = queue.get(timeout=150)
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
    return result if isinstance(result, str) else [torch.from_numpy(y) for y in result]


def test_distributed():
    theirs = distributed(False)
    if isinstance(theirs, str):
        pytest.skip(f"the reference does not work here either: {theirs[:200]}")
    ours = distributed(True)
    assert not isinstance(ours, str), ours
    compare(theirs, ours)


# ---------------------------------------------------------------- accelerate


@pytest.mark.parametrize("places", ["cpu", "disk"])
def test_dispatch_model(places, tmp_path):
    from accelerate import dispatch_model

    def scenario(model):
        device_map = {
            "embed": "cpu",
            "blocks.layers.0": places,
            "blocks.layers.1": "cpu",
            "extra": "cpu",
            "head": "cpu",
            "to_vocab": places,
        }
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)
        return logits(model)

    side_by_side(scenario, adapters=[("one", "LORA", LORA)])


# ---------------------------------------------------- other ways of running it


@ACTIVE
def test_compile_without_graph_breaks(active):
    def scenario(model):
        torch._dynamo.reset()
        ours = isinstance(model, models.OurMixin)  # the reference breaks the graph in every LoRA layer
        compiled = torch.compile(model, backend="aot_eager", fullgraph=ours)
        return logits(compiled), gradients(model, forward=compiled)

    side_by_side(scenario, active=active)


def test_compiled_model_follows_switches():
    def scenario(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        results = [logits(compiled)]
        model.disable_adapters()
        results.append(logits(compiled))
        model.enable_adapters()
        results.append(logits(compiled))
        return results

    side_by_side(scenario, adapters=[("one", "LORA", LORA)])


def test_export():
    def scenario(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        program = torch.export.export(model, (IDS,))
        return [y.detach() for y in program.module()(IDS)]

    side_by_side(scenario, active=("one", "three"))


@ACTIVE
def test_vmap(active):
    def scenario(model):
        batch = torch.stack([IDS, (IDS + 1) % 13, (IDS + 2) % 13])
        with torch.no_grad():
            return list(torch.func.vmap(model)(batch))

    side_by_side(scenario, active=active)


def test_gradients_per_sample():
    def scenario(model):
        parameters = {path: p.detach() for path, p in model.named_parameters() if p.requires_grad}

        def loss(values, row):
            return (torch.func.functional_call(model, values, (row[None],))[0] ** 2).sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IDS)

    side_by_side(scenario)


@ACTIVE
def test_forward_mode(active):
    def scenario(model):
        values = {path: p.detach() for path, p in model.named_parameters()}
        tangents = {path: torch.ones_like(value) * 0.01 for path, value in values.items()}

        def run(given):
            return torch.func.functional_call(model, given, (IDS,))[0]

        return list(torch.func.jvp(run, (values,), (tangents,)))

    side_by_side(scenario, active=active)


@ACTIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(active, dtype):
    def scenario(model):
        def forward(ids):
            with torch.autocast("cpu", dtype=dtype):
                return model(ids)

        with torch.no_grad():
            results = forward(IDS)
        return list(results), gradients(model, forward=forward)

    side_by_side(scenario, tolerance=6e-2, active=active)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def scenario(model):
        plain = gradients(model)

        def forward(ids):
            x = model.embed(ids).requires_grad_()
            for layer in model.blocks.layers:
                x = checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
            x = x + torch.tanh(model.extra(x))
            return model.head(x), model.to_vocab(x)

        again = gradients(model, forward=forward)
        compare(plain, again)
        return again

    side_by_side(scenario)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_checkpointing(kind):
    def run(ours):
        model = models.build(kind, ours, 3).train()
        config = CONFIGS["LORA"][ours](r=2, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"])
        model.add_adapter(config)
        for path, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
        model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        return {path: p.grad for path, p in model.named_parameters() if p.grad is not None}

    compare(run(False), run(True))


def test_inference_mode_and_training_after_it():
    def scenario(model):
        with torch.inference_mode():
            first = [y.clone() for y in model(IDS)]
        return [y.detach().clone() for y in first], gradients(model)

    side_by_side(scenario)
