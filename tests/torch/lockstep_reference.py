"""The reference of the lockstep tests: Transformers' mixin with PEFT on a model.

Where peftc differs on purpose (docs/differences.md) the reference is brought to the documented state from outside; each
such place says "difference" and what it is. Everything else is what Transformers and PEFT do by themselves.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging

import torch
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import _freeze_adapter
from safetensors.torch import load_file, save_file
from their_mixin import V5, freeze_counts
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if V5:
    from transformers.utils.loading_report import log_state_dict_report

PREFIX = "base_model.model."
FAMILY = {"LORA": "lora", "ADALORA": "lora", "IA3": "ia3", "LOHA": "lycoris"}


def method_of(config) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


@contextlib.contextmanager
def _heads_follow():
    """Difference: an adapter that does not replace a module leaves it alone; the reference raises halfway."""
    original = ModulesToSaveWrapper.set_adapter

    def set_adapter(wrapper, names, *mode, **options):
        names = [names] if isinstance(names, str) else names
        known = [name for name in names if name in wrapper._adapters]
        if known:
            original(wrapper, known, *mode, **options)

    ModulesToSaveWrapper.set_adapter = set_adapter
    try:
        yield
    finally:
        ModulesToSaveWrapper.set_adapter = original


@contextlib.contextmanager
def _heads_go():
    """Difference: several adapters may be active while one that replaces a module is deleted; PEFT 0.21 raises halfway."""
    original = ModulesToSaveWrapper.delete_adapter

    def delete_adapter(wrapper, adapter_name, new_active_adapters):
        heirs = [heir for heir in new_active_adapters or () if heir in wrapper._adapters and heir != adapter_name]
        original(wrapper, adapter_name, heirs)

    ModulesToSaveWrapper.delete_adapter = delete_adapter
    try:
        yield
    finally:
        ModulesToSaveWrapper.delete_adapter = original


@contextlib.contextmanager
def _conflicts_are_real():
    """Difference: a second adapter with biases is refused if there is a first one with biases, not if there is any
    other; AdaLora is refused beside a trainable adapter if it is trainable itself."""
    check, init = LoraModel._check_new_adapter_config, AdaLoraModel.__init__

    def check_biases(tuner, config):
        if sum(getattr(other, "bias", "none") != "none" for other in tuner.peft_config.values()) > 1:
            check(tuner, config)

    def init_frozen(tuner, model, config, adapter_name, **options):
        if config.inference_mode:
            LoraModel.__init__(tuner, model, config, adapter_name, **options)
            _freeze_adapter(tuner.model, adapter_name)
        else:
            init(tuner, model, config, adapter_name, **options)

    def check_trainable(tuner, config):
        if config.inference_mode:
            LoraModel._check_new_adapter_config(tuner, config)
        else:
            check_both(tuner, config)

    check_both = AdaLoraModel._check_new_adapter_config
    LoraModel._check_new_adapter_config = check_biases
    AdaLoraModel._check_new_adapter_config = check_trainable
    AdaLoraModel.__init__ = init_frozen
    try:
        yield
    finally:
        LoraModel._check_new_adapter_config = check
        AdaLoraModel._check_new_adapter_config = check_both
        AdaLoraModel.__init__ = init


@contextlib.contextmanager
def _gathered():
    """A list of the warnings of Transformers' logger of adapters, which are not passed on."""
    logger, texts = logging.getLogger("transformers.integrations.peft"), []

    def gather(record):
        texts.append(record.getMessage())
        return False

    logger.addFilter(gather)
    try:
        yield texts
    finally:
        logger.removeFilter(gather)


def _norm_of_base(module, base, weight, *args, **options):
    return type(module).get_weight_norm(module, base.to(weight.dtype), *args, **options)


def plain_key(key: str) -> str:
    """Difference: a state dict has the names of the module without adapters, however many methods wrap it."""
    for part in (".lora_", ".ia3_", ".base_layer."):
        while f".base_layer{part}" in key:
            key = key.replace(f".base_layer{part}", part)
    return key


