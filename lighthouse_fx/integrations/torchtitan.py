"""torchtitan 0.3: two config overrides, for models whose attention calls scaled_dot_product_attention no longer.

    --override.imports lighthouse_fx.integrations.torchtitan.documents --compile.enable --compile.backend lighthouse

`documents`: torchtitan's own FlexAttention, which stays inside packed documents and is rewritten as it is. torchtitan compiles
models that have it with `inductor` or `aot_eager` alone, for FlexAttention is slow where Inductor does not compile it. The
backend `lighthouse` is Inductor, so this gives it another class. FlexAttention trains on a GPU only.

    GQAttention.Config(inner_attention=FlexAttention)              ->  GQAttention.Config(inner_attention=DocumentAttention)

`causal_attention`: plainly causal attention, which crosses the borders of documents. Only `GQAttention` (Llama 3, Qwen3) is
replaced; models with an attention of their own (sliding windows, sinks) are left as they are.

    GQAttention.Config(inner_attention=FlexAttention or VarlenAttention)  ->  GQAttention.Config(inner_attention=SDPA)

torchtitan compiles all blocks alike, so no layer stays dense, and has no options for a backend: enter
`TwoStage(..., config=...).stage(step)` or `pretraining(config)` around its train step. Importing this module registers the
overrides with torchtitan, as its own are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import (
    FlexAttention,
    GQAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.protocols.module import Module

_UNLIMITED = (-1, 0)


class DocumentAttention(Module):  # type: ignore[misc]
    """FlexAttention, in a class of its own."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):  # type: ignore[misc]
        """The same; torchtitan makes its masks for it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kernel_options = config.kernel_options

    forward = FlexAttention.forward


@override(target=FlexAttention.Config, exact=True, description="FlexAttention, for the backend lighthouse")  # type: ignore[untyped-decorator]
def documents(cfg: FlexAttention.Config) -> DocumentAttention.Config:
    """The same attention, in a model that torchtitan compiles with the backend lighthouse."""
    attention: DocumentAttention.Config = derive(cfg, DocumentAttention.Config)
    return attention


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
