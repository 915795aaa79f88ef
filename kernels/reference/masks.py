"""The plain twin of the check of a mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LOOKED_AT = 1 << 22  # elements of a mask at once, so that a large one needs no second of its size


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
