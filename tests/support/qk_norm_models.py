"""Models of transformers with norms on queries and keys, small."""

import transformers

LAYERS, D = 2, 8
SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=D))


def olmo2():
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES))


def gemma3():
    layers = ["full_attention"] * LAYERS  # layers with a sliding window stay dense
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, head_dim=D, layer_types=layers))


MODELS = {"qwen3": qwen3, "olmo2": olmo2, "gemma3": gemma3}
