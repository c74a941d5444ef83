"""Random sequences of calls for the lockstep tests: what a sequence is made of, and running one on two models.

A sequence is plain data: a `spec` (model and what the sequence may contain) and a list of steps, each a tuple of a name
and arguments. Both follow from the seed; `Lockstep(spec, subject, folder).replay(steps)` runs a list written by hand.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import random
import re
import warnings

import lockstep_models as models
import peft
import torch
from lockstep_reference import PREFIX, Reference
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from their_mixin import V5
from torch import nn
from transformers import PreTrainedModel

import peftc

NAMES = ["zeta", "kilo", "xray", "bravo"]  # no name is part of another or of a module's (defect 1 has its own tests)
THEIR_CONFIGS = {
    "LORA": peft.LoraConfig,
    "IA3": peft.IA3Config,
    "ADALORA": peft.AdaLoraConfig,
    "LOHA": peft.LoHaConfig,
}
OUR_CONFIGS = {
    "LORA": peftc.LoraConfig,
    "IA3": peftc.IA3Config,
    "ADALORA": peftc.AdaLoraConfig,
    "LOHA": peft.LoHaConfig,  # PEFT makes these
}
DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
#: Relative. In half precision two ways to round are this far apart; test_gradients.py measures both from the exact value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 3e-2, torch.bfloat16: 0.12}
#: Texts of our own (docs/differences.md), where PEFT's guesses, or does not name the culprit: patterns of how each begins.
OWN_TEXTS = [
    # with other adapters around PEFT says that the targets may be excluded, or may be heads
    (
        "No modules were targeted for adaptation",
        r"Target modules .+ not found in the base model\. Please check the target",
    ),
    (r"Target module \w+\(.* is not supported\.", r"Target module \w+ \([\w.]+\) is not supported\."),
    ("`r` should be a positive integer value but", "config: `r` should be a positive integer value but"),
    (
        r"AdaLoraModel supports only 1 trainable adapter",
        r"AdaLora allows one trainable adapter on a model, and adapter \w+",
    ),
    (
        "LoraModel supports only 1 adapter with bias",
        r"a model takes one adapter with bias other than 'none', and adapter \w+",
    ),
]


class Mismatch(AssertionError):
    pass


# ------------------------------------------------------------------ sequences


def specification(seed: int) -> dict:
    """The model of sequence `seed`, and what may occur in it."""
    rng = random.Random(seed * 7919 + 1)
    kind = rng.choices(["text", "image", "signal", "bert", "llama", "gpt2"], [45, 18, 7, 10, 10, 10])[0]
    shape = {}
    if kind == "text":
        shape = {
            "bias": rng.random() < 0.7,
            "padding_idx": rng.choice([None, 3]),
            "shared": rng.random() < 0.2,
            "tied": rng.random() < 0.2,
        }
    elif kind in ("image", "signal"):
        kernel = rng.choice([1, 3])
        shape = {
            "kernel": kernel,
            "stride": rng.choice([1, 2]),
            "padding": rng.choice([0, 1]),
            "groups": rng.choice([1, 1, 2]),
            "bias": rng.random() < 0.7,
        }
    elif kind == "llama":
        shape = {"tied": rng.random() < 0.3}
    family = rng.choices(["LORA", "IA3", "ADALORA", "mixed"], [45, 15, 10, 30])[0]
    residual = family == "LORA" and kind not in ("image", "signal", "gpt2") and rng.random() < 0.15  # PEFT: Linear only
    if residual:
        shape["shared"] = (
            False  # what calls a layer under its other name has the base weights here, not what is left of them
        )
    return {
        "seed": seed,
        "kind": kind,
        "shape": shape,
        "family": family,
        "residual": residual,  # pissa, olora: float32 only, in PEFT
        "dtype": "float" if residual else rng.choices(list(DTYPES), [70, 14, 8, 8])[0],
        "dropout": rng.random() < 0.2,  # then the model stays in eval mode
        "training": rng.random() < 0.5,
        "bias": family == "LORA" and rng.random() < 0.3,
        "heads": rng.choice(["none", "none", "some", "all"]) if models.LAYERS[kind]["heads"] else "none",
    }


class Generator:
    """Draws steps that make sense, or are wrong in an interesting way, for the state that the reference is in."""

    def __init__(self, spec: dict, lockstep: Lockstep) -> None:
        self.spec, self.lockstep = spec, lockstep
        self.rng = random.Random(spec["seed"])
        self.layers = models.LAYERS[spec["kind"]]

    def steps(self, count: int):
        yield self.add()
        weights = {
            self.add: 3, self.load: 3, self.save: 2, self.set: 4, self.toggle: 3, self.delete: 2, self.state: 1,
            self.train: 4, self.again: 1, self.copy: 1, self.dtype: 1, self.mode: 1, self.reload: 1, self.wrong: 2,
        }  # fmt: skip
        kinds = list(weights)
        made = 1
        while made < count:
            step = self.rng.choices(kinds, list(weights.values()))[0]()
            if step is not None:
                made += 1
                yield step

    def loaded(self) -> list[str]:
        return self.lockstep.theirs.names()

    def name(self):
        free = [name for name in NAMES if name not in self.loaded()]
        if not free or self.rng.random() < 0.08:
            return self.rng.choice(NAMES)
        return None if "default" not in self.loaded() and self.rng.random() < 0.1 else self.rng.choice(free)

    def known(self) -> str:
        return self.rng.choice([*self.loaded(), *self.loaded(), *self.loaded(), "nobody"])

    def some(self) -> list[str]:
        names = self.rng.sample(self.loaded(), self.rng.randint(0, len(self.loaded())))
        if names and self.rng.random() < 0.1:
            names.append(names[0])
        if self.rng.random() < 0.1:
            names.append("nobody")
        return names

    def fields(self):
        """(method, fields of its config)"""
        rng, spec = self.rng, self.spec
        method = spec["family"]
        if method == "mixed":
            method = rng.choice(["LORA", "LORA", "IA3", "ADALORA", *(["LOHA"] if "LOHA" in self.layers else [])])
        every = self.layers[method]
        if spec["kind"] == "image" and spec["family"] == "mixed" and method == "IA3":
            every = ["fc"]  # PEFT: a convolution takes one method
        targets = rng.sample(every, rng.randint(1, min(3, len(every))))
        fields: dict = {"target_modules": targets}
        if method == "LORA":
            self.lora(fields)
        elif method == "ADALORA":
            fields.update(init_r=rng.choice([2, 3]), lora_alpha=rng.choice([2, 8]), total_step=10, tinit=1, tfinal=1)
            fields["inference_mode"] = any(
                getattr(config, "inference_mode", True) is False
                for config in getattr(self.lockstep.theirs.model, "peft_config", {}).values()
            ) and rng.random() < 0.9  # fmt: skip
        elif method == "LOHA":
            fields.update(r=rng.choice([1, 2]), alpha=rng.choice([1, 4]))
        else:
            fields["feedforward_modules"] = [name for name in targets if name in self.layers["feedforward"]]
            if rng.random() < 0.2:
                fields["init_ia3_weights"] = False
        if spec["dropout"] and method in ("LORA", "ADALORA"):
            fields["lora_dropout"] = 0.3
        if spec["heads"] == "all" or (spec["heads"] == "some" and rng.random() < 0.4):
            fields["modules_to_save"] = list(self.layers["heads"])
        return method, fields

    def lora(self, fields: dict) -> None:
        rng, spec = self.rng, self.spec
        targets = fields["target_modules"]
        even = spec["shape"].get("groups", 1) > 1
        fields["r"] = rng.choice([2, 4] if even else [1, 2, 3, 4])
        fields["lora_alpha"] = rng.choice([1, 4, 8])
        fields["use_rslora"] = rng.random() < 0.3
        if spec["residual"] and rng.random() < 0.6:
            fields["init_lora_weights"] = rng.choice(["pissa", "olora"])
            fields["target_modules"] = targets = [name for name in self.layers["ADALORA"] if name != "c_attn"][
                :2
            ] or targets
            fields["r"] = rng.choice([1, 2, 4])
            return
        draw = rng.random()
        plain = not {"embed", "word_embeddings", "embed_tokens", "wte", "first", "second", "line", "room"} & set(
            targets
        )
        if draw < 0.1:
            fields["init_lora_weights"] = False
        elif draw < 0.2:
            fields["init_lora_weights"] = "gaussian"
        elif draw < 0.25 and plain:
            fields["init_lora_weights"] = "orthogonal"
            fields["r"] = 2
        if rng.random() < 0.3:
            fields["rank_pattern"] = {rng.choice(targets): rng.choice([2, 4] if even else [1, 3])}
        if rng.random() < 0.3:
            fields["alpha_pattern"] = {rng.choice(targets): rng.choice([2, 16])}
        if rng.random() < 0.25 and not even:  # peftc refuses DoRA on grouped convolutions
            fields["use_dora"] = True
        elif rng.random() < 0.15 and plain and "init_lora_weights" not in fields:
            fields["lora_bias"] = True
        if spec["bias"] and rng.random() < (0.7 if not self.loaded() else 0.1):
            fields["bias"] = rng.choice(["all", "lora_only"])
        if rng.random() < 0.15 and spec["kind"] in ("text", "bert", "llama"):
            fields["layers_to_transform"] = [rng.randrange(2)]
        elif rng.random() < 0.15:
            fields["target_modules"] = r".*\.?(" + "|".join(targets).replace(".", r"\.") + ")"
        elif (
            rng.random() < 0.1
            and spec["kind"] not in ("image", "signal")
            and spec["heads"] == "none"
            and spec["family"] == "LORA"
        ):
            # With other wrappers around PEFT also adapts what is inside of them.
            fields["target_modules"] = "all-linear"
        if rng.random() < 0.1 and isinstance(fields["target_modules"], list) and len(targets) > 1:
            fields["exclude_modules"] = [targets[0]]

    # Each of these gives one step, or None if it makes no sense now.

    def add(self):
        method, fields = self.fields()
        return ("add", self.name(), method, fields, self.rng.random() < 0.3)

    def save(self):
        if not self.loaded():
            return None
        own_save = self.spec["kind"] in models.TRANSFORMERS  # save_pretrained, which takes no name
        name = None if own_save and self.rng.random() < 0.4 else self.rng.choice(self.loaded())
        return ("save", name, f"s{len(self.lockstep.log)}")

    def load(self):
        if not self.lockstep.saves:
            return self.save()
        # What is loaded to be trained is in train mode at once, where dropout draws.
        options = {"trainable": self.rng.random() < 0.4 and not self.spec["dropout"]}
        if self.rng.random() < 0.35:
            options["state"] = True
            options["prefix"] = self.rng.random() < 0.5
            if self.rng.random() < 0.2:
                options["drop"] = self.rng.randrange(20)
            if self.rng.random() < 0.2:
                options["extra"] = True
        if self.rng.random() < 0.15:
            options["low_cpu_mem_usage"] = True
        key = self.rng.choice(list(self.lockstep.saves))
        return ("load", self.name(), key, self.rng.choice(["theirs", "ours"]), options)

    def set(self):
        return ("set", self.known() if self.rng.random() < 0.5 else self.some())

    def toggle(self):
        return (self.rng.choice(["disable", "enable"]),)

    def delete(self):
        return ("delete", self.known() if self.rng.random() < 0.6 else self.some())

    def state(self):
        return ("state", None if self.rng.random() < 0.3 else self.known(), self.rng.random() < 0.5)

    def train(self):
        dtype = next(self.lockstep.theirs.model.parameters()).dtype
        kind = "SGD" if dtype in (torch.float16, torch.bfloat16) else self.rng.choice(["SGD", "AdamW"])
        return ("train", kind, self.rng.randint(1, 2))

    def again(self):
        return ("train", "again", 1) if self.lockstep.theirs.optimiser is not None else None

    def copy(self):
        return ("copy", self.rng.choice(["deepcopy", "deepcopy", "pickle", "torch.save"]))

    def dtype(self):
        return None if self.spec["residual"] else ("dtype", self.rng.choice([*DTYPES, "float", "float"]))

    def mode(self):
        return None if self.spec["dropout"] else ("mode", self.rng.random() < 0.5)

    def reload(self):
        return ("reload",)

    def wrong(self):
        return ("wrong", self.rng.choice(["target", "dict", "nothing", "empty", "tuple", "layer", "r"]))


# -------------------------------------------------------------- the other model


class Ours:
    """A model with peftc's mixin, behind the calls that `Reference` has."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimiser = None

    def names(self):
        return list(self.model.peft_config) if self.model._hf_peft_config_loaded else []

    def snapshot(self):
        return lambda: None  # a refused call changes nothing

    def add(self, config, name):
        self.model.add_adapter(config, name)

    def load(self, folder, name, **options):
        if V5 and isinstance(self.model, PreTrainedModel) and options.get("peft_config") is not None:
            options["is_trainable"] = not options["peft_config"].inference_mode  # which decides there
        self.model.load_adapter(folder, name, **options)

    def set(self, names):
        self.model.set_adapter(names)

    def disable(self):
        self.model.disable_adapters()

    def enable(self):
        self.model.enable_adapters()

    def delete(self, names):
        self.model.delete_adapter(names)

    def active_adapters(self):
        return self.model.active_adapters()

    def state_dict(self, name, given=None):
        return self.model.get_adapter_state_dict(name, given)

    def save(self, folder, name):
        if name is None and hasattr(self.model, "save_pretrained"):
            self.model.save_pretrained(folder)
        else:
            self.model.save_adapter(folder, name)

    def running(self):
        return contextlib.nullcontext()

    def copied(self, copier):
        self.optimiser = None
        return copier(self)

    def patched(self):
        return contextlib.nullcontext()


