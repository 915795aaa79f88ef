"""The plain PyTorch twin of every op: what the kernels must equal, and what runs where there is no kernel.

It favours being read: the pooled pyramid is materialised, which the kernels never do. Sums are taken in float32, or in
float64 for float64 inputs. Everything is a gather through `entries` (slot -> window) or `slots` (window -> slot, -1 where
the window is no entry), so nothing depends on the order of atomics. Source: SPEC.md, "The four stages".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid
from .scorers import norms

_LOWEST = torch.finfo(torch.float32).min
_LOOKED_AT = 1 << 22  # elements of a mask at once, so that a large one needs no second of its size


def norm_scores(x: Tensor, groups: int, pyramid: Pyramid) -> Tensor:
    """The largest norm in each window above level 0, over the heads of each group: `[B, Hx, N, D]` -> `[B, G, P - N]`."""
    return window_scores(norms(x, groups), pyramid)


# --- selection --------------------------------------------------------------------------------------------------------


def select_windows(s_q: Tensor, s_k: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Which windows are entries, and in which slot.

    Args:
        s_q: float32 `[B, G, N]` query scores of the tokens; s_k: key scores. NaN and -inf count as the lowest score.

    Returns:
        `entries` int32 `[B, G, S]`: the number of the window in each slot;
        `slots` int32 `[B, G, P]`: the slot of each window, -1 for a window that is no entry.
    """
    return choose_windows(window_scores(s_q, pyramid), window_scores(s_k, pyramid), pyramid)


def window_scores(scores: Tensor, pyramid: Pyramid) -> Tensor:
    """The largest token score in each window above level 0, numbered as windows are, less N: `[B, G, N]` -> `[B, G, P - N]`."""
    scores = torch.where(scores > -torch.inf, scores, _LOWEST)[..., : pyramid.covered]
    return torch.cat(
        [scores.unflatten(-1, (-1, pyramid.pooling**level)).amax(-1) for level in range(1, pyramid.levels)]
        or [scores[..., :0]],
        dim=-1,
    )


def ranks_by_previous(scores: Tensor, pyramid: Pyramid) -> Tensor:
    """By what windows are ranked under a causal selection: the score of the one before, the lowest for the first of a level.

    Args:
        scores: `[B, G, P - N]`, of the windows above level 0.
    """
    if pyramid.levels == 1:
        return scores
    levels = scores.split([pyramid.windows(level) for level in range(1, pyramid.levels)], -1)
    return torch.cat([F.pad(level, (1, 0), value=_LOWEST)[..., :-1] for level in levels], -1)


