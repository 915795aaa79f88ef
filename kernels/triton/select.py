"""Triton: which windows are entries, and in which slot. One program per tile, one launch, no sort, no word from the host.

The k largest of a tile's candidates are found by their threshold: 16 quarterings of the range of float bits, each a count.
Ties at the threshold go to the lower index by a prefix sum. Where an entry lies follows from counts, too. Number the
level-l candidates of a tile a = 0, 1, ... in order. Among entries of levels up to l, those before the end of candidate a are

    local_l(a) = a + local-length_{l-1}(p * (expanded level-l candidates up to and with a)),

candidates of coarser levels before it are its ancestors' own numbers, and the entries before the tile follow from the
sizes of the tiles. The twin is `reference.choose_windows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..geometry import Pyramid
from ..ops.dispatch import launchable
from .launch import on_device_of

_LOWEST = float(torch.finfo(torch.float32).min)
_LARGEST_TILE = 16384  # candidates that one program holds in registers


@triton.jit
def _order_bits(score):
    """Floats as unsigned integers in the same order; none is 0, which is left for what is no candidate."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0 equal to 0
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _largest(keys, share):
    """The `share` largest of the keys that are not 0, the lower index first where they are equal: a mask."""
    threshold = tl.full([], 0, tl.uint32)
    low = tl.full([], 1 << 30, tl.uint32)
    for _ in range(16):  # two bits at a time: three counts in one sum
        one, two, three = threshold | low, threshold | (low << 1), threshold | low | (low << 1)
        counts = (keys >= one).to(tl.int64) + ((keys >= two).to(tl.int64) << 20) + ((keys >= three).to(tl.int64) << 40)
        count = tl.sum(counts, axis=0)
        threshold = tl.where((count & 0xFFFFF) >= share, one, threshold)
        threshold = tl.where(((count >> 20) & 0xFFFFF) >= share, two, threshold)
        threshold = tl.where((count >> 40) >= share, three, threshold)
        low = low >> 2
    above = keys > threshold
    equal = (keys == threshold) & (keys > 0)
    wanted = share - tl.sum(above.to(tl.int32), axis=0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= wanted))


