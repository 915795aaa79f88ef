"""The pyramid's arithmetic: how many windows, tiles and entries there are, and where each window is numbered.

Nothing here looks at data: every figure follows from the length and the configuration, so the gathered length `S` is a
static shape. Where the length is a `torch.SymInt` (dynamic shapes) the figures are symbolic expressions of it.

Windows are numbered level by level, finest first: window `i` of level `l` is number `offset(l) + i`.
Source: SPEC.md, "The four stages" and "What we decide"; paper arXiv 2605.06554.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

_USUAL_QUOTA = 128
_LEAST_CAUSAL_QUOTA = 64  # windows that compete for fewer tell of those behind (SPEC.md, "Causal selection")
_QUOTAS = (_USUAL_QUOTA, _LEAST_CAUSAL_QUOTA, 16)
_LEAST_QUOTA = 2  # one by query, one by key


@cache
def default_quota(topk: int) -> int:
    """Windows expanded per tile and level: the divisor of `topk` nearest 128 by ratio, ties to the smaller.

    Divisors below 64 count only where there are no others.
    """
    divisors = {d for i in range(1, math.isqrt(topk) + 1) if topk % i == 0 for d in (i, topk // i)}
    large = {d for d in divisors if d >= _LEAST_CAUSAL_QUOTA} or divisors
    return min(sorted(large), key=lambda d: max(d / _USUAL_QUOTA, _USUAL_QUOTA / d))


def tokens_of_tile(quota: int, *, levels: int, pooling: int) -> int:
    """The tokens of which a tile that expands `quota` windows per level expands half: `2 p (L - 1)` for each window."""
    return 2 * pooling * max(1, levels - 1) * quota


def half_of(length: int, *, levels: int, pooling: int, quota: int | None = None) -> tuple[int, int]:
    """`topk` and `quota` by which half of a sequence is expanded, over all levels, in whole tiles.

    The quota is 128 unless one is given, and 64, 16 or 2 where the sequence has no tokens for a tile of that. Where the length
    is a `torch.SymInt` so is `topk`, and the quota an `int`: what decides it becomes a guard, so there are few to choose from.
    """
    if quota is None:
        fitting = (each for each in _QUOTAS if length >= tokens_of_tile(each, levels=levels, pooling=pooling))
        quota = next(fitting, _LEAST_QUOTA)
    of_tile = tokens_of_tile(quota, levels=levels, pooling=pooling)
    return (quota if length < of_tile else length // of_tile * quota), quota


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """The shape of one pyramid over `length` tokens.

    Args:
        length: tokens in the sequence, `N`; an `int` or a `torch.SymInt`.
        levels: pyramid levels `L`; level 0 is the tokens. 0: no pyramid, beside a local branch.
        pooling: pooling factor `p >= 2` between levels.
        topk: windows expanded per level over the whole sequence, `k >= 1`.
        quota: windows expanded per tile and level, `m`; a divisor of `topk`, or None for `default_quota(topk)`.
        keep_first: expand window 0 at every level, so that no token is left without a contribution.
        causal_selection: rank each window by the scores of the one before it, so that no token is told of later ones.
    """

    length: int
    levels: int
    pooling: int
    topk: int
    quota: int | None = None
    keep_first: bool = True
    causal_selection: bool = True

    @property
    def widest(self) -> int:
        """Tokens in one coarsest window, `p^(L-1)`."""
        return int(self.pooling ** max(0, self.levels - 1))

    @property
    def coarse(self) -> int:
        """Coarsest windows, `M`."""
        return self.length // self.widest

    @property
    def covered(self) -> int:
        """Tokens under the coarsest windows; the rest, the tail, is always kept at level 0."""
        return self.coarse * self.widest

    @property
    def quota_(self) -> int:
        """Windows expanded per tile and level, `m`."""
        return default_quota(self.topk) if self.quota is None else self.quota

    @property
    def tiles(self) -> int:
        """Tiles `T = k / m`; tile `t` owns the coarsest windows `[t*M//T, (t+1)*M//T)`."""
        return self.topk // self.quota_

    @property
    def tiles_with_windows(self) -> int:
        """As many tiles as can matter: with more tiles than windows, each window is a tile of its own."""
        return max(1, min(self.tiles, self.coarse))

    def windows(self, level: int) -> int:
        """Windows of a level; at level 0 every token, the tail included."""
        return self.length if level == 0 else self.coarse * self.pooling ** (self.levels - 1 - level)

    def offset(self, level: int) -> int:
        """The number of a level's first window."""
        return sum(self.windows(finer) for finer in range(level))

    @property
    def size(self) -> int:
        """Windows of all levels."""
        return self.offset(self.levels)

    @property
    def gathered(self) -> int:
        """Entries in the gathered sub-sequence, `S`, the same for every head."""
        if self.levels == 0:
            return 0
        tail = self.length % self.widest
        if self._fills_quotas:  # and nothing is divided by a number of tiles that may be symbolic
            return self.coarse + tail + (self.levels - 1) * self.pooling * self.topk
        smaller, larger_tiles = self.coarse // self.tiles, self.coarse % self.tiles
        in_tiles = (self.tiles - larger_tiles) * self._children(smaller) + larger_tiles * self._children(smaller + 1)
        return self.coarse + tail + in_tiles

    @property
    def _fills_quotas(self) -> bool:
        """Whether every tile has as many windows as it may expand."""
        if isinstance(self.topk, torch.SymInt):  # it follows the length, a quota for so many tokens
            of_tile = tokens_of_tile(self.quota_, levels=self.levels, pooling=self.pooling)
            if of_tile >= self.quota_ * self.widest:
                return True  # without a guard
        return bool(self.coarse >= self.topk)

    def gathered_below(self, length: float) -> float:
        """More than are gathered of that length, whatever it is: linear in the length."""
        if self.levels == 0:
            return 0.0
        expanded = length / 2 if isinstance(self.topk, torch.SymInt) else (self.levels - 1) * self.pooling * self.topk
        return length / self.widest + self.widest + expanded

    def of_tile(self, windows: int) -> int:
        """Entries in a tile of so many coarsest windows."""
        return windows + self._children(windows)

    def _children(self, candidates: int) -> int:
        """Entries below the coarsest level in a tile of so many coarsest windows."""
        children = 0
        for _ in range(self.levels - 1):
            candidates = self.pooling * torch.sym_min(candidates, self.quota_)
            children += candidates
        return children
