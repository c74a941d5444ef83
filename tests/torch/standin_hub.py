"""Stand-ins for the Hub repositories that Transformers' own integration tests use: models of the same architecture and
adapters of the same kind, a few kilobytes each, randomly initialised, in the layout of the Hugging Face cache.  With
`environment(home)` a process finds them under their names, revisions and subfolders without a network.

    python standin_hub.py HOME      fills the cache in HOME

A process of its own, because the Hub's client reads its environment when it is imported, and so that the files are
the reference's (Transformers and PEFT as installed), whatever is patched in the process that wants them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

BASE = "hf-internal-testing/tiny-random-OPTForCausalLM"
ADAPTER = "peft-internal-testing/tiny-OPTForCausalLM-lora"  # main: .bin; refs/pr/2: .safetensors
REVISIONS = "peft-internal-testing/tiny-opt-lora-revision"  # main: in a subfolder only; "test": at the top
MIXTRAL = "hf-internal-testing/Mixtral-tiny"


def environment(home: Path) -> dict[str, str]:
    """The environment of a process that knows these repositories and no others."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    return {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def make(home: Path) -> Path:
    """Fill the cache in `home`; returns it."""
    subprocess.run([sys.executable, __file__, str(home)], env=environment(home), check=True, capture_output=True)
    return home


class Repository:
    """One repository of the cache in `home`.  `commit(folder, …)` adds a revision that holds the folder's files."""

    def __init__(self, home: Path, name: str):
        self.name = name
        self.folder = home / "hub" / f"models--{name.replace('/', '--')}"

    def commit(self, files: Path, revision: str = "main", absent: Iterable[str] = ()) -> None:
        """`absent`: names that a client has asked for in vain, which the cache remembers, too."""
        sha = hashlib.sha1(f"{self.name}@{revision}".encode()).hexdigest()
        shutil.copytree(files, self.folder / "snapshots" / sha)
        reference = self.folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(sha)
        for name in absent:
            marker = self.folder / ".no_exist" / sha / name
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def opt_config():
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=320, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=160, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE without a merge: every byte is a token; OPT's special tokens have OPT's numbers."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    details = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "model_max_length": 128, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(details))


def write_model(folder: Path, model) -> None:
    """As .safetensors and as .bin."""
    import torch

    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_adapter(folder: Path) -> None:
    """A LoRA adapter for BASE that changes its outputs."""
    from peft import LoraConfig, get_peft_model
    from transformers import OPTForCausalLM

    config = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(OPTForCausalLM.from_pretrained(BASE), config).save_pretrained(folder)
    (folder / "README.md").unlink()


def as_bin(folder: Path) -> None:
    """The adapter's weights as PEFT used to write them: by torch.save."""
    import torch
    from safetensors.torch import load_file

    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()


def build(home: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM, OPTForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        write_model(folder / "base", OPTForCausalLM(opt_config()))
        write_tokenizer(folder / "base")
        base = Repository(home, BASE)
        for revision in (
            "main",
            "refs/pr/2",
        ):  # an adapter's revision is looked for in its base model's repository, too
            base.commit(folder / "base", revision, absent=["adapter_config.json", "chat_template.jinja"])

        write_adapter(folder / "lora")
        adapter = Repository(home, ADAPTER)
        adapter.commit(folder / "lora", "refs/pr/2")
        as_bin(folder / "lora")
        adapter.commit(folder / "lora", absent=["adapter_model.safetensors"])

        revisions = Repository(home, REVISIONS)
        revisions.commit(folder / "lora", "test", absent=["adapter_model.safetensors"])
        (folder / "main").mkdir()
        shutil.copytree(folder / "lora", folder / "main" / "test_subfolder")
        revisions.commit(folder / "main", absent=["adapter_config.json", "test_subfolder/adapter_model.safetensors"])

        mixtral = MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
        )  # fmt: skip
        write_model(folder / "mixtral", MixtralForCausalLM(mixtral))
        Repository(home, MIXTRAL).commit(folder / "mixtral", absent=["adapter_config.json"])


if __name__ == "__main__":
    build(Path(sys.argv[1]))