@triton.jit
def _select_kernel(
    score_q, score_k, entries, slots, scratch, coarse, length, gathered, windows, score_row, list_row, quota, tiles,
    LEVELS: tl.constexpr, P: tl.constexpr, KEEP_FIRST: tl.constexpr, PREVIOUS: tl.constexpr, LOWEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CHILDREN: tl.constexpr,
):  # fmt: skip
    """Program: one tile of one batch row and key/value head. PREVIOUS ranks each window by the scores of the one before it.

    Scratch, per program and level above 0: the expanded windows, the coarser candidates before each, the running count
    of expanded candidates, and the local slot after each candidate; four lists of `list_row` numbers.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    score_q += row * score_row
    score_k += row * score_row
    entries += row * gathered
    slots += row * windows
    scratch += (row * tiles + tile) * (LEVELS * 4) * list_row

    first_window = (tile.to(tl.int64) * coarse // tiles).to(tl.int32)
    small = coarse // tiles
    larger_before = first_window - tile * small  # tiles before this one that have one window more
    size = ((tile + 1).to(tl.int64) * coarse // tiles).to(tl.int32) - first_window
    below, below_larger = small * 0, small * 0  # entries under the coarsest level in a small and in a larger tile
    reach, reach_larger = small, small + 1
    for _ in tl.static_range(1, LEVELS):
        reach, reach_larger = P * tl.minimum(reach, quota), P * tl.minimum(reach_larger, quota)
        below += reach
        below_larger += reach_larger
    base = first_window + larger_before * below_larger + (tile - larger_before) * below

    # Until it is chosen, no window of the tile has a slot.
    for level in tl.static_range(LEVELS - 1):
        number = first_window * (P ** (LEVELS - 1 - level))
        for finer_level in tl.static_range(level):
            number += length if finer_level == 0 else coarse * (P ** (LEVELS - 1 - finer_level))
        count = size * (P ** (LEVELS - 1 - level))
        for begin in range(0, count, BLOCK):
            a = begin + tl.arange(0, BLOCK)
            tl.store(slots + number + a, -1, mask=a < count)

    # From the coarsest level down: choose, and list what is expanded.
    candidates = size
    for level in tl.static_range(LEVELS - 1, 0, -1):
        a = tl.arange(0, BLOCK if level == LEVELS - 1 else BLOCK_CHILDREN)
        valid = a < candidates
        if level == LEVELS - 1:
            window = first_window + a
            coarser = a * 0
        else:
            above = scratch + (level + 1) * 4 * list_row
            window = tl.load(above + a // P, mask=valid, other=0) * P + a % P
            coarser = tl.load(above + list_row + a // P, mask=valid, other=0)
        # The scores of level 1 come first, then those of level 2, ...
        place = window
        for finer in tl.static_range(1, level):
            place += coarse * (P ** (LEVELS - 1 - finer))
        scored = valid
        if PREVIOUS:
            place -= 1
            scored = valid & (window > 0)
        q = tl.load(score_q + place, mask=scored, other=LOWEST)
        if KEEP_FIRST:
            q = tl.where(window == 0, float("inf"), q)
        expanded = _largest(tl.where(valid, _order_bits(q), 0), quota - quota // 2)
        k = tl.load(score_k + place, mask=scored, other=LOWEST)
        expanded = expanded | _largest(tl.where(valid & (expanded == 0), _order_bits(k), 0), quota // 2)
        running = tl.cumsum(expanded.to(tl.int32), axis=0)
        here = scratch + level * 4 * list_row
        tl.store(here + running - 1, window, mask=expanded)
        tl.store(here + list_row + running - 1, coarser + a, mask=expanded)
        tl.store(here + 2 * list_row + a, running, mask=valid)
        candidates = tl.minimum(candidates, quota) * P
        tl.debug_barrier()  # the next level reads the lists

    # From the tokens up: number what is there.
    for level in tl.static_range(LEVELS):
        if level < LEVELS - 1:
            reach = size
            for _ in tl.static_range(LEVELS - 1 - level):
                reach = tl.minimum(reach, quota) * P
            a = tl.arange(0, BLOCK_CHILDREN)
            valid = a < reach
            above = scratch + (level + 1) * 4 * list_row
            window = tl.load(above + a // P, mask=valid, other=0) * P + a % P
            coarser = tl.load(above + list_row + a // P, mask=valid, other=0)
        else:
            a = tl.arange(0, BLOCK)
            valid = a < size
            window = first_window + a
            coarser = a * 0
        local = a
        if level > 0:
            here = scratch + level * 4 * list_row
            finer = P * tl.load(here + 2 * list_row + a, mask=valid, other=0)
            if level > 1:
                finer = tl.load(here - 4 * list_row + 3 * list_row + finer - 1, mask=valid & (finer > 0), other=0)
            local += finer
            tl.store(here + 3 * list_row + a, local + 1, mask=valid)
        number = window
        for finer_level in tl.static_range(level):
            number += length if finer_level == 0 else coarse * (P ** (LEVELS - 1 - finer_level))
        slot = base + coarser + local
        tl.store(entries + slot, number, mask=valid)
        tl.store(slots + number, slot, mask=valid)
        tl.debug_barrier()  # the next level reads the local slots

    # The tail is kept token by token, after everything else.
    if tile == tiles - 1:
        covered = coarse * (P ** (LEVELS - 1))
        for begin in range(covered, length, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            tl.store(entries + gathered - length + token, token, mask=token < length)
            tl.store(slots + token, gathered - length + token, mask=token < length)


def _most_candidates(pyramid: Pyramid) -> tuple[int, int]:
    """The most candidates that a tile has: at the coarsest level, and below it."""
    tile_size = -(-pyramid.coarse // pyramid.tiles_with_windows)
    children = pyramid.pooling * min(tile_size, pyramid.quota_)
    for _ in range(pyramid.levels - 2):
        children = max(children, pyramid.pooling * min(children, pyramid.quota_))
    return tile_size, children


def choose_windows(window_q: Tensor, window_k: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """`reference.choose_windows`, by which tiles are served that no single program can hold."""
    batch, groups = window_q.shape[:2]
    p, quota, tiles, levels = pyramid.pooling, pyramid.quota_, pyramid.tiles_with_windows, pyramid.levels
    tile_size, children = _most_candidates(pyramid)
    if pyramid.coarse == 0 or max(tile_size, children) > _LARGEST_TILE:
        return reference.choose_windows(window_q, window_k, pyramid)
    block, block_children = triton.next_power_of_2(tile_size), triton.next_power_of_2(children)
    list_row = max(block, block_children)
    entries = window_q.new_empty(batch, groups, pyramid.gathered, dtype=torch.int32)
    slots = entries.new_empty(batch, groups, pyramid.size)
    scratch = entries.new_empty(batch * groups * tiles * levels * 4 * list_row)
    with on_device_of(window_q):
        launchable(_select_kernel)[(tiles, batch * groups)](
            window_q, window_k, entries, slots, scratch, pyramid.coarse, pyramid.length, pyramid.gathered,
            pyramid.size, window_q.shape[2], list_row, quota, tiles,
            LEVELS=levels, P=p, KEEP_FIRST=pyramid.keep_first, PREVIOUS=pyramid.causal_selection, LOWEST=_LOWEST,
            BLOCK=block, BLOCK_CHILDREN=block_children,
            num_warps=max(4, min(16, list_row // 512)),
        )  # fmt: skip
    return entries, slots
