"""Causal attention inside documents, whose entries lie one after another in every head, by the stock kernels for that.

FlashAttention attends to sequences of different lengths. Where the plan says so (`plan.py`), the longest document of
a row is kept out of that, and cuDNN attends to it alone. How many documents there are reaches the op as a tensor on the CPU, so
it can be told to the kernels without waiting for the GPU, and no graph depends on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid
from ..torch_private import (
    assert_async,
    cudnn_attention_backward,
    cudnn_attention_forward,
    flash_attention_backward,
    flash_attention_forward,
)
from .plan import PIECE, Plan, first_of_longest, plan, too_many

WIDEST = {"cudnn": 128, "flash": 256}  # head dimensions that they take
_UNSAFE = (torch.Tag.cudagraph_unsafe,)  # a recorded launch would keep the number of sequences that it was recorded with


def bounds_of(segments: Tensor, sequences: int, most: int) -> Tensor:
    """Where each run of equal segments begins in `[B * G * S]`, then the end, repeated: int32 `[sequences + 1]`."""
    total = segments.numel()
    begins = F.pad(segments[..., 1:] != segments[..., :-1], (1, 0), value=True).flatten()
    number = begins.int().cumsum(0)
    assert_async(number[-1] <= sequences, too_many(most))
    place = torch.arange(total, dtype=torch.int32, device=segments.device)
    beyond = sequences + 1  # what begins nothing is written there, and cut off
    bounds = place.new_full((sequences + 2,), total)
    return bounds.scatter(0, torch.where(begins, number - 1, beyond).clamp(max=beyond), place)[:-1]


class Longest(NamedTuple):
    """The longest document of each batch row, and where its rows are in every head, of the `T = B * G * S` rows.

    Attributes:
        own: bool `[T, 1, 1]`, which they are.
        front: bool `[T, 1, 1]`, the first rows of each head, as many as are its own: where they are, or are brought.
        bounds: as `bounds_of`, with these documents cut into pieces: variable-length attention is to be quick with them.
        source: int32 `[T]`, the row to bring to each place; behind them it is the last of them again, so that nothing of
            another document is there. None where they are in front already.
        target: int32 `[T]`, the place that each of them is brought to; anything for rows of other documents. None likewise.
    """

    own: Tensor
    front: Tensor
    bounds: Tensor
    source: Tensor | None = None
    target: Tensor | None = None

    def taken(self, x: Tensor, heads: int, rows: int) -> Tensor:
        """So many rows of each head's document, of `[T, n, D]`: `[B * G, n, rows, D]`."""
        if self.source is None:
            return _first(x, heads, rows).transpose(1, 2)
        brought: Tensor = x.index_select(0, _first(self.source, heads, rows).flatten())
        return brought.view(heads, rows, *x.shape[1:]).transpose(1, 2)

    def put(self, taken: Tensor, x: Tensor) -> None:
        """Write the documents' rows, as `taken` gives them, into `[T, n, D]`."""
        heads, _, rows, _ = taken.shape
        taken = taken.transpose(1, 2)  # [B * G, rows, n, D]
        if self.target is None:
            x, own = _first(x, heads, rows), _first(self.own, heads, rows)
        else:
            head = torch.arange(heads, dtype=torch.int32, device=x.device)[:, None] * rows
            place = self.target.view(heads, -1).clamp(max=rows - 1) + head
            taken, own = taken.flatten(0, 1).index_select(0, place.flatten()), self.own
        torch.where(own, taken, x, out=x)


def _first(x: Tensor, heads: int, rows: int) -> Tensor:
    """The first rows of each head: `[heads * S, ...]` -> `[heads, rows, ...]`."""
    return x.view(heads, -1, *x.shape[1:])[:, :rows]


