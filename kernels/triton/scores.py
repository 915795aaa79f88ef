"""Triton: the score of every window, straight from queries or keys. One pass over the tokens, nothing written but scores.

The twin is `reference.token_scores(scorer="norm")` followed by `reference.window_scores`. One pass reaches up to two
levels; what lies above is a maximum over its output, a sixteenth of the tokens or less for the usual pooling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Pyramid
from ..ops.dispatch import launchable
from .launch import block_rows, divisor_up_to, on_device_of

_LOWEST = float(torch.finfo(torch.float32).min)
_MOST_UNROLLED = 4
_BLOCK_BYTES, _WARPS = 2048, 8  # measured on an H100, see gather_scatter.py


@triton.jit
def _score_kernel(
    x, scores, rows, groups, fine, upper, score_row,
    stride_b, stride_h, stride_n, stride_d,
    P: tl.constexpr, INNER: tl.constexpr, UNROLL: tl.constexpr, REPEAT: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M windows of INNER * P tokens of one key/value head. INNER is P for two levels, 1 for one."""
    row = tl.program_id(0) % rows  # batch row and key/value head
    m = tl.program_id(0) // rows * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside = m < upper
    mask = inside[:, None] & (d < DIM)[None, :]
    batch, group = (row // groups).to(tl.int64), (row % groups).to(tl.int64)
    start = m.to(tl.int64) * (INNER * P)  # first token of each window
    at = x + batch * stride_b + group * REPEAT * stride_h + start[:, None] * stride_n + d[None, :] * stride_d
    written = scores + row.to(tl.int64) * score_row
    best = tl.full([BLOCK_M], -1.0, tl.float32)
    for c in range(INNER):
        best_inner = tl.full([BLOCK_M], -1.0, tl.float32)
        for _ in range(0, P, UNROLL):
            for _ in tl.static_range(UNROLL):
                squares = tl.full([BLOCK_M], 0.0, tl.float32)
                at_head = at
                for _ in range(REPEAT):
                    values = tl.load(at_head, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, D]
                    squares = tl.maximum(squares, tl.sum(values * values, axis=1), propagate_nan=tl.PropagateNan.ALL)
                    at_head += stride_h
                at += stride_n
                # A token with a bad number scores lowest, and must not hide the others of its window.
                best_inner = tl.maximum(best_inner, tl.where(squares == squares, squares, -1.0))
        norms = tl.where(best_inner < 0, LOWEST, tl.sqrt_rn(tl.maximum(best_inner, 0.0)))
        tl.store(written + m * INNER + c, norms, mask=inside)
        best = tl.maximum(best, best_inner)
    if INNER > 1:
        norms = tl.where(best < 0, LOWEST, tl.sqrt_rn(tl.maximum(best, 0.0)))
        tl.store(written + fine + m, norms, mask=inside)


def norm_scores(x: Tensor, groups: int, pyramid: Pyramid) -> Tensor:
    """The largest norm in each window above level 0, over the heads of each group.

    Args:
        x: `[B, Hx, N, D]` of any strides; groups: `G`, a divisor of `Hx`.

    Returns:
        float32 `[B, G, P - N]`, windows numbered as in `Pyramid`, less N.
    """
    batch, heads, _, dim = x.shape
    levels, p = pyramid.levels, pyramid.pooling
    scores = x.new_empty(batch, groups, pyramid.size - pyramid.length, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    reached = min(levels - 1, 2)
    upper = pyramid.windows(reached)
    block_d = triton.next_power_of_2(dim)
    block_m = block_rows(block_d * x.element_size(), _BLOCK_BYTES)
    rows = batch * groups
    with on_device_of(x):
        launchable(_score_kernel)[(rows * triton.cdiv(upper, block_m),)](
            x, scores, rows, groups, pyramid.windows(1), upper, scores.shape[2], *x.stride(),
            P=p, INNER=p if reached == 2 else 1, UNROLL=divisor_up_to(p, _MOST_UNROLLED), REPEAT=heads // groups,
            DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, LOWEST=_LOWEST, num_warps=_WARPS,
        )  # fmt: skip
    for level in range(reached + 1, levels):
        finer, here, next_ = (pyramid.offset(i) - pyramid.length for i in (level - 1, level, level + 1))
        torch.amax(scores[..., finer:here].unflatten(-1, (-1, p)), -1, out=scores[..., here:next_])
    return scores
