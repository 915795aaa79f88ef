"""Triton: rows from tokens to entries and back. Every row is written once; there are no atomics and no zero-fill.

`collect`: each entry reads the tokens of its window (gather; the gradient of scatter). `spread`: each token reads the at
most L entries that concern it, through the inverse map `slots` (scatter; the gradient of gather). The twins are the four
functions `gather`, `gather_backward`, `scatter`, `scatter_backward` of `reference`. Addresses are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Pyramid
from ..ops.dispatch import launchable
from .launch import block_rows, divisor_up_to, on_device_of

_MOST_UNROLLED = 8
# Measured on an H100 at N from 8K to 512K, head dimension 128: small blocks and many of them, so that loads are always
# under way. Nothing is tuned at run time: a result must not depend on timing.
_COLLECT = {"block_bytes": 2048, "num_warps": 8}
_SPREAD = {"block_bytes": 4096, "num_warps": 2}


@triton.jit
def tells_of_border(starts, document, begin, width, token, asked, covered, LEVELS: tl.constexpr, P: tl.constexpr):
    """Whether a window is an entry because of a border behind a token, perhaps: `reference.own_document` says when.

    Args: `starts` of the batch row; the token's document; where the window begins, and its tokens; of which to ask.
    """
    told = asked & (begin < 0)
    for above in tl.static_range(1, LEVELS):
        first = begin // (P**above) * (P**above)
        divided = asked & (width < P**above) & (first < covered) & (document <= first - P**above)
        last = tl.load(starts + first + (P**above - 1), mask=divided, other=0)
        told = told | (divided & (last > token))
    return told


@triton.jit
def _collect_kernel(
    x, entries, starts, out, heads, groups, length, coarse, gathered,
    stride_b, stride_h, stride_n, stride_d,
    LEVELS: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr, CAUSAL: tl.constexpr, UNROLL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, DOCUMENTS: tl.constexpr,
    UNTOLD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_S entries of one head. MEAN divides by the width; CAUSAL reads from the window's last token on.

    DOCUMENTS leaves out tokens whose document begins after the window does, UNTOLD those that an entry would tell of a border.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    blocks = tl.cdiv(gathered, BLOCK_S)
    row = tl.program_id(0) // blocks  # batch row and head
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    group = head // (heads // groups)
    inside = s < gathered
    entry = tl.load(entries + (batch * groups + group) * gathered + s, mask=inside, other=0)

    start = entry
    width = tl.full([BLOCK_S], 1, tl.int32)
    first = length  # number of the level's first window
    for level in tl.static_range(1, LEVELS):
        here = entry >= first
        start = tl.where(here, (entry - first) * (P**level), start)
        width = tl.where(here, P**level, width)
        first += coarse * (P ** (LEVELS - 1 - level))
    begin = start
    if CAUSAL:
        start += width - 1
    tokens = tl.where(inside, tl.minimum(width, length - start), 0)
    covered = coarse * (P ** (LEVELS - 1))

    at = x + batch * stride_b + head * stride_h + start.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    in_row = (d < DIM)[None, :]
    total = tl.zeros([BLOCK_S, BLOCK_D], acc)
    for outer in range(0, tl.max(tokens, axis=0), UNROLL):
        for u in tl.static_range(UNROLL):
            read = outer + u < tokens
            if DOCUMENTS:
                token = start + outer + u
                document = tl.load(starts + batch * length + token, mask=read, other=length)
                read = read & (document <= begin)
                if UNTOLD:
                    read = read & ~tells_of_border(
                        starts + batch * length, document, begin, width, token, read, covered, LEVELS, P
                    )
            total += tl.load(at, mask=read[:, None] & in_row, other=0.0).to(acc)
            at += stride_n
    if MEAN:
        total = total / width.to(acc)[:, None]
    written = out + (row.to(tl.int64) * gathered + s)[:, None] * DIM + d[None, :]
    tl.store(written, total.to(out.dtype.element_ty), mask=inside[:, None] & in_row)


@triton.jit
def _spread_kernel(
    x, slots, starts, out, heads, groups, length, coarse, windows,
    stride_b, stride_h, stride_s, stride_d,
    LEVELS: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, DOCUMENTS: tl.constexpr,
    UNTOLD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N tokens of one head. MEAN divides by the width; CAUSAL starts at each window's last token.

    DOCUMENTS leaves out windows that begin before the token's document does, UNTOLD those that tell of a border behind it.
    """
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.num_programs(0) // tl.cdiv(length, BLOCK_N)
    row = tl.program_id(0) % rows  # heads are neighbours in memory, so they are neighbours here
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    group = head // (heads // groups)
    inside = n < length
    in_row = (d < DIM)[None, :]
    base = x + batch * stride_b + head * stride_h + d[None, :] * stride_d
    inverse = slots + (batch * groups + group) * windows
    if DOCUMENTS:
        document = tl.load(starts + batch * length + n, mask=inside, other=length)

    covered = coarse * (P ** (LEVELS - 1))
    there = inside
    if UNTOLD:
        there = inside & ~tells_of_border(starts + batch * length, document, n, n * 0 + 1, n, inside, covered, LEVELS, P)
    slot = tl.load(inverse + n, mask=there, other=-1)
    total = tl.load(
        base + slot.to(tl.int64)[:, None] * stride_s, mask=(slot >= 0)[:, None] & in_row, other=0.0
    ).to(acc)  # [BLOCK_N, D]
    first = length  # number of the level's first window
    for level in tl.static_range(1, LEVELS):
        shifted = n
        if CAUSAL:
            shifted = n - (P**level - 1)
        window = shifted // (P**level)
        count = coarse * (P ** (LEVELS - 1 - level))
        there = inside & (shifted >= 0) & (window < count)
        if DOCUMENTS:
            there = there & (window * (P**level) >= document)
        if UNTOLD:
            there = there & ~tells_of_border(
                starts + batch * length, document, window * (P**level), n * 0 + P**level, n, there, covered, LEVELS, P
            )
        slot = tl.load(inverse + first + window, mask=there, other=-1)
        part = tl.load(
            base + slot.to(tl.int64)[:, None] * stride_s, mask=(slot >= 0)[:, None] & in_row, other=0.0
        ).to(acc)
        if MEAN:
            part = part / (P**level)
        total += part
        first += count
    written = out + ((batch * length + n) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(written, total.to(out.dtype.element_ty), mask=inside[:, None] & in_row)


def _collect(
    x: Tensor, entries: Tensor, pyramid: Pyramid, *, mean: bool, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    batch, heads, length, dim = x.shape
    gathered = entries.shape[2]
    out = x.new_empty(batch, heads, gathered, dim)
    block_d = triton.next_power_of_2(dim)
    block_s = block_rows(block_d * x.element_size(), _COLLECT["block_bytes"])
    with on_device_of(x):
        launchable(_collect_kernel)[(batch * heads * triton.cdiv(gathered, block_s),)](
            x, entries.contiguous(), _contiguous(starts, entries), out,
            heads, entries.shape[1], length, pyramid.coarse, gathered, *x.stride(),
            LEVELS=pyramid.levels, P=pyramid.pooling, MEAN=mean, CAUSAL=is_causal,
            UNROLL=divisor_up_to(pyramid.widest, _MOST_UNROLLED),
            DIM=dim, BLOCK_D=block_d, BLOCK_S=block_s, WIDE=x.dtype == torch.float64, DOCUMENTS=starts is not None,
            UNTOLD=starts is not None and pyramid.causal_selection,
            num_warps=_COLLECT["num_warps"],
        )  # fmt: skip
    return out


def _spread(
    x: Tensor, slots: Tensor, pyramid: Pyramid, *, mean: bool, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    batch, heads, _, dim = x.shape
    length = pyramid.length
    out = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    block_d = triton.next_power_of_2(dim)
    block_n = block_rows(block_d * x.element_size(), _SPREAD["block_bytes"])
    with on_device_of(x):
        launchable(_spread_kernel)[(batch * heads * triton.cdiv(length, block_n),)](
            x, slots.contiguous(), _contiguous(starts, slots), out,
            heads, slots.shape[1], length, pyramid.coarse, slots.shape[2], *x.stride(),
            LEVELS=pyramid.levels, P=pyramid.pooling, MEAN=mean, CAUSAL=is_causal,
            DIM=dim, BLOCK_D=block_d, BLOCK_N=block_n, WIDE=x.dtype == torch.float64, DOCUMENTS=starts is not None,
            UNTOLD=starts is not None and pyramid.causal_selection,
            num_warps=_SPREAD["num_warps"],
        )  # fmt: skip
    return out


def _contiguous(starts: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel takes a pointer there, also where it reads nothing by it."""
    return instead if starts is None else starts.contiguous()


def gather(x: Tensor, entries: Tensor, pyramid: Pyramid) -> Tensor:
    """`reference.gather`."""
    return _collect(x, entries, pyramid, mean=True, is_causal=False)


def gather_backward(grad: Tensor, slots: Tensor, pyramid: Pyramid) -> Tensor:
    """`reference.gather_backward`."""
    return _spread(grad, slots, pyramid, mean=True, is_causal=False)


def scatter(
    out: Tensor, slots: Tensor, pyramid: Pyramid, *, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    """`reference.scatter`."""
    return _spread(out, slots, pyramid, mean=False, is_causal=is_causal, starts=starts)


def scatter_backward(
    grad: Tensor, entries: Tensor, pyramid: Pyramid, *, is_causal: bool, starts: Tensor | None = None
) -> Tensor:
    """`reference.scatter_backward`."""
    return _collect(grad, entries, pyramid, mean=False, is_causal=is_causal, starts=starts)