def longest_of(segments: Tensor, starts: Tensor, most: int, *, in_front: bool) -> Longest:
    """The longest document of each row, found without waiting for the GPU.

    Args:
        in_front: whether its rows come before all others, as `documents.arrange` puts them.
    """
    batch, groups, gathered = segments.shape
    own = segments == first_of_longest(starts)[:, None, None]
    place = torch.arange(gathered, dtype=torch.int32, device=segments.device)
    begin = 0 if in_front else torch.where(own, place, gathered).amin(-1, keepdim=True)
    pieces = torch.where(own, -1 - (place - begin) // PIECE, segments)
    bounds = bounds_of(pieces, batch * groups * (most + 1 - (-gathered // PIECE)), most)
    if in_front:
        return Longest(own.reshape(-1, 1, 1), own.reshape(-1, 1, 1), bounds)
    head = torch.arange(batch * groups, dtype=torch.int32, device=segments.device).view(batch, groups, 1) * gathered
    count = own.sum(-1, keepdim=True, dtype=torch.int32)
    source = head + (begin + torch.minimum(place, count - 1)).clamp(0, gathered - 1)
    target = (place - begin).clamp(0, gathered - 1).int().flatten()
    return Longest(own.reshape(-1, 1, 1), (place < count).reshape(-1, 1, 1), bounds, source.int().flatten(), target)


# --- the op -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lighthouse_fx::attend_in_sequences", mutates_args=(), tags=_UNSAFE)
def attend_in_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: list[Tensor],
    known: Tensor | None,
    batch: int,
    groups: int,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
    scale: float,
    revision: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each sequence.

    Args:
        query: `[B * G * S, H / G, D]`; key, value: `[B * G * S, 1, D]`, of bfloat16 or float16 on a GPU.
        bounds: `bounds_of` the entries' documents, for as many as there can be.
        longest: what `longest_of` finds, for cuDNN, less what is None; nothing where that is not faster.
        known: what the CPU knows of the documents, see `known_documents.plan`.
        length: tokens of the pyramid that the rest describes.

    Returns:
        As query, and the logarithms of the sums of exponentials, in the kernels' own order: float32 `[2, T * H / G]`, of
        FlashAttention and of cuDNN.
    """
    told = _plan(bool(longest), known, batch, groups, length, levels, pooling, topk, quota, most)
    apart = Longest(*longest) if told.apart else None
    bounds = (apart.bounds if apart else bounds)[: told.sequences + 1]
    out, flash_sums = flash_forward(query, key, value, bounds, told.longest, scale)
    sums = flash_sums.new_zeros(2, flash_sums.numel())
    sums[0] = flash_sums.flatten()
    if apart:
        q, k, v = (apart.taken(x, batch * groups, told.apart) for x in (query, key, value))
        own, own_sums = cudnn_forward(q, k, v, scale)
        apart.put(own, out)
        sums[1, : own_sums.numel()] = own_sums.flatten()
    return out, sums


@torch.library.custom_op("lighthouse_fx::attend_in_sequences_backward", mutates_args=(), tags=_UNSAFE)
def attend_in_sequences_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    bounds: Tensor,
    longest: list[Tensor],
    known: Tensor | None,
    batch: int,
    groups: int,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
    scale: float,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    told = _plan(bool(longest), known, batch, groups, length, levels, pooling, topk, quota, most)
    apart = Longest(*longest) if told.apart else None
    bounds = (apart.bounds if apart else bounds)[: told.sequences + 1]
    # The gradients of rows that cuDNN attends to are nonsense here, keep to themselves, and are written over below.
    grads = flash_backward(grad.contiguous(), query, key, value, out, sums[0], bounds, told.longest, scale)
    if apart:
        heads, rows = batch * groups, told.apart
        g, q, k, v, own = (apart.taken(x, heads, rows) for x in (grad, query, key, value, out))
        g = g.masked_fill(~_first(apart.front, heads, rows).transpose(1, 2), 0)
        of_own = sums[1, : heads * q.shape[1] * rows]
        for x, found in zip(cudnn_backward(g, q, k, v, own, of_own, scale), grads, strict=True):
            apart.put(x, found)
    return grads


def _plan(
    cudnn: bool,
    known: Tensor | None,
    batch: int,
    groups: int,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
) -> Plan:
    pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota or None)
    return plan(known, pyramid, batch=batch, groups=groups, most=most, cudnn=cudnn)


@attend_in_sequences.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(2, query.shape[0] * query.shape[1], dtype=torch.float32)


@attend_in_sequences_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, longest, known, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, bounds, known, *longest)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, out, sums, bounds, known, *longest = ctx.saved_tensors
    grads = attend_in_sequences_backward(grad, query, key, value, out, sums, bounds, longest, known, *ctx.rest)
    return *grads, None, [None] * len(longest), *(None,) * 11


attend_in_sequences.register_autograd(_differentiate, setup_context=_save)


# --- the kernels ------------------------------------------------------------------------------------------------------


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention 2, on rows `[rows, heads, D]`. The sums are `[heads, rows]`."""
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


def cudnn_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN, on `[batch, heads, rows, D]`. The sums are `[batch, heads, rows, 1]`."""
    out, sums, *_ = cudnn_attention_forward(query, key, value, None, True, 0.0, True, False, scale=scale)
    return out, sums


def cudnn_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    rows, sums = query.shape[2], sums.view(*query.shape[:3], 1)
    nothing_dropped = torch.empty((), dtype=torch.int64, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = cudnn_attention_backward(
        grad, query, key, value, out, sums, nothing_dropped, nothing_dropped, None, None, None, rows, rows, 0.0, True,
        scale=scale,
    )  # fmt: skip
    return grads
