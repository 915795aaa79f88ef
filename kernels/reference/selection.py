"""The plain twin of selection: scores of windows, which windows are entries, and in which slot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid
from .scorers import norms

_LOWEST = torch.finfo(torch.float32).min


def norm_scores(x: Tensor, groups: int, pyramid: Pyramid) -> Tensor:
    """The largest norm in each window above level 0, over the heads of each group: `[B, Hx, N, D]` -> `[B, G, P - N]`."""
    return window_scores(norms(x, groups), pyramid)


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
