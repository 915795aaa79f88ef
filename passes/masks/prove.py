"""Prove of explicit masks that they are only the causal mask, or no mask at all. Changes nothing in the graph.

    i = arange(N)[:, None]; j = arange(N); mask = j <= i
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)     ->  its AttentionCall now says is_causal=True, mask=None

The proof is exact, from the operations that build the mask (`evaluate.py`). A mask that depends on any input of the graph
is not proved, whatever that input holds today. Nor is it disproved: it may be assumed to be causal, by the configuration,
and checked when it is there. A mask that is shown to be another is never assumed to be causal.

The masks of attention that is written out, which are added to its scores or say where these are filled, are proved alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import GuardOnDataDependentSymNode, bounds, is_traceable_wrapper_subclass

from ..attention_call import AttentionCall, Refusal, ScoreMask, fake, for_each_call
from ..ir.aliasing import Writers, written
from ..ir.internal_error import internal_error
from ..ir.subgraphs import Region
from ..match.products import is_number
from .diagonals import Cases, Diagonals, Unproven, as_cases, coordinate
from .evaluate import ORIGIN, Elements, is_one
from .in_place import History
from .rules import OPERATIONS

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
_OR_ASSUME = (
    "; pack with documents instead of padding; or, if the mask is always causal, set assume_causal=True, "
    "which checks that in every step"
)
_CHECKED = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prove_masks(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Turn calls with a provable mask into causal (or full) calls; refuse those with another mask, and note every doubt."""
    writers = functools.cache(lambda: written(gm))
    for_each_call(gm, lambda call: _prove(call, writers) if call.mask is not None else call)
    return gm


def _prove(call: AttentionCall, writers: Callable[[], Writers]) -> AttentionCall:
    if call.region.opaque or call.is_causal is not False:
        return call
    try:
        bands, last, visited = _seen(call, writers())
    except Unproven as why:
        if _shows(call) and why.node is not None and _within(call).bands[0][1] < math.inf:
            return call.refuse(f"attn_mask hides earlier tokens: {why}", _remedy(call))
        if _shows(call) and (why.false & Diagonals(((0, math.inf),)) & _within(call)).bands:
            return call.refuse(f"attn_mask hides earlier tokens, as a sliding window does; besides, {why}", _remedy(call))
        return _in_doubt(call, str(why))
    except Exception as error:
        return _in_doubt(call, internal_error(error, "the proof of its mask").reason)
    if bands is None:
        if call.score_mask is not None and call.score_mask.fill is not None:
            return call.refuse("attn_mask fills scores with another number than -inf or the lowest one", _remedy(call))
        return call.refuse("attn_mask adds a bias other than 0 and -inf", _remedy(call))
    if bands == ((-last, last),):
        return replace(call, mask=None, score_mask=None, mask_nodes=visited)
    if bands == ((0, last),):
        return replace(call, mask=None, score_mask=None, is_causal=True, mask_nodes=visited)
    if len(bands) == 1 and bands[0][0] == 0:
        return call.refuse(f"sliding window: attn_mask shows each token the last {bands[0][1] + 1:.0f} only")
    return call.refuse("attn_mask is neither causal nor full", _remedy(call))


def _remedy(call: AttentionCall) -> str:
    return _REMEDY_BY_HAND if call.score_mask else _REMEDY


def _shows(call: AttentionCall) -> bool:
    """Whether False in a mask hides a key."""
    form = call.score_mask
    return form is None or (form.fill is not None and not form.hides)


def _in_doubt(call: AttentionCall, why: str) -> AttentionCall:
    """The call as causal, with its doubt, where a check can stand for the proof; refused elsewhere."""
    reason = f"explicit attn_mask, not proved to be only causal: {why}"
    try:
        problem = _never_causal(call)
    except GuardOnDataDependentSymNode:  # sizes that nobody knows while compiling cannot be compared
        problem = "its shape is not known"
    if problem is not None:
        return call.refuse(f"{reason}; {problem}", _remedy(call))
    doubt = Refusal(reason=reason, remedy=_remedy(call) + _OR_ASSUME)
    return replace(call, mask=None, is_causal=True, unproved=call.mask, doubt=doubt)


