"""What the examples here share: a Llama and tokens so small that each trains in seconds on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lighthouse_fx import LighthouseConfig

STEPS = 6
TOKENS = 64
PYRAMID = LighthouseConfig(levels=3, pooling=2, topk=8)  # small, for 64 tokens; LighthouseConfig() fits any length


def llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count up from anywhere, by one or by two."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(TOKENS) * (1 + index % 2) + index) % 64  # [N]
        return {"input_ids": ids, "labels": ids}
