"""Causal attention inside documents, whose entries lie one after another in every head, by the stock kernels for that.

FlashAttention attends to sequences of different lengths. Where the plan says so (`known_documents.py`), a long document is
kept out of that, and cuDNN attends to it alone. How many documents there are reaches the op as a tensor on the CPU, so it can
be told to the kernels without waiting for the GPU, and no graph depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Pyramid
from .known_documents import PIECE, Apart, Plan, plan, too_many
from .torch_private import (
    assert_async,
    cudnn_attention_backward,
    cudnn_attention_forward,
    flash_attention_backward,
    flash_attention_forward,
)

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


# --- the op -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lighthouse_fx::attend_in_sequences", mutates_args=(), tags=_UNSAFE)
def attend_in_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    known: Tensor | None,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
    scale: float,
    cudnn: bool,
    revision: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each run of equal segments.

    Args:
        query: `[B * G * S, H / G, D]`; key, value: `[B * G * S, 1, D]`, of bfloat16 or float16 on a GPU.
        segments: int32 `[B, G, S]`, the token where each entry's document begins, `length` for a divided window.
        known: what the CPU knows of the documents, see `known_documents.plan`.
        cudnn: whether cuDNN may take long documents.

    Returns:
        As query, and the logarithms of the sums of exponentials, in the kernels' own order: float32 `[2, B, G * S * H / G]`, of
        FlashAttention and of cuDNN.
    """
    told = _plan(segments, known, length, levels, pooling, topk, quota, most, cudnn)
    bounds = bounds_of(_cut(segments, told), told.sequences, most)
    out, flash_sums = flash_forward(query, key, value, bounds, told.longest, scale)
    sums = torch.stack([flash_sums.reshape(segments.shape[0], -1)] * 2)
    for part in _parts(segments, told):
        own, own_sums = cudnn_forward(part.taken(query), part.taken(key), part.taken(value), scale)
        part.put(own, out)
        sums[1, part.row, : own_sums.numel()] = own_sums.flatten()
    return out, sums


@torch.library.custom_op("lighthouse_fx::attend_in_sequences_backward", mutates_args=(), tags=_UNSAFE)
def attend_in_sequences_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    segments: Tensor,
    known: Tensor | None,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
    scale: float,
    cudnn: bool,
    revision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    told = _plan(segments, known, length, levels, pooling, topk, quota, most, cudnn)
    bounds = bounds_of(_cut(segments, told), told.sequences, most)
    parts = list(_parts(segments, told))
    rest = grad.clone(memory_format=torch.contiguous_format) if parts else grad.contiguous()
    for part in parts:
        part.clear(rest)
    grads = flash_backward(rest, query, key, value, out, sums[0].flatten(), bounds, told.longest, scale)
    for part in parts:
        own_grad, own_out = part.taken(grad, fill=False), part.taken(out)
        own = cudnn_backward(
            own_grad, part.taken(query), part.taken(key), part.taken(value), own_out, sums[1, part.row], scale
        )
        for x, found in zip(own, grads, strict=True):
            part.put(x, found)
    return grads


@attend_in_sequences.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, groups, gathered = segments.shape
    return torch.empty_like(query), query.new_empty(2, batch, groups * gathered * query.shape[1], dtype=torch.float32)


@attend_in_sequences_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, known, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, segments, known)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_in_sequences_backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 11


attend_in_sequences.register_autograd(_differentiate, setup_context=_save)


# --- documents that have a call of their own --------------------------------------------------------------------------


def _plan(
    segments: Tensor,
    known: Tensor | None,
    length: int,
    levels: int,
    pooling: int,
    topk: int,
    quota: int,
    most: int,
    cudnn: bool,
) -> Plan:
    pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota or None)
    batch, groups, _ = segments.shape
    return plan(known, pyramid, batch=batch, groups=groups, most=most, cudnn=cudnn)


def _cut(segments: Tensor, told: Plan) -> Tensor:
    """Segments that make short sequences of what has a call of its own: variable-length attention is to be quick with it."""
    if told.apart:
        segments = segments.clone()
    for part in told.apart:
        row = segments[part.row]
        own = row == part.first
        row.copy_(torch.where(own, -1 - own.int().cumsum(-1).sub_(1) // PIECE, row))
    return segments


def _parts(segments: Tensor, told: Plan) -> Iterator[_Part]:
    return (_Part(segments, part) for part in told.apart)


class _Part:
    """The rows of one document among those of its batch row, in each key/value head."""

    def __init__(self, segments: Tensor, part: Apart) -> None:
        groups, gathered = segments.shape[1:]
        self.row, self.rows = part.row, part.rows
        self.span = slice(part.row * groups * gathered, (part.row + 1) * groups * gathered)
        self.own = segments[part.row] == part.first  # [G, S]
        count = self.own.sum(-1, keepdim=True)
        begin = self.own.int().argmax(-1, keepdim=True)  # [G, 1]
        head = torch.arange(groups, device=segments.device)[:, None]
        place = torch.arange(part.rows, device=segments.device)
        self.beyond = place >= count  # [G, rows]
        # Rows beyond the document are filled with its last: nothing of another is in the call.
        self.source = head * gathered + begin + torch.minimum(place, count - 1)  # [G, rows]
        place = torch.arange(gathered, device=segments.device)
        self.target = head * part.rows + (place - begin).clamp(0, part.rows - 1)  # [G, S]

    def taken(self, x: Tensor, *, fill: bool = True) -> Tensor:
        """The document's rows of `[B * G * S, heads, D]`: `[G, heads, rows, D]`; behind them its last row, or zeros."""
        taken = x[self.span].index_select(0, self.source.flatten()).view(*self.source.shape, *x.shape[1:])
        if not fill:
            taken.masked_fill_(self.beyond[..., None, None], 0)
        return taken.transpose(1, 2)

    def put(self, own: Tensor, x: Tensor) -> None:
        """Write the document's rows, as `taken` gives them, into `[B * G * S, heads, D]`."""
        rows = own.transpose(1, 2).flatten(0, 1).index_select(0, self.target.flatten())
        torch.where(self.own.flatten()[:, None, None], rows, x[self.span], out=x[self.span])

    def clear(self, x: Tensor) -> None:
        """Make the document's rows zero."""
        x[self.span].masked_fill_(self.own.flatten()[:, None, None], 0)


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
    """The gradients of query, key and value. Of the sums, the first are needed."""
    rows = query.shape[2]
    sums = sums[: query[..., 0].numel()].view(*query.shape[:3], 1)
    nothing_dropped = torch.empty((), dtype=torch.int64, device=query.device)
    grads: tuple[Tensor, Tensor, Tensor] = cudnn_attention_backward(
        grad, query, key, value, out, sums, nothing_dropped, nothing_dropped, None, None, None, rows, rows, 0.0, True,
        scale=scale,
    )  # fmt: skip
    return grads