def _never_causal(call: AttentionCall) -> str | None:
    """Why a mask cannot be checked to be the causal mask, or cannot be it whatever it holds."""
    mask, query, key, form = fake(call.mask), fake(call.query), fake(call.key), call.score_mask
    if mask is None or query is None or key is None or query.dim() != 4:
        return "its shape is not known"
    scores = _scores(call)
    if not 2 <= mask.dim() <= len(scores):
        return "its shape is not known"
    if is_traceable_wrapper_subclass(mask) or mask.dtype not in _CHECKED:
        return f"a {type(mask).__name__} of {mask.dtype} is not checked"
    if form and mask.dtype != (form.dtype if form.fill is None else torch.bool):
        return f"a mask of {mask.dtype} is not checked, as its scores are of {form.dtype}"
    if form and form.fill is not None and not (is_number(form.fill) and form.fill <= torch.finfo(form.dtype).min):
        return "what fills the scores is not known to be -inf or their lowest number"
    if mask.requires_grad:
        return "it is trained, or depends on what is"
    if any(size != query.shape[2] for size in (*mask.shape[-2:], key.shape[2])):
        return f"its shape {list(mask.shape)} has not a row and a column for each of {query.shape[2]} tokens"
    # An expanded batch of queries is a wider output, which the rewritten attention would not have.
    wide = any(size != of and not is_one(size) for size, of in zip(mask.shape[-3::-1], scores[-3::-1], strict=False))
    return "its batch or heads are not those of the query" if wide else None


def _scores(call: AttentionCall) -> tuple[Any, ...]:
    """The shape of the scores that a call's mask hides: `[B, H, N, N]`, by hand also `[B, N, N]`."""
    query, key = fake(call.query), fake(call.key)
    assert query is not None and key is not None, "checked before"
    return call.score_mask.shape if call.score_mask else (*query.shape[:3], key.shape[2])


def _seen(call: AttentionCall, writers: Writers) -> tuple[_Bands | None, float, _Nodes]:
    """The bands of diagonals `i - j` that a call's mask lets through, the last diagonal, and the nodes that build the mask.

    No bands where it is a bias and no mask.
    """
    mask, query, key, form = fake(call.mask), fake(call.query), fake(call.key), call.score_mask
    if mask is None or query is None or key is None or query.dim() != 4 or key.dim() != 4:
        raise Unproven("its shape is not known")
    scores = _scores(call)
    if not 2 <= mask.dim() <= len(scores) <= 4:
        raise Unproven("its shape is not known")
    full = scores[len(scores) - mask.dim() :]
    if any(size != expected and not is_one(size) for size, expected in zip(mask.shape, full, strict=True)):
        raise Unproven(f"its shape {list(mask.shape)} does not fit {list(full)}")
    names = ("bij" if len(scores) == 3 else "bhij")[-mask.dim() :]
    sizes = {name: size if isinstance(size, int) else _ANY_LENGTH for name, size in zip(names, full, strict=True)}
    history = History(writers)
    elements = Elements(OPERATIONS, sizes, history.held)
    where = tuple(ORIGIN if is_one(size) else coordinate(name) for size, name in zip(mask.shape, names, strict=True))
    within, reader = _within(call), form.node if form else call.node
    last = within.bands[0][1]
    filled = as_cases(elements.at(form.fill, call.region, (), reader)) if form and form.fill is not None else None
    if form and filled and not all(value <= torch.finfo(form.dtype).min for _, value in filled.parts):
        return None, last, ()
    found = as_cases(elements.at(call.mask, call.region, where, reader))
    history.refuse_other_writes(elements.visited)
    allowed = _allowed(found, mask.dtype, form)
    if allowed is None:
        return None, last, ()
    return (allowed & within).bands, last, tuple(elements.visited.items())


def _within(call: AttentionCall) -> Diagonals:
    """All diagonals that a call's mask has, as far as its length is known."""
    query = fake(call.query)
    most = bounds(query.shape[2])[1] if query is not None else _ANY_LENGTH
    last = most - 1 if most < _ANY_LENGTH else math.inf
    return Diagonals(((-last, last),))


def _allowed(mask: Cases, dtype: torch.dtype, form: ScoreMask | None) -> Diagonals | None:
    """The diagonals on which a mask lets the key be seen. None where it does other things to keys, too."""
    if form and form.fill is not None:
        return mask.where(lambda value: value != form.hides) if dtype == torch.bool else None
    if form is None and dtype == torch.bool:
        return mask.where(bool)
    # An added bias is a mask where it is 0 or takes the whole weight away. NaN is neither; Elements does not let it through.
    # Added by hand, bool is a bias of numbers, and what takes the weight away is a matter of the scores that it is added to.
    if not dtype.is_floating_point:
        return None
    lowest = torch.finfo(form.dtype if form else dtype).min
    if not all(value == 0 or value <= lowest for _, value in mask.parts):
        return None
    return mask.where(lambda value: value == 0)
