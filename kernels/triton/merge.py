"""Triton: the merge of entries and local windows by their log-sum-exps, its gradient, and the output for a stock backward.

Tokens read the at most L entries that concern them, as `_spread_kernel` does; entries read their tokens, as `_collect_kernel`.
Every row is written once, without atomics. The twins are `merge`, `merge_backward` and `shift_output` of `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import Pyramid
from ..ops.dispatch import launchable
from .gather_scatter import tells_of_border
from .launch import block_rows, on_device_of

_TOKENS = {"block_bytes": 4096, "num_warps": 2}  # as gather_scatter.py's, whose access it shares; not measured apart
_ENTRIES = {"block_bytes": 2048, "num_warps": 8}
_ROWS = {"block_bytes": 4096, "num_warps": 4}


@triton.jit
def _slot_of(
    inverse, starts, document, n, inside, first, length, coarse,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, P: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
    UNTOLD: tl.constexpr,
):  # fmt: skip
    """The slot of the entry of a level that concerns each token, or -1. `first`: the number of the level's first window."""
    shifted = n
    if CAUSAL:
        shifted = n - (P**LEVEL - 1)
    window = shifted // (P**LEVEL)
    count = length if LEVEL == 0 else coarse * (P ** (LEVELS - 1 - LEVEL))
    there = inside & (shifted >= 0) & (window < count)
    begin = window * (P**LEVEL)
    if DOCUMENTS:
        there = there & (begin >= document)
    if UNTOLD:
        covered = coarse * (P ** (LEVELS - 1))
        there = there & ~tells_of_border(starts, document, begin, n * 0 + P**LEVEL, n, there, covered, LEVELS, P)
    return tl.load(inverse + first + window, mask=there, other=-1)


