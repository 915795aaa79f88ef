"""What the CPU knows of packed documents, and what follows for the kernels that attend inside them. Integers only.

Variable-length attention launches blocks for every sequence that it is told of, as many as the longest would need; most may
find nothing to do. Told of 257 sequences a head where there are 12, it takes longer for that than for the attention. So it has
to be told what is close to the truth. Which entries are whose is decided on the GPU, head by head, but the pyramid bounds it.

PyTorch's variable-length attention is FlashAttention 2, and where cuDNN is faster a long document is worth a call of cuDNN's
attention of its own, on as many rows as the document may have: rows behind its own concern nobody, as attention is causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Pyramid

FIELDS = 4  # of `summary`
PIECE = 256  # rows; a document that has a call of its own is cut into such pieces where the others are attended to
_SHAPES = 16  # of calls of their own, at most: cuDNN makes a plan for each, which takes a tenth of a second
_SHARE = 0.55  # cuDNN's time over FlashAttention 2's, and
_ROWS = 1200  # what copying a row costs, in rows of FlashAttention's work on one: both measured on an H100


def summary(starts: Tensor) -> Tensor:
    """Of each row how many documents, where the longest begins, its tokens and those of the next longest: int64 `[B, 4]`.

    Args:
        starts: int32 `[B, N]`, where each token's document begins.
    """
    place = torch.arange(starts.shape[-1], device=starts.device)
    first = starts == place
    last = F.pad(first[:, 1:], (0, 1), value=True)
    lengths = F.pad((place - starts + 1) * last, (0, 1))  # at a document's last token; one more, so that there are two
    tokens, where = lengths.topk(2)
    begins = starts.long().gather(1, where[:, :1])
    return torch.cat([first.sum(1, keepdim=True), begins, tokens], 1)


@dataclass(frozen=True, slots=True)
class Apart:
    """A document that gets a call of its own: its batch row, the token where it begins, and rows that hold its entries."""

    row: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """At most how many sequences there are for variable-length attention, how long at most, and what is kept out of it."""

    sequences: int
    longest: int
    apart: tuple[Apart, ...] = ()


def plan(known: Tensor | None, pyramid: Pyramid, *, batch: int, groups: int, most: int, cudnn: bool) -> Plan:
    """What to tell the kernels of the entries of documents.

    Each row and key/value head has a sequence for each document, and one for the windows that borders divide.

    Args:
        known: `summary`; None, or zeros, where only the GPU knows. most: documents in a row at most.
        cudnn: whether cuDNN may take long documents.

    Raises:
        ValueError: more documents than `most`.
    """
    gathered = pyramid.gathered
    rows = [] if known is None else known.tolist()
    if not any(documents for documents, *_ in rows):
        return Plan(batch * groups * (most + 1), gathered)
    sequences, longest, apart = 0, 1, []
    for row, (documents, first, tokens, next_tokens) in enumerate(rows):
        if documents > most:
            raise ValueError(f"{documents} documents in a row: {too_many(most)}")
        entries = entries_at_most(first, tokens, pyramid)
        if cudnn and (length := _worth_a_call(entries, tokens, pyramid)):
            apart.append(Apart(row, first, length))
            sequences += groups * -(-length // PIECE)
            entries = max(PIECE, _windows(next_tokens, pyramid))
        divided = (documents - 1) * (pyramid.levels - 1)  # a border divides at most a window of each level above 0
        sequences += groups * (documents + 1)
        longest = max(longest, entries, divided)
    return Plan(sequences, min(longest, gathered), tuple(apart))


def entries_at_most(first: int, tokens: int, pyramid: Pyramid) -> int:
    """At most how many entries a document has: of each tile no more than the tile, nor than windows that fit into it."""
    begin, end = first, first + tokens
    entries = max(0, end - max(begin, pyramid.covered))  # of the tail
    tiles = pyramid.tiles_with_windows
    for tile in range(tiles):
        bounds = [number * pyramid.coarse // tiles for number in (tile, tile + 1)]
        shared = min(end, bounds[1] * pyramid.widest) - max(begin, bounds[0] * pyramid.widest)
        if shared > 0:
            entries += min(pyramid.of_tile(bounds[1] - bounds[0]), _windows(shared, pyramid))
    return min(entries, pyramid.gathered)


def _windows(tokens: int, pyramid: Pyramid) -> int:
    """At most how many windows of all levels lie in so many tokens."""
    return sum(tokens // pyramid.pooling**level for level in range(pyramid.levels))


def _worth_a_call(entries: int, tokens: int, pyramid: Pyramid) -> int:
    """The rows of a document's own call, a multiple of a sixteenth; 0 where FlashAttention takes no longer on all."""
    step = -(-pyramid.gathered // _SHAPES)
    rows = min(pyramid.gathered, -(-entries // step) * step)
    return rows if tokens >= 2 * pyramid.widest and entries**2 > _SHARE * rows**2 + _ROWS * rows else 0


def too_many(most: int) -> str:
    """What is wrong, and the remedy."""
    return f"there are more than max_documents={most} documents in a row: give a larger max_documents in the config"
