"""Adapter configs: the classes, fields, defaults and files of PEFT 0.17.1.

A config is a plain mutable object.  Making one checks what PEFT checks; whether it can work is checked when it comes
from a file (`from_pretrained`) and when an adapter is made of it, by the C core, which names field and value.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal

from . import _core

CONFIG_NAME = "adapter_config.json"

# Arguments of `from_pretrained` that say where the file is; the others may be fields.
_PLACE = frozenset(
    ("cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "local_files_only", "proxies", "revision")
    + ("subfolder", "token")
)
# Arguments of a download that PEFT passes on and that have no use here, or no effect any more.
_WITHOUT_USE = frozenset(
    ("library_name", "library_version", "local_dir", "local_dir_use_symlinks", "repo_type", "resume_download")
    + ("user_agent", "repo_id", "filename")
)


class PeftType(str, Enum):
    """The methods that PEFT 0.17.1 knows. peftc has code for LORA, IA3 and ADALORA."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FOURIERFT = "FOURIERFT"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    CPT = "CPT"
    BONE = "BONE"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    SHIRA = "SHIRA"
    C3A = "C3A"


#: Fields that PEFT has got since 0.17.1, whose fields the classes below have, up to 0.21.2.
_LATER_FIELDS = frozenset(
    ("peft_version", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "lora_ga_config",
     "velora_config", "monteclora_config", "ensure_weight_tying")
)  # fmt: skip


