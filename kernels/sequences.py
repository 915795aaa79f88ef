"""Causal attention to sequences of different lengths that lie one after another, by the stock kernels for that.

The kernels launch blocks for every sequence that they are told of, as many as the longest would need, and most of these may
find nothing to do: told of 257 sequences a head where there are 2, they take longer for that than for the attention. So they
have to be told what is close to the truth. Where documents are given on the CPU it is known without waiting for the GPU, and
reaches the op as a tensor on the CPU, `known`: so no graph depends on how many documents there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_private import (
    cudnn_attention_backward,
    cudnn_attention_forward,
    flash_attention_backward,
    flash_attention_forward,
)

WIDEST = {"cudnn": 128, "flash": 256}  # head dimensions that a kernel takes
_UNSAFE = torch.Tag.cudagraph_unsafe  # a recorded launch would keep the number of sequences that it was recorded with


def extent(starts: Tensor) -> Tensor:
    """What is known of documents: how many in all rows, in the fullest row, tokens of the longest. int64 `[3]`."""
    place = torch.arange(starts.shape[-1], device=starts.device)
    in_row = (starts == place).sum(-1)
    return torch.stack([in_row.sum(), in_row.amax(), (place - starts).amax() + 1])


def limits(
    known: Tensor | None, *, batch: int, groups: int, gathered: int, levels: int, pooling: int, most: int
) -> tuple[int, int]:
    """How many sequences there are at most, and how long they are at most.

    Each row and key/value head has one for the entries of each document, and one for the windows that borders divide.

    Args:
        known: `extent` on the CPU; None, or zeros, where only the GPU knows. most: documents in a row at most.

    Raises:
        ValueError: more documents than `most`.
    """
    in_all, in_row, longest = (0, 0, 0) if known is None else known.tolist()
    if in_all == 0:
        return batch * groups * (most + 1), gathered
    if in_row > most:
        raise ValueError(f"{in_row} documents in a row: {too_many(most)}")
    entries = sum(longest // pooling**level for level in range(levels))
    divided = (in_row - 1) * (levels - 1)  # a border divides at most a window of each level above 0
    return groups * (in_all + batch), min(gathered, max(entries, divided))


def too_many(most: int) -> str:
    """What is wrong, and the remedy."""
    return f"there are more than max_documents={most} documents in a row: give a larger max_documents in the config"


# --- the op -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lighthouse_fx::attend_to_sequences", mutates_args=(), tags=_UNSAFE)
def attend_to_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    known: Tensor | None,
    batch: int,
    groups: int,
    levels: int,
    pooling: int,
    scale: float,
    kernel: str,
    revision: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each sequence.

    Args:
        query: `[B * G * S, H / G, D]`; key, value: `[B * G * S, 1, D]`, of bfloat16 or float16 on a GPU.
        bounds: int32 `[B * G * (most + 1) + 1]`, where sequences begin, then the end, repeated.
        known: int64 `[3]` on the CPU, see `limits`.
        kernel: "cudnn" or "flash".

    Returns:
        As query, and the logarithms of the sums of exponentials, float32 `[B * G * S * H / G]` in the kernel's own order.
    """
    bounds, longest = _told(query, bounds, known, batch, groups, levels, pooling, kernel)
    forward = cudnn_forward if kernel == "cudnn" else flash_forward
    out, sums = forward(query, key, value, bounds, longest, scale)
    return out, sums.flatten()


@torch.library.custom_op("lighthouse_fx::attend_to_sequences_backward", mutates_args=(), tags=_UNSAFE)
def attend_to_sequences_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    known: Tensor | None,
    batch: int,
    groups: int,
    levels: int,
    pooling: int,
    scale: float,
    kernel: str,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    bounds, longest = _told(query, bounds, known, batch, groups, levels, pooling, kernel)
    backward = cudnn_backward if kernel == "cudnn" else flash_backward
    return backward(grad.contiguous(), query, key, value, out, sums, bounds, longest, scale)


def _told(
    query: Tensor, bounds: Tensor, known: Tensor | None, batch: int, groups: int, levels: int, pooling: int, kernel: str
) -> tuple[Tensor, int]:
    """The bounds of as many sequences as a kernel is told of, and the length that none exceeds."""
    heads, gathered = batch * groups, query.shape[0] // (batch * groups)
    sequences, longest = limits(
        known,
        batch=batch,
        groups=groups,
        gathered=gathered,
        levels=levels,
        pooling=pooling,
        most=(len(bounds) - 1) // heads - 1,
    )
    if kernel == "cudnn":  # it builds a plan for each pair, which takes long: there are to be few
        sequences, longest = (1 << (size - 1).bit_length() for size in (sequences, longest))
    return bounds[: sequences + 1], min(longest, gathered)


@attend_to_sequences.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[0] * query.shape[1], dtype=torch.float32)


@attend_to_sequences_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, known, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, bounds, known)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_to_sequences_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 9


attend_to_sequences.register_autograd(_differentiate, setup_context=_save)


# --- the kernels ------------------------------------------------------------------------------------------------------


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention 2. The sums are `[heads, rows]`."""
    out, sums, *_ = flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return out, sums


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    sums = sums.view(query.shape[1], query.shape[0])
    nothing_dropped = torch.empty(2, dtype=torch.uint64, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = flash_attention_backward(
        grad, query, key, value, out, sums, bounds, bounds, longest, longest, 0.0, True, nothing_dropped, nothing_dropped,
        scale=scale,
    )  # fmt: skip
    return grads


def cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """cuDNN. The sums are `[rows, heads, 1]`."""
    out, sums, *_ = cudnn_attention_forward(
        query, key, value, None, bounds, bounds, longest, longest, True, 0.0, True, False, scale=scale
    )
    return out, sums


def cudnn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    sums = sums.view(*query.shape[:2], 1)
    nothing_dropped = torch.empty(1, dtype=torch.int64, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = cudnn_attention_backward(
        grad, query, key, value, out, sums, nothing_dropped, nothing_dropped, None, bounds, bounds, longest, longest, 0.0, True,
        scale=scale,
    )  # fmt: skip
    return grads
