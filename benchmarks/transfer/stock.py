"""Stock attention that returns its log-sum-exp, with a gradient through both.

On a GPU: torch's cuDNN attention, and its FlashAttention 2 for a sliding window. Their backwards know no gradient of the
log-sum-exp, but only `delta = rowsum(dO * O)` holds the output there, so an output is passed for which that is
`delta - dlse` (SPEC.md, "The local branch"). Elsewhere: plain PyTorch, in O(N^2) memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


def compiled_on_gpu(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function that is compiled for tensors on a GPU, and left as it is for others."""
    compiled = torch.compile(function, **options)

    @functools.wraps(function)
    def chosen(first: Tensor, *rest: Any) -> Any:
        return (compiled if first.is_cuda else function)(first, *rest)

    return chosen


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int = 0) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: `[B, H, N, D]` and float32 `[B, H, N]`.

    Args:
        window: keys that a query sees, itself and those before it; 0: all.
    """
    if not q.is_cuda:
        return plain(q, k, v, causal=causal, window=window)
    out, lse = _Windowed.apply(q, k, v, window) if window else _Whole.apply(q, k, v, causal)  # type: ignore[no-untyped-call]
    return out, lse


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int = 0) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in the dtype of the inputs."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    behind = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    seen = (behind >= 0) if causal else torch.ones_like(behind, dtype=torch.bool)
    if window:
        seen &= behind < window
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _with_delta(out: Tensor, grad: Tensor, grad_lse: Tensor) -> Tensor:
    """An output that makes `rowsum(grad * out)` smaller by the gradient of the log-sum-exp. `grad_lse` `[..., 1]`."""
    wide = grad.float()
    size = wide.square().sum(-1, keepdim=True)
    step = torch.where(size > 0, grad_lse / size.clamp_min(1e-37), 0.0)
    return (out.float() - step * wide).to(out.dtype)


_with_delta = compiled_on_gpu(_with_delta, dynamic=True)


class _Whole(torch.autograd.Function):
    """cuDNN, causal or over all keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *rest = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
        ctx.save_for_backward(q, k, v, out, lse, *rest[:2], *rest[4:6])
        ctx.lengths, ctx.causal = rest[2:4], causal
        return out, lse.reshape(out.shape[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cum_q, cum_k, seed, offset = ctx.saved_tensors
        out = _with_delta(out, grad, grad_lse[..., None])
        grads = _ATEN._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, *ctx.lengths, 0.0, ctx.causal
        )
        return *grads, None


class _Windowed(torch.autograd.Function):
    """FlashAttention 2 with a window."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        length = q.shape[1]
        out, lse, seed, unused, _ = _ATEN._flash_attention_forward(
            q, k, v, None, None, length, length, 0.0, True, False, window_size_left=window - 1, window_size_right=0
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        ctx.window = window
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed, unused = ctx.saved_tensors
        grad, length = grad.transpose(1, 2), q.shape[1]
        out = _with_delta(out, grad, grad_lse.transpose(1, 2)[..., None])
        grads = _ATEN._flash_attention_backward(
            grad, q, k, v, out, lse, None, None, length, length, 0.0, True, seed, unused,
            window_size_left=ctx.window - 1, window_size_right=0,
        )  # fmt: skip
        return *(x.transpose(1, 2) for x in grads), None
