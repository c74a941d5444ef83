"""What is settled about a config before an adapter is made: defaults that depend on the model, and conflicts with the
adapters that are there already.  Nothing here changes the model or the config; the mixin does so when all has worked.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ._targets import FEEDFORWARD, TARGETS
from .hosts import Host

#: A list of at least so many targets is replaced by the fewest suffixes that say the same (PEFT does, and saves those).
MANY_TARGETS = 20

#: Heads that "all-linear" leaves out when task_type is SEQ_CLS and the model has no output embedding.
CLASSIFIER_NAMES = ("score", "classifier")

#: Methods that share PEFT's layer classes, and names of tensors that do not begin with the method's.
_FAMILY = {"ADALORA": "LORA", "LOHA": "LYCORIS", "LOKR": "LYCORIS"}
_KEY_PREFIX = {"ADALORA": "lora_", "LOHA": "hada_", "VERA": "vera_lambda_"}


def family(method: str) -> str:
    """Loading an adapter replaces the active ones of its own family only."""
    return _FAMILY.get(method, method)


def key_prefix(method: str) -> str:
    """How the last part of a tensor's name begins that belongs to an adapter of the method."""
    return _KEY_PREFIX.get(method, f"{method.lower()}_")


def method_of(config: Any) -> str:
    """The config's peft_type as plain text: "LORA", "IA3", "ADALORA"."""
    value = getattr(config.peft_type, "value", config.peft_type)
    return str(value)


def draws(config: Any) -> bool:
    """Are there random numbers in a fresh adapter? IA3's vectors begin as ones."""
    return method_of(config) != "IA3" or not getattr(config, "init_ia3_weights", True)


def check_name(name: Any) -> str:
    """The adapter name to use: "default" for None and "".

    Raises:
        TypeError: not a str.
        ValueError: a name that cannot be part of a parameter's name.
    """
    if name is None or name == "":
        return "default"
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a str, got {name!r}")
    if "." in name:
        raise ValueError(
            f"adapter name {name!r} contains a dot: the name becomes one part of the parameters' dotted names "
            f"(lora_A.{name}.weight), so a dot would split it. Use for example {name.replace('.', '_')!r}"
        )
    if "\0" in name:
        raise ValueError(f"adapter name {name!r} contains a NUL character")
    return name


def check_against(config: Any, others: Mapping[str, Any]) -> None:
    """Refuse a config that cannot live beside the adapters that are there, as PEFT does.

    Raises:
        ValueError: a second adapter with bias other than "none", or a second trainable one when this is an AdaLora.
    """
    method = method_of(config)
    if getattr(config, "bias", "none") != "none":
        biased = [name for name, other in others.items() if getattr(other, "bias", "none") != "none"]
        if biased:
            raise ValueError(
                f"a model takes one adapter with bias other than 'none', and adapter {biased[0]} has "
                f"bias={others[biased[0]].bias!r} already; set bias='none' or delete that adapter first"
            )
    if method == "ADALORA" and not config.inference_mode:
        trainable = [name for name, other in others.items() if not other.inference_mode]
        if trainable:
            raise ValueError(
                f"AdaLora allows one trainable adapter on a model, and adapter {trainable[0]} is trainable already; set "
                "inference_mode=True in all configs but the one to train"
            )


