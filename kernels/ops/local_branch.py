"""The local branch: attention inside a window, attention with its log-sum-exp, and the merge of what a token is given.

`local_attention` and `attention_and_lse` are composite ops, nodes of a rewritten graph that AOTAutograd sees through, to the op
of a stock kernel (`stock.py`) or to plain PyTorch (`reference/local.py`). `merge` is an op like scatter, with its gradient.
Source: SPEC.md, "The local branch".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid
from ..packed.attention import document_problem, in_sequences, segments_of
from ..packed.varlen import WIDEST, bounds_of
from ..reference import local as plain
from ..revision import REVISION
from ..sdpa import resolved
from ..stock import stock_attention
from .dispatch import kernels_for
from .inlined import kernel_op

_ALIGNED = 8  # FlashAttention and cuDNN take head dimensions that are multiples of it
_HALF = (torch.bfloat16, torch.float16)

_library = torch.library.Library("lighthouse_fx", "FRAGMENT")
_library.define(
    "local_attention(Tensor query, Tensor key, Tensor value, int window, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa, Tensor? starts=None, int most=0) -> (Tensor, Tensor)"
)
_library.define(
    "attention_and_lse(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, float? scale, "
    "bool enable_gqa, str kernel, Tensor? entries=None, Tensor? starts=None, int levels=0, int pooling=0, int most=0) -> "
    "(Tensor, Tensor)"
)


def _local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    starts: Tensor | None = None,
    most: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention to the `window - 1` tokens before each token and itself (on either side if not `is_causal`), in O(N w).

    Args:
        query: `[B, H, N, D]`; key: `[B, G, N, D]`; value: `[B, G, N, Dv]`.
        starts: int32 `[B, N]`, where each token's document begins, at most `most` in a row; the window stays inside.

    Returns:
        `[B, H, N, Dv]` and the log-sum-exp of the scaled scores, `[B, H, N]`, float64 for float64 and float32 otherwise.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    width = max(query.shape[-1], value.shape[-1])
    if query.device.type == "cuda" and query.dtype in _HALF and width <= WIDEST["flash"] and _flash_is_on():
        bounds, longest = None, query.shape[2]
        if starts is not None:
            bounds = bounds_of(starts, starts.shape[0] * most, most)
        return _stock(query, key, value, bounds, longest, window, dropout_p, is_causal, scale, "flash")
    return plain.local_attention(
        query, key, value, window, is_causal=is_causal, scale=scale, dropout_p=dropout_p, starts=starts
    )


def _attention_and_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    kernel: str,
    entries: Tensor | None = None,
    starts: Tensor | None = None,
    levels: int = 0,
    pooling: int = 0,
    most: int = 0,
) -> tuple[Tensor, Tensor]:
    """`lighthouse_fx::attention`, and the log-sum-exp of the scaled scores before dropout.

    Args:
        entries: int32 `[B, G, S]`, the windows that the rows stand for, and starts: int32 `[B, N]`, where each token's document
            begins, at most `most` in a row: attention stays inside. None: it does not.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if entries is not None and starts is not None:
        if (problem := document_problem(query, value, kernel)) is not None:
            raise ValueError(problem)
        segments = segments_of(entries, starts, Pyramid(length=starts.shape[-1], levels=levels, pooling=pooling, topk=1))
        if not in_sequences(query.device):
            return plain.attention_and_lse(
                query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p, segments=segments
            )
        batch, groups, gathered = segments.shape
        query, key, value = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (query, key, value))  # [B * G, R or 1, S, D]
        bounds = bounds_of(segments, batch * groups * (most + 1), most)
        out, lse = _stock(query, key, value, bounds, gathered, 0, dropout_p, is_causal, scale, "flash")
        return out.unflatten(0, (batch, groups)).flatten(1, 2), lse.unflatten(0, (batch, groups)).flatten(1, 2)
    chosen = _chosen(query, value, dropout_p, kernel)
    if chosen is None:
        return plain.attention_and_lse(query, key, value, is_causal=is_causal, scale=scale, dropout_p=dropout_p)
    return _stock(query, key, value, None, query.shape[2], 0, dropout_p, is_causal, scale, chosen)


def lse_problem(kernel: str) -> str | None:
    """Why a kernel cannot be used beside a local branch, with the remedy, or None."""
    if kernel in ("flash-attn", "flash-attn-4"):
        return f"kernel={kernel!r} is not tried with a local branch: use kernel='auto', or local_window=0"
    return None


