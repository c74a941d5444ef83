"""The C core of peftc. Private: use the names that `peftc` exports."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, SupportsIndex, TypeAlias, TypeVar, final

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import Buffer, Self, disjoint_base

_FilePath: TypeAlias = str | bytes | PathLike[str] | PathLike[bytes]
_Pair: TypeAlias = int | tuple[int, int] | list[int]
_T = TypeVar("_T")

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> dict[str, Any]: ...

class SafetensorError(Exception): ...

def safetensors_load_file(path: _FilePath, /) -> dict[str, np.ndarray]: ...
def safetensors_load(data: Buffer, /) -> dict[str, np.ndarray]: ...
def safetensors_save_file(
    tensors: Mapping[str, np.ndarray],
    path: _FilePath,
    metadata: Mapping[str, str] | None,
    /,
) -> None: ...
def safetensors_save(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None, /) -> bytes: ...

@final
class SafeSlice:
    """One tensor of an open file; index it as a NumPy array to read that part."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, key: Any, /) -> np.ndarray: ...

@final
class safe_open:
    """An open safetensors file; tensors are read when they are asked for."""

    def __new__(
        cls,
        filename: _FilePath,
        framework: str,
        device: str = "cpu",
        *,
        backend: str = "mmap",
    ) -> Self: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *args: object) -> None: ...
    def keys(self) -> list[str]: ...
    def offset_keys(self) -> list[str]: ...
    def metadata(self) -> dict[str, str] | None: ...
    def get_tensor(self, name: str, /) -> np.ndarray: ...
    def get_tensors(self) -> dict[str, np.ndarray]: ...
    def get_slice(self, name: str, /) -> SafeSlice: ...

def load_torch_bin(path: _FilePath, /) -> dict[str, np.ndarray]:
    """Read the dict of tensors in a file of torch.save, without running anything in it."""

def parse_torch_bin(data: Buffer, /) -> dict[str, np.ndarray]: ...
def torch_bin_raw(source: str | PathLike[str] | Buffer, /) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name → (dtype in safetensors' names, shape, bytes in row-major order), from a path or from the content."""

@final
class AdapterRegistry:
    """One model's modules, its adapters, and which of them are active."""

    def __new__(cls) -> Self: ...
    def bind(
        self,
        modules: Sequence[tuple[str, object]],
        output_embedding: str | None = None,
        input_embedding: str | None = None,
    ) -> None:
        """Append modules (dotted name, object) to the table; objects that are `Module`s learn their registry and index.
        Names that are already bound to the same object are skipped, so the call can be repeated as a model grows."""
    def add(
        self,
        name: str,
        config: str,
        *,
        label: str = "config",
        seed: int = 0,
        trainable: bool = True,
        wait: bool = True,
    ) -> None:
        """Plan, allocate and initialise a new adapter from a JSON config. It is listed but not active. All or nothing."""
    def load(
        self,
        name: str,
        config: str,
        source: str | dict[str, np.ndarray],
        *,
        label: str = "config",
        seed: int = 0,
        trainable: bool = False,
        wait: bool = True,
    ) -> tuple[list[str], list[str]]:
        """Plan, allocate and fill a new adapter from a weights file (.safetensors or .bin) or a dict of arrays.
        Returns (missing keys, unexpected keys). It is listed but not active. All or nothing."""
    def finish(self) -> None:
        """Wait for the values of the adapter that add or load made with wait=False; raises what reading them raises."""
    def remove(self, name: str, /) -> None: ...
    def replace(self, name: str, incoming: str, /) -> None:
        """Let an inactive adapter take another's name and place, among the active ones too. All or nothing."""
    def activate(self, names: Sequence[str], /) -> None:
        """Make exactly these adapters active, in this order. O(1) in modules and adapters. All or nothing."""
    def active(self) -> list[str]: ...
    def names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: object, /) -> bool: ...
    @property
    def enabled(self) -> bool:
        """Whether the active adapters apply."""
    @enabled.setter
    def enabled(self, value: bool, /) -> None: ...
    @property
    def version(self) -> int:
        """Grows with every change of what is active."""
    def peft_type(self, name: str, /) -> str: ...
    def trainable(self, name: str, /) -> bool: ...
    def set_trainable(self, name: str, trainable: bool, /) -> None: ...
    def tensors(self, name: str, /) -> list[tuple[str, str, np.ndarray, bool, bool, str]]:
        """Per tensor: (state-dict key, name in the model, array view of the arena, in the state dict?, trainable?,
        module's dotted name)."""
    def layout(
        self, name: str, /
    ) -> tuple[
        np.ndarray,
        list[str],
        list[str],
        list[str],
        list[bool],
        list[tuple[str, str, tuple[int, ...], list[int], list[int]]],
        list[tuple[str, bool, int, float, float, bool, int]],
    ]:
        """What a host makes its own tensors from: (arena as uint8; of each tensor key, module, parameter, in the state dict?;
        groups of tensors that are alike, slots)."""
    def state_dict(self, name: str, /) -> dict[str, np.ndarray]:
        """state-dict key → view of the arena."""
    def saved_modules(self, name: str, /) -> list[str]:
        """Dotted names of the modules that the adapter replaces (modules_to_save)."""
    def adapted_modules(self, name: str, /) -> list[str]: ...
    def save(self, name: str, path: str, /, prefix: str = "base_model.model.") -> None:
        """Write the adapter's state dict as safetensors straight from the arena, atomically, with PEFT's metadata."""
    def merge(self, names: Sequence[str] | None = None, safe_merge: bool = False) -> None: ...
    def unmerge(self) -> None: ...
    def merged(self) -> list[str]: ...

