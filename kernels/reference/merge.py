"""The plain twin of the merge: a token's output is one softmax-weighted mean of all that it is given.

A token is given the outputs of the entries that concern it, at most one per level, and that of its local window, each with the
log-sum-exp of its scores. With `LSE` the log-sum-exp of these, `out = sum_c exp(lse_c - LSE) out_c`. Absent contributions have
a log-sum-exp of minus infinity; the local one is always there. Source: SPEC.md, "The local branch".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Pyramid
from .pooling import blocks_of, per_head, rows_at, widen
from .scatter import own_document


def merge(
    out: Tensor,
    lse: Tensor,
    local_out: Tensor,
    local_lse: Tensor,
    slots: Tensor,
    pyramid: Pyramid,
    *,
    is_causal: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge what the entries and the local windows give.

    Args:
        out: `[B, H, S, D]`, of the entries; lse: `[B, H, S]`; local_out: `[B, H, N, D]`; local_lse: `[B, H, N]`.

    Returns:
        `[B, H, N, D]` and the log-sum-exp `[B, H, N]`.
    """
    given = [(local_lse, widen(local_out))]
    for level in range(pyramid.levels):
        slot = per_head(_token_slots(slots, level, pyramid, is_causal, starts), out)  # [B, H, N]
        given.append((_lse_at(lse, slot), rows_at(widen(out), slot.clamp(min=0))))
    total = torch.stack([of for of, _ in given]).logsumexp(0)
    merged = sum((of - total).exp()[..., None] * rows for of, rows in given)
    assert isinstance(merged, Tensor)
    return as_tokens(merged.to(local_out.dtype)), total


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
    pyramid: Pyramid,
    *,
    is_causal: bool,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `out`, `lse`, `local_out` and `local_lse`.

    With `w = exp(lse_c - LSE)`, over the tokens of c: `dout_c = sum w grad`, `dlse_c = sum w grad . (out_c - merged)`.
    """
    wide, mean = widen(grad), widen(merged)
    weight = (local_lse - total).exp()[..., None]  # [B, H, N, 1]
    local = weight * wide, (weight * wide * (widen(local_out) - mean)).sum(-1)
    of_out, of_lse = [], []
    for level in range(pyramid.levels):
        slot = per_head(_token_slots(slots, level, pyramid, is_causal, starts), out)  # [B, H, N]
        weighted = (_lse_at(lse, slot) - total).exp()[..., None] * wide  # [B, H, N, D]
        apart = rows_at(widen(out), slot.clamp(min=0)) - mean
        shift = pyramid.pooling**level - 1 if is_causal else 0
        of_out.append(blocks_of(weighted, shift, level, pyramid).sum(-2))
        of_lse.append(blocks_of((weighted * apart).sum(-1, keepdim=True), shift, level, pyramid).sum(-2))
    index = per_head(entries, out)
    found, found_lse = (rows_at(torch.cat(x, 2), index) for x in (of_out, of_lse))
    return found.to(out.dtype), found_lse[..., 0].contiguous(), as_tokens(local[0].to(local_out.dtype)), local[1]


def shift_output(out: Tensor, grad: Tensor, grad_lse: Tensor) -> Tensor:
    """An output by which a stock backward, given `grad`, also passes on the gradient of the log-sum-exp.

    A backward reads the output for `delta = grad . out` alone, and `delta - grad_lse` is what it should be. Where `grad` is 0
    there is no such output, and the gradient of that row's log-sum-exp is lost; where it is very small, it is bounded.

    Args:
        out, grad: `[B, H, N, D]`, as the backward is given them; grad_lse: `[B, H, N]`.
    """
    wide, largest = widen(grad), torch.finfo(out.dtype).max / 4
    peak = wide.abs().amax(-1, keepdim=True)
    unit = wide / torch.where(peak > 0, peak, 1)
    share = (grad_lse[..., None] / unit.square().sum(-1, keepdim=True).clamp(min=1) / peak).clamp(-largest, largest)
    return (widen(out) - torch.where(peak > 0, share, 0) * unit).to(out.dtype)


def _token_slots(slots: Tensor, level: int, pyramid: Pyramid, is_causal: bool, starts: Tensor | None) -> Tensor:
    """The slot of the entry of a level that concerns each token, or -1: `[B, G, P]` -> `[B, G, N]`."""
    token, width = torch.arange(pyramid.length, device=slots.device), pyramid.pooling**level
    begin = token - (width - 1 if is_causal else 0)
    window = begin.div(width, rounding_mode="floor")
    there = ((begin >= 0) & (window < pyramid.windows(level))).expand(slots.shape[0], 1, -1)  # [B, 1, N]
    if starts is not None:
        there = there & own_document(starts, level, pyramid)[:, None]
    number = (pyramid.offset(level) + window).clamp(0, slots.shape[2] - 1)
    return torch.where(there, slots[..., number], -1)


def _lse_at(lse: Tensor, slot: Tensor) -> Tensor:
    """`[B, H, S]` at the slots of tokens, minus infinity where there is none: `[B, H, N]`."""
    return torch.where(slot >= 0, lse.gather(2, slot.long().clamp(min=0)), -torch.inf)


def as_tokens(x: Tensor) -> Tensor:
    """`[B, H, N, D]` that lies as `[B, N, H, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