class TaskType(str, Enum):
    """What the model is for. Only SEQ_CLS matters to adapters: "all-linear" then leaves the classifier alone."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_TASK_TYPES = tuple(task.value for task in TaskType)
# Methods that add tokens or layers around the model, so that there is nothing to inject.
_PROMPT_METHODS = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
)


class _Fields:
    """What a dataclass would generate anew for each class, once: it is a third of the import time."""

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        # Here and below: subclasses are dataclasses, this class is none.
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__qualname__}({values})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in fields(self))  # type: ignore[arg-type]


@dataclass(repr=False, eq=False)
class PeftConfig(_Fields):
    """What all configs have in common.

    Args:
        task_type: a `TaskType` or its name, or None.
        peft_type: the method, a `PeftType` or its name. The classes below set it.
        auto_mapping: how to find the base model's class again; kept for PEFT, not used.
        base_model_name_or_path: the model that the adapter is for; kept, not checked.
        revision: revision of that base model; kept, not used.
        inference_mode: whether a load with this config gives a frozen adapter.

    Raises:
        ValueError: task_type is not a `TaskType`.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(_TASK_TYPES)}."
            )

    # -------------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Field names → values, copied deeply."""
        return asdict(self)

    def to_json_string(self) -> str:
        """The text of adapter_config.json: sorted keys, indent 2, sets as lists in the order Python iterates them.

        That order is PEFT's, too: it differs from one Python process to the next (string hashes do) and is the same
        for the same set within a process.

        Raises:
            TypeError: a value that JSON cannot hold.
        """
        return to_file_text(self.to_dict())

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into a folder, which is made if need be. The same bytes as PEFT's; atomic.

        Args:
            save_directory: the folder.
            **kwargs: `auto_mapping_dict` replaces auto_mapping in the file; others are ignored, as PEFT does.

        Raises:
            AssertionError: save_directory is a file (PEFT's type for this).
            OSError: the file cannot be written; an older one is left as it was.
            TypeError: a value that JSON cannot hold.
        """
        if os.path.isfile(save_directory):
            raise AssertionError(f"Provided path ({save_directory}) should be a directory, not a file")
        values = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        text = to_file_text(values)
        os.makedirs(save_directory, exist_ok=True)
        _core.config_write(os.path.join(save_directory, CONFIG_NAME), text)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> PeftConfig:
        """Read adapter_config.json of a local folder or of a repository on the Hub.

        The class of the result follows the file's peft_type.

        Args:
            pretrained_model_name_or_path: folder, or id of a repository ("user/name").
            subfolder: folder inside of it.
            **kwargs: revision, token, cache_dir, local_files_only, force_download, proxies, … say where and how to
                look; names of fields of the class give values for fields that the file lacks; others are ignored.

        Raises:
            ValueError: no such file, not JSON, or values that cannot work; the text names file, field and value.
            TypeError: the file has the fields of some method but no peft_type.
            KeyError: peft_type is not a method.
            NotImplementedError: a method or option of PEFT that peftc has no code for.

        Warns:
            UserWarning: fields that this version does not know; they are ignored.
        """
        place = {key: kwargs[key] for key in kwargs if key in _PLACE}
        own = {f.name for f in fields(cls)} - _PLACE - _WITHOUT_USE
        defaults = {key: kwargs[key] for key in kwargs if key in own}
        path = _find(pretrained_model_name_or_path, subfolder, place)
        text = _core.config_read(path)
        values = cls._parse(text, path)
        if "peft_type" in values or cls not in _CLASSES.values():
            _core.config_check(text, label=path)
        config = cls.from_peft_type(**cls.check_kwargs(**{**defaults, **values}))
        if "peft_type" not in values:  # the class said it: check what came out of it
            _core.config_check(as_peftc_json(config), label=path)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields in a JSON file, as a dict.

        Raises:
            OSError: it cannot be read.
            ValueError: it does not hold a JSON object; the text says where.
        """
        return cls._parse(_core.config_read(path_json_file), os.fspath(path_json_file))

    @staticmethod
    def _parse(text: bytes, path: str) -> dict[str, Any]:
        values = _core.json_loads(text, label=path)
        if not isinstance(values, dict):
            # the content of a file is a value, whatever type it parses to
            raise ValueError(f"{path} must hold a JSON object with the fields of a config, got {values!r:.80}")
        if "runtime_config" in values:
            warnings.warn(f"{path} has a `runtime_config` key. This is ignored: it is valid at runtime only.")
            del values["runtime_config"]
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A config from its fields; of the class that `peft_type` names, or of this class without it.

        Raises:
            KeyError: peft_type is not a method.
            ValueError: it is a prompt method, or a value is wrong.
            NotImplementedError: it is a method that peftc has no code for.
            TypeError: fields that this class does not have, and no peft_type.

        Warns:
            UserWarning: fields that the class does not know; they are ignored.
        """
        target = _class_of(kwargs["peft_type"]) if "peft_type" in kwargs else cls
        known = {f.name for f in fields(target)}
        # Unset, a later field changes nothing; set, it was refused by name when the text was checked.
        kwargs = {key: value for key, value in kwargs.items() if key in known or key not in _LATER_FIELDS or value}
        kwargs.pop("peft_version", None)
        unexpected = sorted(set(kwargs) - known)
        if not unexpected:
            return target(**kwargs)
        if "peft_type" not in kwargs:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        warnings.warn(
            f"Unexpected keyword arguments {unexpected} for class {target.__name__}, these are ignored. The config was "
            "probably saved by a newer version of PEFT than 0.17.1, whose fields peftc knows; what the adapter computes "
            "may depend on them."
        )
        return target(**{key: value for key, value in kwargs.items() if key in known})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """A hook for subclasses: the fields as `from_pretrained` uses them."""
        return kwargs

    @property
    def is_prompt_learning(self) -> bool:
        """False: such methods cannot be injected into a model's modules."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: likewise."""
        return False


@dataclass(repr=False, eq=False)
class LoraRuntimeConfig(_Fields):
    """Options of a run, never saved. Kept for PEFT; peftc has no use for them."""

    ephemeral_gpu_offload: bool = False


@dataclass(repr=False, eq=False)
class LoftQConfig(_Fields):
    """Options of the LoftQ initialisation, which peftc refuses. Kept so that a config made for PEFT can be made."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass(repr=False, eq=False)
class EvaConfig(_Fields):
    """Options of the EVA initialisation: kept in the file; peftc can load such an adapter but not initialise one."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ValueError("`rho` must be >= 1.0")
        if self.tau < 0.0 or self.tau > 1.0:
            raise ValueError("`tau` must be between 0.0 and 1.0.")


@dataclass(repr=False, eq=False)
class CordaConfig(_Fields):
    """Options of the CorDA initialisation, which peftc refuses. Kept so that a config made for PEFT can be made."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass(repr=False, eq=False)
class LoraConfig(PeftConfig):
    """LoRA: y += scaling · B A x, with A (r, in) and B (out, r).

    Args:
        r: rank, at least 1.
        target_modules: which modules to adapt. A list of names: a module whose dotted name is one of them or ends in
            "." + one of them. A string: a regular expression that must match the whole name, or "all-linear". None:
            what PEFT takes for the model's type. A list becomes a set.
        exclude_modules: which of these to leave out; a list or a regular expression.
        lora_alpha: scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: probability in [0, 1] of dropping an element of the adapter's input in training.
        fan_in_fan_out: the base weight is stored (in, out); set for Conv1D by itself.
        bias: which biases of the base model belong to the adapter: "none", "all" or "lora_only".
        use_rslora: see lora_alpha.
        modules_to_save: names of modules that the adapter replaces and saves whole, such as the classifier.
        init_lora_weights: True (B = 0), False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_[number]".
        layers_to_transform: index or indices of the layers to adapt; needs a list of targets.
        layers_pattern: name of the list of layers, such as "layers" or "h"; needs layers_to_transform.
        rank_pattern: regular expression → rank, for modules whose rank is not r. The first that matches counts.
        alpha_pattern: the same for lora_alpha.
        megatron_config, megatron_core, trainable_token_indices, layer_replication, target_parameters, use_qalora,
            qalora_group_size, loftq_config, eva_config, corda_config, runtime_config: as in PEFT; a value that would
            change the result is refused when the adapter is made.
        use_dora: learn the norm of each column of the weight apart from its direction.
        lora_bias: B has a bias.

    Raises:
        ValueError, TypeError: values that exclude each other, with PEFT's texts.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    use_dora: bool = False
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str):
            if self.layers_to_transform is not None:
                raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
            if self.layers_pattern is not None:
                raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        self._check_init()
        # PEFT keeps layer types of a user's own here; its LoraModel reads it.
        self._custom_modules: dict[Any, Any] | None = None

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if init == "loftq":
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = vars(self.loftq_config)
        elif self.loftq_config:
            self.loftq_config = {}
            warnings.warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        elif init == "eva" and self.eva_config is None:
            warnings.warn("`init_lora_weights` is 'eva' but `eva_config` is not specified. Using default EVA config.")
            self.eva_config = EvaConfig()
        elif init != "eva" and self.eva_config is not None:
            warnings.warn("`eva_config` specified but will be ignored when `init_lora_weights` is not 'eva'.")
        elif init == "corda" and self.corda_config is None:
            warnings.warn(
                "`init_lora_weights` is 'corda' but `corda_config` is not specified. Using default CorDA config."
            )
            self.corda_config = CordaConfig()
        elif init != "corda" and self.corda_config is not None:
            warnings.warn("`corda_config` specified but will be ignored when `init_lora_weights` is not 'corda'.")
        if self.lora_bias:
            if init not in (True, False):
                raise ValueError(
                    f"The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                    f"init_lora_weights={init} instead."
                )
            if self.use_dora:
                raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        changes_base = isinstance(init, str) and (init.startswith("pissa") or init in ("olora", "corda"))
        if changes_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and an initialization that changes the base "
                "weights (PiSSA/CorDA/OLoRA): the adapter cannot be converted back to the original base weights later."
            )

    def to_dict(self) -> dict[str, Any]:
        """Field names → values, copied deeply, without runtime_config."""
        values = super().to_dict()
        del values["runtime_config"]
        return values


