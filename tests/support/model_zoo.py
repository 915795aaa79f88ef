"""Small models of many families, random weights, and what is to become of their attention: the rows of docs/models.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

LAYERS, HEADS, WIDTH, TOKENS = 2, 4, 32, 72
_VOCABULARY = 96
_USUAL = {
    "vocab_size": _VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT_NOTE = "nothing: keys of 16 dimensions and values of 12 are supported"
_MASK_NOTE = "its layers are always given a mask, so compile it as a whole"
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GEMMA = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}

_LITGPT_LLAMA = {
    "n_query_groups": 2, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "parallel_residual": False,
    "bias": False, "rotary_percentage": 1.0,
}  # fmt: skip
# Transformers 5.17 itself leaves Gemma 2's soft-capping out, to call scaled_dot_product_attention; 5.24 writes it out instead.
_GEMMA_2_CALLS_SDPA = transformers.Gemma2PreTrainedModel._supports_sdpa


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model and what is expected of it: for each attention of a step, in order, whether it is rewritten.

    `qk_norm`: queries and keys are all of one length, so that another scorer than their norms has to rank them. `breaks`: the
    model's own code breaks the graph; all others are compiled with fullgraph=True. `note` is for the reader. `package`: what
    has to be there to build it.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    whole: tuple[bool, ...] = (True,) * LAYERS
    layers: tuple[bool, ...] = (True,) * LAYERS
    qk_norm: bool = False
    breaks: bool = False
    note: str = ""
    package: str = "transformers"


def token_ids() -> torch.Tensor:
    return torch.randint(0, _VOCABULARY, (2, TOKENS))


def images() -> torch.Tensor:
    return torch.rand(1, 3, 40, 40, dtype=torch.float64)  # 100 patches and one token for the class


def vectors() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)


def causal(family: str, *, config: str = "", **fields) -> Callable[[], nn.Module]:
    """A causal language model of transformers."""

    def build() -> nn.Module:
        settings = getattr(transformers, config or f"{family}Config")(**(_USUAL | fields))
        return getattr(transformers, f"{family}ForCausalLM")(settings)

    return build


def mixture(family: str, experts: str = "batched_mm", **fields) -> Callable[[], nn.Module]:
    """A causal language model with routed experts; `experts` is how they are computed. grouped_mm knows no float64."""

    def build() -> nn.Module:
        model = causal(family, **fields)()
        model.set_experts_implementation(experts)
        return model

    return build


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=_VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, use_cache=False,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    fields = {name: value for name, value in _USUAL.items() if name not in ("num_key_value_heads", "use_cache")}
    return transformers.BertForMaskedLM(transformers.BertConfig(**fields, **_NO_DROPOUT))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, image_size=40,
        patch_size=4, **_NO_DROPOUT,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def litgpt(**fields) -> Callable[[], nn.Module]:
    """litgpt's one model; `fields` make it any family's."""

    def build() -> nn.Module:
        package = importlib.import_module("litgpt")
        usual = {
            "block_size": 128, "padded_vocab_size": _VOCABULARY, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH,
            "intermediate_size": 48,
        }  # fmt: skip
        return package.GPT(package.Config(**(usual | fields)))

    return build


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` over one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, WIDTH]
        return x + self.attention(x, x, x, need_weights=False)[0]


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` in a module of one's own: alone, Dynamo skips PyTorch's layers as it skips all of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=48, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, WIDTH]
        return self.layer(x)


class Stack(nn.Module):
    """Layers of one kind, one after the other."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, N, WIDTH]
        for layer in self.layers:
            x = layer(x)
        return x