def lowrank_forward(
    x: Any, y: Any, out: Any, terms: tuple[tuple[Any, Any, float, Any, Any], ...], hidden: Any = None, /
) -> bool:
    """out = y + Σ scaling · (((x Aᵀ) ∘ E) Bᵀ + bias) on torch CPU tensors, each term (A, B, scaling, E, bias). False,
    with nothing written, where the kernels do not take the tensors. `hidden` gets one term's (x Aᵀ)ᵀ."""

def lowrank_backward(
    grad: Any,
    x: Any,
    A: Any,
    B: Any,
    E: Any,
    scaling: float,
    hidden: Any,
    base: Any,
    dx: Any,
    dA: Any,
    dB: Any,
    dE: Any,
    /,
) -> bool:
    """Derivatives of one term of lowrank_forward, into those of the last four that are not None; dx = base + …. False as
    above."""

def dropout_noise(state: np.ndarray, keep: float, value: float, out: Any, /) -> bool:
    """out ← what torch's bernoulli_(keep) draws from that state of its CPU generator, times value; the state moves on."""

def add_lowrank_to_weight(W: Any, A: Any, B: Any, scaling: float, E: Any, transpose: bool, out: Any, /) -> bool:
    """out = W + scaling · (B ⊙ E) A, or its transpose, in one pass over the weight. False as above."""

def adalora_update(
    tensors: list[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]], beta1: float, beta2: float, /
) -> int | None:
    """Averages of (parameter, grad, sensitivity, uncertainty) take in a step; the index of the first that is not finite."""

def adalora_scores(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], e: tuple[np.ndarray, np.ndarray], /
) -> np.ndarray: ...
def adalora_threshold(scores: np.ndarray, keep: int, /) -> float: ...
def adalora_budget(
    step: int, tinit: int, tfinal: int, total_step: int, deltaT: int, initial: int, target: int, /
) -> tuple[int, bool]:
    """How many triplets may stay at a step, and whether the others go at it."""

def orthogonality(matrix: np.ndarray, columns: bool, scale: float = 0.0, grad: np.ndarray | None = None, /) -> float:
    """The Frobenius norm of the Gram matrix of rows or columns, less I; scale times its derivative is added to grad."""

_Watch: TypeAlias = tuple[tuple[Callable[[], Any], ...], tuple[Any, ...], dict[str, Any]]

def lowrank_adder(
    factor: type,
    identity: type,
    dropout: type,
    fresh: type,
    watch: _Watch,
    grad_enabled: Callable[[], bool],
    empty_like: Callable[[Any], Any],
    linear: Callable[..., Any],
    noise: Callable[[Any, Any], Any],
    record: Callable[..., Any],
    /,
) -> tuple[
    Callable[[Any, Any, Any, tuple[str, ...]], Any],
    Callable[[Any, Any, tuple[str, ...]], Any],
    Callable[[Any, Any, tuple[tuple[str, int, int], ...]], Any],
]:
    """Functions (layer, x, y, live) → y + Σ scaling · B(A(x)), (layer, x, live) → base(x) + …, and (layer, x, parts) → the
    same with an adapter for x[begin:end] each; each gives None where torch's own operations are needed."""