@dataclass(repr=False, eq=False)
class AdaLoraConfig(LoraConfig):
    """AdaLora: y += scaling / (rank + 1e-5) · B (E ∘ A x), with learned ranks.

    Args:
        target_r: average rank at the end.
        init_r: rank at the start, and of the tensors.
        tinit, tfinal: steps at the start and at the end in which ranks do not change.
        deltaT: steps between two changes.
        beta1, beta2: how slowly the averages of sensitivity and its uncertainty move, in (0, 1).
        orth_reg_weight: weight of the term that keeps A and B orthogonal in training.
        total_step: steps of the training; must be given, more than tinit + tfinal.
        rank_pattern: learned: name of a lora_E tensor → which of its entries are kept.

    Raises:
        ValueError: as `LoraConfig`, or a schedule that leaves no step for changes.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADALORA
        if self.use_dora:
            raise ValueError(f"{self.peft_type} does not support DoRA.")
        if self.loftq_config:
            raise ValueError(f"{self.peft_type} does not support LOFTQ.")
        if self.r != 8:
            warnings.warn(
                "Note that `r` is not used in AdaLora and will be ignored."
                "If you intended to set the initial rank, use `init_r` instead."
            )
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or "
                "increase `total_step`."
            )


@dataclass(repr=False, eq=False)
class IA3Config(PeftConfig):
    """IA3: the output of a module, or the input of a feed-forward one, times a learned vector.

    Args:
        target_modules, exclude_modules, fan_in_fan_out, modules_to_save: as for `LoraConfig`.
        feedforward_modules: which of the targets scale their input; a list (a subset of a list of targets) or a
            regular expression.
        init_ia3_weights: start with ones, so that the adapter does nothing at first.

    Raises:
        ValueError: feedforward_modules is not a subset of target_modules.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self.feedforward_modules = _as_set(self.feedforward_modules)
        inputs, targets = self.feedforward_modules, self.target_modules
        if isinstance(inputs, set) and isinstance(targets, set) and not inputs <= targets:
            raise ValueError("`feedforward_modules` should be a subset of `target_modules`")


