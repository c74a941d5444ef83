"""`PeftAdapterMixin`: adapters on a model, under the names and signatures of Transformers' mixin of that name.

The signatures and what they promise are those of Transformers 4.56.2's documentation (main_classes/peft).  The work is
done by the C core (`peftc._core.AdapterRegistry`); a method here checks names, finds files and keeps `peft_config`.
"""
# ruff: noqa: UP007, UP045  (the annotations are those of the documented signatures)

import os
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Optional, TypeAlias, TypeVar, Union

from . import _prepare
from ._attachment import Attachment, MadeAdapter, check_config, make_adapter, stay_active
from ._core import AdapterRegistry
from ._sources import as_config, is_config, read_config, read_weights, renamed, write_config
from .hosts.generation import adapter_logger

if TYPE_CHECKING:

    class torch:
        """The documented annotation names torch, which peftc does without: an array of any library does."""

        Tensor: TypeAlias = Any


_NOT_LOADED = "No adapter loaded. Please load an adapter first."
_PREFIX = "base_model.model."


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _as_documented(method: _Method) -> _Method:
    """Show `inspect` the documented signature alone: what is keyword-only came with Transformers 5."""
    import inspect

    signature = inspect.signature(method)
    kept = [one for one in signature.parameters.values() if one.kind is not one.KEYWORD_ONLY]
    method.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return method