@triton.jit
def _merge_kernel(
    x, lse, local, local_lse, slots, starts, out, total, heads, groups, length, coarse, windows, gathered,
    stride_b, stride_h, stride_s, stride_d, local_b, local_h, local_n, local_d,
    LEVELS: tl.constexpr, P: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, DOCUMENTS: tl.constexpr,
    UNTOLD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N tokens of one head. First what each is given weighs, then the mean."""
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    rows = tl.num_programs(0) // tl.cdiv(length, BLOCK_N)
    row = tl.program_id(0) % rows
    n = tl.program_id(0) // rows * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    inside = n < length
    in_row = (d < DIM)[None, :]
    inverse = slots + (batch * groups + head // (heads // groups)) * windows
    starts += batch * length
    document = n
    if DOCUMENTS:
        document = tl.load(starts + n, mask=inside, other=length)
    of_entries = lse + row.to(tl.int64) * gathered
    base = x + batch * stride_b + head * stride_h + d[None, :] * stride_d

    own = tl.load(local_lse + row.to(tl.int64) * length + n, mask=inside, other=0.0)
    largest = own
    first = length * 0
    for level in tl.static_range(LEVELS):
        slot = _slot_of(
            inverse, starts, document, n, inside, first, length, coarse, level, LEVELS, P, CAUSAL, DOCUMENTS, UNTOLD
        )
        largest = tl.maximum(largest, tl.load(of_entries + slot, mask=slot >= 0, other=-float("inf")))
        first += length if level == 0 else coarse * (P ** (LEVELS - 1 - level))

    weight = tl.exp(own - largest)
    weights = weight
    at = local + batch * local_b + head * local_h + n.to(tl.int64)[:, None] * local_n + d[None, :] * local_d
    mean = weight[:, None] * tl.load(at, mask=inside[:, None] & in_row, other=0.0).to(acc)  # [BLOCK_N, D]
    first = length * 0
    for level in tl.static_range(LEVELS):
        slot = _slot_of(
            inverse, starts, document, n, inside, first, length, coarse, level, LEVELS, P, CAUSAL, DOCUMENTS, UNTOLD
        )
        weight = tl.exp(tl.load(of_entries + slot, mask=slot >= 0, other=-float("inf")) - largest)
        weights += weight
        part = tl.load(base + slot.to(tl.int64)[:, None] * stride_s, mask=(slot >= 0)[:, None] & in_row, other=0.0)
        mean += weight[:, None] * part.to(acc)
        first += length if level == 0 else coarse * (P ** (LEVELS - 1 - level))
    mean = mean / weights[:, None]
    written = out + ((batch * length + n) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(written, mean.to(out.dtype.element_ty), mask=inside[:, None] & in_row)
    tl.store(total + row.to(tl.int64) * length + n, largest + tl.log(weights), mask=inside)


@triton.jit
def _local_backward_kernel(
    grad, local, local_lse, merged, total, grad_local, grad_lse, heads, length,
    grad_b, grad_h, grad_n, grad_d, local_b, local_h, local_n, local_d, merged_b, merged_h, merged_n, merged_d,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N tokens of one head."""
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    blocks = tl.cdiv(length, BLOCK_N)
    row = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    inside = n < length
    mask = inside[:, None] & (d < DIM)[None, :]
    token = n.to(tl.int64)[:, None]
    at = row.to(tl.int64) * length + n
    g = tl.load(grad + batch * grad_b + head * grad_h + token * grad_n + d[None, :] * grad_d, mask=mask, other=0.0).to(acc)
    x = tl.load(local + batch * local_b + head * local_h + token * local_n + d[None, :] * local_d, mask=mask, other=0.0)
    mean = tl.load(
        merged + batch * merged_b + head * merged_h + token * merged_n + d[None, :] * merged_d, mask=mask, other=0.0
    )
    weight = tl.exp(tl.load(local_lse + at, mask=inside, other=0.0) - tl.load(total + at, mask=inside, other=0.0))
    tl.store(grad_lse + at, weight * tl.sum(g * (x.to(acc) - mean.to(acc)), axis=1), mask=inside)
    written = grad_local + ((batch * length + n) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(written, (weight[:, None] * g).to(grad_local.dtype.element_ty), mask=mask)


@triton.jit
def _entries_backward_kernel(
    grad, x, lse, merged, total, entries, starts, grad_x, grad_lse, heads, groups, length, coarse, gathered,
    grad_b, grad_h, grad_n, grad_d, stride_b, stride_h, stride_s, stride_d, merged_b, merged_h, merged_n, merged_d,
    LEVELS: tl.constexpr, P: tl.constexpr, CAUSAL: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, DOCUMENTS: tl.constexpr,
    UNTOLD: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_S entries of one head, each with the tokens that it concerns."""
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    blocks = tl.cdiv(gathered, BLOCK_S)
    row = tl.program_id(0) // blocks
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    inside = s < gathered
    in_row = (d < DIM)[None, :]
    entry = tl.load(entries + (batch * groups + head // (heads // groups)) * gathered + s, mask=inside, other=0)
    begin = entry
    width = tl.full([BLOCK_S], 1, tl.int32)
    first = length
    for level in tl.static_range(1, LEVELS):
        here = entry >= first
        begin = tl.where(here, (entry - first) * (P**level), begin)
        width = tl.where(here, P**level, width)
        first += coarse * (P ** (LEVELS - 1 - level))
    start = begin
    if CAUSAL:
        start += width - 1
    tokens = tl.where(inside, tl.minimum(width, length - start), 0)
    covered = coarse * (P ** (LEVELS - 1))
    starts += batch * length
    place = row.to(tl.int64) * gathered + s
    own = tl.load(lse + place, mask=inside, other=0.0)
    slot = s.to(tl.int64)[:, None]
    rows = x + batch * stride_b + head * stride_h + slot * stride_s + d[None, :] * stride_d
    value = tl.load(rows, mask=inside[:, None] & in_row, other=0.0).to(acc)
    total += row.to(tl.int64) * length
    found = tl.zeros([BLOCK_S, BLOCK_D], acc)
    of_lse = tl.zeros([BLOCK_S], acc)
    for i in range(0, tl.max(tokens, axis=0)):
        token = start + i
        read = i < tokens
        if DOCUMENTS:
            document = tl.load(starts + token, mask=read, other=length)
            read = read & (document <= begin)
            if UNTOLD:
                read = read & ~tells_of_border(starts, document, begin, width, token, read, covered, LEVELS, P)
        weight = tl.exp(own - tl.load(total + token, mask=read, other=float("inf")))
        n = token.to(tl.int64)[:, None]
        mask = read[:, None] & in_row
        g = tl.load(grad + batch * grad_b + head * grad_h + n * grad_n + d[None, :] * grad_d, mask=mask, other=0.0).to(acc)
        mean = tl.load(
            merged + batch * merged_b + head * merged_h + n * merged_n + d[None, :] * merged_d, mask=mask, other=0.0
        ).to(acc)
        g = weight[:, None] * g
        found += g
        of_lse += tl.sum(g * (value - mean), axis=1)
    tl.store(grad_x + place[:, None] * DIM + d[None, :], found.to(grad_x.dtype.element_ty), mask=inside[:, None] & in_row)
    tl.store(grad_lse + place, of_lse, mask=inside)


@triton.jit
def _shift_kernel(
    out, grad, grad_lse, shifted, heads, length,
    out_b, out_h, out_n, out_d, grad_b, grad_h, grad_n, grad_d, shifted_b, shifted_h, shifted_n,
    LARGEST: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_N rows of one head."""
    acc: tl.constexpr = tl.float64 if WIDE else tl.float32
    blocks = tl.cdiv(length, BLOCK_N)
    row = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    mask = (n < length)[:, None] & (d < DIM)[None, :]
    token = n.to(tl.int64)[:, None]
    g = tl.load(grad + batch * grad_b + head * grad_h + token * grad_n + d[None, :] * grad_d, mask=mask, other=0.0).to(acc)
    x = tl.load(out + batch * out_b + head * out_h + token * out_n + d[None, :] * out_d, mask=mask, other=0.0).to(acc)
    of_lse = tl.load(grad_lse + row.to(tl.int64) * length + n, mask=n < length, other=0.0)
    peak = tl.max(tl.abs(g), axis=1)
    divisor = tl.where(peak > 0, peak, 1.0)
    unit = g / divisor[:, None]
    share = of_lse / tl.maximum(tl.sum(unit * unit, axis=1), 1.0) / divisor
    share = tl.where(peak > 0, tl.minimum(tl.maximum(share, -LARGEST), LARGEST), 0.0)
    written = shifted + batch * shifted_b + head * shifted_h + token * shifted_n + d[None, :]
    tl.store(written, (x - share[:, None] * unit).to(shifted.dtype.element_ty), mask=mask)


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
    """`reference.merge`."""
    batch, heads, length, dim = local_out.shape
    merged = local_out.new_empty(batch, length, heads, dim).transpose(1, 2)
    total = local_lse.new_empty(batch, heads, length)
    block_d = triton.next_power_of_2(dim)
    block_n = block_rows(block_d * out.element_size(), _TOKENS["block_bytes"])
    with on_device_of(out):
        launchable(_merge_kernel)[(batch * heads * triton.cdiv(length, block_n),)](
            out, lse.contiguous(), local_out, local_lse.contiguous(), slots.contiguous(), _starts(starts, slots), merged, total,
            heads, slots.shape[1], length, pyramid.coarse, slots.shape[2], out.shape[2], *out.stride(), *local_out.stride(),
            LEVELS=pyramid.levels, P=pyramid.pooling, CAUSAL=is_causal,
            DIM=dim, BLOCK_D=block_d, BLOCK_N=block_n, WIDE=out.dtype == torch.float64, DOCUMENTS=starts is not None,
            UNTOLD=starts is not None and pyramid.causal_selection, num_warps=_TOKENS["num_warps"],
        )  # fmt: skip
    return merged, total


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
    """`reference.merge_backward`."""
    batch, heads, length, dim = local_out.shape
    gathered, wide = out.shape[2], out.dtype == torch.float64
    grad_local = local_out.new_empty(batch, length, heads, dim).transpose(1, 2)
    grad_local_lse, grad_lse = local_lse.new_empty(batch, heads, length), lse.new_empty(batch, heads, gathered)
    grad_out = out.new_empty(batch, heads, gathered, dim)
    block_d = triton.next_power_of_2(dim)
    block_n = block_rows(block_d * out.element_size(), _TOKENS["block_bytes"])
    block_s = block_rows(block_d * out.element_size(), _ENTRIES["block_bytes"])
    total = total.contiguous()
    with on_device_of(out):
        launchable(_local_backward_kernel)[(batch * heads * triton.cdiv(length, block_n),)](
            grad, local_out, local_lse.contiguous(), merged, total, grad_local, grad_local_lse, heads, length,
            *grad.stride(), *local_out.stride(), *merged.stride(),
            DIM=dim, BLOCK_D=block_d, BLOCK_N=block_n, WIDE=wide, num_warps=_TOKENS["num_warps"],
        )  # fmt: skip
        launchable(_entries_backward_kernel)[(batch * heads * triton.cdiv(gathered, block_s),)](
            grad, out, lse.contiguous(), merged, total, entries.contiguous(), _starts(starts, entries), grad_out, grad_lse,
            heads, entries.shape[1], length, pyramid.coarse, gathered, *grad.stride(), *out.stride(), *merged.stride(),
            LEVELS=pyramid.levels, P=pyramid.pooling, CAUSAL=is_causal,
            DIM=dim, BLOCK_D=block_d, BLOCK_S=block_s, WIDE=wide, DOCUMENTS=starts is not None,
            UNTOLD=starts is not None and pyramid.causal_selection, num_warps=_ENTRIES["num_warps"],
        )  # fmt: skip
    return grad_out, grad_lse, grad_local, grad_local_lse


def shift_output(out: Tensor, grad: Tensor, grad_lse: Tensor) -> Tensor:
    """`reference.shift_output`."""
    batch, heads, length, dim = out.shape
    shifted = torch.empty_like(out)
    block_d = triton.next_power_of_2(dim)
    block_n = block_rows(block_d * out.element_size(), _ROWS["block_bytes"])
    with on_device_of(out):
        launchable(_shift_kernel)[(batch * heads * triton.cdiv(length, block_n),)](
            out, grad, grad_lse.contiguous(), shifted, heads, length,
            *out.stride(), *grad.stride(), *shifted.stride()[:3],
            LARGEST=torch.finfo(out.dtype).max / 4, DIM=dim, BLOCK_D=block_d, BLOCK_N=block_n,
            WIDE=out.dtype == torch.float64, num_warps=_ROWS["num_warps"],
        )  # fmt: skip
    return shifted


def _starts(starts: Tensor | None, instead: Tensor) -> Tensor:
    """A kernel takes a pointer there, also where it reads nothing by it."""
    return instead if starts is None else starts.contiguous()
