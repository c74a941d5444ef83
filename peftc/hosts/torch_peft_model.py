"""`PeftModel`: a torch model with adapters under the names, arguments and files of PEFT's class."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from .. import _prepare
from .._sources import is_config, read_config
from . import torch_card, torch_peft_save
from .torch_imports import when_imported
from .torch_inject import attachment, check_config, has_adapters, new_name, prefix_of
from .torch_peft import as_pefts
from .torch_peft_load import files_of, load_new, method_in, read, read_again
from .torch_registry import join_peft
from .torch_state import set_state
from .torch_to_peft import goes_to_peft, put_back_if_refused
from .torch_tuner import TUNERS, Tuner, tuner_for

if TYPE_CHECKING:
    from typing_extensions import Self

_HALVES = (torch.float16, torch.bfloat16)


def _numbers(parameter: Any) -> int:
    """How many numbers a parameter stands for, as PEFT counts them: bitsandbytes packs two of 4 bits into a byte."""
    count: int = parameter.numel() or getattr(parameter, "ds_numel", 0)
    return count * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else count


class PeftModel(nn.Module):
    """A model with adapters: what `peftc.get_peft_model` and `PeftModel.from_pretrained` return.

    Parameters, files, texts and arguments are those of `peft.PeftModel`; isinstance says so too, once peft is imported. The
    model itself is `base_model.model`, whose layers are changed in place; anything that is asked of the wrapper and is not
    here is the model's.

    Args:
        model: any torch model.
        peft_config: a config of peftc or of PEFT: LoRA, AdaLora or IA3. It is kept, not copied.
        adapter_name: name of the first adapter.
        autocast_adapter_dtype: adapters of a float16 or bfloat16 model are float32.
        low_cpu_mem_usage: without effect; nothing is made twice.

    Attributes:
        base_model: the model with adapters of one method (PEFT's LoraModel and so on): `model`, `set_adapter` for
            several at once, `merge_adapter`, `enable_adapter_layers`, …
        peft_type: the method.
        active_adapter: name of the adapter that was set last.
        special_peft_forward_args: arguments of a call that are for the adapters: "adapter_names".

    Raises:
        ValueError, TypeError, NotImplementedError: as `peftc.get_peft_model`.
    """

    #: pipeline tag of the model card
    pipeline_tag: str | None = None
    #: modules that an adapter of this task always replaces
    task_heads: tuple[str, ...] = ()

    base_model: Tuner

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        checkpointing = self._begin(model, peft_config, adapter_name)
        self._with_heads(peft_config)
        self.base_model.add(_prepare.check_name(adapter_name), peft_config)
        self._finish(adapter_name, autocast_adapter_dtype, checkpointing)

    def _begin(self, model: nn.Module, peft_config: Any, adapter_name: str) -> bool:
        """All but the adapter. Does the model checkpoint gradients? It looks through its modules for that, which are fewer now."""
        check_config(peft_config)
        nn.Module.__init__(self)
        attachment(model)  # refuses what is no torch model
        self.base_model = tuner_for(peft_config)(model)
        self.base_model.training = self.training = model.training
        self.active_adapter: Any = adapter_name
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        return bool(getattr(model, "is_gradient_checkpointing", True))

    def _finish(self, adapter_name: str, autocast_adapter_dtype: bool, checkpointing: bool) -> None:
        model: Any = self.base_model.model
        if autocast_adapter_dtype:
            self._to_float32(adapter_name)
        if checkpointing:
            self.prepare_model_for_gradient_checkpointing(model)
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1
        for name, _ in model.named_children():
            if any(head in name for head in self.modules_to_save or ()) and self.task_heads:
                self.cls_layer_name = name
                break

    def _with_heads(self, config: Any) -> None:
        """The task's heads among the modules that the config's adapter replaces."""
        if self.task_heads and hasattr(config, "modules_to_save"):
            listed = list(config.modules_to_save or ())
            config.modules_to_save = [*listed, *(name for name in self.task_heads if name not in listed)]

    def _to_float32(self, name: str) -> bool:
        """float32 for the half-precision tensors of one adapter. Were there any?"""
        registry = attachment(self.base_model.model).registry
        if not any(tensor.dtype in _HALVES for tensor in registry.state_dict(name).values()):
            return False
        part = registry.part(name)
        halves = [tensor for tensor in part.tensors() if tensor.dtype in _HALVES] if part is not None else []
        for tensor in halves:
            tensor.data = tensor.data.to(torch.float32)
        found = bool(halves)
        for _, layer in registry.adapted_layers(name):
            for field in (*layer.adapter_layer_names, *layer.other_param_names):
                container = layer._modules.get(field)
                if container is None:
                    continue
                child = container._modules.get(name)
                tensors = list(child.parameters()) if child is not None else [container._parameters.get(name)]
                for parameter in tensors:
                    if parameter is not None and parameter.dtype in _HALVES:
                        parameter.data = parameter.data.to(torch.float32)
                        found = True
        return found

    def _to_eval(self) -> None:
        """eval(), at a cost that does not grow with the number of adapters."""
        attachment(self.base_model.model).host.to_eval(self.base_model.model)
        self.base_model.training = self.training = False

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let gradients start at the input embeddings, which checkpoints need when all base parameters are frozen."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    # ------------------------------------------------------------------- asking

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapter's name → its config."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in the order they apply."""
        return self.base_model.active_adapters

    @property
    def has_active_enabled_adapter(self) -> bool:
        """False while adapters are disabled that would be active."""
        registry = attachment(self.base_model.model).registry
        return registry.enabled or not registry.active()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """May PEFT's `convert_to_lora` make LoRA of the adapters?"""
        return self.base_model.supports_lora_conversion()

    @property
    def active_peft_config(self) -> Any:
        """The config of `active_adapter`."""
        return self.peft_config[self.active_adapter]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters replace, of all of them together; None if there are none."""
        names: set[str] = set()
        for config in self.peft_config.values():
            names.update(getattr(config, "modules_to_save", None) or ())
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The base model's dtype; None if it does not say."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The model itself, with its adapted layers."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that require gradients, all numbers)."""
        sizes = [(_numbers(parameter), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print what `get_nb_trainable_parameters` counts, and the percentage."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[Any]:
        """What PEFT's function of that name says of every adapted layer. Needs the package peft."""
        from peft import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """What PEFT's function of that name says of the model. Needs the package peft."""
        from peft import get_model_status

        return get_model_status(self)

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with the active adapters.

        Args:
            adapter_names: one name for each row of the batch, "__base__" for none, instead of the active adapters. LoRA in
                eval mode only.
        """
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_ours(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate() with the active adapters; `adapter_names` as in `forward`."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model().generate(*args, **self._without_ours(kwargs))

    def _without_ours(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model._enable_peft_forward_hooks(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone while a `with` statement lasts; adapters that were disabled before stay so after it."""
        was_enabled = attachment(self.base_model.model).registry.enabled
        try:
            self.base_model.disable_adapter_layers()
            yield
        finally:
            if was_enabled:
                self.base_model.enable_adapter_layers()

    # ----------------------------------------------------------------- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: Any,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool | None = None,
    ) -> None:
        """Make a fresh adapter of the same method. It is not active: `set_adapter` makes it so.

        Args:
            adapter_name: a new name.
            peft_config: a config of the method that the model has.
            low_cpu_mem_usage: without effect.
            autocast_adapter_dtype: float32 tensors in a half-precision model; None: if the PEFT that is installed does so
                (since 0.19).

        Raises:
            ValueError: another method; the name is taken or has a dot; what `peftc.get_peft_model` refuses.
        """
        check_config(peft_config)
        name = new_name(adapter_name, peft_config)
        self._check_method(peft_config)
        before = getattr(peft_config, "modules_to_save", None)
        self._with_heads(peft_config)
        try:
            self.base_model.add(name, peft_config)
        except BaseException:
            if hasattr(peft_config, "modules_to_save"):
                peft_config.modules_to_save = before
            raise
        if torch_peft_save.version_of_peft() >= (0, 19) if autocast_adapter_dtype is None else autocast_adapter_dtype:
            self._to_float32(name)

    def _check_method(self, config: Any) -> None:
        mine, other = (_prepare.method_of(one) for one in (self, config))
        if mine != other:
            raise ValueError(
                f"Cannot combine adapters with different peft types. Found {self.peft_type} and {config.peft_type}."
            )

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make one adapter the active one, and trainable unless inference_mode; all others become inactive.

        `base_model.set_adapter` takes several.

        Raises:
            ValueError: an unknown name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.base_model.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the tensors of these adapters, active or not, have gradients, or not. Unknown names are passed over."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and free its memory. If it was the only active one, the first of the others by name takes over.

        Raises:
            ValueError: an unknown name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        self.base_model.delete_adapter(adapter_name)
        active = self.active_adapters
        if len(active) == 1:
            self.active_adapter = active[0]

    def load_adapter(
        self,
        model_id: Union[str, "os.PathLike[str]"],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter from a folder or from the Hub. It is not active: `set_adapter` makes it so.

        Args:
            model_id: folder with adapter_config.json and adapter_model.safetensors (or .bin), or the id of a repository.
            adapter_name: a new name; or that of an adapter, which then gets the file's values.
            is_trainable: leave it trainable. Otherwise it is frozen, and the model goes to eval mode.
            torch_device: without effect: tensors go to the device of their layers.
            autocast_adapter_dtype: as for the class.
            ephemeral_gpu_offload, low_cpu_mem_usage: without effect.
            key_mapping: regular expression → replacement, for names that the model has changed since.
            **kwargs: subfolder, revision, token, cache_dir, local_files_only, … for the download;
                ignore_mismatched_sizes; device_map, max_memory, offload_… are without effect.

        Returns:
            missing_keys and unexpected_keys, as PEFT names them.

        Raises:
            ValueError: no such files; another method; what does not fit the model.
            RuntimeError: shapes differ from those of the adapter that is there already.
        """
        files, ignore = files_of(model_id, kwargs)
        if adapter_name in self.peft_config:
            config = self.peft_config[adapter_name]
            state = read(files.weights(), key_mapping)
            result = set_state(self, state, adapter_name, ignore, False)
            part = prefix_of(config)
            result.missing_keys[:] = [
                key for key in result.missing_keys if f".{adapter_name}" in key and f".{part}" in key
            ]
        else:
            label = files.config()
            config = read_config(label, attachment(self.base_model.model).host)
            config.inference_mode = not is_trainable
            new_name(adapter_name, config)
            self._check_method(config)
            result = load_new(self, adapter_name, config, label, files.weights(), key_mapping)
            if autocast_adapter_dtype and self._to_float32(adapter_name):
                read_again(self, adapter_name, files.weights(), key_mapping)
        if not is_trainable:
            self._to_eval()
        return result

    # -------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: Union[str, "os.PathLike[str]"],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "Self":
        """A model with an adapter from a folder or from the Hub, active.

        Args:
            model: any torch model; it is changed in place.
            model_id, adapter_name, is_trainable, autocast_adapter_dtype, ephemeral_gpu_offload, low_cpu_mem_usage,
                key_mapping, **kwargs: as `load_adapter`.
            config: a config instead of the folder's.

        Returns:
            A `PeftModel`, or its subclass for the config's task_type. Where peftc has no code for the adapter and peft is
            installed, what PEFT's class returns.
        """
        if config is not None and not is_config(config):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        files, _ = files_of(model_id, kwargs)
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None) or None
        label = "config" if config is not None else files.config()
        method = _prepare.method_of(config) if config is not None else method_in(label)
        if goes_to_peft(model, method):
            import peft

            theirs: Any = getattr(peft, cls.__name__)
            converted = config if config is None else as_pefts(config)
            with put_back_if_refused(model):
                return theirs.from_pretrained(  # type: ignore[no-any-return]  # PEFT's model
                    model, model_id, adapter_name, is_trainable, converted, autocast_adapter_dtype, ephemeral_gpu_offload,
                    low_cpu_mem_usage, key_mapping, **kwargs,
                )  # fmt: skip
        if config is None:
            config = read_config(label, attachment(model).host)
        config.inference_mode = not is_trainable
        name, weights = new_name(adapter_name, config), files.weights()
        made: Self = cls.__new__(TASKS.get(_task(config), cls))  # type: ignore[arg-type]  # a subclass of PeftModel
        checkpointing = made._begin(model, config, name)
        result = load_new(made, name, config, label, weights, key_mapping)
        made._finish(name, False, checkpointing)
        if autocast_adapter_dtype and made._to_float32(name):
            read_again(made, name, weights, key_mapping)
        if result.missing_keys:
            warnings.warn(
                f"Found missing adapter keys while loading the checkpoint: {result.missing_keys}.", stacklevel=2
            )
        if not is_trainable:
            made._to_eval()
        return made

    def save_pretrained(
        self,
        save_directory: Union[str, "os.PathLike[str]"],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" to the folder itself, others to subfolders of their names, and README.md.

        Args:
            save_directory: folder, made if need be.
            safe_serialization: adapter_model.safetensors; otherwise adapter_model.bin, as torch.save writes it.
            selected_adapters: names; all if None.
            save_embedding_layers: as for `peftc.get_peft_model_state_dict`.
            is_main_process: False writes nothing, for all but one process of a distributed run.
            path_initial_model_for_weight_conversion: folder with a pissa or olora adapter as it was before training, saved
                with init_lora_weights=True: what is written is a LoRA adapter of twice the rank for the unchanged
                base model.
            **kwargs: state_dict: take the tensors from this dict of the whole model.

        Raises:
            ValueError: the folder is a file; unknown names; a conversion that is not possible.
            OSError: the folder cannot be written. An older file is whole then.
        """
        torch_peft_save.save(
            self,
            os.fspath(save_directory),
            safe_serialization,
            selected_adapters,
            save_embedding_layers,
            is_main_process,
            path_initial_model_for_weight_conversion,
            kwargs.get("state_dict"),
        )

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write README.md with what PEFT notes there, or bring an existing one up to date."""
        torch_card.write(self, output_dir)

    # ------------------------------------------------------------------ merging

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with adapters folded into its weights for good; no adapter is left.

        Args:
            progressbar: show one.
            safe_merge: refuse a result with NaN or infinity.
            adapter_names: which; the active ones if None.

        Raises:
            ValueError: unknown names; safe_merge found NaN or infinity. Nothing is changed then.
        """
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model without adapters. Modules that the active adapter replaces stay replaced, as in PEFT."""
        return self.base_model.unload()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters into the base weights until `unmerge_adapter`; the arguments are those of `merge_and_unload`."""
        self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit."""
        self.base_model.unmerge_adapter()

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """A new adapter, not active, that is a weighted combination of others.

        Args:
            adapters, weights: which, and how much of each.
            adapter_name: its name.
            *args, **kwargs: for LoRA, as PEFT's: combination_type="svd" ("linear", "cat", "svd", "ties", "dare_linear",
                "dare_ties", "magnitude_prune", and these with "_svd"), svd_rank, svd_clamp, svd_full_matrices, svd_driver,
                density, majority_sign_method.

        Raises:
            ValueError: an unknown adapter or combination; ranks or targets that cannot be combined.
            TypeError: AdaLora, which cannot.
        """
        self.base_model.add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)


# -------------------------------------------------------------------------------- tasks


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` for task_type SEQ_CLS: adapters bring the modules called classifier and score along."""

    task_heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` for task_type TOKEN_CLS: adapters bring the modules called classifier and score along."""

    task_heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` for task_type QUESTION_ANS: adapters bring the module called qa_outputs along."""

    task_heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` for task_type CAUSAL_LM."""

    pipeline_tag = "text-generation"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate() with the active adapters; `adapter_names` as in `forward`."""
        model: Any = self.get_base_model()
        if "generation_config" in self.__dict__:
            model.generation_config = self.__dict__["generation_config"]
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` for task_type SEQ_2_SEQ_LM."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` for task_type FEATURE_EXTRACTION."""


#: task_type → class
TASKS: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _task(config: Any) -> str:
    return str(getattr(config.task_type, "value", config.task_type))


def make(
    model: Any,
    config: Any,
    adapter_name: str,
    mixed: bool,
    autocast_adapter_dtype: bool,
    revision: str | None,
    low_cpu_mem_usage: bool,
) -> Any:
    """See `peftc.get_peft_model`."""
    check_config(config)
    if goes_to_peft(model, _prepare.method_of(config), mixed):
        import peft

        with put_back_if_refused(model):
            return peft.get_peft_model(
                model, as_pefts(config), adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage
            )
    name, path = new_name(adapter_name, config), torch_peft_save.name_of(model)
    _warn_before(model, config, path, revision)
    heads = getattr(config, "modules_to_save", None)
    try:
        made = TASKS.get(_task(config), PeftModel)(model, config, name, autocast_adapter_dtype)
    except BaseException:
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = heads
        raise
    for one in (config, made.peft_config[name]):  # two if PEFT has made the layers
        one.base_model_name_or_path = path
        if revision is not None:
            one.revision = revision
    return made


def _warn_before(model: nn.Module, config: Any, path: str | None, revision: str | None) -> None:
    if has_adapters(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=4,
        )
    before = config.base_model_name_or_path
    if before is not None and before != path:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{path}'. Please ensure that the "
            "correct base model is loaded when loading this checkpoint.",
            stacklevel=4,
        )
    if revision is not None and config.revision is not None and config.revision != revision:
        warnings.warn(
            f"peft config has already set base model revision to {config.revision}, overwriting with revision {revision}",
            stacklevel=4,
        )


def _join_peft() -> None:
    """Make our classes subclasses of PEFT's of the same names: isinstance then holds."""
    join_peft()
    import peft
    from peft import tuners
    from peft.tuners.tuners_utils import BaseTuner

    BaseTuner.register(Tuner)
    for cls in TUNERS.values():
        getattr(tuners, cls.__name__).register(cls)
    PeftModel.__bases__ = (peft.PeftModel,)
    for task in TASKS.values():
        task.__bases__ = (PeftModel, getattr(peft, task.__name__))


when_imported("peft", _join_peft)
