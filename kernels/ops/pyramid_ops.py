"""The ops as PyTorch knows them: schema, fake and autograd. Torch only: Triton is imported when first needed.

`select` decides, without gradient, which windows are entries. `gather` pools tokens into entries and `scatter` adds
entries back to tokens; both are linear, and their backwards are ops of their own, each the other's adjoint, so that any
order of differentiation works. All are deterministic (a selective checkpointing policy may save or recompute them).

`revision` takes part in no computation: see `revision.py`. Shapes as in SPEC.md: `B` batch, `H` query heads, `G` key/value
heads, `N` tokens, `S` entries, `P` windows of all levels, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..geometry import Pyramid
from ..packed import attention as documents
from ..reference.scorers import token_scores
from ..revision import REVISION
from ..sdpa import attention, has_choice, require_package
from .dispatch import kernels_for
from .inlined import kernel_op
from .local_branch import attention_and_lse, local_attention, merge


def _pyramid(length: int, levels: int, pooling: int, *, causal_selection: bool = False) -> Pyramid:
    """Where only the numbering of windows matters, not how many are expanded."""
    return Pyramid(length=length, levels=levels, pooling=pooling, topk=1, causal_selection=causal_selection)


def _token_layout(like: Tensor, length: int) -> Tensor:
    """An empty `[B, H, N, D]` that lies as `[B, N, H, D]`: the layout of a projection, so that a model copies nothing."""
    batch, heads, _, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


# --- select -----------------------------------------------------------------------------------------------------------


def _select_in_two_kernels(q: Tensor, k: Tensor, v: Tensor, levels: int, *rest: Any) -> bool:
    """Whether select is its kernels, and for documents what a compiler fuses, and block sizes are known: N decides them."""
    return rest[5] == "norm" and levels <= 3 and isinstance(q.shape[2], int)


@kernel_op("lighthouse_fx::select", inline=_select_in_two_kernels)
def select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    keep_first: bool,
    causal_selection: bool,
    scorer: str,
    dilation: int,
    is_causal: bool,
    scale: float | None,
    revision: str,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the entries (SPEC.md, "Score and select"). No gradient flows through it.

    Args:
        q: `[B, H, N, D]`; k: `[B, G, N, D]`; v: `[B, G, N, Dv]`; read only as far as the scorer needs them.
        quota: windows per tile and level, 0 for the default.
        causal_selection: rank each window by the one before it, where `is_causal`; bidirectional attention ranks by its own.
        starts: int32 `[B, N]`, where each token's document begins; None: one document (`attention.py`).

    Returns:
        `entries` int32 `[B, G, S]`, the window in each slot, and `slots` int32 `[B, G, P]`, the slot of each window or -1.
    """
    pyramid = Pyramid(
        length=q.shape[2],
        levels=levels,
        pooling=pooling,
        topk=topk,
        quota=quota or None,
        keep_first=keep_first,
        causal_selection=causal_selection and is_causal,
    )
    kernels = kernels_for(q)
    if scorer == "norm":
        window_q, window_k = (kernels.norm_scores(x, k.shape[1], pyramid) for x in (q, k))
    else:
        tokens = token_scores(q, k, v, scorer=scorer, dilation=dilation, is_causal=is_causal, scale=scale)
        window_q, window_k = (reference.window_scores(scores, pyramid) for scores in tokens)
    if starts is None:
        entries, slots = kernels.choose_windows(window_q, window_k, pyramid)
        return entries, slots
    if pyramid.causal_selection:  # first the ranks, then what must be expanded
        window_q, window_k = (reference.ranks_by_previous(scores, pyramid) for scores in (window_q, window_k))
        pyramid = replace(pyramid, causal_selection=False)
    first = documents.must_expand(starts, pyramid)[:, None]  # [B, 1, P - N]
    window_q, window_k = (scores.masked_fill(first, torch.inf) for scores in (window_q, window_k))
    entries, slots = kernels.choose_windows(window_q, window_k, pyramid)
    return documents.arrange(entries, slots, starts, pyramid)


