"""What every Triton launch needs: block sizes and the right device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's. Free where it is already."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def divisor_up_to(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`: how far a loop is unrolled."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def block_rows(row_bytes: int, block_bytes: int, *, at_least: int = 4) -> int:
    """Rows, a power of two, of a block that moves about so many bytes at once."""
    rows = at_least
    while rows * 2 * row_bytes <= block_bytes:
        rows *= 2
    return rows