def direct_calls(cls: type, watch: _Watch, answer: Callable[[Any, Any, tuple[str, ...]], Any] | None, /) -> None:
    """Let calls of the class's instances skip nn.Module.__call__ and `forward` where nothing would be between them: to the
    base layer if no adapter is active, else to answer(layer, x, live) unless that is None."""

def lowrank_node(
    watch: _Watch,
    grad_enabled: Callable[[], bool],
    linear: Callable[..., Any],
    matmul: Callable[..., Any],
    empty: Callable[..., Any],
    empty_like: Callable[[Any], Any],
    sum: Callable[..., Any],
    derivatives: Callable[[Any, Any], tuple[Any, ...]],
    /,
) -> tuple[Callable[..., Any], Callable[[Any, Any], tuple[Any, ...]]]:
    """(forward, backward) of the torch.autograd.Function that is the low-rank sum."""

def scale_adder(
    fresh: type,
    watch: _Watch,
    grad_enabled: Callable[[], bool],
    empty_like: Callable[[Any], Any],
    linear: Callable[..., Any],
    record: Callable[..., Any],
    /,
) -> tuple[Callable[[Any, Any, tuple[str, ...]], Any], Callable[[Any, Any, tuple[str, ...], bool], Any]]:
    """Functions (layer, x, live) → base(x) ∘ vector or base(x ∘ vector), and (layer, x, live, before) → x ∘ vector; each gives
    None where torch's own operations are needed."""

def scale_node(
    watch: _Watch,
    grad_enabled: Callable[[], bool],
    linear: Callable[..., Any],
    matmul: Callable[..., Any],
    empty_like: Callable[[Any], Any],
    product: Callable[[Any, Any], Any],
    derivatives: Callable[[Any, Any], tuple[Any, ...]],
    /,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) of the torch.autograd.Function that is the product of rows with a vector."""

def module_like(template: _T, /) -> _T:
    """A new object with the template's items: its containers copied one level deep, everything else shared."""

def modules_like(templates: list[_T], /) -> list[_T]: ...
def trees_like(templates: list[_T], /) -> list[_T]:
    """As modules_like, but the children of each are new, too."""

def set_requires_grad(parameters: list[Any] | tuple[Any, ...], flag: bool, /) -> None: ...
def walk_modules(
    root: Any, leads: dict[type, tuple[str, ...]], find: Callable[[type], tuple[str, ...]], /
) -> list[tuple[str, Any]]:
    """(dotted name, module) of everything below root, each once; wrappers (leads: the way to what is in them) are
    looked through."""

def describe_modules(
    modules: list[tuple[str, Any]], linear: type | None, of_class: dict[type, Any], describe: Callable[[Any], Any], /
) -> tuple[list[tuple[str, Any]], list[Any]]:
    """(name, row for AdapterRegistry.bind) of each module: of_class's, else describe(module), which plain ones of the class
    `linear` do without. And the modules' own parameters."""

def put_in_eval(root: Any, kinds: dict[type, int], ask: Callable[[type], int], /) -> None:
    """root.eval(); kinds: 0 for classes whose train() is torch's, 1 for adapted layers, 2 for a train() to be called."""

def put_items(objects: list[Any], puts: tuple[tuple[tuple[str, ...], str, Any], ...], /) -> None:
    """Set items in each object; puts are (path, key, a list of a value for each or one for all)."""

def find_places(modules: dict[str, Any], paths: list[str], /) -> tuple[list[Any], list[str], list[Any]]:
    """(parents, keys, tops) such that parent._modules[key] is top, of modules by their dotted names."""

def tensors_over(arena: Any, groups: list[Any], count: int, /) -> list[Any] | None:
    """torch tensors over AdapterRegistry.layout's arena; None where torch cannot be asked to make them."""

def own_parameters(modules: list[Any], /) -> list[Any]: ...
def parameters_of(layers: list[Any], fields: tuple[str, ...], name: str, /) -> list[Any]:
    """One adapter's parameters in each layer's children called `fields`."""

def drop_adapter(
    layers: list[Any], holding: tuple[str, ...], other: tuple[str, ...], later: tuple[str, ...], name: str, /
) -> list[int]:
    """Take an adapter out of the fields of each layer; the indices of layers with nothing left in `holding`."""

