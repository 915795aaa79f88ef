"""torchtitan 0.3: a config override that makes its attention call scaled_dot_product_attention, which it no longer does.

    --override.imports lighthouse_fx.integrations.torchtitan.causal_attention --compile.enable --compile.backend lighthouse

    GQAttention.Config(inner_attention=FlexAttention or VarlenAttention)  ->  GQAttention.Config(inner_attention=SDPA)

Attention is then plainly causal: it crosses the borders of packed documents, which torchtitan's own attention keeps inside.
Only `GQAttention` (Llama 3, Qwen3) is replaced; models with an attention of their own (sliding windows, sinks) are left as
they are. torchtitan compiles all blocks alike, so no layer stays dense, and has no options for a backend: enter
`TwoStage(..., config=...).stage(step)` or `pretraining(config)` around its train step. Importing this module registers the
override with torchtitan, as its overrides are.
"""

from __future__ import annotations

from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import GQAttention, ScaledDotProductAttention, VarlenAttention

_UNLIMITED = (-1, 0)


@override(target=GQAttention.Config, exact=True, description="causal SDPA, for the backend lighthouse")  # type: ignore[untyped-decorator]
def causal_attention(cfg: GQAttention.Config) -> GQAttention.Config:
    """The same attention with causal SDPA inside.

    Raises:
        ValueError: for a sliding window or bidirectional attention, which this would not be.
    """
    inner = cfg.inner_attention
    if isinstance(inner, VarlenAttention.Config) and tuple(inner.window_size) != _UNLIMITED:
        raise ValueError(
            f"window_size={inner.window_size} is not plainly causal attention, (-1, 0): leave "
            "lighthouse_fx.integrations.torchtitan.causal_attention out for this model, it stays dense"
        )
    attention = derive(inner, ScaledDotProductAttention.Config)  # with the sharding that the other one has
    return derive(cfg, GQAttention.Config, inner_attention=attention)