_DENSE = (False,) * LAYERS
MODELS = {
    "Llama": Entry(build=causal("Llama"), inputs=token_ids),
    "Mistral": Entry(build=causal("Mistral", head_dim=8, sliding_window=None), inputs=token_ids),
    "Mistral, sliding window": Entry(
        build=causal("Mistral", head_dim=8, sliding_window=16), inputs=token_ids, whole=_DENSE, layers=_DENSE
    ),
    "Qwen2": Entry(build=causal("Qwen2"), inputs=token_ids),
    "Qwen3": Entry(build=causal("Qwen3", head_dim=8), inputs=token_ids, qk_norm=True),
    "Gemma 2": Entry(
        build=causal("Gemma2", **_GEMMA),
        inputs=token_ids,
        whole=(False, _GEMMA_2_CALLS_SDPA),
        layers=(False, _GEMMA_2_CALLS_SDPA),
    ),
    "Gemma 3": Entry(
        build=causal(
            "Gemma3", config="Gemma3TextConfig", **_GEMMA, layer_types=["sliding_attention", "full_attention"]
        ),
        inputs=token_ids,
        whole=(False, True),
        layers=(False, True),
        qk_norm=True,
    ),
    "OLMo 2": Entry(build=causal("Olmo2"), inputs=token_ids, qk_norm=True),
    "Phi-3": Entry(build=causal("Phi3", sliding_window=None), inputs=token_ids),
    "GPT-2": Entry(build=gpt2, inputs=token_ids),
    "GPT-NeoX": Entry(build=causal("GPTNeoX"), inputs=token_ids),
    "Falcon": Entry(
        build=causal("Falcon", new_decoder_architecture=False, multi_query=True),
        inputs=token_ids,
        layers=_DENSE,
        note=_MASK_NOTE,
    ),
    "Falcon, grouped heads": Entry(
        build=causal("Falcon", new_decoder_architecture=True, num_kv_heads=2),
        inputs=token_ids,
        layers=_DENSE,
        note=_MASK_NOTE,
    ),
    "Falcon, ALiBi": Entry(
        build=causal("Falcon", new_decoder_architecture=False, multi_query=False, alibi=True),
        inputs=token_ids,
        whole=_DENSE,
        layers=_DENSE,
        note="ALiBi adds to the scores what no causal mask adds",
    ),
    "StarCoder2": Entry(
        build=causal(
            "Starcoder2", sliding_window=None, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0
        ),
        inputs=token_ids,
    ),
    "Granite": Entry(build=causal("Granite", attention_multiplier=0.25), inputs=token_ids),
    "Mixtral": Entry(build=mixture("Mixtral", sliding_window=None, num_local_experts=4, head_dim=8), inputs=token_ids),
    "Mixtral, experts in a loop": Entry(
        build=mixture("Mixtral", "eager", sliding_window=None, num_local_experts=4, head_dim=8),
        inputs=token_ids,
        whole=_DENSE,
        breaks=True,
        note="the loop breaks the graph, so that the mask is made in another one; transformers' other experts do not",
    ),
    "OLMoE": Entry(build=mixture("Olmoe", **_EXPERTS), inputs=token_ids, qk_norm=True),
    "Qwen3 MoE": Entry(
        build=mixture("Qwen3Moe", moe_intermediate_size=16, head_dim=8, **_EXPERTS), inputs=token_ids, qk_norm=True
    ),
    "DeepSeek V2": Entry(build=mixture("DeepseekV2", **_LATENT), inputs=token_ids, note=_LATENT_NOTE),
    "DeepSeek V3": Entry(
        build=mixture("DeepseekV3", n_group=2, topk_group=1, **_LATENT), inputs=token_ids, note=_LATENT_NOTE
    ),
    "litgpt, as Pythia": Entry(build=litgpt(), inputs=token_ids, package="litgpt"),
    "litgpt, as Llama": Entry(build=litgpt(**_LITGPT_LLAMA), inputs=token_ids, package="litgpt"),
    "litgpt, as Qwen3": Entry(
        build=litgpt(**_LITGPT_LLAMA, norm_qk=True), inputs=token_ids, qk_norm=True, package="litgpt"
    ),
    "litgpt, as Gemma 3": Entry(
        build=litgpt(**_LITGPT_LLAMA, sliding_window_size=16, sliding_window_indices=[1, 0]),
        inputs=token_ids,
        whole=(False, True),
        layers=(False, True),
        package="litgpt",
    ),
    "litgpt, as Gemma 2": Entry(
        build=litgpt(**_LITGPT_LLAMA, attention_logit_softcapping=50.0),
        inputs=token_ids,
        whole=_DENSE,
        layers=_DENSE,
        package="litgpt",
    ),
    "BERT": Entry(build=bert, inputs=token_ids),
    "ViT": Entry(build=vit, inputs=images),
    "nn.TransformerEncoderLayer": Entry(build=lambda: Stack(EncoderLayer), inputs=vectors),
    "nn.MultiheadAttention": Entry(build=lambda: Stack(SelfAttention), inputs=vectors),
}
