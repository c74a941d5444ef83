"""LoRA+ (Hayou et al. 2024): the factor B learns faster than A."""

from typing import Any


def loraplus_groups(
    model: Any, lr: float, ratio: float, *, weight_decay: float = 0.0, lr_embedding: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of `peftc.optim` or `torch.optim`: B learns `ratio` times as fast as A.

        optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-4, ratio=16))

    Args:
        model: a model of either host; only parameters that require gradients are taken.
        lr: for A and for everything that is neither B nor a vector.
        ratio: at least 1; harder tasks take more.
        weight_decay: of all groups but the last.
        lr_embedding: for the factors of adapted embeddings; `lr` if None.

    Returns:
        Four groups, as PEFT's `create_loraplus_optimizer` makes them; any may be empty: A and the rest; factors of
        embeddings (only with lr_embedding: in PEFT 0.17 they end up in the first group, 0.21 has 1e-6 for them); B and
        vectors; of those, without weight decay, biases and the parameters of LayerNorms.
    """
    rest: list[Any] = []
    embeddings: list[Any] = []
    fast: list[Any] = []
    fast_without_decay: list[Any] = []
    norms = {
        name for name, module in model.named_modules() if any(c.__name__ == "LayerNorm" for c in type(module).__mro__)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, own = name.rpartition(".")
        parts = name.split(".")
        if lr_embedding is not None and any(part.startswith("lora_embedding_") for part in parts):
            embeddings.append(parameter)
        elif "lora_B" in parts or parameter.ndim == 1:
            (fast_without_decay if "bias" in own or owner in norms else fast).append(parameter)
        else:
            rest.append(parameter)
    return [
        {"params": rest, "weight_decay": weight_decay, "lr": lr},
        {"params": embeddings, "weight_decay": weight_decay, "lr": 1e-6 if lr_embedding is None else lr_embedding},
        {"params": fast, "weight_decay": weight_decay, "lr": lr * ratio},
        {"params": fast_without_decay, "weight_decay": 0.0, "lr": lr * ratio},
    ]