def choose_windows(window_q: Tensor, window_k: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """The same from the scores of the windows above level 0, `[B, G, P - N]` each, without NaN and -inf."""
    shape, device = window_q.shape[:2], window_q.device
    present = {
        level: window_q.new_zeros(*shape, pyramid.windows(level), dtype=torch.bool) for level in range(pyramid.levels)
    }
    present[0][..., pyramid.covered :] = True
    present[pyramid.levels - 1][..., : pyramid.coarse] = True
    if pyramid.coarse == 0:
        return _number(present, pyramid)
    if pyramid.causal_selection:
        window_q, window_k = (ranks_by_previous(scores, pyramid) for scores in (window_q, window_k))

    p, tiles = pyramid.pooling, pyramid.tiles_with_windows
    bounds = torch.arange(tiles + 1, device=device) * pyramid.coarse // tiles
    candidates = bounds[:-1, None] + torch.arange(pyramid.coarse // tiles + 1, device=device)  # [T, C]
    valid = (candidates < bounds[1:, None]).expand(*shape, -1, -1)  # [B, G, T, C]
    candidates = candidates.expand_as(valid)
    for level in range(pyramid.levels - 1, 0, -1):
        first = pyramid.offset(level) - pyramid.length
        level_q, level_k = (s[..., first : first + pyramid.windows(level)] for s in (window_q, window_k))  # [B, G, W]
        if pyramid.keep_first:
            level_q = level_q.clone()
            level_q[..., 0] = torch.inf
        candidates, valid = _expand(level_q, level_k, candidates, valid, pyramid.quota_)  # [B, G, T, E]
        children = (candidates[..., None] * p + torch.arange(p, device=device)).flatten(-2)  # [B, G, T, E * p]
        valid = valid[..., None].expand(*valid.shape, p).flatten(-2)
        # Invalid places write beyond the last window, where they are dropped.
        target = torch.where(valid, children, pyramid.windows(level - 1)).flatten(-2)
        chosen = F.pad(present[level - 1], (0, 1)).scatter(-1, target, True)
        present[level - 1] = chosen[..., :-1]
        candidates = children
    return _number(present, pyramid)


def _expand(window_q: Tensor, window_k: Tensor, candidates: Tensor, valid: Tensor, quota: int) -> tuple[Tensor, Tensor]:
    """The candidates to expand, in ascending order: the best half by query score, then the best others by key score."""
    index = torch.where(valid, candidates, 0)
    chosen = torch.zeros_like(valid)
    for scores, share in ((window_q, quota - quota // 2), (window_k, quota // 2)):
        shown = scores.gather(-1, index.flatten(-2)).view_as(index)
        shown = torch.where(valid & ~chosen, shown, -torch.inf)
        best = shown.sort(dim=-1, descending=True, stable=True).indices[..., :share]  # ties: the lower index first
        chosen = chosen.scatter(-1, best, True) & valid
    ascending = chosen.sort(dim=-1, descending=True, stable=True).indices[..., :quota]
    return candidates.gather(-1, ascending), chosen.gather(-1, ascending)


def _number(present: dict[int, Tensor], pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """Slots by window end, the finer first where ends are equal: counts and prefix sums instead of a sort."""
    p = pyramid.pooling
    batch, groups, length = present[0].shape
    device = present[0].device
    per_end = torch.zeros(batch, groups, length, dtype=torch.int32, device=device)  # entries that end at each token
    for level in range(pyramid.levels):
        ends = slice(p**level - 1, pyramid.windows(level) * p**level, p**level)
        per_end[..., ends] += present[level]
    following = per_end.cumsum(-1, dtype=torch.int32) - per_end  # the next free slot at each end
    slots = torch.full((batch, groups, pyramid.size), -1, dtype=torch.int32, device=device)
    for level in range(pyramid.levels):
        ends = slice(p**level - 1, pyramid.windows(level) * p**level, p**level)
        here = slice(pyramid.offset(level), pyramid.offset(level + 1))
        slots[..., here] = torch.where(present[level], following[..., ends], -1)
        following[..., ends] += present[level]
    entries = torch.zeros(batch, groups, pyramid.gathered + 1, dtype=torch.int32, device=device)
    windows = torch.arange(pyramid.size, dtype=torch.int32, device=device).expand_as(slots)
    entries.scatter_(-1, torch.where(slots < 0, pyramid.gathered, slots).long(), windows)
    return entries[..., :-1].contiguous(), slots


# --- gather and scatter -----------------------------------------------------------------------------------------------


def gather(x: Tensor, entries: Tensor, pyramid: Pyramid) -> Tensor:
    """The mean of each entry's window: `[B, Hx, N, D]` -> `[B, Hx, S, D]`."""
    wide = _widen(x)
    pooled = [_blocks(wide, 0, level, pyramid).mean(-2) for level in range(pyramid.levels)]
    return _rows(torch.cat(pooled, -2), _per_head(entries, x)).to(x.dtype)


def gather_backward(grad: Tensor, slots: Tensor, pyramid: Pyramid) -> Tensor:
    """The adjoint of `gather`: `[B, Hx, S, D]` -> `[B, Hx, N, D]`. Each token reads the entries it is part of."""
    total = _token_layout(_widen(grad), pyramid)
    for level in range(pyramid.levels):
        width = pyramid.pooling**level
        rows = _present_rows(_widen(grad) / width, _level_slots(slots, level, pyramid))  # [B, Hx, W, D]
        total[:, :, : rows.shape[2] * width] += rows.repeat_interleave(width, dim=2)
    return total.to(grad.dtype)


def scatter(
    out: Tensor, slots: Tensor, pyramid: Pyramid, *, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    """The sum, for each token, of the entries that concern it: `[B, H, S, D]` -> `[B, H, N, D]`.

    Causal: entry `(l, i)` concerns the `p^l` tokens from its window's last token on, those of its own document where there
    are several (`starts`, see `attention.py`). Otherwise its own window.
    """
    total = _token_layout(_widen(out), pyramid)
    for level in range(pyramid.levels):
        width = pyramid.pooling**level
        rows = _present_rows(_widen(out), _level_slots(slots, level, pyramid))  # [B, H, W, D]
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
    wide = _widen(grad)
    sums = []
    for level in range(pyramid.levels):
        shift = pyramid.pooling**level - 1 if is_causal else 0
        concerned = wide
        if starts is not None:
            concerned = torch.where(own_document(starts, level, pyramid)[:, None, :, None], wide, 0)
        sums.append(_blocks(concerned, shift, level, pyramid).sum(-2))
    return _rows(torch.cat(sums, -2), _per_head(entries, grad)).to(grad.dtype)


# --- masks ------------------------------------------------------------------------------------------------------------


def hidden_from(dtype: torch.dtype) -> float:
    """The value at or below which a mask of this dtype hides a key. `causal_mask.py` says why this one."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)


def is_causal_mask(mask: Tensor) -> Tensor:
    """Whether a mask `[.., N, N]` is the causal mask: a bool `[]`."""
    found = torch.ones((), dtype=torch.bool, device=mask.device)
    for _, right in rows_that_are_causal(mask):
        found = found & right.all()
    return found


def rows_that_are_causal(mask: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block of rows, and where the block is as in the causal mask: `[.., rows, N]`."""
    length = mask.shape[-1]
    rows = max(1, _LOOKED_AT // max(1, mask.numel() // max(1, length)))
    position = torch.arange(length, device=mask.device)
    for start in range(0, length, rows):
        block = mask[..., start : start + rows, :]
        earlier = position <= position[start : start + rows, None]
        if mask.dtype == torch.bool:
            yield start, block == earlier
        else:
            yield start, torch.where(earlier, block == 0, block <= hidden_from(mask.dtype))


# --- helpers ----------------------------------------------------------------------------------------------------------


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


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _token_layout(like: Tensor, pyramid: Pyramid) -> Tensor:
    """Zeros `[B, H, N, D]` that lie as `[B, N, H, D]`, as projections and the kernels write them."""
    batch, heads, _, dim = like.shape
    return like.new_zeros(batch, pyramid.length, heads, dim).transpose(1, 2)


def _blocks(x: Tensor, shift: int, level: int, pyramid: Pyramid) -> Tensor:
    """The level's windows, moved `shift` tokens on and padded with zeros at the end: `[B, H, W, p^l, D]`."""
    width = pyramid.pooling**level
    if pyramid.windows(level) == 0:
        return x.new_zeros(*x.shape[:2], 0, 1, x.shape[-1])
    reach = shift + pyramid.windows(level) * width
    x = F.pad(x, (0, 0, 0, max(0, reach - pyramid.length)))[:, :, shift:reach]
    return x.reshape(*x.shape[:2], pyramid.windows(level), width, x.shape[-1])


def _per_head(index: Tensor, x: Tensor) -> Tensor:
    """Index tensors are per key/value head: repeat them for the query heads of each group."""
    return index.long().repeat_interleave(x.shape[1] // index.shape[1], dim=1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """`[B, H, R, D]`, `[B, H, S]` -> `[B, H, S, D]`"""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def _level_slots(slots: Tensor, level: int, pyramid: Pyramid) -> Tensor:
    return slots[..., pyramid.offset(level) : pyramid.offset(level + 1)]


def _present_rows(x: Tensor, slots: Tensor) -> Tensor:
    """The rows in the slots of one level's windows, zero for windows that are no entry. `[B, H, W, D]`"""
    slots = _per_head(slots, x)
    return torch.where(slots[..., None] >= 0, _rows(x, slots.clamp(min=0)), 0)