def json_loads(text: str | bytes, label: str = "config") -> Any: ...
def json_canonical(text: str | bytes, label: str = "config") -> str: ...
def config_check(text: str | bytes, label: str = "config") -> list[str]:
    """Check an adapter config as the core does; returns the names of fields that are unknown."""

def config_read(path: str | PathLike[str], /) -> bytes: ...
def config_write(path: str | PathLike[str], text: str | bytes, /) -> None: ...
def pattern_fullmatch(pattern: str, subject: str, /) -> bool: ...
def pattern_match_suffix(pattern: str, subject: str, /) -> bool: ...
def pattern_search(pattern: str, subject: str, /) -> tuple[str | None] | None: ...
def manual_seed(seed: int, /) -> None:
    """Start the generator of fresh weights and dropout; `peftc.manual_seed` calls it."""

def thread_seed(seed: int | None, /) -> None:
    """Let this thread draw from a generator of its own, or (None) from the process's again."""

def safetensors_layout(data: Buffer, label: str, /) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Per tensor of a file given as a buffer: (name, dtype, shape, offset, bytes)."""

@disjoint_base
class Parameter:
    """An array that a layer computes with; behaves like the array."""

    def __new__(cls, data: ArrayLike, requires_grad: bool = True) -> Self: ...
    @property
    def data(self) -> np.ndarray: ...
    @data.setter
    def data(self, value: ArrayLike, /) -> None: ...
    @property
    def grad(self) -> np.ndarray | None: ...
    @grad.setter
    def grad(self, value: ArrayLike | None, /) -> None: ...
    @property
    def requires_grad(self) -> bool: ...
    @requires_grad.setter
    def requires_grad(self, value: bool, /) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def _raw(self) -> np.ndarray: ...
    @property
    def _dtype_name(self) -> str: ...
    @classmethod
    def _from_raw(cls, data: np.ndarray, dtype: Any, /) -> Parameter: ...
    def _convert(self, dtype: Any, /) -> None: ...
    def _copy_from(self, other: Parameter, /) -> None: ...
    def _share(self, other: Parameter, /) -> None: ...
    def _fill(self, kind: str, a: float, b: float, /) -> None: ...
    def _attach(self, registry: AdapterRegistry, adapter: str, /) -> None: ...
    def __array_ufunc__(self, ufunc: Any, method: str, /, *inputs: Any, **kwargs: Any) -> Any: ...
    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any, /) -> Any: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray: ...
    def __getattribute__(self, name: str, /) -> Any: ...  # what is not here is the array's
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def __add__(self, value: Any, /) -> Any: ...
    def __radd__(self, value: Any, /) -> Any: ...
    def __sub__(self, value: Any, /) -> Any: ...
    def __rsub__(self, value: Any, /) -> Any: ...
    def __mul__(self, value: Any, /) -> Any: ...
    def __rmul__(self, value: Any, /) -> Any: ...
    def __truediv__(self, value: Any, /) -> Any: ...
    def __rtruediv__(self, value: Any, /) -> Any: ...
    def __matmul__(self, value: Any, /) -> Any: ...
    def __rmatmul__(self, value: Any, /) -> Any: ...
    def __pow__(self, value: Any, mod: None = None, /) -> Any: ...
    def __rpow__(self, value: Any, mod: None = None, /) -> Any: ...
    def __neg__(self) -> Any: ...

@disjoint_base
class Module:
    """The C base of `peftc.nn.Module`: the call, and the link to the model's adapters."""

    def __init__(self) -> None: ...
    @property
    def training(self) -> bool: ...
    @training.setter
    def training(self, value: bool, /) -> None: ...
    @property
    def registry(self) -> AdapterRegistry | None: ...
    @property
    def _bound_name(self) -> str | None: ...
    @property
    def _outputs(self) -> list[Node] | int | None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

@disjoint_base
class Layer(Module):
    """A module with a weight: the base of the layers."""

    @property
    def weight(self) -> Parameter | None: ...
    @weight.setter
    def weight(self, value: ArrayLike, /) -> None: ...
    @property
    def bias(self) -> Parameter | None: ...
    @bias.setter
    def bias(self, value: ArrayLike | None, /) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def _parameters(self) -> dict[str, Parameter | None]: ...

class Linear(Layer):
    @property
    def weight(self) -> Parameter: ...
    @weight.setter
    def weight(self, value: ArrayLike, /) -> None: ...
    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: Any = None) -> None: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    def forward(self, x: ArrayLike, /) -> np.ndarray: ...
    def forward_act(self, x: ArrayLike, act: str, /) -> np.ndarray: ...