class Reference:
    """A model with Transformers' mixin.

    Attributes:
        model: the model.
        active: names of the active adapters. Difference: one list for the model, not one per layer.
        enabled: whether adapters apply. Difference: the model's state, not each layer's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: list[str] = []
        self.enabled = True
        self.residuals: dict[str, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self.biases: dict[str, list[tuple[nn.Parameter, torch.Tensor]]] = {}
        self.biases_in: set[str] = set()
        self.awake: set[str] = set()  # adapters in train mode, whatever the model's: loaded to be trained
        self.optimiser = None

    # ------------------------------------------------------------ looking

    def names(self) -> list[str]:
        return list(self.model.peft_config) if self.model._hf_peft_config_loaded else []

    def of_type(self, *types: type) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, types)]

    def heads(self, name: str) -> set[int]:
        """The modules that adapter `name` replaces."""
        return {id(wrapper) for wrapper in self.of_type(ModulesToSaveWrapper) if name in wrapper.modules_to_save}

    def own(self, name: str) -> dict[str, nn.Parameter]:
        """Path → parameter of adapter `name`, without modules_to_save."""
        return {
            path: parameter
            for path, parameter in self.model.named_parameters()
            if name in path.split(".") and "modules_to_save" not in path.split(".")
        }

    def trains(self, name: str) -> bool:
        return any(parameter.requires_grad for parameter in self.own(name).values())

    def adapted(self, name: str) -> list[nn.Module]:
        return [
            module
            for module in self.of_type(BaseTunerLayer)
            if any(name in getattr(module, field) for field in module.adapter_layer_names)
        ]

    def active_adapters(self) -> list[str]:
        raw = self.model.active_adapters()  # raises when nothing is loaded
        families = {FAMILY[method_of(config)] for config in self.model.peft_config.values()}
        if len(families) == 1 and self.of_type(BaseTunerLayer):
            assert list(raw) == self.active, (raw, self.active)
        return list(self.active)

    # ---------------------------------------------------------- undoing

    def snapshot(self):
        """A function that puts back everything a call may change. Difference: a refused call changes nothing."""
        modules = [
            (module, {key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
                      for key, value in module.__dict__.items()})
            for module in self.model.modules()
        ]  # fmt: skip
        parameters = [(p, p.data, p.data.clone(), p.requires_grad) for p in self.model.parameters()]
        mine = {key: copy.copy(value) for key, value in vars(self).items() if key not in ("model", "optimiser")}

        def restore() -> None:
            for module, values in modules:
                module.__dict__.clear()
                module.__dict__.update(values)
            for parameter, data, values, flag in parameters:
                parameter.data = data
                data.copy_(values)
                parameter.requires_grad_(flag)
            vars(self).update(mine)

        return restore

    # ---------------------------------------------------------- the calls

    def add(self, config, name) -> None:
        before = self._begin()
        with _heads_follow(), _conflicts_are_real():
            self.model.add_adapter(config, name)
        name = name or "default"
        self.active = [name]
        self._adopt(name, config, before)

    def load(self, folder, name, **options) -> None:
        """Difference: low_cpu_mem_usage changes nothing but memory."""
        options.pop("low_cpu_mem_usage", None)
        before = self._begin()
        places = [(module, field, p) for module in self.model.modules() for field, p in module._parameters.items()]
        trainable = {}
        if isinstance(self.model, PreTrainedModel) and V5 and options.get("peft_config") is not None:
            trainable = {"is_trainable": not options["peft_config"].inference_mode}
        with _heads_follow(), _conflicts_are_real(), _gathered() as texts:
            info = self.model.load_adapter(folder, name, **trainable, **options)
        for module, field, parameter in places:
            if parameter is not None and module._parameters[field] is not parameter:
                # Difference: Transformers 5 puts a new parameter in the place of a base parameter that is in the file. It
                # is not tied any more, and is trained with an adapter that is loaded to be trained.
                parameter.data = module._parameters[field].data
                module._parameters[field] = parameter
        name = "default" if name is None else name
        if info is None:
            self._log_missing(name, options.get("adapter_state_dict"), "".join(texts))
        else:
            lost = sorted(key for key in info.missing_keys if f".modules_to_save.{name}." in key)
            if lost:  # difference: Transformers 5 goes on with a copy of the base's head
                raise KeyError(lost[0].replace(f".modules_to_save.{name}", ""))
            self._load_magnitudes(name, folder, options.get("adapter_state_dict"), info)
            self._log_report(name, folder, info)
        config = self.model.peft_config[name]
        family, heads = FAMILY[method_of(config)], self.heads(name)
        # Difference: a head and its adapter are active together, so the other family's adapter with that head goes.
        kept = [
            other
            for other in self.active
            if FAMILY[method_of(self.model.peft_config[other])] != family and not heads & self.heads(other)
        ]
        self.active = [*kept, name]
        if config.inference_mode:
            self.awake.clear()  # the whole model is in eval mode now
        else:
            self.awake.add(name)
        self._adopt(name, config, before)

    def _log_missing(self, name, state, text) -> None:
        """Difference: what a state dict lacks of an IA3 or LoHa adapter is logged, too."""
        if state is not None and method_of(self.model.peft_config[name]) in ("IA3", "LOHA"):
            given = {key.removeprefix(PREFIX) for key in state}
            missing = [path for path in self.own(name) if path.removesuffix(f".{name}") not in given]
            if missing and "missing keys" not in text:
                text += "Loading adapter weights from state_dict led to missing keys in the model: " + ", ".join(
                    missing
                )
        if text:
            logging.getLogger("transformers.integrations.peft").warning(text)

    def _load_magnitudes(self, name, folder, state, info) -> None:
        """Difference: Transformers 5 does not find the magnitudes of DoRA on embeddings."""
        lost = [key for key in info.unexpected_keys if f"{key}.weight" in info.missing_keys]
        if lost:
            state = load_file(f"{folder}/adapter_model.safetensors") if state is None else state
            state = {key.removeprefix(PREFIX): value for key, value in state.items()}
            parameters = dict(self.model.named_parameters())
        for key in lost:
            parameters[f"{key}.weight"].data.copy_(state[key.removesuffix(f".{name}")])
            info.missing_keys = set(info.missing_keys) - {f"{key}.weight"}
            info.unexpected_keys = set(info.unexpected_keys) - {key}

    def _log_report(self, name, folder, info) -> None:
        """Difference: of Transformers 5's report, without the tensors of other adapters."""
        mine = [key for key in info.missing_keys if name in key.split(".")]
        info.missing_keys = {key for key in mine if "ranknum" not in key}  # and without counts, which no file has
        log_state_dict_report(self.model, folder, True, info, logging.getLogger("transformers.integrations.peft"))

    def set(self, names) -> None:
        """Difference: a repeated name counts once, the caller's list is not kept."""
        if isinstance(names, list):
            names = list(dict.fromkeys(names))
        self._begin()
        with _heads_follow():
            self.model.set_adapter(names)
        self.active = [names] if isinstance(names, str) else names
        self.settle()

    def disable(self) -> None:
        self.model.disable_adapters()
        self.enabled = False
        self.settle()

    def enable(self) -> None:
        self.model.enable_adapters()
        self.enabled = True
        self.settle()

    def delete(self, names) -> None:
        self._begin()
        self._follow_magnitudes()
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with _heads_go():
            self.model.delete_adapter(names)
        for parameter, flag in flags:  # difference: the flags of what stays active stay
            parameter.requires_grad = flag
        gone = [names] if isinstance(names, str) else list(names)
        for layer in self.of_type(BaseTunerLayer):  # difference: a name that is used again is not DoRA again
            for field in ("use_dora", "lora_variant", "lora_bias", "lora_magnitude_vector"):
                for name in gone:
                    if name in getattr(layer, field, {}):
                        del getattr(layer, field)[name]
        self._delete_heads(gone)
        for name in gone:
            self.residuals.pop(name, None)
            for parameter, other in self.biases.pop(name, []):
                if name in self.biases_in:
                    parameter.data = other.to(parameter.dtype)
                parameter.requires_grad = False
            self.biases_in.discard(name)
        had, left = self.active, [name for name in self.active if name not in gone]
        self.active = left
        if not self.names():
            self.enabled, self.active = True, []
        elif had and not left:  # difference: one heir for the model, not one per layer
            self.active = [min(self.names())]
            with _heads_follow():
                self._begin()
                self.model.set_adapter(self.active)
        self._unwrap()
        self.settle()

    def state_dict(self, name, given=None) -> dict[str, torch.Tensor]:
        state = {plain_key(key): value for key, value in self.model.get_adapter_state_dict(name, given).items()}
        name = self.active[0] if name is None else name
        others = set(self.names()) - {name}
        # Difference: an adapter's state dict has its own tensors only (IA3; bias="all" with lora_bias).
        state = {key: value for key, value in state.items() if others.isdisjoint(key.split("."))}
        # Difference: bias="all" does not save a head's bias under names that nothing loads.
        state = {
            key: value
            for key, value in state.items()
            if not {"original_module", "modules_to_save"} & set(key.split("."))
        }
        paths = {id(parameter): path for path, parameter in self.model.named_parameters()}
        # Difference: a bias of a layer that has two names is saved under the first, as its adapters are.
        every = {plain_key(path) for path, _ in self.model.named_parameters(remove_duplicate=False)}
        second = every - {plain_key(path) for path in paths.values()}
        state = {key: value for key, value in state.items() if key not in second}
        # Difference: base weights of embeddings come with an adapter that adapts them, not with any that could.
        adapted = self.adapted(name)
        mine = {
            plain_key(f"{path}.base_layer.weight") for path, module in self.model.named_modules() if module in adapted
        }
        state = {key: value for key, value in state.items() if not key.endswith("base_layer.weight") or key in mine}

        if getattr(self.model.peft_config[name], "bias", "none") == "lora_only":
            # Difference: PEFT 0.21 saves the biases of all layers with LoRA, whichever adapters those have.
            layers = [(path, module) for path, module in self.model.named_modules() if isinstance(module, LoraLayer)]
            foreign = {plain_key(f"{path}.base_layer.bias") for path, module in layers if module not in adapted}
            foreign |= {key.replace(".base_layer.", ".") for key in foreign}
            state = {key: value for key, value in state.items() if key not in foreign}

        def own_key(key):
            """Difference: `base_layer` is where this adapter wraps a layer, not where any other does."""
            layer, wrapped, field = key.rpartition(".base_layer.")
            return key if not wrapped or f"{layer}.base_layer.weight" in mine else f"{layer}.{field}"

        state = {own_key(key): value for key, value in state.items()}
        bias = getattr(self.model.peft_config[name], "bias", "none")
        for parameter, other in self.biases.get(name, []):
            # Difference: bias="lora_only" is saved, a head's bias too if another adapter replaces the head, and biases
            # belong to the adapter while it is inactive, too.
            path = own_key(plain_key(paths[id(parameter)]).replace(".original_module.", "."))
            if bias == "lora_only" or path in state or ".original_module." in paths[id(parameter)]:
                state[path] = parameter.detach() if name in self.biases_in else other
        return state

    def save(self, folder, name) -> None:
        """What `save_pretrained` of PEFT or Transformers writes; name None is the latter's choice, the active one."""
        folder.mkdir(parents=True, exist_ok=True)
        if name is None and hasattr(self.model, "save_pretrained"):
            name = self.active_adapters()[0]
            try:
                self.model.save_pretrained(folder)
            except RuntimeError as error:
                # Difference: with bias="all" a head's bias is saved once. Under two names Transformers sees shared tensors,
                # and may refuse.
                if "shared tensors" not in str(error) or getattr(self.model.peft_config[name], "bias", "") != "all":
                    raise
        else:
            config = self.model.peft_config[name]
            mode, config.inference_mode = config.inference_mode, True
            config.save_pretrained(folder)
            config.inference_mode = mode
        state = {PREFIX + key: value.contiguous() for key, value in self.state_dict(name).items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @contextlib.contextmanager
    def running(self):
        """Difference: what pissa and olora take out of the base weights is out only while they are active.

        And DoRA beside them takes the norm of the base weights, from which nothing is out.
        """
        changed = {}
        norms = []
        if self.enabled:
            for name in self.active:
                for parameter, delta in self.residuals.get(name, []):
                    changed.setdefault(parameter, parameter.data)
                    parameter.data = parameter.data - delta
        for layer in self.of_type(LoraLayer) if changed else ():
            base = changed.get(layer.get_base_layer().weight)
            for module in layer.lora_magnitude_vector.values() if base is not None else ():
                norms.append(module)
                module.get_weight_norm = functools.partial(_norm_of_base, module, base)
        try:
            yield
        finally:
            for module in norms:
                del module.get_weight_norm
            for parameter, data in changed.items():
                parameter.data = data

    def copied(self, copier) -> Reference:
        self.optimiser = None
        return copier(self)

    def patched(self):
        return contextlib.nullcontext()

    # ------------------------------------------------- between the calls

    def _begin(self):
        """Values before a call. Heads get a state from which PEFT can switch them."""
        for wrapper in self.of_type(ModulesToSaveWrapper):
            wrapper._active_adapter = next(iter(wrapper.modules_to_save))
        return {parameter: parameter.data.clone() for parameter in self.model.parameters()}

    def _adopt(self, name, config, before) -> None:
        """A new adapter is in: what belongs to it, and not to the model, is taken note of."""
        if str(getattr(config, "init_lora_weights", "")).startswith(("pissa", "olora")):
            # Difference: the base weights stay as they were; what was taken out of them is the adapter's.
            self.residuals[name] = []
            for parameter, data in before.items():
                if not torch.equal(parameter.data, data):
                    self.residuals[name].append((parameter, data - parameter.data))
                    parameter.data = data
        bias = getattr(config, "bias", "none")
        if bias != "none":
            mine = {
                id(getattr(layer.get_base_layer(), "bias", None))
                for layer in self.adapted(name)
                if isinstance(layer, LoraLayer)
            }
            replaced = {  # the bias of a head that another adapter replaces is the base's for this one
                id(parameter)
                for wrapper in self.of_type(ModulesToSaveWrapper)
                if name in wrapper.modules_to_save
                for parameter in wrapper.original_module.parameters()
            }
            self.biases[name] = [
                (parameter, before[parameter])
                for path, parameter in self.model.named_parameters()
                if (id(parameter) in mine if bias == "lora_only" else self._is_base_bias(path))
                and id(parameter) not in replaced
            ]
            self.biases_in.add(name)
            mine = {id(parameter) for parameter, _ in self.biases[name]}
            for path, parameter in self.model.named_parameters():
                # Difference: it trains its own biases, and none of the layers and adapters that came before.
                if path.endswith("bias") and id(parameter) not in mine and name not in path.split("."):
                    parameter.requires_grad = False
        # Difference: fan_in_fan_out is that of the last layer for every adapter, not for the first on a layer only.
        for layer in self.adapted(name):
            base = layer.get_base_layer()
            if isinstance(base, (nn.Linear, Conv1D)):
                config.fan_in_fan_out = isinstance(base, Conv1D)
        self.settle()

    @staticmethod
    def _is_base_bias(path: str) -> bool:
        parts = path.split(".")
        return (
            "bias" in parts[-1]
            and not any(part.startswith(("lora_", "ia3_")) for part in parts)
            and "modules_to_save" not in parts
        )

    def _follow_magnitudes(self) -> None:
        """Difference: DoRA's magnitude on convolutions and embeddings obeys set, disable and delete."""
        for layer in self.of_type(LoraLayer):
            for name, module in layer.lora_magnitude_vector.items():
                factors = layer.lora_A[name].weight if name in layer.lora_A else layer.lora_embedding_A[name]
                module.requires_grad_(factors.requires_grad)

    def _delete_heads(self, names) -> None:
        """Difference: deleting an adapter deletes its heads."""
        for parent in list(self.model.modules()):
            for child, wrapper in list(parent.named_children()):
                if isinstance(wrapper, ModulesToSaveWrapper):
                    for name in names:
                        wrapper._adapters.discard(name)
                        if name in wrapper.modules_to_save:
                            del wrapper.modules_to_save[name]
                    if not wrapper.modules_to_save:
                        setattr(parent, child, wrapper.original_module)

    def _unwrap(self) -> None:
        """Difference: a layer whose last adapter of a method has gone is without that method's wrapper again."""
        for parent in list(self.model.modules()):
            for child, module in list(parent.named_children()):
                inner = module
                while isinstance(inner, BaseTunerLayer) and not any(
                    getattr(inner, field) for field in inner.adapter_layer_names
                ):
                    inner = inner.base_layer
                if inner is not module:
                    setattr(parent, child, inner)

    def settle(self) -> None:
        """Bring layers, flags and modes to what the model's state says."""
        for layer in self.of_type(BaseTunerLayer):
            layer._active_adapter = list(self.active)
            layer._disable_adapters = not self.enabled  # difference: what is added while disabled stays so
        self._follow_magnitudes()
        freeze_counts(self.model)  # difference, to PEFT 0.21
        # Under Transformers 5 a load to be trained leaves the adapter before trainable.
        training = {name: (V5 or name in self.active) and self.trains(name) for name in self.names()}
        for wrapper in self.of_type(ModulesToSaveWrapper):
            # Difference: a head is active, disabled, trained and frozen with its adapter.
            active = [name for name in self.active if name in wrapper.modules_to_save]
            wrapper._active_adapter = active or ["-"]  # a name that it does not have: the original module
            wrapper._disable_adapters = not self.enabled
            wrapper.original_module.requires_grad_(False)
            for name, module in wrapper.modules_to_save.items():
                module.requires_grad_(training[name])
        for name, entries in self.biases.items():
            # Difference: the biases of an adapter apply, and are trained, while it is active and enabled.
            apply = self.enabled and name in self.active
            if apply != (name in self.biases_in):
                self.biases[name] = [(parameter, parameter.data) for parameter, _ in entries]
                for parameter, other in entries:
                    parameter.data = other.to(parameter.dtype)
                self.biases_in ^= {name}
            for parameter, _ in entries:
                parameter.requires_grad = training[name]
        # Difference: new layers follow the model's mode, unless they were loaded to be trained.
        self.awake &= set(self.names())
        self.model.train(self.model.training)
        for layer in self.of_type(BaseTunerLayer):
            for field in (*layer.adapter_layer_names, *layer.other_param_names, "lora_magnitude_vector"):
                container = getattr(layer, field, None)
                for name in self.awake if isinstance(container, nn.ModuleDict) else ():
                    if name in container:
                        container[name].train()