def _chosen(query: Tensor, value: Tensor, dropout_p: float, kernel: str) -> str | None:
    """The stock kernel that attends to a tensor, as far as `kernel` allows; None: plain PyTorch."""
    if (problem := lse_problem(kernel)) is not None:
        raise ValueError(problem)
    if query.device.type != "cuda":
        return "cpu" if query.device.type == "cpu" and dropout_p == 0 and kernel in ("auto", "flash") else None
    width = max(query.shape[-1], value.shape[-1])
    for name in resolved(query.device, kernel).split(","):
        if name == "efficient" and dropout_p == 0 and query.dtype in (*_HALF, torch.float32):
            return name
        if name in WIDEST and width <= WIDEST[name] and query.dtype in _HALF and (dropout_p == 0 or name == "flash"):
            return name
    return None


def _flash_is_on() -> bool:
    on: bool = torch.backends.cuda.flash_sdp_enabled()
    return on


def _stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    longest: int,
    window: int,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """By a stock kernel, with heads and head dimensions as it takes them."""
    wanted = value.shape[-1]
    width = max(query.shape[-1], wanted)
    width = width if kernel == "cpu" else -(-width // _ALIGNED) * _ALIGNED
    query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if kernel in ("cpu", "efficient") and key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out, lse, _ = stock_attention(
        query, key, value, bounds, longest, window, is_causal, dropout_p, scale, kernel, REVISION
    )
    return out if width == wanted else out[..., :wanted], lse


_library.impl("local_attention", _local_attention, "CompositeImplicitAutograd")
_library.impl("attention_and_lse", _attention_and_lse, "CompositeImplicitAutograd")
local_attention = torch.ops.lighthouse_fx.local_attention.default
attention_and_lse = torch.ops.lighthouse_fx.attention_and_lse.default


# --- merge ------------------------------------------------------------------------------------------------------------


@kernel_op("lighthouse_fx::merge")
def merge(
    out: Tensor,
    lse: Tensor,
    local_out: Tensor,
    local_lse: Tensor,
    entries: Tensor,
    slots: Tensor,
    levels: int,
    pooling: int,
    is_causal: bool,
    revision: str,
    starts: Tensor | None = None,
    causal_selection: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each token's mean of what the entries that concern it and its local window give, weighted by their log-sum-exp.

    Args:
        out: `[B, H, S, D]`; lse: `[B, H, S]`; local_out: `[B, H, N, D]`; local_lse: `[B, H, N]`; the rest as for `scatter`.

    Returns:
        `[B, H, N, D]`, and the log-sum-exp of all that a token is given, `[B, H, N]`, without gradient.
    """
    pyramid = _pyramid(local_out, levels, pooling, causal_selection)
    merged: tuple[Tensor, Tensor] = kernels_for(out).merge(
        out, lse, local_out, local_lse, slots, pyramid, is_causal=is_causal, starts=starts
    )
    return merged


@kernel_op("lighthouse_fx::merge_backward")
def merge_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    local_out: Tensor,
    local_lse: Tensor,
    merged: Tensor,
    total: Tensor,
    entries: Tensor,
    slots: Tensor,
    levels: int,
    pooling: int,
    is_causal: bool,
    revision: str,
    starts: Tensor | None = None,
    causal_selection: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `out`, `lse`, `local_out` and `local_lse`."""
    pyramid = _pyramid(local_out, levels, pooling, causal_selection)
    grads: tuple[Tensor, Tensor, Tensor, Tensor] = kernels_for(out).merge_backward(
        grad, out, lse, local_out, local_lse, merged, total, entries, slots, pyramid, is_causal=is_causal, starts=starts
    )
    return grads


def _pyramid(local_out: Tensor, levels: int, pooling: int, causal_selection: bool) -> Pyramid:
    length = local_out.shape[2]
    return Pyramid(length=length, levels=levels, pooling=pooling, topk=1, causal_selection=causal_selection)


def _like_tokens(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


@merge.register_fake
def _(out: Tensor, lse: Tensor, local_out: Tensor, local_lse: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like_tokens(local_out), local_lse.new_empty(local_lse.shape)


@merge_backward.register_fake
def _(
    grad: Tensor, out: Tensor, lse: Tensor, local_out: Tensor, local_lse: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), lse.new_empty(lse.shape), _like_tokens(local_out), local_lse.new_empty(local_lse.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, entries, slots, levels, pooling, is_causal, revision, starts, causal_selection = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.rest = levels, pooling, is_causal, revision
    ctx.causal_selection = causal_selection
    ctx.save_for_backward(*given, *output, entries, slots, starts)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    return *merge_backward(grad, *tensors, *ctx.rest, starts, ctx.causal_selection), *(None,) * 8


merge.register_autograd(_differentiate, setup_context=_save)
