"""Prove of explicit masks that they are only the causal mask, or no mask at all. Changes nothing in the graph.

    i = arange(N)[:, None]; j = arange(N); mask = j <= i
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)     ->  its AttentionCall now says is_causal=True, mask=None

The proof is exact, from the operations that build the mask (`elements.py`). A mask that depends on any input of the graph
is not proved, whatever that input holds today. The masks of attention that is written out, which are added to its scores or
say where these are filled, are proved alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .call import DENSE, AttentionCall, ScoreMask, fake, for_each_call
from .elements import ORIGIN, Elements, is_one
from .operations import OPERATIONS, is_fresh
from .regions import Region
from .symbolic import Cases, Diagonals, Unproven, as_cases, coordinate
from .writes import Writers, memories, written

_Bands = tuple[tuple[float, float], ...]
_Nodes = tuple[tuple[fx.Node, Region], ...]
_ANY_LENGTH = 2**32  # no symbolic size is greater
_REMEDY = (
    "pass is_causal=True and no attn_mask; with transformers, call the model without attention_mask and position_ids"
)
_REMEDY_BY_HAND = (
    "make the mask in forward, of torch.ones(N, N).tril() or arange (a buffer or an argument may hold anything), or use "
    "scaled_dot_product_attention with is_causal=True"
)


def prove_masks(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Turn calls with a provable mask into causal (or full) calls; refuse the others with what stands in the way."""
    if DENSE not in gm.meta:
        writers = functools.cache(lambda: written(gm))
        for_each_call(gm, lambda call: _prove(call, writers) if call.mask is not None else call)
    return gm


def _prove(call: AttentionCall, writers: Callable[[], Writers]) -> AttentionCall:
    if call.region.opaque:
        return call
    remedy = _REMEDY_BY_HAND if call.score_mask else _REMEDY
    try:
        bands, last, visited = _seen(call, writers())
    except Unproven as why:
        return call.refuse(f"explicit attn_mask, not proved to be only causal: {why}", remedy)
    except Exception:  # whatever a user's graph holds, failing to understand it must not fail the compilation
        return call.refuse(
            "explicit attn_mask, not proved to be only causal: its construction was not understood", remedy
        )
    if bands == ((-last, last),):
        return replace(call, mask=None, score_mask=None, mask_nodes=visited)
    if bands == ((0, last),):
        return replace(call, mask=None, score_mask=None, is_causal=True, mask_nodes=visited)
    if len(bands) == 1 and bands[0][0] == 0:
        return call.refuse(f"sliding window: attn_mask shows each token the last {bands[0][1] + 1:.0f} only")
    return call.refuse("attn_mask is neither causal nor full", remedy)


def _seen(call: AttentionCall, writers: Writers) -> tuple[_Bands, float, _Nodes]:
    """The bands of diagonals `i - j` that a call's mask lets through, the last diagonal, and the nodes that build the mask."""
    mask, query, key = fake(call.mask), fake(call.query), fake(call.key)
    if mask is None or query is None or key is None or query.dim() != 4 or key.dim() != 4 or mask.dim() < 2:
        raise Unproven("its shape is not known")
    form = call.score_mask
    scores = form.shape if form else (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.dim() > len(scores) or not 2 <= len(scores) <= 4:
        raise Unproven("its shape is not known")
    full = scores[len(scores) - mask.dim() :]
    if any(size != expected and not is_one(size) for size, expected in zip(mask.shape, full, strict=True)):
        raise Unproven(f"its shape {list(mask.shape)} does not fit {list(full)}")
    names = ("bij" if len(scores) == 3 else "bhij")[-mask.dim() :]
    sizes = {name: size if isinstance(size, int) else _ANY_LENGTH for name, size in zip(names, full, strict=True)}
    elements = Elements(OPERATIONS, sizes)
    where = tuple(ORIGIN if is_one(size) else coordinate(name) for size, name in zip(mask.shape, names, strict=True))
    found = as_cases(elements.at(call.mask, call.region, where))
    if form is None:
        allowed = _allowed(found, mask.dtype)
    elif form.fill is None:
        allowed = _allowed_by_adding(found, mask.dtype, form.dtype)
    else:
        allowed = _allowed_by_filling(found, as_cases(elements.at(form.fill, call.region, ())), mask.dtype, form)
    _refuse_shared_writes(elements.visited, writers)
    length = query.shape[2]
    last = length - 1 if isinstance(length, int) else math.inf
    return (allowed & Diagonals(((-last, last),))).bands, last, tuple(elements.visited.items())


def _allowed(mask: Cases, dtype: torch.dtype) -> Diagonals:
    """The diagonals on which a mask lets the key be seen."""
    if dtype == torch.bool:
        return mask.where(bool)
    # An added bias is a mask where it is 0 or takes the whole weight away. NaN is neither; Elements does not let it through.
    lowest = torch.finfo(dtype).min
    if not all(value == 0 or value <= lowest for _, value in mask.parts):
        raise Unproven("it adds a bias other than 0 and -inf")
    return mask.where(lambda value: value == 0)


def _allowed_by_adding(mask: Cases, dtype: torch.dtype, scores: torch.dtype) -> Diagonals:
    """As for a bias of the scores' own dtype; bool is no mask here, but numbers that are added."""
    if not dtype.is_floating_point:
        raise Unproven(f"numbers of {dtype} are added to the scores")
    return _allowed(mask, scores)


def _allowed_by_filling(mask: Cases, fill: Cases, dtype: torch.dtype, form: ScoreMask) -> Diagonals:
    if dtype != torch.bool:
        raise Unproven(f"scores are filled where a tensor of {dtype} says so")
    if not all(value <= torch.finfo(form.dtype).min for _, value in fill.parts):
        raise Unproven("it fills scores with another number than -inf or the lowest one")
    return mask.where(lambda value: value != form.hides)


def _refuse_shared_writes(visited: Mapping[fx.Node, Region], writers: Writers) -> None:
    """A proof reads each node as if nothing wrote to its memory, so nothing may.

    A fresh tensor written to by its only user, through which the proof went, is fine.
    """
    for node in visited:
        read = list(memories([node]))
        if len(read) != 1:
            raise Unproven(f"the memory of {node.name} is not known")
        for write in writers.get(read[0], ()):
            base = write.args[0] if write.args else None
            only_user = isinstance(base, fx.Node) and is_fresh(base) and len(base.users) == 1
            if not (only_user and write in visited):
                raise Unproven(f"it may be changed in place, by {write.name}")
