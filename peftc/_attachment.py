"""What a model with adapters carries, and how an adapter is made on it: the steps that every API of peftc shares."""

import json
from _thread import RLock  # what threading.RLock() gives, without the module
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _prepare
from ._core import AdapterRegistry
from .config import as_peftc_json
from .hosts import host_of

#: fields of a config that choose modules beside target_modules
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")


class Attachment:
    """What a model with adapters carries besides `peft_config`: its registry, who knows how to walk it, and the configs
    that its adapters were made from, as JSON (those in `peft_config` are the caller's and may be edited)."""

    __slots__ = ("allocators", "host", "lock", "made_from", "registry")

    def __init__(self, model: object) -> None:
        self.host = host_of(model)
        self.registry: Any = self.host.new_registry()
        self.lock = RLock()
        self.made_from: dict[str, str] = {}
        #: AdaLora adapters in training: what is remembered of them between steps
        self.allocators: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__ if field != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for field, value in state.items():
            setattr(self, field, value)
        self.lock = RLock()


class MadeAdapter(NamedTuple):
    """An adapter that is listed but not active: its config, what that is to become, and which tensors did not fit."""

    config: Any
    settled: dict[str, Any]
    text: str
    missing: list[str]
    unexpected: list[str]


def make_adapter(
    attached: Attachment,
    model: Any,
    name: str,
    config: Any,
    others: Mapping[str, Any],
    label: str,
    source: Any,
    *,
    trainable: bool | None = None,
    targets: str | None = None,
) -> MadeAdapter:
    """Make adapter `name` on the model from `config`, fresh (source None) or filled from source.

    Args:
        others: name → config of the adapters that are there.
        trainable: the config's inference_mode decides if None.
        targets: a pattern that stands in for the config's choice of modules.

    The config is not changed; one of peftc's comes back as PEFT's if PEFT has to make the adapter. A refused adapter leaves
    no trace; the errors are those of `add_adapter` and `load_adapter`.
    """
    registry, host = attached.registry, attached.host
    _prepare.check_against(config, others)
    modules = host.named_modules(model)
    settled = _prepare.settle_targets(config, model, host, modules)
    registry.bind(modules, host.output_embedding(model, modules), host.input_embedding(model, modules))
    instead = {} if targets is None else {"target_modules": targets, **dict.fromkeys(_CHOOSING)}
    given, before = config, dict(settled)
    text = as_peftc_json(config, {**settled, **instead})
    missing: list[str] = []
    unexpected: list[str] = []
    if trainable is None:
        trainable = not config.inference_mode
    try:
        host.generation(model).check(model, config)
        if getattr(config, "_custom_modules", None):  # PEFT's _register_custom_module
            raise NotImplementedError("peftc has no code for layer classes that a config brings itself")
        if source is None:
            seed = host.new_seed() if _prepare.draws(config) else 0
            registry.add(name, text, label=label, seed=seed, trainable=trainable)
        else:
            missing, unexpected = registry.load(name, text, source, label=label, trainable=trainable)
    except (NotImplementedError, ValueError, KeyError) as refused:
        config, settled, missing, unexpected = host.make_elsewhere(
            registry, name, config, instead, source, refused, label=label, trainable=trainable
        )
    try:
        orientation = getattr(config, "fan_in_fan_out", None)
        if orientation is not None and (orientation or "Conv1D" in host.adapted_kinds(registry, modules, name)):
            found = dict(modules)
            kinds = {path: host.kind(found[path]) for path in registry.adapted_modules(name)}
            settled["fan_in_fan_out"] = _prepare.settle_orientation(config, kinds)
        if instead or config is not given or settled != before:
            text = as_peftc_json(config, settled)
    except BaseException:
        registry.remove(name)
        raise
    return MadeAdapter(config, settled, text, missing, unexpected)


def check_config(attached: Attachment, name: str, config: Any) -> None:
    """Refuse a config that no longer is that of the adapter `name`."""
    made = attached.made_from.get(name)
    if made is None:
        return
    before, now = json.loads(made), json.loads(as_peftc_json(config))
    allocator = attached.allocators.get(name)
    if allocator is not None and allocator.masks is not None:
        from ._adalora import masks_of

        before["rank_pattern"], now["rank_pattern"] = allocator.masks, masks_of(config, name)
    _prepare.check_unchanged(name, before, now)


def stay_active(registry: AdapterRegistry, new: str) -> list[str]:
    """The active adapters that a newly loaded one leaves active: those of the other family, unless both replace the
    same module."""
    family = _prepare.family(registry.peft_type(new))
    replaced = set(registry.saved_modules(new))
    return [
        name
        for name in registry.active()
        if _prepare.family(registry.peft_type(name)) != family and replaced.isdisjoint(registry.saved_modules(name))
    ]
