"""What depends on the Transformers that a model belongs to.

peftc by itself behaves as the mixin of Transformers 4.56.2; so do NumPy models and torch models of no Transformers.  A
host says which generation a model is of (`Host.generation`); `torch_generation.Five` has what Transformers 5 does
otherwise.  The mixin, the registries and the patch ask here and nowhere else.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


def adapter_logger() -> Any:
    """Transformers' logger for adapters, by name: filters and tests that know it go on working."""
    import logging

    return logging.getLogger("transformers.integrations.peft")


class LoadConfig(NamedTuple):
    """What a `LoadStateDictConfig` of Transformers 5 says about an adapter. The rest of it is about the base model."""

    location: Any = None
    download: Mapping[str, Any] = MappingProxyType({})
    prefer_bin: bool = False
    conversions: Any = None
    ignore_sizes: bool = False


class Generation:
    """Transformers 4, and models of no Transformers."""

    #: Does load_adapter's `is_trainable` decide, or, where one is passed, the config's `inference_mode`?
    argument_decides = False
    #: Does the first load put a model anew that accelerate has spread over devices?
    dispatches = True
    #: Does a load to be trained leave what was trainable before trainable, the other adapters among it?
    loads_keep_flags = False

    def methods(self) -> dict[str, Any]:
        """Methods to put under Transformers in the place of the mixin's: those whose signatures differ."""
        return {}

    def load_config(self, given: Any) -> LoadConfig:
        """Read load_adapter's `load_config`; None gives defaults."""
        if given is None:
            return LoadConfig()
        options = dict(getattr(given, "download_kwargs", None) or {})
        options.pop("tqdm_class", None)
        if options.get("revision") is not None:
            options["revision"] = str(options["revision"])  # without the commit, which may be the base model's
        return LoadConfig(
            getattr(given, "pretrained_model_name_or_path", None),
            {key: value for key, value in options.items() if value is not None and value != ""},
            getattr(given, "use_safetensors", None) is False,
            getattr(given, "weight_mapping", None),
            bool(getattr(given, "ignore_mismatched_sizes", False)),
        )

    def arguments_of_theirs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """load_adapter's keyword arguments as Transformers' own method takes them."""
        kwargs = dict(kwargs)
        if kwargs.pop("hotswap", False) is True:
            raise NotImplementedError(
                "hotswap=True: the model's adapters were made by PEFT before peftc was patched in, and Transformers 4 cannot "
                "swap those; delete the adapter and load the other one"
            )
        kwargs.pop("load_config", None)
        if kwargs.pop("local_files_only", False):
            kwargs["adapter_kwargs"] = {"local_files_only": True, **(kwargs.get("adapter_kwargs") or {})}
        return kwargs

    def check(self, model: Any, config: Any) -> None:
        """Refuse what this Transformers does to a config before it makes an adapter, and peftc cannot.

        Raises:
            NotImplementedError: by name.
        """

    def weights(self, model: Any, source: Any, name: str, config: Any, conversions: Any) -> Any:
        """The weights (a path or a dict) under the names that they have in this model."""
        return source

    def report(
        self, model: Any, origin: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Any = ()
    ) -> Any:
        """Log what a file had too much and too little, as names in the model. Returns what load_adapter does."""
        text = ""
        if unexpected:
            keys = ", ".join(unexpected)
            text += f"Loading adapter weights from {origin} led to unexpected keys not found in the model: {keys}. "
        if missing:
            text += f"Loading adapter weights from {origin} led to missing keys in the model: {', '.join(missing)}"
        if text:
            adapter_logger().warning(text)

    def saved_modules_gone(self, model: Any, paths: Iterable[str]) -> None:
        """Called after a delete with the modules that an adapter had replaced and none does any more."""


FOUR = Generation()


def no_such_modules(name: str, extra: Iterable[str]) -> str:
    """Why adapter `name` cannot be swapped for one that adapts other modules as well."""
    return (
        f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(sorted(extra))}. Adapter {name} does "
        "not adapt these modules: delete it and load the other one instead"
    )
