"""Random sequences of calls in lockstep: Transformers' mixin with PEFT on a torch model, ours on its twin.

After every call both must agree on: the exception (type, and text where it is PEFT's or Transformers' own), the loaded
names, what is active on each layer and in which order, the names of adapter tensors, which of them want gradients,
and the outputs. State dicts and saved files are compared as part of the sequences.

Where peftc differs on purpose (docs/differences.md) the reference is brought to the documented state; each such place
is a method of `Reference` with "difference" in its docstring.
"""

import copy
import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.numpy import load_file, save_file
from transformers.integrations.peft import PeftAdapterMixin
from twins import CONFIGS, OUR_CONFIGS, TORCH, Twins, text_net

import peftc

NAMES = ["zeta", "kilo", "xray", "bravo"]  # no name is part of another or of a module's: defect 1
OWN_TEXTS = [  # PEFT's text guesses or does not name the culprit
    (
        "No modules were targeted for adaptation. This might be",
        "Target modules {'nowhere'} not found in the base model.",
    ),
    (
        "AdaLoraModel supports only 1 trainable adapter.",
        "AdaLora allows one trainable adapter on a model, and adapter ",
    ),
]
PREFIX = "base_model.model."


class OnCpu(PeftAdapterMixin):
    """Transformers' mixin outside of PreTrainedModel asks for this alone."""

    device = torch.device("cpu")


WITH_MIXIN = SimpleNamespace(**{**vars(TORCH), "mixins": (OnCpu,)})


def network(lib, **shape):
    return text_net(WITH_MIXIN if lib is TORCH else lib, **shape)


class Reference:
    """The torch model behind Transformers' mixin, with peftc's documented differences applied from outside."""

    def __init__(self, model):
        self.model = model
        self.enabled = True

    def wrappers(self):
        return [m for m in self.model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]

    def names(self):
        return list(self.model.peft_config) if self.model._hf_peft_config_loaded else []

    def settle(self):
        """Difference: enable brings saved heads back, too; what is added while disabled stays disabled."""
        for module in self.wrappers():
            flags = {name: p.requires_grad for name, p in module.named_parameters()}
            if isinstance(module, ModulesToSaveWrapper) or not self.enabled:
                module.enable_adapters(self.enabled)
                for name, parameter in module.named_parameters():
                    parameter.requires_grad = flags[name]
        self.model.eval()  # difference: new layers follow the model's mode

    def load(self, *arguments, adapter_name, **options):
        """Difference: the head of what was loaded is active too, not the one of the adapter before it; and one of the
        other family with a head of its own stays active no longer."""
        self.model.load_adapter(*arguments, adapter_name=adapter_name, **options)
        if any(isinstance(module, ModulesToSaveWrapper) for module in self.wrappers()):
            flags = [(p, p.requires_grad) for p in self.model.parameters()]
            self.model.set_adapter(adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad = flag

    def delete(self, names, heirs):
        """Difference: saved heads go as well, if nothing is left active, all layers agree on who is next, and whoever
        stays active keeps its flags (the reference sets them anew on the layers of what was deleted, disabled or not)."""
        flags = [(p, p.requires_grad) for p in self.tensors().values()]
        self.model.delete_adapter(names)
        for parameter, flag in flags:
            parameter.requires_grad = flag
        names = [names] if isinstance(names, str) else names
        for module in self.wrappers():  # difference: a name that is used again is not DoRA again
            for name in names:
                getattr(module, "use_dora", {}).pop(name, None)
                getattr(module, "lora_variant", {}).pop(name, None)
        for parent in list(self.model.modules()):
            for child, module in list(parent.named_children()):
                if isinstance(module, ModulesToSaveWrapper):
                    for name in names:
                        module.delete_adapter(name, heirs)
                    if not module.modules_to_save:  # emptied, it cannot run
                        setattr(parent, child, module.original_module)
        if not self.names():
            self.enabled = True  # difference: a model without adapters does not remember that they were disabled
            for module in self.wrappers():
                module.enable_adapters(True)

    def layers(self):
        """path → names active on that layer, in order. Difference: not the first layer's for all."""
        return {
            path: [a for a in module.active_adapters if a in self.adapters_of(module)]
            for path, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer) and self.adapters_of(module)
        }

    @staticmethod
    def adapters_of(module):
        return {name for field in module.adapter_layer_names for name in getattr(module, field)}

    def tensors(self):
        names = set(self.names())
        return {path: p for path, p in self.model.named_parameters() if names & set(path.split("."))}

    def state_dict(self, name, state_dict=None):
        """Difference: an IA3 adapter's state dict is its own (defect 2)."""
        state = self.model.get_adapter_state_dict(name, state_dict)
        others = set(self.names()) - {name}
        return {key: value for key, value in state.items() if others.isdisjoint(key.split("."))}


