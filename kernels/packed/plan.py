"""What the CPU knows of packed documents, and what follows for the kernels that attend inside them. Integers only.

Variable-length attention launches blocks for every sequence that it is told of, as many as the longest would need; most may
find nothing to do. Told of 257 sequences a head where there are 12, it takes longer for that than for the attention. So it has
to be told what is close to the truth. Which entries are whose is decided on the GPU, head by head, but the pyramid bounds it.

PyTorch's variable-length attention is FlashAttention 2. Where cuDNN is faster, a document that fills most of its row is worth
a call of cuDNN's attention, on as many rows as it can have: those behind its own concern nobody, as attention is causal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Pyramid

FIELDS = 4  # of `summary`
PIECE = 256  # rows; a document that has a call of its own is cut into such pieces where the others are attended to
_MOST_OF_ITS_ROW = 0.7  # of the entries: from there on a call of cuDNN's of its own is faster; measured on an H100
_ALIGNED = 128  # rows, of a call of cuDNN's
_SIZES = 16  # of such calls: cuDNN takes its time to plan for a size that is new to it


def by_length(starts: Tensor) -> Tensor:
    """At the last token of each document a number that is the larger, the longer it is, and then the earlier: int64 `[B, N]`.

    `unpacked` gives back where it begins and how long it is, so that the CPU and the GPU agree on which is the longest.
    """
    length = starts.shape[-1]
    place = torch.arange(length, device=starts.device)
    last = F.pad(starts[:, 1:] == place[1:], (0, 1), value=True)
    return torch.where(last, (place - starts + 1) * length + (length - 1 - starts), 0)


def unpacked(numbers: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where documents begin and how many tokens they have, of `by_length`; of 0, no tokens."""
    return length - 1 - numbers % length, numbers // length


def first_of_longest(starts: Tensor) -> Tensor:
    """Where the longest document of each row begins, the first of several: int64 `[B]`."""
    return unpacked(by_length(starts).amax(-1), starts.shape[-1])[0]


def summary(starts: Tensor) -> Tensor:
    """Of each row how many documents, where the longest begins, its tokens and those of the next longest: int64 `[B, 4]`.

    Args:
        starts: int32 `[B, N]`, where each token's document begins.
    """
    numbers = F.pad(by_length(starts), (0, 1))  # one more, so that there are two
    begins, tokens = unpacked(numbers.topk(2).values, starts.shape[-1])
    return torch.cat([(numbers > 0).sum(1, keepdim=True), begins[:, :1], tokens], 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What variable-length attention is told: at most so many sequences, with at most so many rows in the longest.

    `apart`: the longest document of each batch row is kept out of it, and has cuDNN's attention on so many rows; 0: it is not.
    """

    sequences: int
    longest: int
    apart: int = 0


def plan(known: Tensor | None, pyramid: Pyramid, *, batch: int, groups: int, most: int, cudnn: bool) -> Plan:
    """What to tell the kernels of the entries of documents.

    Each row and key/value head has a sequence for each document, and one for the windows that borders divide.

    Args:
        known: `summary`; None where only the GPU knows. most: documents in a row at most.
        cudnn: whether cuDNN is faster.

    Raises:
        ValueError: more documents than `most`.
    """
    gathered = pyramid.gathered
    if known is None:
        return Plan(batch * groups * (most + 1), gathered)
    rows = known.tolist()
    if (fullest := max(row[0] for row in rows)) > most:
        raise ValueError(f"{fullest} documents in a row: {too_many(most)}")
    entries = [entries_at_most(first, tokens, pyramid) for _, first, tokens, _ in rows]
    others = [entries_anywhere(tokens, pyramid) for *_, tokens in rows]
    sequences = sum(groups * (row[0] + 1) for row in rows)
    apart, largest = 0, max(entries)
    has_entries = all(row[2] >= 2 * pyramid.widest for row in rows)
    if cudnn and has_entries and sum(count**2 for count in entries) > batch * (_MOST_OF_ITS_ROW * gathered) ** 2:
        step = _up_to_multiple(-(-gathered // _SIZES), _ALIGNED)
        apart = min(gathered, _up_to_multiple(largest, step))
        sequences += sum(groups * -(-count // PIECE) for count in entries)
        entries = [PIECE]
    divided = (fullest - 1) * (pyramid.levels - 1)  # a border divides at most a window of each level above 0
    return Plan(sequences, min(gathered, max(*entries, *others, divided, 1)), apart)


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


@lru_cache(maxsize=1024)  # all layers ask, forward and backward
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


@lru_cache(maxsize=1024)
def entries_anywhere(tokens: int, pyramid: Pyramid) -> int:
    """The same wherever it lies. A document across two tiles may have more entries than a longer one that is a tile."""
    largest = -(-pyramid.coarse // pyramid.tiles_with_windows)
    smallest = max(1, pyramid.coarse // pyramid.tiles_with_windows) * pyramid.widest
    touched = min(pyramid.tiles_with_windows, (tokens + smallest - 2) // smallest + 1)
    tail = min(tokens, pyramid.length - pyramid.covered)
    return min(_windows(tokens, pyramid), touched * pyramid.of_tile(largest) + tail)


def _windows(tokens: int, pyramid: Pyramid) -> int:
    """At most how many windows of all levels lie in so many tokens."""
    return sum(tokens // pyramid.pooling**level for level in range(pyramid.levels))


def too_many(most: int) -> str:
    """What is wrong, and the remedy."""
    return f"there are more than max_documents={most} documents in a row: give a larger max_documents in the config"
