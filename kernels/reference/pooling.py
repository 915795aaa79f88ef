"""The plain twin of pooling: `gather` and its adjoint, and the index arithmetic that scatter and merge share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid


def gather(x: Tensor, entries: Tensor, pyramid: Pyramid) -> Tensor:
    """The mean of each entry's window: `[B, Hx, N, D]` -> `[B, Hx, S, D]`."""
    wide = widen(x)
    pooled = [blocks_of(wide, 0, level, pyramid).mean(-2) for level in range(pyramid.levels)]
    return rows_at(torch.cat(pooled, -2), per_head(entries, x)).to(x.dtype)


def gather_backward(grad: Tensor, slots: Tensor, pyramid: Pyramid) -> Tensor:
    """The adjoint of `gather`: `[B, Hx, S, D]` -> `[B, Hx, N, D]`. Each token reads the entries it is part of."""
    total = token_layout(widen(grad), pyramid)
    for level in range(pyramid.levels):
        width = pyramid.pooling**level
        rows = present_rows(widen(grad) / width, level_slots(slots, level, pyramid))  # [B, Hx, W, D]
        total[:, :, : rows.shape[2] * width] += rows.repeat_interleave(width, dim=2)
    return total.to(grad.dtype)


def widen(x: Tensor) -> Tensor:
    """In the type that sums are taken in."""
    return x if x.dtype == torch.float64 else x.float()


def token_layout(like: Tensor, pyramid: Pyramid) -> Tensor:
    """Zeros `[B, H, N, D]` that lie as `[B, N, H, D]`, as projections and the kernels write them."""
    batch, heads, _, dim = like.shape
    return like.new_zeros(batch, pyramid.length, heads, dim).transpose(1, 2)


def blocks_of(x: Tensor, shift: int, level: int, pyramid: Pyramid) -> Tensor:
    """The level's windows, moved `shift` tokens on and padded with zeros at the end: `[B, H, W, p^l, D]`."""
    width = pyramid.pooling**level
    if pyramid.windows(level) == 0:
        return x.new_zeros(*x.shape[:2], 0, 1, x.shape[-1])
    reach = shift + pyramid.windows(level) * width
    x = F.pad(x, (0, 0, 0, max(0, reach - pyramid.length)))[:, :, shift:reach]
    return x.reshape(*x.shape[:2], pyramid.windows(level), width, x.shape[-1])


def per_head(index: Tensor, x: Tensor) -> Tensor:
    """Index tensors are per key/value head: repeat them for the query heads of each group."""
    return index.long().repeat_interleave(x.shape[1] // index.shape[1], dim=1)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """`[B, H, R, D]`, `[B, H, S]` -> `[B, H, S, D]`"""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[-1]))


def level_slots(slots: Tensor, level: int, pyramid: Pyramid) -> Tensor:
    """The part of `slots` of one level's windows."""
    return slots[..., pyramid.offset(level) : pyramid.offset(level + 1)]


def present_rows(x: Tensor, slots: Tensor) -> Tensor:
    """The rows in the slots of one level's windows, zero for windows that are no entry. `[B, H, W, D]`"""
    slots = per_head(slots, x)
    return torch.where(slots[..., None] >= 0, rows_at(x, slots.clamp(min=0)), 0)