_CLASSES: dict[str, type[PeftConfig]] = {"LORA": LoraConfig, "IA3": IA3Config, "ADALORA": AdaLoraConfig}


def as_peftc_json(config: Any, settled: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Any config, ours or PEFT's own, as the JSON text that the C core reads.

    Args:
        config: an object with `peft_type` and `to_dict()`.
        settled: values that stand in for the config's own, of fields that it has.

    Raises:
        TypeError: it is no config, or a value is of a type that JSON cannot hold; the text names the field.
    """
    if not hasattr(config, "peft_type") or not callable(getattr(config, "to_dict", None)):
        raise TypeError(f"a config with peft_type and to_dict() is needed, got {type(config).__name__}")
    values = _values_of(config)
    values.update((field, value) for field, value in settled.items() if field in values)
    values.pop("runtime_config", None)
    for key, value in values.items():
        if isinstance(value, (set, frozenset)):
            values[key] = sorted(value) if all(isinstance(item, str) for item in value) else list(value)
    return _dump(values, indent=None)


# --------------------------------------------------------------------------- helpers

#: where to_dict is known to be a deep copy of all fields but runtime_config
_COPYING = ("peft.config", "peft.tuners.lora.config", __name__)


def _values_of(config: Any) -> dict[str, Any]:
    """What config.to_dict() gives, in a dict of one's own: where copying is all that it does, without copies of the values."""
    method = getattr(config.to_dict, "__func__", None)  # an instance may have its own
    if getattr(method, "__module__", None) in _COPYING and is_dataclass(config):
        return {field.name: getattr(config, field.name) for field in fields(config)}
    return dict(config.to_dict())


def _class_of(peft_type: Any) -> type[PeftConfig]:
    """The class for a method, or the exception that says why there is none."""
    name = getattr(peft_type, "value", peft_type)
    known = ", ".join(_CLASSES)
    if isinstance(name, str) and name in _CLASSES:
        return _CLASSES[name]
    if isinstance(name, str) and name in _PROMPT_METHODS:
        raise ValueError(
            f"{name} is a prompt or prefix method: it adds tokens or layers around a model and cannot be injected into "
            f"its modules. Methods that can are {known}"
        )
    if isinstance(name, str) and name in PeftType.__members__:
        raise NotImplementedError(f"peftc has no code for the method {name} of PEFT; it knows {known}")
    raise KeyError(f"peft_type is {name!r}, which is not a method; known are {known}")


def _as_set(value: list[str] | set[str] | str | None) -> set[str] | str | None:
    return set(value) if isinstance(value, list) else value


def to_file_text(values: dict[str, Any]) -> str:
    """A config's fields as adapter_config.json holds them: sorted keys, two spaces, sets as lists."""
    return _dump({key: list(value) if isinstance(value, set) else value for key, value in values.items()})


def _dump(values: dict[str, Any], indent: int | None = 2) -> str:
    import json

    try:
        return json.dumps(values, indent=indent, sort_keys=True, default=_plain)
    except (TypeError, ValueError, RecursionError):
        for key, value in values.items():  # which one was it?
            try:
                json.dumps(value, sort_keys=True, default=_plain)
            except (TypeError, ValueError, RecursionError) as error:
                raise TypeError(f"field {key} of the config cannot be written as JSON: {error}") from error
        raise


def _plain(value: Any) -> Any:
    """Python's own type for NumPy and torch scalars, a list for a set, a dict for a config inside a config."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a type of JSON")


def _find(location: Any, subfolder: str | None, place: dict[str, Any]) -> str:
    """Path of adapter_config.json, downloaded if it is not local."""
    folder = os.fspath(location)
    path = os.path.join(folder, subfolder, CONFIG_NAME) if subfolder else os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(path):
        return path
    from .hub import AdapterFiles

    try:
        return AdapterFiles(folder, subfolder=subfolder, **place).config()
    except (OSError, ValueError) as error:
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{folder}': {error}") from error