@select.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, levels: int, pooling: int, topk: int, quota: int, *_: Any
) -> tuple[Tensor, Tensor]:
    pyramid = Pyramid(length=q.shape[2], levels=levels, pooling=pooling, topk=topk, quota=quota or None)
    batch, groups = k.shape[0], k.shape[1]
    entries = k.new_empty(batch, groups, pyramid.gathered, dtype=torch.int32)
    return entries, k.new_empty(batch, groups, pyramid.size, dtype=torch.int32)


def _no_gradient(ctx: Any, *_: Tensor) -> tuple[None, ...]:
    return (None,) * 15


select.register_autograd(_no_gradient)


# --- gather -----------------------------------------------------------------------------------------------------------


@kernel_op("lighthouse_fx::gather")
def gather(x: Tensor, entries: Tensor, slots: Tensor, levels: int, pooling: int, revision: str) -> Tensor:
    """The mean of each entry's window: x `[B, Hx, N, D]` -> `[B, Hx, S, D]`, `Hx` a multiple of `G`."""
    result: Tensor = kernels_for(x).gather(x, entries, _pyramid(x.shape[2], levels, pooling))
    return result


@kernel_op("lighthouse_fx::gather_backward")
def gather_backward(
    grad: Tensor, entries: Tensor, slots: Tensor, length: int, levels: int, pooling: int, revision: str
) -> Tensor:
    """The adjoint of `gather`: grad `[B, Hx, S, D]` -> `[B, Hx, N, D]`."""
    result: Tensor = kernels_for(grad).gather_backward(grad, slots, _pyramid(length, levels, pooling))
    return result


@gather.register_fake
def _(x: Tensor, entries: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], entries.shape[2], x.shape[3])


@gather_backward.register_fake
def _(grad: Tensor, entries: Tensor, slots: Tensor, length: int, *_: Any) -> Tensor:
    return _token_layout(grad, length)


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, entries, slots, *ctx.rest = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(entries, slots)