def settle_targets(config: Any, model: Any, host: Host, modules: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of `config` that depend on the model, with the values they get: target_modules, feedforward_modules.

    Args:
        modules: the model's modules with their dotted names, some perhaps under several.

    Raises:
        ValueError: target_modules (or IA3's feedforward_modules) is None and there is no default for this model.
    """
    method = method_of(config)
    settled: dict[str, Any] = {}
    targets = getattr(config, "target_modules", None)
    if targets is None and method in TARGETS and not getattr(config, "target_parameters", None):
        targets = _default(TARGETS[method], "target_modules", model, host)
        settled["target_modules"] = targets if method == "ADALORA" else set(targets)
    if method == "IA3" and getattr(config, "feedforward_modules", None) is None:
        settled["feedforward_modules"] = set(_default(FEEDFORWARD, "feedforward_modules", model, host))
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = settled["target_modules"] = _all_linear(config, model, host, modules)
    if isinstance(targets, (list, set, tuple)) and len(targets) >= MANY_TARGETS and method != "IA3":
        fewer = fewest_suffixes(targets, [name for name, _ in _each_once(modules)])
        if len(fewer) < len(targets):
            settled["target_modules"] = fewer
    return settled


def _default(table: Mapping[str, list[str]], field: str, model: Any, host: Host) -> list[str]:
    model_type: Any = host.model_config(model).get("model_type")
    if model_type not in table:
        raise ValueError(
            f"Please specify `{field}` in `peft_config`: there is no default for a model of type {model_type!r}"
        )
    return list(table[model_type])


def _all_linear(config: Any, model: Any, host: Host, modules: list[tuple[str, Any]]) -> set[str]:
    names = {name for name, module in _each_once(modules) if host.is_linear(module)}
    head = host.output_embedding(model, modules)
    if head is None and str(getattr(config.task_type, "value", config.task_type)) == "SEQ_CLS":
        head = next((name for name in CLASSIFIER_NAMES if getattr(model, name, None) is not None), None)
    names.discard(head or "")
    return names


def _each_once(modules: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Each module under its first name."""
    return list({id(module): (path, module) for path, module in reversed(modules)}.values())[::-1]


def _suffixes(name: str) -> list[str]:
    """ "a.b.c" → ["c", "b.c", "a.b.c"]"""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def fewest_suffixes(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """The shortest list of name endings that selects the same of `names` as `targets` does.

    Greedy in a fixed order, so that the same list comes out as in PEFT: targets by their last parts, and for each that
    is not covered yet its shortest suffix that no other module has.
    """
    wanted = set(targets)
    if "" in wanted:
        raise ValueError("target_modules has an empty string, which would name the model itself")
    taken = {
        suffix
        for name in names
        if not any(suffix in wanted for suffix in _suffixes(name))
        for suffix in _suffixes(name)
    }
    chosen: set[str] = set()
    for suffixes in sorted(_suffixes(target) for target in wanted):
        for suffix in suffixes:
            covered = any(inner in chosen for inner in suffixes[:-1])
            if suffix not in chosen and suffix not in taken and not covered:
                chosen.add(suffix)
                break
    return chosen or wanted


def settle_orientation(config: Any, kinds: Mapping[str, str]) -> bool:
    """fan_in_fan_out after all adapted layers (name → kind) had their say, with a warning when it changes.

    torch's Linear stores (out, in) and GPT-2's Conv1D (in, out); the layer's class decides, and the flag follows.
    """
    flag = bool(getattr(config, "fan_in_fan_out", False))
    for name, kind in kinds.items():
        if kind == "Linear" and flag:
            warnings.warn(
                f"fan_in_fan_out=True, but {name} is a Linear, which stores (out, in): the config gets False",
                stacklevel=5,
            )
            flag = False
        elif kind == "Conv1D" and not flag:
            warnings.warn(
                f"fan_in_fan_out=False, but {name} is a Conv1D, which stores (in, out): the config gets True",
                stacklevel=5,
            )
            flag = True
    return flag


#: Fields that decide what an adapter's tensors are or mean.
DECIDING_FIELDS = (
    "peft_type",
    "r",
    "init_r",
    "rank_pattern",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "lora_bias",
    "use_dora",
    "fan_in_fan_out",
    "init_lora_weights",
)


def _comparable(field: str, value: Any) -> Any:
    """A field's value such that two spellings of the same are equal: order of names, an empty list and None."""
    if field == "init_lora_weights":  # only these say something about a trained adapter: what is taken out of the base
        return value if isinstance(value, str) and value.startswith(("pissa", "olora")) else None
    if field == "layers_to_transform":
        return [value] if isinstance(value, int) else value
    if isinstance(value, list):
        return sorted(set(value), key=str) or None
    return value or None


def check_unchanged(name: str, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to save adapter `name` under a config that describes another one.

    Args:
        made: the fields that the adapter was made from, as JSON has them.
        now: those of its config today.

    Raises:
        ValueError: a field that decides about the tensors differs; the text has both values.
    """
    for field in DECIDING_FIELDS:
        if field == "r" and now.get("peft_type") == "ADALORA":  # inherited and without effect
            continue
        before, after = made.get(field), now.get(field)
        if _comparable(field, before) != _comparable(field, after):
            raise ValueError(
                f"peft_config[{name!r}].{field} is {after!r}, but the adapter was made with {before!r}, and a folder with "
                "that config would not load as this adapter. Set the field back before saving, or add an adapter with the "
                "other value"
            )


def name_in_model(key: str, adapter: str, prefix: str) -> str:
    """A state-dict key as it would be called in the model: "a.lora_A.weight" → "a.lora_A.NAME.weight".

    A key without the method's prefix ("lora_", "ia3_") comes back as it is.
    """
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.startswith(prefix):
            return ".".join([*parts[: i + 1], adapter, *parts[i + 1 :]])
    return key


def name_in_file(name: str, adapter: str, prefix: str) -> str:
    """The way back: "a.lora_A.NAME.weight" → "a.lora_A.weight"."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.startswith(prefix) and parts[i + 1] == adapter:
            return ".".join([*parts[: i + 1], *parts[i + 2 :]])
    return name