class Patched(Ours):
    """A Transformers model as it is, under `peftc.patch_transformers()` while it is called."""

    def patched(self):
        return peftc.patch_transformers()


def pickled(side):
    return pickle.loads(pickle.dumps(side))


def saved(side):
    buffer = io.BytesIO()
    torch.save(side, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


class Listening(logging.Handler):
    """The texts that Transformers' logger of adapters gets."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record):
        self.texts.append(re.sub(r"\w+ LOAD REPORT", "LOAD REPORT", record.getMessage()))  # the class of the model

    def __enter__(self):
        logging.getLogger("transformers.integrations.peft").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("transformers.integrations.peft").removeHandler(self)


# ---------------------------------------------------------------- in lockstep


class Lockstep:
    """Two models side by side.

    Args:
        spec: as `specification` gives it.
        subject: Reference (the harness against itself), Ours or Patched.
        folder: for saved adapters.
    """

    def __init__(self, spec: dict, subject: type, folder) -> None:
        self.spec, self.subject, self.folder = spec, subject, folder
        with_our_mixin = subject is Ours
        kind, seed, shape = spec["kind"], spec["seed"], spec["shape"]
        self.theirs = Reference(models.build(kind, False, seed, **shape))
        self.ours = subject(models.build(kind, with_our_mixin, seed, **shape))
        self.sides = (self.theirs, self.ours)
        for side in self.sides:
            side.model.to(DTYPES[spec["dtype"]]).train(spec["training"] and not spec["dropout"])
        self.inputs = models.inputs(kind, seed)
        self.saves: dict[str, tuple] = {}
        self.log: list[tuple] = []
        self.logged: list[str] = []  # what the last call logged
        self.check()

    # ------------------------------------------------------------ running

    def run(self, count: int) -> None:
        for step in Generator(self.spec, self).steps(count):
            self.step(step)

    def replay(self, steps: list[tuple]) -> None:
        for step in steps:
            self.step(step)

    def step(self, step: tuple) -> None:
        self.log.append(step)
        try:
            getattr(self, "do_" + step[0])(*copy.deepcopy(step[1:]))
            self.check()
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n\nspec = {self.spec!r}\nsteps = [\n"
            text += "".join(f"    {one!r},\n" for one in self.log) + "]\n"
            raise Mismatch(text) from error

    def both(self, call) -> bool:
        """Make a call on both sides; whether it succeeded. Both must raise the same, or nothing, and log the same."""
        errors, heard = [], []
        for side in self.sides:
            restore = side.snapshot()
            with Listening() as listening, warnings.catch_warnings(), side.patched():
                warnings.simplefilter("ignore")
                try:
                    call(side)
                    errors.append(None)
                except Exception as error:  # noqa: BLE001  (any: the two are compared)
                    errors.append(error)
                    restore()
            heard.append(listening.texts)
        if type(errors[0]) is not type(errors[1]) or not same_text(*map(str, errors)):
            raise Mismatch(f"{errors[0]!r} != {errors[1]!r}") from (errors[1] or errors[0])
        same(heard[0], heard[1], "logged")
        self.logged = heard[0]
        return errors[0] is None

    # -------------------------------------------------------------- steps

    def config(self, side, method, fields, foreign: bool):
        if side is self.theirs or foreign or self.subject is Reference:
            return THEIR_CONFIGS[method](**copy.deepcopy(fields))
        return OUR_CONFIGS[method](**copy.deepcopy(fields))

    def do_add(self, name, method, fields, foreign=False):
        if self.both(lambda side: side.add(self.config(side, method, fields, foreign), name)):
            name = name or "default"
            self.same_init(name, fields)
            self.shake(name)

    def same_init(self, name, fields):
        """A fresh adapter: the same shapes, zeros and ones; random draws of the same spread. Then ours takes theirs."""
        self.check_structure()
        theirs, ours = (dict(side.model.named_parameters()) for side in self.sides)
        new = [path for path in theirs if name in path.split(".")]
        if fields.get("init_lora_weights", True) not in (False, "orthogonal") and fields.get("init_ia3_weights", True):
            self.check_outputs()
        for path in new:
            ref, our = theirs[path].detach().double(), ours[path].detach().double()
            constant = bool((ref == ref.flatten()[:1]).all()) and ref.numel() > 1
            determined = constant or "magnitude" in path or "modules_to_save" in path or "ranknum" in path
            if determined and not (fields.get("init_lora_weights", True) in (False, "orthogonal") and "lora_" in path):
                close(ref, our, TOLERANCE[theirs[path].dtype], f"initial {path}")
            elif ref.numel() >= 24 and fields.get("init_lora_weights", True) not in ("pissa", "olora"):
                ratio = float(our.std() / ref.std())
                if not 0.4 < ratio < 2.5:
                    raise Mismatch(f"initial {path}: standard deviation {float(our.std())}, not {float(ref.std())}")
            ours[path].data.copy_(theirs[path].data)

    def shake(self, name):
        """Training, in short: the same random values for both."""
        generator = torch.Generator().manual_seed(len(self.log))
        theirs, ours = (dict(side.model.named_parameters()) for side in self.sides)
        biases = {id(parameter) for parameter, _ in self.theirs.biases.get(name, [])}
        for path in sorted(theirs):
            parameter = theirs[path]
            applied = id(parameter) in biases and name in self.theirs.biases_in
            if (name not in path.split(".") and not applied) or "ranknum" in path:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            if "magnitude" in path:
                value = parameter.data.double() * (1 + noise)
            elif "ia3_" in path:
                value = 1 + noise
            else:
                value = parameter.data.double() * (applied or "modules_to_save" in path) + noise
            parameter.data.copy_(value)
            ours[path].data.copy_(parameter.data)

    def do_save(self, name, key):
        folders = tuple(self.folder / f"{key}-{who}" for who in ("theirs", "ours"))
        order = iter(folders)
        if not self.both(lambda side: side.save(next(order), name)):
            return
        same(
            *(sorted(path.name for path in folder.iterdir() if path.name != "README.md") for folder in folders), "files"
        )
        weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        same(sorted(weights[0]), sorted(weights[1]), "saved keys")
        for path, tensor in weights[0].items():
            exact(tensor, weights[1][path], f"saved {path}")
        same(*(plain(json.loads((folder / "adapter_config.json").read_text())) for folder in folders), "saved config")
        self.saves[key] = folders

    def do_load(self, name, key, who, options):
        if key not in self.saves:
            return
        folder = self.saves[key][who == "ours"]
        low = {"low_cpu_mem_usage": True} if options.get("low_cpu_mem_usage") else {}
        trainable = options["trainable"]
        if options.get("state"):
            state = load_file(folder / "adapter_model.safetensors")
            if "drop" in options:
                state.pop(sorted(state)[options["drop"] % len(state)])
            if not options["prefix"]:
                state = {path.removeprefix(PREFIX): tensor for path, tensor in state.items()}
            if options.get("extra"):
                state["somewhere.lora_A.weight"] = torch.zeros(2, 2)

            def call(side):
                config = peft.PeftConfig.from_pretrained(folder)
                config.inference_mode = not trainable
                tensors = {path: tensor.clone() for path, tensor in state.items()}
                side.load(None, name, peft_config=config, adapter_state_dict=tensors, **low)
        else:

            def call(side):
                side.load(str(folder), name, is_trainable=trainable, **low)

        if self.both(call) and (self.logged or "drop" in options):  # what was missing is drawn anew
            theirs, ours = (dict(side.model.named_parameters()) for side in self.sides)
            same(sorted(theirs), sorted(ours), "parameter names")
            for path, parameter in theirs.items():
                ours[path].data.copy_(parameter.data)

    def do_set(self, names):
        self.both(lambda side: side.set(copy.copy(names)))

    def do_disable(self):
        self.both(lambda side: side.disable())

    def do_enable(self):
        self.both(lambda side: side.enable())

    def do_delete(self, names):
        self.both(lambda side: side.delete(copy.copy(names)))

    def do_state(self, name, given):
        states = []

        def call(side):
            states.append(side.state_dict(name, side.model.state_dict() if given else None))

        if self.both(call):
            same(sorted(states[0]), sorted(states[1]), "keys of get_adapter_state_dict")
            for path, tensor in states[0].items():
                exact(tensor, states[1][path], path)

    def do_train(self, kind, steps):
        if kind == "again" and self.theirs.optimiser is None:
            return
        for side in self.sides:
            if kind != "again":
                trainable = [p for p in side.model.parameters() if p.requires_grad]
                side.optimiser = None
                if trainable:
                    side.optimiser = {
                        "SGD": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.5),
                        "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3),
                    }[kind](trainable)
        for _ in range(steps):
            gradients = []
            for side in self.sides:
                side.model.zero_grad()
                with side.running(), side.patched():
                    results = models.outputs(side.model, self.inputs)
                    if any(result.requires_grad for result in results):
                        sum((result.double() ** 2).mean() for result in results).backward()
                gradients.append({path: p.grad for path, p in side.model.named_parameters()})
            try:
                same_gradients(*gradients)
            except Mismatch:
                if not self.only_rounding(gradients):
                    raise
            for side in self.sides:
                if side.optimiser is not None:
                    side.optimiser.step()
            self.same_update()
        for side in self.sides:
            side.model.zero_grad()

    def only_rounding(self, gradients) -> bool:
        """Gradients that differ by a little more than they may: what they are in float64 decides.

        There both must be the same, and ours no further from it than ours and the reference's may be apart, or all in all
        no further than the reference's are, give or take chance.
        (A small model in bf16 may have gradients of which one digit is right.)
        """
        exact = []
        for side in self.sides:
            optimiser, side.optimiser = side.optimiser, None
            twin = copy.deepcopy(side)
            side.optimiser = optimiser
            twin.model.double()
            twin.model.zero_grad()
            with twin.running(), twin.patched():
                inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
                sum((result**2).mean() for result in models.outputs(twin.model, inputs)).backward()
            exact.append({path: p.grad for path, p in twin.model.named_parameters()})
        # What pissa leaves of the base weights is rounded in the reference's weights.
        if furthest(exact[1], exact[0]) > (1e-3 if self.spec["residual"] else 1e-9):
            return False
        theirs, ours = (furthest(own, true) for own, true in zip(gradients, exact, strict=True))
        return ours <= max(4 * theirs, min(TOLERANCE[g.dtype] for g in gradients[1].values() if g is not None))

    def same_update(self):
        """Parameters after a step of the optimiser; then ours takes theirs, lest rounding adds up."""
        theirs, ours = (dict(side.model.named_parameters()) for side in self.sides)
        adam = isinstance(self.theirs.optimiser, torch.optim.AdamW)
        for path, parameter in theirs.items():
            # AdamW takes the sign of what may be rounding: up to the learning rate in either direction.
            slack = 2.5e-3 if adam else 0.0
            close(parameter.data, ours[path].data, TOLERANCE[parameter.dtype], f"{path} after a step", slack)
            ours[path].data.copy_(parameter.data)

    def do_copy(self, how):
        """Go on with a copy of each; what happens to the original must not matter to it."""
        originals = self.sides
        self.sides = tuple(side.copied(COPIERS[how]) for side in originals)
        self.theirs, self.ours = self.sides
        for side in originals:
            for parameter in side.model.parameters():
                parameter.data.fill_(7.0)

    def do_dtype(self, name):
        for side in self.sides:
            side.optimiser = None
            getattr(side.model, name)()

    def do_mode(self, training):
        for side in self.sides:
            side.model.train(training)
            getattr(side, "awake", set()).clear()

    def do_reload(self):
        """state_dict → other values → load_state_dict."""
        for side in self.sides:
            state = {path: tensor.clone() for path, tensor in side.model.state_dict().items()}
            for parameter in side.model.parameters():
                parameter.data.mul_(3.0)
            side.model.load_state_dict(state)

    def do_wrong(self, what):
        target = models.LAYERS[self.spec["kind"]]["LORA"][-1 if self.spec["kind"] in ("image", "signal") else 0]
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        norm = {"text": "norm", "bert": "LayerNorm", "llama": "input_layernorm", "gpt2": "ln_1"}

        def lora(side, **fields):
            return self.config(side, "LORA", {"r": 2, "target_modules": [target], **fields}, False)

        free = next((name for name in NAMES if name not in self.theirs.names()), "other")
        calls = {
            "target": lambda side: side.add(lora(side, target_modules=["nowhere"]), free),
            "layer": lambda side: side.add(lora(side, target_modules=[target, norm[self.spec["kind"]]]), free),
            "r": lambda side: side.add(lora(side, r=0), free),
            "dict": lambda side: side.add({"r": 2}, free),
            "nothing": lambda side: side.load(None, free),
            "empty": lambda side: side.load(str(empty), free),
            "tuple": lambda side: side.set(("zeta", "kilo")),
        }
        if what != "layer" or self.spec["kind"] in norm:
            self.both(calls[what])

    # ---------------------------------------------------------- comparing

    def check(self) -> None:
        self.check_structure()
        theirs, ours = (dict(side.model.named_parameters()) for side in self.sides)
        for path, parameter in theirs.items():
            exact(parameter, ours[path], f"value of {path}")
        self.check_outputs()

    def check_structure(self) -> None:
        theirs, ours = self.sides
        same(theirs.model._hf_peft_config_loaded, ours.model._hf_peft_config_loaded, "_hf_peft_config_loaded")
        same(theirs.names(), ours.names(), "loaded adapters")
        if theirs.names():
            with theirs.patched():
                active = theirs.active_adapters()
            with ours.patched():
                same(active, ours.active_adapters(), "active adapters")
            for name in theirs.names():
                configs = [plain(side.model.peft_config[name].to_dict()) for side in self.sides]
                same(*configs, f"config of {name}")
        described = []
        for side in self.sides:
            modules = dict(side.model.named_modules())
            described.append(
                {
                    "parameters": [path for path, _ in side.model.named_parameters()],
                    "dtypes": {path: p.dtype for path, p in side.model.named_parameters()},
                    "requires_grad": {path: p.requires_grad for path, p in side.model.named_parameters()},
                    "buffers": [path for path, _ in side.model.named_buffers()],
                    # difference: what pissa and olora started from is there, too
                    "keys of state_dict()": [key for key in side.model.state_dict() if ".lora_initial_" not in key],
                    "BaseTunerLayer": [path for path, m in modules.items() if isinstance(m, BaseTunerLayer)],
                    "ModulesToSaveWrapper": [
                        path for path, m in modules.items() if isinstance(m, ModulesToSaveWrapper)
                    ],
                    "training": {
                        path: m.training
                        for path, m in modules.items()
                        # a container's mode has no effect
                        if isinstance(m, nn.Dropout)
                        or (next(m.parameters(recurse=False), None) is not None and not isinstance(m, nn.ParameterDict))
                    },
                }
            )
        for what, value in described[0].items():
            same(value, described[1][what], what)

    def check_outputs(self) -> None:
        results = []
        for side in self.sides:
            with side.running(), side.patched():
                results.append(models.outputs(side.model, self.inputs))
        for theirs, ours in zip(*results, strict=True):
            same(theirs.requires_grad, ours.requires_grad, "requires_grad of the output")
            close(theirs.detach(), ours.detach(), TOLERANCE[theirs.dtype], "output")


def same(theirs, ours, what: str) -> None:
    if theirs == ours:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted({key for key in {**theirs, **ours} if theirs.get(key, "-") != ours.get(key, "-")})
        raise Mismatch(
            f"{what}: " + "; ".join(f"{k}: {theirs.get(k, '-')!r} != {ours.get(k, '-')!r}" for k in keys[:6])
        )
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) > 6:
        missing, more = [x for x in theirs if x not in ours], [x for x in ours if x not in theirs]
        where = next(
            (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
        )
        raise Mismatch(
            f"{what}: lacks {missing[:6]}, has {more[:6]}, first difference at {where}: "
            f"{theirs[where : where + 3]} != {ours[where : where + 3]}"
        )
    raise Mismatch(f"{what}: {theirs!r} != {ours!r}")


def exact(theirs: torch.Tensor, ours: torch.Tensor, what: str) -> None:
    same((theirs.dtype, theirs.shape), (ours.dtype, ours.shape), what)
    if not torch.equal(theirs.detach(), ours.detach()):
        raise Mismatch(f"{what}: differs by {float((theirs.double() - ours.double()).abs().max())}")


def close(theirs: torch.Tensor, ours: torch.Tensor, tolerance: float, what: str, slack: float = 0.0) -> None:
    same((theirs.dtype, theirs.shape), (ours.dtype, ours.shape), what)
    theirs, ours = theirs.double(), ours.double()
    limit = tolerance * max(1.0, float(theirs.abs().max())) + slack if theirs.numel() else 0.0
    difference = float((theirs - ours).abs().max()) if theirs.numel() else 0.0
    if not difference <= limit:
        raise Mismatch(f"{what}: differs by {difference}, more than {limit}")


def same_gradients(theirs: dict, ours: dict) -> None:
    """For each parameter none on both sides, or the same up to rounding, for which the largest gradient is the scale."""
    same([path for path, g in theirs.items() if g is not None], [path for path, g in ours.items() if g is not None],
         "parameters that got a gradient")  # fmt: skip
    present = [g for g in theirs.values() if g is not None]
    largest = max((float(g.abs().max()) for g in present if g.numel()), default=0.0)
    for path, gradient in theirs.items():
        if gradient is None:
            continue
        same(gradient.dtype, ours[path].dtype, f"gradient of {path}")
        limit = TOLERANCE[gradient.dtype] * (float(gradient.abs().max()) + 0.05 * largest + 1e-6)
        difference = float((gradient.double() - ours[path].double()).abs().max())
        if not difference <= limit:
            raise Mismatch(f"gradient of {path}: differs by {difference}, more than {limit}")


def furthest(gradients: dict, exact: dict) -> float:
    """The largest error of any gradient, relative to its size."""
    largest = max(float(g.abs().max()) for g in exact.values() if g is not None and g.numel())
    return max(
        float((gradients[path].double() - true).abs().max()) / (float(true.abs().max()) + 0.05 * largest)
        for path, true in exact.items()
        if true is not None and true.numel()
    )


def same_text(theirs: str, ours: str) -> bool:
    """PEFT's text, to which ours may add the remedy; or one of OWN_TEXTS."""
    return ours.startswith(theirs.rstrip(".'")) or any(
        re.match(their, theirs, re.DOTALL) and re.match(our, ours) for their, our in OWN_TEXTS
    )


#: Fields of configs that PEFT has got after 0.17.1, which peftc's classes do not have.
LATER = (
    set().union(
        *(config().to_dict() for config in THEIR_CONFIGS.values() if config in (peft.LoraConfig, peft.IA3Config))
    )
    - set(peftc.LoraConfig().to_dict())
    - set(peftc.IA3Config().to_dict())
)


def plain(config: dict) -> dict:
    """A config's dict with sets and enums as plain sorted lists and strings."""

    def value(x):
        if isinstance(x, (set, frozenset)):
            return sorted(x)
        if isinstance(x, dict):
            return {key: value(inner) for key, inner in x.items()}
        return getattr(x, "value", x)

    result = {key: value(x) for key, x in config.items() if key not in LATER}
    for field in ("target_modules", "feedforward_modules", "modules_to_save", "exclude_modules"):
        if isinstance(result.get(field), list):
            result[field].sort()
    return result
