"""What a config without target_modules adapts, by the model's `model_type`.  The values are PEFT's."""


def _by_model(rows: dict[tuple[str, ...], str]) -> dict[str, list[str]]:
    return {model: list(targets) for targets, models in rows.items() for model in models.split()}


_QUERY_AND_VALUE = ("q_proj", "v_proj")

#: peft_type → model_type → target_modules
TARGETS: dict[str, dict[str, list[str]]] = {
    "LORA": _by_model(
        {
            ("q", "v"): "t5 mt5",
            _QUERY_AND_VALUE: "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
            "qwen2 qwen3",
            ("c_attn",): "gpt2 gpt_bigcode",
            ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
            ("q", "v", "q_proj", "v_proj"): "blip-2",
            ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
            ("query_proj", "value_proj"): "deberta-v2",
            ("in_proj",): "deberta",
            ("Wqkv",): "mpt",
            ("c_proj", "c_attn"): "btlm",
            ("qkv_proj",): "codegen",
            ("q_proj", "v_proj", "fc1", "fc2"): "phi",
        }
    ),
    "ADALORA": _by_model(
        {
            ("q", "k", "v", "o", "wi", "wo"): "t5",
            ("q", "k", "v", "o", "wi_0", "wi_1", "wo"): "mt5",
            ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): "bart opt",
            ("c_attn",): "gpt2 gpt_bigcode",
            ("query_key_value",): "bloom gpt_neox",
            _QUERY_AND_VALUE: "gptj gpt_neo llama llama4 gemma gemma2 gemma3_text qwen2 qwen3",
            ("query", "value"): "bert",
            ("query", "key", "value", "dense"): "roberta",
            ("query_proj", "key_proj", "value_proj", "dense"): "deberta-v2",
            ("in_proj",): "deberta",
        }
    ),
    "IA3": _by_model(
        {
            ("k", "v", "wo"): "t5",
            ("k", "v", "wi_1"): "mt5",
            ("c_attn", "mlp.c_proj"): "gpt2 gpt_bigcode",
            ("query_key_value", "mlp.dense_4h_to_h"): "bloom",
            ("key", "value", "output.dense"): "bert roberta",
            ("q_proj", "k_proj", "fc2"): "opt",
            ("q_proj", "v_proj", "fc_out"): "gptj",
            ("query_key_value", "dense_4h_to_h"): "gpt_neox RefinedWebModel RefinedWeb falcon",
            ("q_proj", "v_proj", "c_proj"): "gpt_neo",
            ("q_proj", "v_proj", "fc2"): "bart phi",
            ("k_proj", "v_proj", "down_proj"): "llama mistral",
            ("q_proj", "v_proj", "down_proj"): "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
            ("k_proj", "v_proj", "w2"): "mixtral",
            ("key_proj", "value_proj", "output.dense"): "deberta-v2",
            ("in_proj", "output.dense"): "deberta",
        }
    ),
}

#: IA3's feedforward_modules=None, likewise: model_type → feedforward_modules
FEEDFORWARD: dict[str, list[str]] = _by_model(
    {
        ("wo",): "t5",
        (): "mt5",
        ("mlp.c_proj",): "gpt2 gpt_bigcode",
        ("mlp.dense_4h_to_h",): "bloom",
        ("output.dense",): "bert roberta deberta-v2 deberta",
        ("fc2",): "opt bart phi",
        ("fc_out",): "gptj",
        ("dense_4h_to_h",): "gpt_neox RefinedWeb RefinedWebModel falcon",
        ("c_proj",): "gpt_neo",
        ("down_proj",): "llama llama4 mistral gemma gemma2 gemma3_text qwen2 qwen3",
        ("w2",): "mixtral",
    }
)
