"""Fully sharded models over two processes: with peftc's adapters as with PEFT's.

A scenario is a way of sharding, a way of getting the adapter, and a config. Both processes run it on PEFT's model, then on
ours with the same values: forward, backward, a step, the whole state dict and the adapter's. Where PEFT works ours gives
the same numbers; where it does not the scenario says so.
"""

import datetime
import functools
import os
import socket
import traceback

import numpy as np
import pytest
import torch
from their_mixin import PEFT

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {
    "lora": ("LoraConfig", {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2}),
    "dora": ("LoraConfig", {"target_modules": ["q_proj", "down_proj"], "r": 2, "use_dora": True}),
    "head": ("LoraConfig", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head"]}),
    "embedding": ("LoraConfig", {"target_modules": ["embed_tokens", "q_proj"], "r": 2}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "adalora": ("AdaLoraConfig", {"target_modules": ["q_proj", "v_proj"], "init_r": 3, "total_step": 10}),
}
WAYS = ("whole", "layers", "peft's policy", "fully_shard")
SCENARIOS = [  # by turns through the mixin and in a PeftModel
    (way, ("mixin", "PeftModel")[(i + j) % 2], config) for i, way in enumerate(WAYS) for j, config in enumerate(CONFIGS)
]
#: PEFT's policy wraps what has a `weight`, and leaves trainable parameters of other names beside frozen ones
UNEVEN = [("peft's policy", config) for config in ("embedding", "ia3", "adalora")]
IDS = torch.arange(1, 13).view(2, 6)


def build(ours, entry, config):
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    import peftc

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
            max_position_embeddings=16, tie_word_embeddings=False,
        )
    )  # fmt: skip
    kind, fields = CONFIGS[config]
    if entry == "PeftModel":
        make = peftc.get_peft_model if ours else peft.get_peft_model
        model = make(model, getattr(peft, kind)(**fields))
    else:
        with peftc.patch_transformers() if ours else nothing():
            model.add_adapter(getattr(peft, kind)(**fields), "default")
    generator = torch.Generator().manual_seed(1)
    for path, parameter in sorted(model.named_parameters()):
        if "default" in path.split(".") and "ranknum" not in path:
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(noise + (1 if "ia3_" in path or "magnitude" in path else 0))
    return model


class nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def shard(model, way):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if way == "fully_shard":
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module)
        return fully_shard(model)
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if way == "layers":
        options["auto_wrap_policy"] = functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}
        )
    elif way == "peft's policy":
        from peft.utils.other import fsdp_auto_wrap_policy

        options |= {"auto_wrap_policy": fsdp_auto_wrap_policy(model), "use_orig_params": False}
    return FullyShardedDataParallel(model, **options)


def whole(sharded, way):
    """A context in which the parameters of an FSDP model are whole. `state_of` gathers fully_shard's."""
    if way == "fully_shard":
        return nothing()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.summon_full_params(sharded, writeback=False)


def state_of(sharded, way):
    """Name → value of each parameter. FSDP's own full state dict ends the process on CPUs, with or without adapters."""
    if way == "fully_shard":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    from torch.distributed.fsdp._common_utils import clean_tensor_name

    return {clean_tensor_name(name): p.detach().clone() for name, p in sharded.named_parameters()}


def scenario(ours, way, entry, config, rank):
    import peft

    import peftc

    model = build(ours, entry, config).train()
    sharded = shard(model, way)
    found = {}
    optimiser = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        out = sharded(input_ids=(IDS + rank) % 32, labels=(IDS + rank) % 32)
        out.loss.backward()
        optimiser.step()
        found[f"logits {step}"] = out.logits.detach()
    with whole(sharded, way):
        state = state_of(sharded, way)
    found |= {f"state {key}": value for key, value in state.items()}
    get = peftc.get_peft_model_state_dict if ours else peft.get_peft_model_state_dict
    if entry == "PeftModel":
        adapter = get(model, state_dict=state)
    elif ours:
        with peftc.patch_transformers():
            adapter = model.get_adapter_state_dict("default", state_dict=state)
    else:
        adapter = model.get_adapter_state_dict("default", state_dict=state)
    found |= {f"adapter {key}": value for key, value in adapter.items()}
    return {key: value.detach().clone().numpy() for key, value in found.items()}


def in_process(rank, port, queue, scenarios):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=20)  # a process whose other has failed is not to wait for it
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0, limit)
    for i, (one, ours) in enumerate((one, ours) for one in scenarios for ours in (False, True)):
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.PrefixStore(str(i), store), rank=rank, world_size=2, timeout=limit
        )
        try:
            result = scenario(ours, *one, rank)
        except Exception:  # noqa: BLE001  (the test shows it)
            result = traceback.format_exc()

        queue.put((one, ours, rank, result))
        torch.distributed.destroy_process_group()


def run(scenarios):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=in_process, args=(rank, port, queue, scenarios)) for rank in range(2)]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in range(4 * len(scenarios)):
            one, ours, rank, result = queue.get(timeout=120)
            if rank == 0 or isinstance(result, str):
                results[one, ours] = result
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return results


@pytest.fixture(scope="module")
def results():
    return run(SCENARIOS)


@pytest.mark.parametrize(("way", "entry", "config"), SCENARIOS)
def test_as_with_peft(results, way, entry, config):
    theirs, ours = (results[(way, entry, config), side] for side in (False, True))
    if (way, config) in UNEVEN:
        assert all("Must flatten tensors with uniform `requires_grad`" in text for text in (theirs, ours))
        return
    assert not isinstance(theirs, str), theirs
    assert not isinstance(ours, str), ours
    assert any(key.startswith("adapter") for key in ours)
    if PEFT >= (0, 20):  # leaves out what is in modules that FSDP has wrapped
        state = [key for key in ours if not key.startswith("adapter")]
        assert state == [key for key in theirs if not key.startswith("adapter")]
        assert [key for key in ours if key in theirs] == list(theirs)
    else:
        assert list(ours) == list(theirs)
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=1e-5, rtol=1e-4, err_msg=key)
