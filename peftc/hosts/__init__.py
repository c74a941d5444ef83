"""Hosts: what owns a model.

A host answers what the mixin cannot know: which modules a model has and what they are called, which one is its output
embedding, and what must happen to the model when its adapters change.  Everything else is in `PeftAdapterMixin` and
in the C core.  A second host is a second class with these methods and a row in `_HOSTS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from .._core import AdapterRegistry
from .generation import Generation

#: (dotted name, module)
Modules: TypeAlias = list[tuple[str, Any]]


class Host(Protocol):
    """What the mixin asks of a host. Every `model` argument is the model that the adapters are put on."""

    name: str

    def owns(self, model: object) -> bool:
        """Is this a model of this host?"""

    def new_registry(self) -> Any:
        """Where this host keeps a model's adapters: an AdapterRegistry, or an object with its methods."""

    def serve(self, registry: Any, model: Any) -> None:
        """Called before the registry is used for this model (it may be a copy of the one it was made for)."""

    def new_seed(self) -> int:
        """A seed for the initial values of an adapter, from the host's own generator."""

    def generation(self, model: Any) -> Generation:
        """What depends on the Transformers that the model belongs to."""

    def named_modules(self, model: Any) -> list[tuple[str, Any]]:
        """Every module below the model with its dotted name, the model itself first as "".

        A module that is reachable under several names is listed under each of them."""

    def is_linear(self, module: Any) -> bool:
        """Does "all-linear" mean this module? Perhaps one that no adapter has code for here."""

    def kind(self, module: Any) -> str:
        """torch's class name of what the module does: "Linear", "Conv1D", "Conv2d", "Embedding", … or ""."""

    def adapted_kinds(self, registry: Any, modules: Modules, name: str) -> set[str]:
        """The kinds of the modules that an adapter adapts, among `named_modules`."""

    def output_embedding(self, model: Any, modules: Modules) -> str | None:
        """Dotted name of the head over the vocabulary among `named_modules`, or None."""

    def input_embedding(self, model: Any, modules: Modules) -> str | None:
        """Dotted name of the table of words among `named_modules`, or None."""

    def model_config(self, model: Any) -> dict[str, Any]:
        """The model's configuration; {"model_type": "custom"} when it has none."""

    def device(self, model: Any) -> str:
        """The device that the model is on, for messages."""

    def check_device(self, device: Any, argument: str) -> None:
        """Raise ValueError if adapters cannot be put on `device`, given as `argument`."""

    def as_array(self, tensor: Any) -> Any:
        """A caller's tensor as something that the registry reads."""

    def config_elsewhere(self, refused: Exception, folder: str | None, fields: dict[str, Any] | None) -> Any:
        """The config in a folder, or made of fields, of a method that peftc has no code for; `refused` says so.

        Raises `refused`, or an error that adds a remedy, where nobody else can make such adapters."""

    def make_elsewhere(
        self,
        registry: Any,
        name: str,
        config: Any,
        instead: dict[str, Any],
        source: Any,
        refused: Exception,
        *,
        label: str,
        trainable: bool,
    ) -> tuple[Any, dict[str, Any], list[str], list[str]]:
        """Make an adapter that the registry refused (listed, not active), if somebody else has the code for it.

        instead: fields that stand in for the config's. Returns (the config that it has, fields of it that are settled now,
        missing names, unexpected names); raises as `config_elsewhere`."""

    def flags(self, registry: Any) -> Callable[[], None]:
        """A function that makes trainable again what is trainable now, and nothing else of what there is now."""

    def make_room(self, registry: Any, name: str, rank: int) -> None:
        """Prepare a LoRA adapter for `replace` by any of up to this rank without a change that a compiler would see."""

    def replace(self, registry: Any, name: str, make: Callable[[str], Any]) -> Any:
        """Give LoRA adapter `name` the weights of another, in place; it stays as active as it was.

        make(other_name) makes the other adapter, under a name that is free; what it returns is returned.

        Raises:
            RuntimeError, ValueError: the two do not fit; nothing has changed.
        """

    def plan_places(self, model: Any, device_map: Any, max_memory: Any, offload_folder: Any, offload_index: Any) -> Any:
        """Where the parts of a model that is spread over devices, memory and disk are to be after a load.

        None: where they are. Raises ValueError where the arguments cannot be followed; nothing is changed."""

    def carry_out(self, model: Any, plan: Any) -> None:
        """Do what `plan_places` planned, or raise and leave everything where it is."""

    def to_eval(self, model: Any) -> None:
        """model.eval(), at a cost that does not grow with the number of adapters."""

    def save(self, tensors: dict[str, Any], path: str) -> None:
        """Write an adapter's tensors as safetensors with PEFT's metadata, atomically."""

    def state_from(self, registry: Any, name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """An adapter's tensors out of a state dict of the model; what that lacks is left out."""

    def triplets(self, model: Any, registry: Any, name: str) -> dict[str, Any]:
        """An AdaLora adapter's tensors with their gradients: module name → `_adalora.Triplets`."""

    def mask_triplets(self, model: Any, registry: Any, name: str, masks: dict[str, list[bool]]) -> None:
        """Set singular values to zero: module name → which of its tensors' are kept."""

    def orthogonality_loss(self, model: Any, registry: Any, name: str, weight: float) -> Any:
        """AdaLora's regularisation: see `PeftAdapterMixin.orthogonality_loss`."""

    def adapters_changed(self, model: Any, registry: AdapterRegistry) -> None:
        """Called after adapters were added or removed."""

    def activation_changed(self, model: Any, registry: AdapterRegistry) -> None:
        """Called after the active adapters, or whether they apply, changed."""


def host_of(model: object) -> Host:
    """The host that owns this model.

    Raises:
        TypeError: none does; the text says what would be needed.
    """
    import sys

    from .numpy_host import HOST

    if HOST.owns(model):
        return HOST
    if "torch" in sys.modules:  # nobody has a torch model without it
        from .torch_host import HOST as TORCH

        if TORCH.owns(model):
            return TORCH
    raise TypeError(
        f"peftc cannot put adapters on a {type(model).__module__}.{type(model).__qualname__}: a model is a class that "
        "inherits from peftc.PeftAdapterMixin and from peftc.nn.Module or torch.nn.Module"
    )
