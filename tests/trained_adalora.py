"""An AdaLora adapter as it is after training with PEFT: ranks given up, and a rank_pattern that says which."""

import peft
import torch


def train_adalora(base, folder, shake, logits):
    """(folder, logits) of an AdaLora adapter with a learned rank_pattern, made by PEFT on `base`.

    shake(model, name) gives an adapter values; logits(model) runs the model.
    """
    config = peft.AdaLoraConfig(target_modules=["query"], init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)
    model = peft.get_peft_model(base, config).eval()
    shake(model, "default")
    keep = [True, False, True, False]
    pattern = {}
    for path, parameter in model.named_parameters():
        if "lora_E" in path:
            pattern[path.removeprefix("base_model.model.")] = keep
            parameter.data[~torch.tensor(keep)] = 0
    expected = logits(model)
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(folder)
    return folder, expected
