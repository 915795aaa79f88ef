"""The check that the lists of a `BlockMask` are right for its mask_mod, which the compiler proved to be causal.

    zero = lighthouse_fx.check_blocks(count, indices, full_count, full_indices, starts, N, ...)     # raises where they are not
    entries = entries + zero

FlexAttention sees what its lists name: for each block of queries (or, in the lists of its backward, of keys) the blocks to
look at, some as *full*, in which mask_mod is not asked. `create_block_mask` makes them of mask_mod itself,
`BlockMask.from_kv_blocks` takes any. They are right if each pair of blocks in which the mask shows something is listed once,
and those that are listed as full are shown entirely. Pairs in which it shows nothing may be listed: mask_mod hides them.

The mask is causal, inside documents where there are some. Numbers of documents never fall, so two blocks that do not overlap
share a document if the last token of the earlier one and the first of the later one do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..torch_private import assert_async


@torch.library.custom_op("lighthouse_fx::check_blocks", mutates_args=())
def check_blocks(
    count: Tensor,
    indices: Tensor,
    full_count: Tensor | None,
    full_indices: Tensor | None,
    starts: Tensor | None,
    length: int,
    query_block: int,
    key_block: int,
    by_key: bool,
    call: str,
    revision: str,
) -> Tensor:
    """Raise where lists of blocks are not right. On CUDA that is a device-side assertion, and nobody waits for the GPU.

    Args:
        count: int `[B or 1, H or 1, R]`, how many blocks each row of blocks lists; indices: int `[B or 1, H or 1, R, W]`,
            which, the first `count` of them; full_count, full_indices: likewise, of full blocks.
        starts: int32 `[B, N]`, where each token's document begins; length: N; query_block, key_block: tokens in a block.
        by_key: whether rows are blocks of keys, and what they list blocks of queries.
        call: the attention that they belong to, for the message.

    Returns:
        An int32 zero, `[]`.
    """
    shown, whole = _blocks_of_mask(starts, length, query_block, key_block, count.device)  # [B or 1, 1, Q, K]
    if by_key:
        shown, whole = shown.mT, whole.mT
    rows, columns = shown.shape[-2:]
    if count.shape[-1] != rows:
        raise ValueError(_message(call, f"lists blocks for {count.shape[-1]} rows of blocks, and there are {rows}"))
    listed, right = _listed(count, indices, columns)
    full = torch.zeros_like(listed)
    if full_count is not None and full_indices is not None:
        full, full_right = _listed(full_count, full_indices, columns)
        right = right & full_right
    wrong = (shown & (listed + full != 1)) | ((full != 0) & ~whole)  # [B or 1, H or 1, rows, columns]
    if count.device.type == "cuda":
        assert_async(
            right & ~wrong.any(),
            f"the block_mask of {call} lists other blocks than its causal mask_mod shows: make it with create_block_mask of "
            "this mask_mod, of documents numbered in order",
        )
    elif not right:
        raise ValueError(_message(call, "lists more blocks than there are"))
    elif wrong.any():
        *_, row, column = wrong.nonzero()[0].tolist()
        query, key = (column, row) if by_key else (row, column)
        raise ValueError(
            _message(call, f"is wrong for block {query} of queries and block {key} of keys: it is listed as what it is not, "
                     "left out, or listed twice")
        )  # fmt: skip
    return torch.zeros((), dtype=torch.int32, device=count.device)


@check_blocks.register_fake
def _(count: Tensor, *_: Any) -> Tensor:
    return count.new_empty((), dtype=torch.int32)


def _blocks_of_mask(
    starts: Tensor | None, length: int, query_block: int, key_block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each pair of blocks, whether the mask shows any key to any query there, and whether every key to every query."""
    first_query, last_query = (bound[:, None] for bound in _bounds(length, query_block, device))  # [Q, 1]
    first_key, last_key = _bounds(length, key_block, device)  # [K]
    shown, whole = (first_key <= last_query)[None, None], (last_key <= first_query)[None, None]
    if starts is None:
        return shown, whole
    number = starts[:, None]  # [B, 1, N]

    def same(queries: Tensor, keys: Tensor) -> Tensor:  # [B, 1, Q, K]
        return number[..., queries] == number[..., keys][..., None, :]

    overlap = first_query <= last_key  # where they are also shown: a token sees itself
    return shown & (overlap | same(first_query, last_key)), whole & same(last_query, first_key)


def _bounds(length: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last token of each block; the last block may be a short one."""
    first = torch.arange(0, length, min(block, length), device=device)
    return first, (first + (block - 1)).clamp(max=length - 1)


def _listed(count: Tensor, indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """How often each block is listed: int32 `[.., R, columns]`; and whether all that are listed exist."""
    place = torch.arange(indices.shape[-1], device=indices.device)
    taken = place < count[..., None]
    exist = (((indices >= 0) & (indices < columns)) | ~taken).all() & (count <= indices.shape[-1]).all()
    target = torch.where(taken, indices, columns).clamp(0, columns).long()  # what is not taken goes beyond the last, cut off
    found = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.int32, device=indices.device)
    return found.scatter_add(-1, target, taken.int())[..., :columns], exist


def _message(call: str, what: str) -> str:
    return (
        f"the block_mask of {call} {what}. Its mask_mod is causal, and Lighthouse attention computes that mask: make the "
        "block_mask with create_block_mask of this mask_mod, of documents numbered in order; or keep the attention dense, "
        "by dense_layers or without the backend"
    )