def _differentiate_gather(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entries, slots = ctx.saved_tensors
    return gather_backward(grad, entries, slots, ctx.length, *ctx.rest), None, None, None, None, None


def _save_gather_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, entries, slots, _, *ctx.rest = inputs
    ctx.save_for_backward(entries, slots)


def _differentiate_gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entries, slots = ctx.saved_tensors
    return gather(grad, entries, slots, *ctx.rest), None, None, None, None, None, None


gather.register_autograd(_differentiate_gather, setup_context=_save_gather)
gather_backward.register_autograd(_differentiate_gather_backward, setup_context=_save_gather_backward)


# --- scatter ----------------------------------------------------------------------------------------------------------


@kernel_op("lighthouse_fx::scatter")
def scatter(
    out: Tensor,
    entries: Tensor,
    slots: Tensor,
    length: int,
    levels: int,
    pooling: int,
    is_causal: bool,
    revision: str,
    starts: Tensor | None = None,
    causal_selection: bool = False,
) -> Tensor:
    """Add each entry's output to the tokens that it concerns: out `[B, H, S, D]` -> `[B, H, N, D]` (SPEC.md, 4).

    Args:
        starts: int32 `[B, N]`, where each token's document begins; then it must be causal.
        causal_selection: with `starts`, entries that are there for a border give nothing to tokens before it.
    """
    pyramid = _pyramid(length, levels, pooling, causal_selection=causal_selection)
    result: Tensor = kernels_for(out).scatter(out, slots, pyramid, is_causal=is_causal, starts=starts)
    return result


@kernel_op("lighthouse_fx::scatter_backward")
def scatter_backward(
    grad: Tensor,
    entries: Tensor,
    slots: Tensor,
    levels: int,
    pooling: int,
    is_causal: bool,
    revision: str,
    starts: Tensor | None = None,
    causal_selection: bool = False,
) -> Tensor:
    """The adjoint of `scatter`: grad `[B, H, N, D]` -> `[B, H, S, D]`."""
    pyramid = _pyramid(grad.shape[2], levels, pooling, causal_selection=causal_selection)
    result: Tensor = kernels_for(grad).scatter_backward(grad, entries, pyramid, is_causal=is_causal, starts=starts)
    return result


@scatter.register_fake
def _(out: Tensor, entries: Tensor, slots: Tensor, length: int, *_: Any) -> Tensor:
    return _token_layout(out, length)


@scatter_backward.register_fake
def _(grad: Tensor, entries: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[1], entries.shape[2], grad.shape[3])


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, entries, slots, _, *ctx.rest, starts, ctx.causal_selection = inputs
    ctx.save_for_backward(entries, slots, starts)


def _differentiate_scatter(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entries, slots, starts = ctx.saved_tensors
    return scatter_backward(grad, entries, slots, *ctx.rest, starts, ctx.causal_selection), *(None,) * 9


def _save_scatter_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, entries, slots, *ctx.rest, starts, ctx.causal_selection = inputs
    ctx.length = grad.shape[2]
    ctx.save_for_backward(entries, slots, starts)


def _differentiate_scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    entries, slots, starts = ctx.saved_tensors
    return scatter(grad, entries, slots, ctx.length, *ctx.rest, starts, ctx.causal_selection), *(None,) * 8


scatter.register_autograd(_differentiate_scatter, setup_context=_save_scatter)
scatter_backward.register_autograd(_differentiate_scatter_backward, setup_context=_save_scatter_backward)


# --- all of it --------------------------------------------------------------------------------------------------------


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pyramid: Pyramid,
    *,
    scorer: str = "norm",
    dilation: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    kernel: str = "auto",
    starts: Tensor | None = None,
    max_documents: int = 256,
    known: Tensor | None = None,
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    checks: Sequence[Tensor] = (),
    local_window: int = 0,
) -> Tensor:
    """Lighthouse attention: select, gather, attend, scatter. The compiler pass traces this function into a graph.

    With a local window also attention inside it, and in place of scatter the merge of both; without levels that alone.

    Args:
        q: `[B, H, N, D]`; k: `[B, G, N, D]`; v: `[B, G, N, Dv]`; `pyramid.length` must be `N`.
        starts: int32 `[B, N]`, where each token's document begins, at most `max_documents` in a row; None: one document.
        known: what is known of the documents on the CPU, see `known_documents.plan`.
        score_q: `[B, H, N, *]`, what the scorer reads in place of q; score_k: `[B, G, N, *]`.
        checks: int32 zeros, `[]`, of operations that raise where an assumption fails; the result depends on them.
        local_window: tokens that each token attends to itself, see `local_branch.py`; 0: none.

    Returns:
        `[B, H, N, Dv]` in q's dtype.
    """
    require_package(kernel)
    length, levels, pooling = pyramid.length, pyramid.levels, pyramid.pooling
    if levels == 0:
        for zero in checks:
            q = q + zero
        alone: Tensor = local_attention(
            q, k, v, local_window, dropout_p, is_causal, scale, enable_gqa, starts, max_documents
        )[0]
        return alone
    entries, slots = select(
        q if score_q is None else score_q,
        k if score_k is None else score_k,
        v,
        levels,
        pooling,
        pyramid.topk,
        pyramid.quota or 0,
        pyramid.keep_first,
        pyramid.causal_selection,
        scorer,
        dilation,
        is_causal,
        scale if scorer != "norm" else None,  # elsewhere it would only tie the selection to a traced number
        REVISION,
        starts,
    )
    for zero in checks:
        entries = entries + zero
    local = None
    if local_window:
        local = local_attention(q, k, v, local_window, dropout_p, is_causal, scale, enable_gqa, starts, max_documents)
    q, k, v = (gather(x, entries, slots, levels, pooling, REVISION) for x in (q, k, v))
    if local is not None:
        rows = (None, None) if starts is None else (entries, starts)
        out, lse = attention_and_lse(
            q, k, v, dropout_p, is_causal, scale, enable_gqa, kernel, *rows, levels, pooling, max_documents
        )
        merged: Tensor = merge(
            out, lse, *local, entries, slots, levels, pooling, is_causal, REVISION, starts, pyramid.causal_selection
        )[0]
        return merged
    if starts is not None:
        out = documents.attention_in_documents(
            q, k, v, entries, starts, levels, pooling, pyramid.topk, pyramid.quota or 0, dropout_p, scale, enable_gqa,
            max_documents, kernel, known,
        )  # fmt: skip
    elif has_choice(q.device, kernel):
        out = attention(q, k, v, dropout_p, is_causal, scale, enable_gqa, kernel)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    result: Tensor = scatter(
        out, entries, slots, length, levels, pooling, is_causal, REVISION, starts, pyramid.causal_selection
    )
    return result
