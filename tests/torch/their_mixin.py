"""Transformers' mixin for modules that are no model of Transformers, which is what it is compared on here."""

import logging
import os

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.integrations.peft import PeftAdapterMixin as TheirMixin

V5 = int(transformers.__version__.split(".")[0]) >= 5
#: (major, minor) of PEFT: what it does otherwise does not always come with Transformers 5
PEFT = tuple(map(int, peft.__version__.split(".")[:2]))


class OnCpu(TheirMixin):
    """Outside of PreTrainedModel, Transformers 4's mixin asks the model for this alone."""

    device = torch.device("cpu")


if V5:

    class OnCpu(TheirMixin):
        """Transformers 5 loads adapters with code of PreTrainedModel. Other modules get them from PEFT's functions here, as
        in Transformers 4."""

        def load_adapter(self, folder, adapter_name=None, *, peft_config=None, adapter_state_dict=None,
                         is_trainable=False, **options):  # fmt: skip
            name = adapter_name or "default"
            if self._hf_peft_config_loaded and name in self.peft_config:
                raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
            if folder is None and (peft_config is None or adapter_state_dict is None):
                raise ValueError(
                    "You should either pass a `peft_model_id` or a `peft_config` and `adapter_state_dict` to load an adapter."
                )
            if peft_config is None:
                if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
                    raise ValueError(
                        f"adapter model file not found in {folder}. Make sure you are passing the correct path"
                    )
                peft_config = peft.PeftConfig.from_pretrained(folder)
                peft_config.inference_mode = not is_trainable
            state = peft.utils.load_peft_weights(folder) if adapter_state_dict is None else adapter_state_dict
            peft.inject_adapter_in_model(peft_config, self, name)
            self._hf_peft_config_loaded = True
            state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
            for path, parameter in self.named_parameters():
                if name not in path.split("."):
                    parameter.requires_grad = False  # PEFT 0.21 leaves others as they were
            found = peft.utils.set_peft_model_state_dict(self, state, name)
            marks = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
            missing = [key for key in found.missing_keys if marks in key and name in key.split(".")]
            text = ""
            if found.unexpected_keys:
                named = f".lora_A.{name}." if marks == "lora_" else ".lora_A."
                keys = ", ".join(key.replace(".lora_A.", named) for key in found.unexpected_keys)
                text += (
                    f"Loading adapter weights from state_dict led to unexpected keys not found in the model: {keys}. "
                )
            if missing:
                text += (
                    f"Loading adapter weights from state_dict led to missing keys in the model: {', '.join(missing)}"
                )
            if text:
                logging.getLogger("transformers.integrations.peft").warning(text)
            if peft_config.inference_mode:
                self.eval()
                for module in self.modules():
                    if isinstance(module, BaseTunerLayer):
                        module.requires_grad_(False)


def freeze_counts(model):
    """AdaLora's ranknum counts singular values. PEFT 0.21 makes it trainable, with the others; nobody means that."""
    for path, parameter in model.named_parameters():
        if "ranknum" in path.split("."):
            parameter.requires_grad_(False)