class Conv1D(Layer):
    @property
    def weight(self) -> Parameter: ...
    @weight.setter
    def weight(self, value: ArrayLike, /) -> None: ...
    def __init__(self, nf: int, nx: int, dtype: Any = None) -> None: ...
    @property
    def nf(self) -> int: ...
    @property
    def nx(self) -> int: ...
    def forward(self, x: ArrayLike, /) -> np.ndarray: ...
    def forward_act(self, x: ArrayLike, act: str, /) -> np.ndarray: ...

class Conv2d(Layer):
    @property
    def weight(self) -> Parameter: ...
    @weight.setter
    def weight(self, value: ArrayLike, /) -> None: ...
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Pair,
        stride: _Pair = 1,
        padding: _Pair | str = 0,
        dilation: _Pair = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: Any = None,
    ) -> None: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def kernel_size(self) -> tuple[int, int]: ...
    @property
    def stride(self) -> tuple[int, int]: ...
    @property
    def padding(self) -> tuple[int, int]: ...
    @property
    def dilation(self) -> tuple[int, int]: ...
    def forward(self, x: ArrayLike, /) -> np.ndarray: ...

class Embedding(Layer):
    @property
    def weight(self) -> Parameter: ...
    @weight.setter
    def weight(self, value: ArrayLike, /) -> None: ...
    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, dtype: Any = None
    ) -> None: ...
    @property
    def num_embeddings(self) -> int: ...
    @property
    def embedding_dim(self) -> int: ...
    @property
    def padding_idx(self) -> int | None: ...
    def forward(self, ids: ArrayLike, /) -> np.ndarray: ...

class LayerNorm(Layer):
    def __init__(
        self,
        normalized_shape: SupportsIndex | tuple[int] | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: Any = None,
    ) -> None: ...
    @property
    def normalized_shape(self) -> tuple[int]: ...
    @property
    def eps(self) -> float: ...
    def forward(self, x: ArrayLike, residual: ArrayLike | None = None, /) -> np.ndarray: ...

class RMSNorm(Layer):
    def __init__(
        self,
        normalized_shape: SupportsIndex | tuple[int] | list[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        dtype: Any = None,
    ) -> None: ...
    @property
    def normalized_shape(self) -> tuple[int]: ...
    @property
    def eps(self) -> float | None: ...
    def forward(self, x: ArrayLike, residual: ArrayLike | None = None, /) -> np.ndarray: ...

def gelu(x: ArrayLike, /) -> np.ndarray: ...
def gelu_tanh(x: ArrayLike, /) -> np.ndarray: ...
def relu(x: ArrayLike, /) -> np.ndarray: ...
def silu(x: ArrayLike, /) -> np.ndarray: ...
def tanh(x: ArrayLike, /) -> np.ndarray: ...
def softmax(x: ArrayLike, /) -> np.ndarray: ...
def dropout(x: ArrayLike, p: float, /) -> np.ndarray: ...
def linear(x: ArrayLike, weight: ArrayLike, bias: ArrayLike | None, /) -> np.ndarray: ...
def layer_norm(
    x: ArrayLike, weight: ArrayLike | None, bias: ArrayLike | None, eps: float, residual: ArrayLike | None, /
) -> np.ndarray: ...
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    num_heads: int,
    mask: ArrayLike | None,
    scale: float | None,
    dropout: float = 0.0,
    /,
) -> np.ndarray: ...

@final
class Node:
    """A recorded operation of a forward pass in train mode."""

    @property
    def shape(self) -> tuple[int, ...]: ...

def backward(nodes: tuple[Node, ...], gradients: tuple[ArrayLike, ...], /) -> None: ...
def record(inputs: tuple[Any, ...], result: np.ndarray, function: Any, /) -> Any: ...
def set_gradients(on: bool, /) -> None: ...
def set_tensor_type(type: type, /) -> None: ...
def adamw_step(
    items: Any,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: float,
    maximize: bool = False,
    /,
) -> None: ...
def sgd_step(
    items: Any,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    /,
) -> None: ...
def first_bad_gradient(parameters: Any, /) -> int: ...
def gradient_norms(parameters: Any, kind: float, /) -> list[float]: ...
def scale_gradients(parameters: Any, factor: float, /) -> None: ...
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: int,
    smoothing: float,
    mean: bool,
    /,
) -> tuple[float, np.ndarray]: ...
