"""A new adapter that is a weighted combination of others.

Linear and SVD combinations, and the pruning ones: TIES (Yadav et al. 2023: trim, elect a sign, average those that agree),
DARE (Yu et al. 2023: drop at random) and pruning by magnitude. As in PEFT, whose results these are, what DARE keeps is
not scaled up.
"""

import copy
import math
import warnings
from typing import Any

import torch

from .torch_lora import Conv2d, Embedding

_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_SAME_RANK = ("linear", *_PRUNING)
_WITH_SVD = ("svd", *(f"{name}_svd" for name in _PRUNING))


# ----------------------------------------------------------------------- combining


def combine(how: str, tensors: list[torch.Tensor], weights: torch.Tensor, pruning: dict[str, Any]) -> torch.Tensor:
    """One tensor of several of the same shape; `how` is "linear" or one of the pruning combinations."""
    if how != "linear":
        tensors = [_prune(tensor, pruning["density"], how.startswith("dare")) for tensor in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * weights.view(-1, *(1 for _ in tensors[0].shape))
    if not how.endswith("ties"):
        return weighted.sum(dim=0)
    agree = _agree(stacked, pruning["majority_sign_method"])
    return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1.0)


def _prune(tensor: torch.Tensor, density: float, at_random: bool) -> torch.Tensor:
    """Zeros but for a share `density` of the values: the largest, or those that chance keeps."""
    if density is None:
        raise ValueError("this combination_type prunes: density, the share of the values to keep, is needed")
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if at_random:
        return tensor * torch.bernoulli(torch.full_like(tensor, density))
    largest = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[largest] = 1
    return tensor * mask.view(tensor.shape)


def _agree(stacked: torch.Tensor, method: str) -> torch.Tensor:
    """Which values have the sign that was elected at their place: by their sum, or by how many there are."""
    signs = stacked.sign()
    if method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{method}"')
    votes = (stacked if method == "total" else signs).sum(dim=0)
    return signs == torch.where(votes >= 0, 1, -1)


# ----------------------------------------------------------------------------- LoRA


def add_lora(
    tuner: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    svd: dict[str, Any],
    pruning: dict[str, Any],
) -> None:
    """See `LoraModel.add_weighted_adapter`."""
    configs = tuner.peft_config
    if adapter_name in configs:
        return
    how, rank = _settle(tuner, adapters, combination_type, svd["rank"])
    config = copy.deepcopy(configs[adapters[0]])
    config.r = config.lora_alpha = rank
    config.target_modules = _union([configs[name].target_modules for name in adapters], "target_modules")
    config.alpha_pattern, config.rank_pattern = {}, {}
    registry = tuner._registry
    by_module: dict[str, list[tuple[str, Any, float]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for path, layer in registry.adapted_layers(name):
            by_module.setdefault(path, []).append((name, layer, weight))
    # Computed before anything is added, so that what cannot be leaves no trace.
    factors = {path: _factors(uses, how, rank, svd, pruning) for path, uses in by_module.items()}
    tuner.add(adapter_name, config)
    registry.set_trainable(adapter_name, False)
    with torch.no_grad():
        for path, layer in registry.adapted_layers(adapter_name):
            a, b = _parameters(layer, adapter_name)
            for parameter, value, dim in ((a, factors[path][0], 0), (b, factors[path][1], 1)):
                parameter.zero_()
                parameter.narrow(dim, 0, value.shape[dim]).copy_(value)


def _settle(tuner: Any, adapters: list[str], combination_type: str, svd_rank: int | None) -> tuple[str, int]:
    """(combination, rank of the result) after all checks."""
    configs = tuner.peft_config
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist")
    for name in adapters:
        if tuner._registry.part(name) is not None:
            raise NotImplementedError(
                f"adapter {name} has layers that PEFT made, and peftc can combine its own only: "
                f"{', '.join(tuner._registry.adapted_modules(name))}"
            )
    _check_saved(tuner, adapters)
    how = "linear" if len(adapters) == 1 else combination_type
    ranks = [max([config.r, *(config.rank_pattern or {}).values()]) for config in map(configs.get, adapters)]
    if how in _SAME_RANK:
        if len(set(ranks)) != 1:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                "dare_linear."
            )
        return how, ranks[0]
    if how == "cat":
        return how, sum(ranks)
    if how in _WITH_SVD:
        return how, svd_rank or max(ranks)
    raise ValueError(f"Invalid combination_type: {how}")


def _check_saved(tuner: Any, adapters: list[str]) -> None:
    owners: dict[str, int] = {}
    for name in adapters:
        for path in tuner._registry.saved_modules(name):
            owners[path] = owners.get(path, 0) + 1
    shared = sum(count > 1 for count in owners.values())
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s)."
        )


