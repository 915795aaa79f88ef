"""Triton: whether a mask is the causal mask, in one pass that reads the mask and writes a byte per block of rows.

The twin is `reference.is_causal_mask`; `causal_mask.py` says what the causal mask is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dispatch import launchable
from ..reference import hidden_from
from .launch import on_device_of

_BLOCK_I, _BLOCK_J, _WARPS = 16, 256, 4  # not measured: wide enough for whole cache lines of a boolean mask


@triton.jit
def _mask_kernel(
    mask, wrong, tokens, heads, blocks, stride_b, stride_h, stride_i, stride_j,
    IS_BOOL: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_I rows of one batch row and head."""
    lead = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    rows = mask + lead // heads * stride_b + lead % heads * stride_h + i.to(tl.int64)[:, None] * stride_i
    found = tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    for start in range(0, tokens, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (i < tokens)[:, None] & (j < tokens)[None, :]
        earlier = j[None, :] <= i[:, None]
        values = tl.load(rows + j.to(tl.int64)[None, :] * stride_j, mask=inside, other=0)
        if values.dtype == tl.bfloat16:
            values = values.to(tl.float32)  # exact; Triton's interpreter does not compare bfloat16
        if IS_BOOL:
            right = (values != 0) == earlier
        else:
            right = (earlier & (values == 0)) | ((j[None, :] > i[:, None]) & (values <= HIDDEN))
        found |= tl.where(inside & (right == 0), 1, 0)
    tl.store(wrong + tl.program_id(0), tl.max(tl.max(found, axis=1), axis=0))


def is_causal_mask(mask: Tensor) -> Tensor:
    """Whether a mask `[.., N, N]` is the causal mask: a bool `[]`."""
    mask = mask[(None,) * (4 - mask.dim())]  # [B, H, N, N]
    batch, heads, tokens, _ = mask.shape
    is_bool = mask.dtype == torch.bool
    blocks = triton.cdiv(tokens, _BLOCK_I)
    wrong = torch.empty(batch * heads * blocks, dtype=torch.int8, device=mask.device)
    with on_device_of(mask):
        launchable(_mask_kernel)[(wrong.numel(),)](
            mask.view(torch.uint8) if is_bool else mask, wrong, tokens, heads, blocks, *mask.stride(),
            IS_BOOL=is_bool, HIDDEN=0.0 if is_bool else hidden_from(mask.dtype),
            BLOCK_I=_BLOCK_I, BLOCK_J=_BLOCK_J, num_warps=_WARPS,
        )  # fmt: skip
    return ~wrong.any()
