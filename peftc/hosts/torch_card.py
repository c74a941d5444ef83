"""README.md of an adapter's folder: the card that PEFT writes beside the weights."""

import os
import sys
from importlib import metadata
from typing import Any

from .. import _prepare

#: The version of PEFT whose files these are, where no peft is installed to say its own.
PEFT_VERSION = "0.17.1"


def write(model: Any, folder: str) -> None:
    """Write the card of a `PeftModel`, or bring an existing one up to date. What a person wrote stays.

    Without huggingface_hub's template engine (the package jinja2) a new card cannot be made, and none is written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        card = ModelCard.load(path)
    else:
        try:
            card = ModelCard.from_template(ModelCardData())
        except ImportError:
            return
    base = model.get_base_model()
    card.data["library_name"] = "peft"
    tags = {*(getattr(base, "model_tags", None) or ()), *_tags(model, base)}
    if tags:
        card.data["tags"] = sorted(tags)
    if not card.data.pipeline_tag and model.pipeline_tag is not None:
        card.data.pipeline_tag = model.pipeline_tag
    config: Any = getattr(base, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, dict) and "_name_or_path" in values:
        card.data["base_model"] = values["_name_or_path"]
    lines = card.text.splitlines()
    heading, version = "### Framework versions", f"- PEFT {_version()}"
    if version not in lines:
        if heading in lines:
            lines.insert(lines.index(heading) + 2, version)
        else:
            lines.append(f"{heading}\n\n{version}")
    card.text = "\n".join(lines)
    card.save(path)


def _tags(model: Any, base: Any) -> set[str]:
    tags = set()
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and isinstance(base, modeling.PreTrainedModel):
        tags.add("transformers")
    if _prepare.method_of(model.active_peft_config) == "LORA":
        tags.add("lora")
    if hasattr(base, "name_or_path"):
        tags.add(f"base_model:adapter:{base.name_or_path}")
    return tags


def _version() -> str:
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return PEFT_VERSION