def _union(targets: list[Any], field: str) -> Any:
    if not targets:
        raise ValueError("Found no adapter matching the names in []")
    if all(isinstance(one, str) for one in targets):
        return "|".join(f"({one})" for one in targets)
    if any(isinstance(one, str) for one in targets):
        raise ValueError(
            f"all adapter configs should follow the same target modules type: {field} is a pattern in some and a list in "
            "others. Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
        )
    return set().union(*(one or () for one in targets))


def _parameters(layer: Any, name: str) -> tuple[Any, Any]:
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _factors(
    uses: list[tuple[str, Any, float]], how: str, rank: int, svd: dict[str, Any], pruning: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one module of the new adapter, perhaps of a smaller rank than it has."""
    layer = uses[0][1]
    scales = [weight * layer.scaling[name] for name, _, weight in uses]
    pairs = [tuple(p.detach() for p in _parameters(layer, name)) for name, _, _ in uses]
    if how == "cat":
        downs = [a * weight * layer.scaling[name] for (a, _), (name, _, weight) in zip(pairs, uses, strict=True)]
        return torch.cat(downs), torch.cat([b for _, b in pairs], dim=1)
    if how in _WITH_SVD:
        return _by_svd(uses, how.removesuffix("svd").removesuffix("_") or "linear", rank, svd, pruning)
    # Each of A and B gets the root of the weight; a negative one's sign goes to A.
    device = pairs[0][0].device
    roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales], device=device)
    signed = roots * torch.tensor([math.copysign(1.0, scale) for scale in scales], device=device)
    down = combine(how, [a for a, _ in pairs], signed, pruning).to(pairs[0][0].dtype)
    return down, combine(how, [b for _, b in pairs], roots, pruning).to(pairs[0][1].dtype)


def _by_svd(
    uses: list[tuple[str, Any, float]],
    how: str,
    rank: int,
    svd: dict[str, Any],
    pruning: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    layer: Any = uses[0][1]
    deltas = [layer.get_delta_weight(name).detach() for name, _, _ in uses]
    weights = torch.tensor([weight for _, _, weight in uses], device=deltas[0].device)
    delta = combine(how, deltas, weights, pruning)
    a, b = _parameters(layer, uses[0][0])
    shape = delta.shape
    if isinstance(layer, Conv2d):
        delta = delta.flatten(1)
    elif isinstance(layer, Embedding) or layer.fan_in_fan_out:
        delta = delta.T
    u, s, vh = torch.linalg.svd(delta, full_matrices=svd["full_matrices"], driver=svd["driver"])
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if svd["clamp"] is not None:
        bound = torch.quantile(torch.cat([up.flatten(), down.flatten()]), svd["clamp"])
        up, down = up.clamp(-bound, bound), down.clamp(-bound, bound)
    if isinstance(layer, Conv2d):
        up, down = up.reshape(*up.shape, 1, 1), down.reshape(-1, *shape[1:])
    return down.to(a.dtype), up.to(b.dtype)


# ------------------------------------------------------------------------------ IA³


def add_ia3(tuner: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """See `IA3Model.add_weighted_adapter`."""
    configs = tuner.peft_config
    if adapter_name in configs:
        return
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist")
    _check_saved(tuner, adapters)
    config = copy.deepcopy(configs[adapters[0]])
    config.target_modules = _union([configs[name].target_modules for name in adapters], "target_modules")
    config.feedforward_modules = _union([configs[name].feedforward_modules for name in adapters], "feedforward_modules")
    registry = tuner._registry
    tuner.add(adapter_name, config)
    registry.set_trainable(adapter_name, False)
    with torch.no_grad():
        for _, layer in registry.adapted_layers(adapter_name):
            vectors = layer._modules["ia3_l"]._parameters
            vectors[adapter_name].zero_()
            for name, weight in zip(adapters, weights, strict=True):
                if name in vectors:
                    vectors[adapter_name] += vectors[name] * weight