class PeftAdapterMixin:
    """Adapters for a model: load, add, switch, combine, save, merge and delete them.

    Put it before the model class: ``class Model(peftc.PeftAdapterMixin, peftc.nn.Module)``. The models of
    `peftc.models` have it already.

    Methods known: LoRA, IA3 and AdaLora. Prompt and prefix methods change a model's inputs, not its layers, and are
    refused.

    Any number of adapters can be loaded; the *active* ones apply, in the order of the list, and only while adapters are
    *enabled*. Changing either costs the same for any model and any number of adapters, and takes effect between
    forward passes: one that runs on another thread finishes as it began.

    A refused call (any exception) leaves the model as it was.

    Attributes:
        peft_config: name → config of every loaded adapter. Exists while there is an adapter.
        _hf_peft_config_loaded: whether there is one. Transformers looks at it.
    """

    _hf_peft_config_loaded: bool = False
    _hotswap_enabled: bool = False
    _prepare_peft_hotswap_kwargs: Optional[dict[str, Any]] = None
    _peftc_attachment: Optional[Attachment] = None
    peft_config: dict[str, Any]

    # ------------------------------------------------------------ new adapters

    @_as_documented
    def load_adapter(
        self,
        peft_model_id: Optional[str] = None,
        adapter_name: Optional[str] = None,
        revision: Optional[str] = None,
        token: Optional[str] = None,
        device_map: Optional[str] = "auto",
        max_memory: Optional[str] = None,
        offload_folder: Optional[str] = None,
        offload_index: Optional[int] = None,
        peft_config: Optional[dict[str, Any]] = None,
        adapter_state_dict: Optional[dict[str, "torch.Tensor"]] = None,
        low_cpu_mem_usage: bool = False,
        is_trainable: bool = False,
        adapter_kwargs: Optional[dict[str, Any]] = None,
        *,
        hotswap: Union[bool, Literal["auto"]] = "auto",
        local_files_only: bool = False,
        load_config: Any = None,
    ) -> None:
        """Load an adapter from a folder, from the Hub or from a state dict, and activate it.

        The other active adapters of the same family (LoRA and AdaLora; IA3) become inactive, and so does one that
        replaces the same module (modules_to_save). If adapters are disabled they stay disabled.

        Args:
            peft_model_id: folder with adapter_config.json and adapter_model.safetensors (or .bin; `str` or
                `os.PathLike`), or the id of a repository on the Hub.
            adapter_name: "default" if None. A name that is taken is an error, one with a dot too.
            revision: branch, tag, commit or "refs/pr/N" on the Hub.
            token: access token for the Hub.
            device_map: where to put a torch model's parts when it gets its first adapter, if accelerate has spread it over
                "cpu" or "disk" (`hf_device_map`): "auto", "balanced", "balanced_low_0" or "sequential" (accelerate's choice),
                a device, or a dict of module's name → device; None leaves them where they are, and so does "auto" under
                Transformers 5. Adapters stay in memory, on the device that their layers compute on. Other models are
                never moved. NumPy models have the CPU: "auto", "cpu", None or a dict of those.
            max_memory: device → bytes or "10GB", for accelerate's choice; what memory there is if None.
            offload_folder: where to write what goes to disk and is not there yet.
            offload_index: tensor's name → where it is, as accelerate has it, of what is on disk already.
            peft_config: a config (or a dict of its fields) instead of the folder's adapter_config.json.
            adapter_state_dict: name → array instead of a file; needs `peft_config`. Names may start with
                "base_model.model.". Arrays are copied and converted to the base layer's dtype.
            low_cpu_mem_usage: without effect: a load reads each tensor once, to where it stays.
            is_trainable: leave the adapter trainable. Otherwise it is frozen and the model goes to eval mode. With
                `peft_config`, that config's inference_mode decides instead.
            adapter_kwargs: subfolder, cache_dir, local_files_only, force_download, revision, token, proxies and the like for
                the download; `device`; `key_mapping`, a dict of regular expression → replacement that renames tensors
                (the first that matches counts). The dict is not changed.
            hotswap: give the LoRA adapter of this name, which must be there, the new weights in the place of its own. Its
                parameters stay the same objects, what is active stays so, and a model compiled with torch.compile after
                `enable_peft_hotswap` is not compiled again. "auto": True after `enable_peft_hotswap` if the name is taken.
            local_files_only: look for Hub files in the cache alone.
            load_config: a `LoadStateDictConfig` of Transformers 5: where files are, in which format, how tensors are
                renamed.

        On a model of Transformers 5 `is_trainable` decides with `peft_config`, too, and what was missing and unexpected is
        returned and logged as a report.

        Raises:
            ValueError: the name is taken; nothing to load was given; files are missing; target modules, shapes or values do
                not fit the model; a device that this host does not have.
            TypeError: `peft_config` or an argument of the wrong type.
            KeyError: a tensor of modules_to_save is missing; an unknown method.
            OSError: the folder or repository cannot be read.
            SafetensorError, pickle.UnpicklingError: the weights file is damaged or malicious.

        Missing and unexpected tensors are logged as warnings (logger "transformers.integrations.peft").
        """
        name = _prepare.check_name(adapter_name)
        swap = self._swaps(name, hotswap)
        if not swap:
            self._new_name(name)
        attached = self._attachment()
        generation = attached.host.generation(self)
        reading = generation.load_config(load_config)
        options = {**reading.download, **(adapter_kwargs or {})}
        key_mapping = options.pop("key_mapping", None)
        if peft_model_id is None:
            peft_model_id = reading.location
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ValueError(
                "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an adapter."
            )
        attached.host.check_device(device_map, "device_map")
        attached.host.check_device(options.pop("device", None), 'adapter_kwargs["device"]')
        if revision is not None and options.setdefault("revision", revision) != revision:
            adapter_logger().error(
                "You passed a `revision` argument both in `adapter_kwargs` and as a standalone argument. "
                "The one in `adapter_kwargs` will be used."
            )
        options.setdefault("token", token)
        if local_files_only:
            options["local_files_only"] = True

        source: Any = adapter_state_dict
        label = "config"
        if peft_model_id is not None:
            from .hub import AdapterFiles

            files = AdapterFiles(peft_model_id, **options)
            if peft_config is None:
                label = files.config()
                config = read_config(label, attached.host)
                config.inference_mode = not is_trainable
            if adapter_state_dict is None:
                source = files.weights(reading.prefer_bin)
        if peft_config is not None:
            config = as_config(peft_config, "peft_config", attached.host)
        if not isinstance(source, str):
            source = read_weights(source)
        source = generation.weights(self, source, name, config, reading.conversions)
        if key_mapping or not isinstance(source, str):
            source = renamed(read_weights(source), key_mapping, attached.host)

        places = None
        said = device_map != "auto" or max_memory is not None or offload_folder is not None
        if not self._hf_peft_config_loaded and (generation.dispatches or said):
            places = attached.host.plan_places(self, device_map, max_memory, offload_folder, offload_index)
        origin = peft_model_id if peft_model_id is not None else "state_dict"
        mode = config.inference_mode
        if generation.argument_decides:
            config.inference_mode = not is_trainable
        try:
            if swap:
                missing, unexpected = self._swap(attached, name, config, label, source)
            else:
                missing, unexpected = self._attach(attached, name, config, label, source, places)
        except BaseException:
            config.inference_mode = mode
            raise
        missing, unexpected = _names_in_model(attached.registry, name, missing, unexpected)
        report = generation.report(self, origin, missing, unexpected)
        if config.inference_mode:
            attached.host.to_eval(self)
        return report  # type: ignore[no-any-return]

    def hotswap(
        self, peft_model_id: Optional[str] = None, adapter_name: Optional[str] = None, **options: Any
    ) -> Optional[Any]:
        """Give a LoRA adapter that is there the weights and the config of another: `load_adapter` with hotswap=True.

        Args:
            peft_model_id: folder or repository of the other adapter.
            adapter_name: the adapter whose weights go; "default" if None. The name stays.
            **options: further arguments of `load_adapter`.

        Returns:
            What `load_adapter` does.

        Raises:
            ValueError: there is no such adapter, or one of the two is no LoRA; `enable_peft_hotswap` left too little room; the
                two differ in modules_to_save, bias, use_dora or lora_bias.
            RuntimeError: the other adapter has modules that this one has not.

        and as `load_adapter`. Nothing has changed then.
        """
        return self.load_adapter(peft_model_id, adapter_name, hotswap=True, **options)

    def enable_peft_hotswap(
        self, target_rank: int = 128, check_compiled: Literal["error", "warn", "ignore"] = "error"
    ) -> None:
        """Let LoRA adapters that are loaded from now on be swapped for others of any rank up to `target_rank`, also in a
        model that torch.compile has compiled in between.

        Their tensors get room for that rank, filled with zeros; what is saved, and `get_adapter_state_dict`, stay without.
        From now on `load_adapter` with a name that is taken swaps (`hotswap`). Swapping without this call works in a
        model that is not compiled, or between adapters of the same ranks and scalings. NumPy models need no room.

        Args:
            target_rank: the highest rank that any of the adapters has.
            check_compiled: what to do if there are adapters already, which get no room: "error", "warn" (log it) or
                "ignore".

        Raises:
            RuntimeError: there are adapters, and check_compiled is "error".
            ValueError: another check_compiled; a target_rank below 1.
        """
        if self._hf_peft_config_loaded:
            if check_compiled == "error":
                raise RuntimeError("Call `enable_peft_hotswap` before loading the first adapter.")
            if check_compiled == "warn":
                adapter_logger().warning(
                    "It is recommended to call `enable_peft_hotswap` before loading the first adapter to avoid recompilation."
                )
            elif check_compiled != "ignore":
                raise ValueError(
                    f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
                )
        if not isinstance(target_rank, int) or target_rank < 1:
            raise ValueError(f"target_rank is the highest rank of an adapter, at least 1; got {target_rank!r}")
        self._hotswap_enabled = True
        self._prepare_peft_hotswap_kwargs = {"target_rank": target_rank, "check_compiled": check_compiled}

    def add_adapter(  # type: ignore[no-untyped-def]  # as documented
        self, adapter_config, adapter_name: Optional[str] = None
    ) -> None:
        """Make a fresh adapter to train, and activate it alone.

        Its tensors are initialised as the config says (`init_lora_weights`, …); `peftc.manual_seed` makes the draws
        repeat. Base parameters are frozen from then on.

        Args:
            adapter_config: a `peftc.LoraConfig`, `IA3Config` or `AdaLoraConfig`, or PEFT's own of these. It is kept, not copied:
                target_modules=None and "all-linear" are replaced by the names found, and base_model_name_or_path is set.
            adapter_name: "default" if None.

        Raises:
            ValueError: the name is taken or has a dot; no module matches the targets; a value that cannot work.
            TypeError: not a config.
            NotImplementedError: a combination that peftc has no code for, by name.
        """
        name = self._new_name(adapter_name)
        if not is_config(adapter_config):
            raise TypeError(f"adapter_config should be an instance of PeftConfig. Got {type(adapter_config)} instead.")
        self._attach(self._attachment(), name, adapter_config, "config", None)

    def _swaps(self, name: str, hotswap: Any) -> bool:
        """Does a load under this name swap an adapter's weights?"""
        there = self._hf_peft_config_loaded and name in self.peft_config
        if hotswap == "auto":
            hotswap = there and self._hotswap_enabled
        if hotswap and not there:
            raise ValueError(
                "To hotswap an adapter, there must already be an existing adapter with the same adapter name."
            )
        if hotswap and _prepare.method_of(self.peft_config[name]) != "LORA":
            raise ValueError("Hotswapping is currently only supported for LoRA, please set `hotswap=False`.")
        return bool(hotswap)

    def _new_name(self, adapter_name: Optional[str]) -> str:
        name = _prepare.check_name(adapter_name)
        if self._hf_peft_config_loaded and name in self.peft_config:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        return name

    def _attachment(self) -> Attachment:
        """The model's attachment; made when first asked for."""
        attached = self._peftc_attachment
        if attached is None:
            # One of several threads wins: setdefault of a dict is atomic.
            attached = self.__dict__.setdefault("_peftc_attachment", Attachment(self))
        attached.host.serve(attached.registry, self)
        return attached

    def _attach(
        self, attached: Attachment, name: str, config: Any, label: str, source: Any, places: Any = None
    ) -> tuple[list[str], list[str]]:
        """Make adapter `name` from `config`, fresh (source None) or filled from source, and activate it.

        places: where to put the model's parts anew (`Host.plan_places`), if it has no adapter yet.

        Returns the state-dict keys that were missing and those that were not wanted."""
        with attached.lock:
            registry, host = attached.registry, attached.host
            adding = source is None
            others = self.peft_config if self._hf_peft_config_loaded else {}
            if name in others:
                raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
            flags = None
            if not adding and others and not config.inference_mode and host.generation(self).loads_keep_flags:
                flags = host.flags(registry)
            base_flags = host.flags(registry) if places is not None else None
            made = make_adapter(attached, self, name, config, others, label, source, trainable=True if adding else None)
            config, settled, text, missing, unexpected = made
            if adding:
                settled["base_model_name_or_path"] = self.__dict__.get("name_or_path", None)
            merged = registry.merged()
            try:
                if not adding and self._prepare_peft_hotswap_kwargs:
                    host.make_room(registry, name, self._prepare_peft_hotswap_kwargs["target_rank"])
                kept = [] if adding else stay_active(registry, name)
                if places is not None:
                    host.carry_out(self, places)  # before: the adapter's own biases are for tensors that are there then
                registry.activate([*kept, name])
            except BaseException:
                registry.remove(name)
                if base_flags is not None:
                    base_flags()
                raise
            # From here on nothing fails: the adapter is in.
            for field, value in settled.items():
                setattr(config, field, value)
            for other in kept:
                registry.set_trainable(other, False)
            if flags is not None:
                flags()
            if not self._hf_peft_config_loaded:
                self.peft_config = {}
                self._hf_peft_config_loaded = True
            self.peft_config[name] = config
            attached.made_from[name] = text
            host.adapters_changed(self, registry)
            host.activation_changed(self, registry)
            if merged:
                _warn_unmerged(merged, f"adapter {name} was activated", 4)
        return missing, unexpected

    def _swap(
        self, attached: Attachment, name: str, config: Any, label: str, source: Any
    ) -> tuple[list[str], list[str]]:
        """Give adapter `name` the weights from source and the config; returns keys as `_attach` does."""
        with attached.lock:
            registry, host = attached.registry, attached.host
            if _prepare.method_of(config) != "LORA":
                raise ValueError("Hotswapping is currently only supported for LoRA, please set `hotswap=False`.")
            others = {other: one for other, one in self.peft_config.items() if other != name}
            merged = registry.merged()
            made: MadeAdapter = host.replace(
                registry, name, lambda new: make_adapter(attached, self, new, config, others, label, source)
            )
            for field, value in made.settled.items():
                setattr(made.config, field, value)
            self.peft_config[name] = made.config
            attached.made_from[name] = made.text
            if not config.inference_mode:
                registry.set_trainable(name, True)
            host.activation_changed(self, registry)
            if merged:
                _warn_unmerged(merged, f"adapter {name} got other weights", 4)
        return made.missing, made.unexpected

    # ------------------------------------------------------- switching adapters

    def set_adapter(self, adapter_name: Union[list[str], str]) -> None:
        """Make one adapter, or several at once, the active ones; all others become inactive.

        Several apply in the order of the list. Adapters named here become trainable. Constant time.

        Args:
            adapter_name: a name or a list of names; [] makes none active.

        Raises:
            ValueError: no adapter is loaded; an unknown name; two adapters that replace the same module
                (modules_to_save), of which only one can be active.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError(_NOT_LOADED)
        if isinstance(adapter_name, list):
            names = adapter_name
            self._check_known(names)
        elif adapter_name in self.peft_config:
            names = [adapter_name]
        else:
            raise ValueError(
                f"Adapter with name {adapter_name} not found. Please pass the correct adapter name among "
                f"{list(self.peft_config)}"
            )
        attached = self._attached()
        registry = attached.registry
        merged = registry.merged()
        registry.activate(names)
        for name in names:
            registry.set_trainable(name, True)
        if merged:
            _warn_unmerged(merged, "adapters were set", 3)
        attached.host.activation_changed(self, registry)

    def disable_adapters(self) -> None:
        """Run the base model alone, as if no adapter were there; which ones are active is remembered. Constant time.

        Modules and biases that an adapter replaces are the base model's again too. The adapters' parameters stop being
        trainable; those of an adapter that is set, added or loaded for training from now on are, although they have no
        effect before `enable_adapters`.

        Raises:
            ValueError: no adapter is loaded.
        """
        attached = self._attached()
        registry = attached.registry
        for name in registry.active():  # first, so that no flag is changed twice
            registry.set_trainable(name, False)
        registry.enabled = False
        attached.host.activation_changed(self, registry)

    def enable_adapters(self) -> None:
        """Let the active adapters apply again, and make them trainable. Constant time.

        Raises ValueError when no adapter is loaded.
        """
        attached = self._attached()
        registry = attached.registry
        registry.enabled = True
        for name in registry.active():
            registry.set_trainable(name, True)
        attached.host.activation_changed(self, registry)

    def active_adapters(self) -> list[str]:
        """The names of the active adapters in the order they apply, in a new list; the same while disabled.

        Raises:
            ValueError: no adapter is loaded.
        """
        names: list[str] = self._attached().registry.active()
        return names

    def active_adapter(self) -> str:
        """Deprecated: the first of `active_adapters`. Raises IndexError if none is active."""
        warnings.warn(
            "The `active_adapter` method is deprecated and will be removed in a future version.",
            FutureWarning,
            stacklevel=2,
        )
        return self.active_adapters()[0]

    def _attached(self) -> Attachment:
        if not self._hf_peft_config_loaded or self._peftc_attachment is None:
            raise ValueError(_NOT_LOADED)
        attached = self._peftc_attachment
        attached.host.serve(attached.registry, self)
        return attached

    def _check_known(self, names: Iterable[Any]) -> None:
        missing = [name for name in names if name not in self.peft_config]
        if missing:
            raise ValueError(
                f"Following adapter(s) could not be found: {', '.join(map(str, missing))}. Make sure you are passing the "
                f"correct adapter name(s). current loaded adapters are: {list(self.peft_config)}"
            )

    # --------------------------------------------------------- state and files

    def get_adapter_state_dict(
        self,
        adapter_name: Optional[str] = None,
        state_dict: Optional[dict] = None,  # type: ignore[type-arg]  # as documented
    ) -> dict:  # type: ignore[type-arg]  # as documented
        """The tensors of one adapter under the names that its file has, without the adapter's name.

        Args:
            adapter_name: the first active adapter if None.
            state_dict: take the tensors from here instead of from the model: a dict as `model.state_dict()` gives it,
                whose names carry the adapter's ("….lora_A.NAME.weight"). What it lacks is left out.

        Returns:
            name → array. Without `state_dict` the arrays share memory with the adapter: writing to them changes it,
            and they keep its memory alive. modules_to_save appear under the module's own name. Where target_modules names
            the embeddings (embed_tokens, lm_head) their base weights are there too, as in PEFT, with a warning. Of an
            AdaLora adapter whose ranks were allocated (`update_and_allocate`) the singular values that are left, with their
            rows and columns, in new arrays.

        Raises:
            ValueError: no adapter is loaded.
            KeyError: an unknown name.
            IndexError: no name was given and none is active.
        """
        attached = self._attached()
        registry = attached.registry
        name = adapter_name if adapter_name is not None else registry.active()[0]
        if name not in self.peft_config:
            raise KeyError(name)
        if state_dict is None:
            state: dict[str, Any] = registry.state_dict(name)
        else:
            state = attached.host.state_from(registry, name, state_dict)
        allocator = attached.allocators.get(name)
        if allocator is None or allocator.masks is None:
            return state
        # As in PEFT, names in the config lose the adapter's name here: save_pretrained writes the config next.
        self.peft_config[name].rank_pattern = allocator.pattern(with_adapter=False)
        resized: dict[str, Any] = allocator.resized(state)
        return resized

    def save_adapter(
        self,
        save_directory: Union[str, "os.PathLike[str]"],
        adapter_name: Optional[str] = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write adapter_config.json and adapter_model.safetensors: a folder that `load_adapter` and PEFT load.

        The bytes are those that PEFT's `save_pretrained` writes, with inference_mode true. Each file is written beside
        its old version and then takes its place, so a save that fails or is killed leaves the old file whole.

        Args:
            save_directory: folder, made if need be.
            adapter_name: the active adapter if None.
            safe_serialization: must be True; peftc reads adapter_model.bin but writes no pickles.

        Raises:
            ValueError: no adapter is loaded, several are active and none was named, the folder is a file,
                safe_serialization is False, or the config in `peft_config` was edited so that it describes another adapter.
            KeyError: an unknown name.
            IndexError: no name was given and none is active.
            OSError: the folder cannot be written.
        """
        attached = self._attached()
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False would write adapter_model.bin, a pickle; peftc reads those but writes "
                "safetensors only, which every version of PEFT since 0.5 loads"
            )
        active = attached.registry.active()
        if adapter_name is None and len(active) > 1:
            raise ValueError(
                f"several adapters are active ({', '.join(active)}), and a folder holds one: pass adapter_name and save "
                "them one by one"
            )
        name = adapter_name if adapter_name is not None else active[0]
        if name not in self.peft_config:
            raise KeyError(name)
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
        config = self.peft_config[name]
        check_config(attached, name, config)
        os.makedirs(folder, exist_ok=True)
        from .hub import CONFIG_NAME, SAFETENSORS_NAME

        path = os.path.join(folder, SAFETENSORS_NAME)
        if name in attached.allocators and attached.allocators[name].masks is not None:
            attached.host.save({_PREFIX + key: t for key, t in self.get_adapter_state_dict(name).items()}, path)
        else:
            attached.registry.save(name, path, _PREFIX)
        write_config(config, os.path.join(folder, CONFIG_NAME))

    def delete_adapter(self, adapter_names: Union[list[str], str]) -> None:
        """Delete adapters and free their memory.

        The other active ones stay active in their order. If none is left, the first of the remaining adapters by
        name becomes active, with a warning. With the last adapter the model is the plain base model again.

        Args:
            adapter_names: a name or a list of names; [] deletes none.

        Raises:
            ValueError: no adapter is loaded, or a name is unknown; nothing is deleted then.
        """
        attached = self._attached()
        generation = attached.host.generation(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        with attached.lock:
            missing = [name for name in names if name not in self.peft_config]
            if missing:
                raise ValueError(
                    "The following adapter(s) are not present and cannot be deleted: " + ", ".join(map(str, missing))
                )
            registry = attached.registry
            merged = registry.merged()
            if any(name in names for name in merged):
                _warn_unmerged(merged, "one of them was deleted", 3)
            had_active = registry.active()
            replaced: list[str] = []
            for name in dict.fromkeys(names):
                replaced += registry.saved_modules(name)
                registry.remove(name)
                del self.peft_config[name]
                attached.made_from.pop(name, None)
                attached.allocators.pop(name, None)
            if not self.peft_config:
                registry.enabled = True
                del self.peft_config
                self._hf_peft_config_loaded = False
            elif had_active and not registry.active():
                heir = min(self.peft_config)
                registry.activate([heir])
                registry.set_trainable(heir, True)
                warnings.warn(
                    f"Adapter {had_active[-1]} was active which is now deleted. Setting active adapter to {heir}.",
                    stacklevel=2,
                )
            if names:
                generation.saved_modules_gone(self, replaced)
                attached.host.adapters_changed(self, registry)
                attached.host.activation_changed(self, registry)

    # ------------------------------------------------------- AdaLora's training

    def update_and_allocate(self, global_step: int) -> None:
        """Update the importance of the singular values of the AdaLora adapter in training, and drop those beyond the budget.

        To be called at every step, after the backward pass and the optimizer's step and before zero_grad. Until step tinit,
        and at steps that deltaT does not divide, only importance is updated; from total_step - tfinal on the ranks are
        final. Singular values that are dropped become zero, and `peft_config[name].rank_pattern` tells which are left;
        saving writes those alone.

        Args:
            global_step: the step, counted from 0 or 1 as in the loop around it.

        Raises:
            ValueError: no adapter is loaded, none of them is an AdaLora to be trained, no parameter of it has a gradient, or
                the ranks should be final by now and were never allocated.
        """
        attached = self._attached()
        name, allocator = self._allocator(attached)
        config = self.peft_config[name]
        masks = allocator.step(attached.host.triplets(self, attached.registry, name), global_step, config)
        if masks is None:
            return
        attached.host.mask_triplets(self, attached.registry, name, masks)
        if global_step <= config.total_step - config.tfinal:
            config.rank_pattern = allocator.pattern(with_adapter=True)

    def orthogonality_loss(self) -> Any:
        """AdaLora's regularisation: orth_reg_weight times the mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ over all adapted layers.

        On a torch model: a tensor to add to the loss. Where the config has a task_type and the model's output a loss of its
        own (it was given labels) this is in it already, as in PEFT. On a NumPy model: a float to add to the loss; its gradient is added to `.grad`
        of lora_A and lora_B, so call it once a step, beside `backward`.

        Raises:
            ValueError: no adapter is loaded, or none of them is an AdaLora to be trained.
        """
        attached = self._attached()
        name, allocator = self._allocator(attached)
        allocator.regularised = True
        return attached.host.orthogonality_loss(self, attached.registry, name, self.peft_config[name].orth_reg_weight)

    def adalora_state_dict(self) -> dict[str, Any]:
        """What `update_and_allocate` remembers of the AdaLora adapter in training, as named NumPy arrays.

        A checkpoint needs it besides the parameters and the optimizer's state to go on exactly; {} before the first step.

        Raises:
            ValueError: no adapter is loaded, or none of them is an AdaLora to be trained.
        """
        state: dict[str, Any] = self._allocator(self._attached())[1].state()
        return state

    def load_adalora_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `adalora_state_dict` gave; peft_config's rank_pattern follows.

        Raises:
            ValueError: as `adalora_state_dict`, or an array that does not belong to the adapter; nothing changes then.
        """
        name, allocator = self._allocator(self._attached())
        allocator.set_state(state)
        self.peft_config[name].rank_pattern = allocator.pattern(with_adapter=True)

    def _allocator(self, attached: Attachment) -> tuple[str, Any]:
        """The AdaLora adapter in training and its allocator, which is made when first asked for."""
        from ._adalora import RankAllocator, trained_adapter

        name = trained_adapter(self, attached.registry)
        allocator = attached.allocators.get(name)
        if allocator is None:
            triplets = attached.host.triplets(self, attached.registry, name)
            ranks = {module: len(e) for module, (_, _, (e, _)) in triplets.items()}
            allocator = attached.allocators[name] = RankAllocator(name, ranks, self.peft_config[name])
        return name, allocator

    # ------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Fold adapters into copies of the base weights, so that a forward pass costs what the base model's does.

        Args:
            adapter_names: the active ones if None. Those merged already stay merged.
            safe_merge: refuse a result with NaN or infinity.

        Raises:
            ValueError: no adapter is loaded; an unknown name; a str instead of a list; safe_merge found NaN or infinity,
                named by module.

        `unmerge_adapter` gives the base weights back bit for bit: they were not touched.
        """
        attached = self._attached()
        if isinstance(adapter_names, str):
            raise ValueError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        registry = attached.registry
        with attached.lock:
            names = registry.active() if adapter_names is None else list(adapter_names)
            self._check_known(names)
            merged = registry.merged()
            new = [name for name in names if name not in merged]
            if merged and not new:
                warnings.warn(f"already merged, nothing to do: {', '.join(names)}", stacklevel=2)
                return
            if merged:
                warnings.warn(f"{', '.join(new)} is merged on top of {', '.join(merged)}", stacklevel=2)
            registry.merge(names, safe_merge)
            attached.host.activation_changed(self, registry)

    def unmerge_adapter(self) -> None:
        """Take merged adapters out of the weights again; exact. Raises ValueError when no adapter is loaded."""
        attached = self._attached()
        with attached.lock:
            if not attached.registry.merged():
                warnings.warn("no adapter is merged, nothing to do", stacklevel=2)
                return
            attached.registry.unmerge()
            attached.host.activation_changed(self, attached.registry)


def _warn_unmerged(merged: list[str], why: str, stacklevel: int) -> None:
    """Merged weights stand for what was active when they were made: the core takes them back when that changes."""
    warnings.warn(f"{', '.join(merged)} was merged and is unmerged now, as {why}", stacklevel=stacklevel)


def _names_in_model(
    registry: AdapterRegistry, name: str, missing: list[str], unexpected: list[str]
) -> tuple[list[str], list[str]]:
    """State-dict keys of adapter `name` as the names that parameters have in the model, for reports."""
    prefix = _prepare.key_prefix(registry.peft_type(name))
    full = {key: model_name or key for key, model_name, *_ in registry.tensors(name)} if missing else {}
    return (
        [full.get(key, key) for key in missing],
        [_prepare.name_in_model(key, name, prefix) for key in unexpected],
    )
