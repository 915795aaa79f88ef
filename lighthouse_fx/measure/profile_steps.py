"""Training steps to profile: of one attention layer, of a small Llama, of a model of yours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighthouse_fx.extras import transformers
from lighthouse_fx.frontend.regional import compile
from lighthouse_fx.kernels.torch_private import OptimizedModule
from lighthouse_fx.passes.config import LighthouseConfig

from .layer import LayerShape

Step = Callable[[], object]


def layer_step(shape: LayerShape, config: LighthouseConfig, device: torch.device) -> Step:
    """Forward and backward of one attention layer, queries, keys and values as projections leave them."""
    _check(config)
    dtype = getattr(torch, shape.dtype)
    tokens = [
        torch.randn(1, shape.length, heads, shape.dim, dtype=dtype, device=device, requires_grad=True)
        for heads in (shape.heads, shape.groups, shape.groups)
    ]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, N, H, D], [B, N, G, D] twice
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    options = {field.name: getattr(config, field.name) for field in fields(config)}
    compiled = torch.compile(attention, backend="lighthouse", fullgraph=True, dynamic=False, options=options)
    grad = torch.randn_like(tokens[0])
    return lambda: torch.autograd.grad(compiled(*tokens), tokens, grad)


def llama_step(shape: LayerShape, config: LighthouseConfig, device: torch.device, *, layers: int = 8) -> Step:
    """An optimiser step of a Llama with random weights and such attention, checkpointed; its first and last are dense.

    Raises:
        ImportError: transformers is not installed.
    """
    _check(config)
    library = transformers("a Llama", instead="profile one layer")
    width = shape.heads * shape.dim
    described = library.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.dim,
        max_position_embeddings=shape.length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = library.LlamaForCausalLM(described).to(device, getattr(torch, shape.dtype))
    # By its new name, where transformers has it: the old one warns.
    checkpoint = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    checkpoint({"use_reentrant": False})
    tokens = torch.randint(0, 256, (1, shape.length), device=device)
    dense = (0, -1) if layers > 2 else ()
    return model_step(model, (tokens,), config, named={"labels": tokens}, dense_layers=dense)


def model_step(
    model: nn.Module,
    inputs: Sequence[Any],
    config: LighthouseConfig,
    *,
    named: Mapping[str, Any] | None = None,
    dense_layers: Sequence[int | str] | None = None,
) -> Step:
    """An optimiser step (AdamW) of a model: its `.loss`, a scalar that it returns, or the mean square of a tensor.

    A model that is not compiled is compiled block by block, in place, as `lighthouse_fx.compile` does; one that is stays so.

    Raises:
        TypeError, ValueError: no module, or one that cannot be compiled block by block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a Module")
    _check(config)
    model.train()
    if not is_compiled(model):
        compile(model, config, dense_layers=dense_layers)
    on_gpu = any(p.is_cuda for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True if on_gpu else None)

    def step() -> None:
        _loss(model(*inputs, **(named or {}))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def is_compiled(model: nn.Module) -> bool:
    """Whether it is compiled already, or a part of it."""
    return any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())


def _check(config: LighthouseConfig) -> None:
    if config.scorer != "norm":
        raise ValueError(
            f"scorer={config.scorer!r} runs attention of its own, which would pass for the model's: profile with scorer='norm'"
        )


def _loss(returned: Any) -> Tensor:
    loss = getattr(returned, "loss", None)
    out = loss if isinstance(loss, Tensor) else getattr(returned, "logits", returned)
    if not isinstance(out, Tensor):
        raise TypeError(f"the model returned a {type(out).__name__}: return a tensor, or something with .loss or .logits")
    return out if out.dim() == 0 else out.float().square().mean()
