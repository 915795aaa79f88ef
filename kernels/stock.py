"""Stock attention kernels that also give the log-sum-exp, and take a gradient for it: one op over several of PyTorch's.

A stock backward knows no gradient of the log-sum-exp. It is given an output for which what it computes is right with one, see
`reference.shift_output`. Which kernel serves is an argument, so that the choice holds forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.dispatch import kernels_for
from .torch_private import (
    cpu_attention_backward,
    cpu_attention_forward,
    cudnn_attention_backward,
    cudnn_attention_forward,
    efficient_attention_backward,
    efficient_attention_forward,
    flash_attention_backward,
    flash_attention_forward,
)

_EFFICIENT_ROWS = 32  # it pads the log-sum-exp to a multiple of so many rows


@torch.library.custom_op("lighthouse_fx::stock_attention", mutates_args=())
def stock_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    longest: int,
    window: int,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    kernel: str,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention by one stock kernel.

    Args:
        query: `[B, H, N, D]`; key, value: `[B, G, N, D]`; D is one that the kernel takes, `G` is H but for "flash" and "cudnn".
        bounds: int32, where sequences begin in `[B * N]`, for "flash"; longest: the rows of the longest at most.
        window: tokens that a token attends to on either side, itself included, for "flash"; 0: all.
        kernel: "flash", "cudnn", "efficient" or "cpu"; "flash" alone drops anything.

    Returns:
        As query; the log-sum-exp `[B, H, N]`; and of what is dropped the seed and the offset, int64 `[2]`.
    """
    nothing = torch.zeros(2, dtype=torch.int64, device=query.device)
    if kernel == "cpu":
        out, lse = cpu_attention_forward(query, key, value, 0.0, is_causal, scale=scale)
        return _token_layout(out), lse.to(_wide(query)).contiguous(), nothing
    if kernel == "cudnn":
        out, lse, *_ = cudnn_attention_forward(query, key, value, None, True, 0.0, is_causal, False, scale=scale)
        return out.contiguous(), lse.reshape(query.shape[:3]), nothing
    if kernel == "efficient":
        out, lse, *_ = efficient_attention_forward(query, key, value, None, True, 0.0, is_causal, scale=scale)
        return _token_layout(out), lse[:, :, : query.shape[2]].contiguous(), nothing
    rows = [_as_rows(x, bounds) for x in (query, key, value)]
    out, lse, state, *_ = flash_attention_forward(
        *rows, bounds, bounds, longest, longest, dropout_p, is_causal, False, scale=scale, **_sides(window, is_causal)
    )
    batch, heads, length = query.shape[:3]
    if bounds is not None:
        lse = lse.view(heads, batch, length).transpose(0, 1)
    out = out.view(batch, length, heads, -1).transpose(1, 2)
    return out, lse.contiguous(), state.view(torch.int64) if dropout_p else nothing


@torch.library.custom_op("lighthouse_fx::stock_attention_backward", mutates_args=())
def stock_attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    random: Tensor,
    bounds: Tensor | None,
    longest: int,
    window: int,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    kernel: str,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from those of the output and of the log-sum-exp."""
    grads: tuple[Tensor, ...]
    length, grad = query.shape[2], grad if grad.stride(-1) == 1 else grad.contiguous()
    out = kernels_for(out).shift_output(out, grad, grad_lse)
    if kernel == "cpu":
        grads = cpu_attention_backward(grad, query, key, value, out, lse, 0.0, is_causal, scale=scale)
    elif kernel == "cudnn":
        grads = cudnn_attention_backward(
            grad.contiguous(), query, key, value, out, lse[..., None], *random.unbind(), None, None, None, length,
            length, 0.0, is_causal, scale=scale,
        )  # fmt: skip
    elif kernel == "efficient":
        padded = F.pad(lse, (0, -length % _EFFICIENT_ROWS), value=torch.inf)  # exp(score - inf) = 0
        grads = efficient_attention_backward(
            grad, query, key, value, None, out, padded, *random.unbind(), 0.0, [True, True, True, False],
            is_causal, scale=scale,
        )[:3]  # fmt: skip
    else:
        g, q, k, v, o = (_as_rows(x, bounds) for x in (grad, query, key, value, out))
        sums = lse if bounds is None else lse.transpose(0, 1).flatten(1).contiguous()
        unused = torch.empty((), dtype=torch.uint64, device=query.device)
        found = flash_attention_backward(
            g, q, k, v, o, sums, bounds, bounds, longest, longest, dropout_p, is_causal, random.view(torch.uint64), unused,
            scale=scale, **_sides(window, is_causal),
        )  # fmt: skip
        grads = tuple(x.view(query.shape[0], length, *x.shape[-2:]).transpose(1, 2) for x in found)
    dq, dk, dv = (_token_layout(x) for x in grads)
    return dq, dk, dv


@stock_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    longest: int,
    window: int,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    kernel: str,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if kernel == "cudnn" else _empty_tokens(query)
    lse = query.new_empty(query.shape[:3], dtype=_wide(query))
    return out, lse, query.new_empty(2, dtype=torch.int64)


@stock_attention_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_tokens(query), _empty_tokens(key), _empty_tokens(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, bounds, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(query, key, value, *output, bounds)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor, _: Tensor) -> tuple[Any, ...]:
    return *stock_attention_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


stock_attention.register_autograd(_differentiate, setup_context=_save)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _sides(window: int, is_causal: bool) -> dict[str, int]:
    if window == 0:
        return {}
    return {"window_size_left": window - 1, "window_size_right": 0 if is_causal else window - 1}


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _as_rows(x: Tensor, bounds: Tensor | None) -> Tensor:
    """FlashAttention takes `[B, N, H, D]`, or of sequences `[B * N, H, D]`, rows of D in one piece."""
    x = x.transpose(1, 2)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x if bounds is None else x.flatten(0, 1)


def _empty_tokens(like: Tensor) -> Tensor:
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _token_layout(x: Tensor) -> Tensor:
    """`[B, H, N, D]` that lies as `[B, N, H, D]`, as it was if it does."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
