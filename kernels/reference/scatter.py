"""The plain twin of scatter: entries give their output to the tokens that they concern."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Pyramid
from .pooling import blocks_of, level_slots, per_head, present_rows, rows_at, token_layout, widen


def scatter(
    out: Tensor, slots: Tensor, pyramid: Pyramid, *, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    """The sum, for each token, of the entries that concern it: `[B, H, S, D]` -> `[B, H, N, D]`.

    Causal: entry `(l, i)` concerns the `p^l` tokens from its window's last token on, those of its own document where there
    are several (`starts`, see `packed/attention.py`). Otherwise its own window.
    """
    total = token_layout(widen(out), pyramid)
    for level in range(pyramid.levels):
        width = pyramid.pooling**level
        rows = present_rows(widen(out), level_slots(slots, level, pyramid))  # [B, H, W, D]
        shift = width - 1 if is_causal else 0
        reached = total[:, :, shift : shift + rows.shape[2] * width]
        added = rows.repeat_interleave(width, dim=2)[:, :, : reached.shape[2]]
        if starts is not None:
            own = own_document(starts, level, pyramid)[:, shift : shift + reached.shape[2]]
            added = torch.where(own[:, None, :, None], added, 0)
        reached += added
    return total.to(out.dtype)


def scatter_backward(
    grad: Tensor, entries: Tensor, pyramid: Pyramid, *, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    """The adjoint of `scatter`: `[B, H, N, D]` -> `[B, H, S, D]`. Each entry sums the tokens that it concerns."""
    wide = widen(grad)
    sums = []
    for level in range(pyramid.levels):
        shift = pyramid.pooling**level - 1 if is_causal else 0
        concerned = wide
        if starts is not None:
            concerned = torch.where(own_document(starts, level, pyramid)[:, None, :, None], wide, 0)
        sums.append(blocks_of(concerned, shift, level, pyramid).sum(-2))
    return rows_at(torch.cat(sums, -2), per_head(entries, grad)).to(grad.dtype)


def own_document(starts: Tensor, level: int, pyramid: Pyramid) -> Tensor:
    """Whether the window of a level that concerns a token, causally, may give it its output: bool `[B, N]`.

    It lies in the token's document. And under a causal selection no window above it has been expanded for a border behind the
    token: one that divides it, while the token's document began before the window that precedes it.
    """
    width = pyramid.pooling**level
    token = torch.arange(starts.shape[-1], device=starts.device)
    begin = (token - (width - 1)).div(width, rounding_mode="floor") * width
    own: Tensor = (begin >= 0) & (begin >= starts)
    for above in range(level + 1, pyramid.levels if pyramid.causal_selection else 0):
        span = pyramid.pooling**above
        first = begin.div(span, rounding_mode="floor") * span
        document_at_end = starts[:, (first + span - 1).clamp(0, starts.shape[-1] - 1)]
        told = (first < pyramid.covered) & (document_at_end > token) & (starts <= first - span)
        own = own & ~told
    return own