class Lockstep:
    def __init__(self, seed, tmp_path):
        self.rng = random.Random(seed)
        twins = Twins(network, seed, layers=2)
        self.ours = twins.ours
        self.reference = Reference(twins.theirs)
        self.heads = seed % 3 == 0  # every adapter of the sequence brings a head: mixing is defect 6
        self.one_family = seed % 2 == 0
        self.ids = np.random.default_rng(seed).integers(0, 19, (2, 5))
        self.folders = []
        self.tmp_path = tmp_path
        self.log = []

    # --------------------------------------------------------------- the calls

    def fields(self):
        """(method, fields). Methods keep to layers of their own: on one layer their order is a documented
        difference."""
        rng = self.rng
        method = "LORA" if self.one_family else rng.choice(["LORA", "LORA", "IA3", "ADALORA"])
        if method == "LORA":
            targets = rng.choice([["q_proj"], ["q_proj", "v_proj"], ["embed", "v_proj"], r".*\.[qv]_proj", ["v_proj"]])
            fields = {"r": rng.choice([1, 2, 3]), "lora_alpha": rng.choice([1, 4]), "use_rslora": rng.random() < 0.3}
            if isinstance(targets, list) and rng.random() < 0.3:
                fields["layers_to_transform"] = [rng.randrange(2)]
                targets = ["q_proj", "v_proj"]
            if rng.random() < 0.2 and targets != ["embed", "v_proj"]:
                fields["use_dora"] = True
        elif method == "IA3":
            targets = rng.choice([["c_attn"], ["down"], ["c_attn", "down"]])
            fields = {"feedforward_modules": [name for name in targets if name == "down"]}
        else:
            targets = ["up"]
            fields = {"init_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1}
        if self.heads:
            fields["modules_to_save"] = ["head"]
        return method, {"target_modules": targets, **fields}

    def name(self):
        free = [name for name in NAMES if name not in self.reference.names()]
        return self.rng.choice(free if free and self.rng.random() < 0.8 else NAMES)

    def add(self):
        name, (method, fields) = self.name(), self.fields()
        wrong = self.rng.random()
        if wrong < 0.08:
            fields["target_modules"] = ["nowhere"]
            fields.pop("feedforward_modules", None)
        theirs, ours = CONFIGS[method](**copy.deepcopy(fields)), OUR_CONFIGS[method](**copy.deepcopy(fields))
        if 0.08 < wrong < 0.12:
            theirs = ours = {"r": 2}
        elif 0.12 < wrong < 0.3:
            ours = copy.deepcopy(theirs)  # PEFT's own config
        if self.both(
            f"add {name} {method} {fields}",
            lambda: self.reference.model.add_adapter(theirs, name),
            lambda: self.ours.add_adapter(ours, name),
        ):
            self.train(name)

    def train(self, name):
        """The same random values for both, written into what the state dicts give."""
        ours = self.ours.get_adapter_state_dict(name)
        theirs = self.reference.state_dict(name)
        assert list(ours) == list(theirs), self.log
        rng = np.random.default_rng(len(self.log))
        for key, value in ours.items():
            noise = 0.2 * rng.standard_normal(value.shape).astype(value.dtype)
            value[...] = noise + (1 if "ia3_" in key or "magnitude" in key else 0)
            theirs[key].data.copy_(torch.from_numpy(value))

    def save(self):
        if not self.reference.names():
            return
        name = self.rng.choice(self.reference.names())
        self.log.append(f"save {name}")
        folders = [self.tmp_path / f"{len(self.log)}-{who}" for who in ("theirs", "ours")]
        state = {PREFIX + key: value.detach().numpy() for key, value in self.reference.state_dict(name).items()}
        config = self.reference.model.peft_config[name]
        mode = config.inference_mode
        config.inference_mode = True
        config.save_pretrained(folders[0])
        config.inference_mode = mode
        save_file(state, folders[0] / "adapter_model.safetensors", metadata={"format": "pt"})
        self.ours.save_adapter(folders[1], name)
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
        assert weights[0] == weights[1], self.log
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
        for fields in configs:  # sets: their order is that of the process
            for field in ("target_modules", "feedforward_modules", "modules_to_save"):
                if isinstance(fields.get(field), list):
                    fields[field].sort()
        if isinstance(self.ours.peft_config[name], (peft.IA3Config, peftc.IA3Config)) and configs[1]["fan_in_fan_out"]:
            # difference: PEFT flips it only for the first adapter on a Conv1D; ours does not depend on what was there
            assert "c_attn" in configs[1]["target_modules"], self.log
            configs[0]["fan_in_fan_out"] = True
        assert configs[0] == configs[1], self.log
        self.folders += folders

    def load(self):
        name = self.name()
        trainable = self.rng.random() < 0.4
        if not self.folders:
            self.save()
        if not self.folders or self.rng.random() < 0.06:
            folder = self.tmp_path / "empty"
            folder.mkdir(exist_ok=True)
        else:
            folder = self.rng.choice(self.folders)
        if self.rng.random() < 0.3 and folder.name != "empty":
            state = load_file(folder / "adapter_model.safetensors")
            if self.rng.random() < 0.5:
                state = {key.removeprefix(PREFIX): value for key, value in state.items()}
            theirs = peft.PeftConfig.from_pretrained(folder)
            theirs.inference_mode = not trainable
            ours = copy.deepcopy(theirs)
            tensors = {key: torch.from_numpy(value.copy()) for key, value in state.items()}
            self.both(
                f"load {name} from a state dict of {folder.name} {trainable=}",
                lambda: self.reference.load(adapter_name=name, peft_config=theirs, adapter_state_dict=tensors),
                lambda: self.ours.load_adapter(adapter_name=name, peft_config=ours, adapter_state_dict=state),
            )
        else:
            self.both(
                f"load {name} from {folder.name} {trainable=}",
                lambda: self.reference.load(str(folder), adapter_name=name, is_trainable=trainable),
                lambda: self.ours.load_adapter(str(folder), name, is_trainable=trainable),
            )

    def set(self):
        loaded = self.reference.names()
        names = self.rng.choice([*loaded, "nobody"])
        if self.rng.random() < 0.6:
            names = self.rng.sample(loaded, self.rng.randint(0, len(loaded)))
            if self.heads and len(names) != 1:
                return  # documented for two names; [] is a test of its own
            if self.rng.random() < 0.1:
                names = [*names, "nobody"]
        self.both(f"set {names}", lambda: self.reference.model.set_adapter(names), lambda: self.ours.set_adapter(names))

    def disable(self):
        if self.both("disable", self.reference.model.disable_adapters, self.ours.disable_adapters, check=False):
            self.reference.enabled = False
        self.check()

    def enable(self):
        if self.both("enable", self.reference.model.enable_adapters, self.ours.enable_adapters, check=False):
            self.reference.enabled = True
        self.check()

    def delete(self):
        loaded = self.reference.names()
        names = self.rng.choice([*loaded, "nobody"])
        if self.rng.random() < 0.4:
            names = self.rng.sample(loaded, self.rng.randint(0, len(loaded)))
            if self.rng.random() < 0.2:
                names = [*names, "nobody"]
        ours = self.ours.active_adapters() if loaded else []
        gone = {names} if isinstance(names, str) else set(names)
        left = [name for name in loaded if name not in gone]
        heirs = [name for name in ours if name in left] or sorted(left)[: bool(ours)]
        done = self.both(
            f"delete {names}",
            lambda: self.reference.delete(names, heirs),
            lambda: self.ours.delete_adapter(names),
            check=False,
        )
        if done and left and gone:
            assert self.ours.active_adapters() == heirs, self.log
            if not [name for name in ours if name in left] and ours:
                self.reference.model.set_adapter(heirs)  # difference: one choice for the model
        self.check()

    def state(self):
        loaded = self.reference.names()
        name = self.rng.choice([*loaded, "nobody"])
        if name == "nobody":
            kind = KeyError if loaded else ValueError
            for model in (self.reference.model, self.ours):
                with pytest.raises(kind):
                    model.get_adapter_state_dict(name)
            return
        theirs = {key: value.detach().numpy() for key, value in self.reference.state_dict(name).items()}
        given = self.rng.random() < 0.5
        ours = self.ours.get_adapter_state_dict(name, state_dict=self.ours.state_dict() if given else None)
        assert list(ours) == list(theirs), self.log
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)

    # -------------------------------------------------------------- comparing

    def both(self, what, theirs, ours, check=True):
        """Call both. Whether it went well, the same for both; a refusal leaves the reference as it was (difference:
        ours needs no help for that)."""
        self.log.append(what)
        before = copy.deepcopy(self.reference.model)
        errors = []
        for call in (theirs, ours):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call()
                errors.append(None)
            except Exception as error:  # noqa: BLE001  (any: the two are compared)
                errors.append(error)
        if type(errors[0]) is not type(errors[1]) or not self.same_text(*map(str, errors)):
            raise AssertionError(f"{self.log}: {errors[0]!r} != {errors[1]!r}") from errors[1]
        if errors[0] is not None:
            self.reference.model = before
        if check:
            self.check()
        return errors[0] is None

    @staticmethod
    def same_text(theirs, ours):
        """PEFT's text, to which ours may add the remedy. Difference: the two texts of OWN_TEXTS are ours."""
        return ours.startswith(theirs.rstrip(".")) or any(
            theirs.startswith(their) and ours.startswith(our) for their, our in OWN_TEXTS
        )

    def check(self):
        reference, ours, log = self.reference, self.ours, self.log
        reference.settle()
        names = reference.names()
        assert ours._hf_peft_config_loaded == bool(names), log
        if names:
            assert list(ours.peft_config) == names, log
            registry = ours._peftc_attachment.registry
            active = ours.active_adapters()
            targets = {name: set(registry.adapted_modules(name)) for name in names}
            for path, theirs in reference.layers().items():
                assert [name for name in active if path in targets[name]] == theirs, (path, active, log)
            if self.one_family and reference.layers():
                assert reference.model.active_adapters() == active, log
            tensors = reference.tensors()
            mine = {path: p for path, p in ours.named_parameters() if set(names) & set(path.split("."))}
            assert set(mine) == set(tensors), log
            for path, parameter in mine.items():
                if "modules_to_save" not in path:  # difference: saved heads are frozen and thawed with the rest
                    assert parameter.requires_grad == tensors[path].requires_grad, (path, "\n".join(log))
        with torch.no_grad():
            expected = reference.model(torch.from_numpy(self.ids))
        for theirs, mine in zip(expected, ours(self.ids), strict=True):
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=2e-5, err_msg=str(log))


@pytest.mark.parametrize("seed", range(150))
def test_sequence(seed, tmp_path):
    steps = Lockstep(seed, tmp_path)
    kinds = [
        steps.add,
        steps.save,
        steps.load,
        steps.set,
        steps.set,
        steps.disable,
        steps.enable,
        steps.delete,
        steps.state,
    ]
    steps.add()
    for _ in range(11):
        steps.rng.choice(kinds)()
