"""Prove of explicit masks that they are only the causal mask, or no mask at all. Changes nothing in the graph.

    i = arange(N)[:, None]; j = arange(N); mask = j <= i
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)     ->  its AttentionCall now says is_causal=True, mask=None

The proof is exact, from the operations that build the mask (`elements.py`). A mask that depends on any input of the graph
is not proved, whatever that input holds today.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .call import DENSE, AttentionCall, fake, for_each_call
from .elements import Elements, is_fresh
from .regions import regions
from .symbolic import Affine, Diagonals, Unproven, as_cases, coordinate

_WRITES = frozenset({"setitem", "copy_", "fill_", "index_put_", "scatter_"})
_REMEDY = (
    "pass is_causal=True and no attn_mask; with transformers, call the model without attention_mask and position_ids"
)


def prove_masks(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Turn calls with a provable mask into causal (or full) calls; refuse the others with what stands in the way."""
    if DENSE not in gm.meta:
        written = _written_in_place(gm)
        for_each_call(gm, lambda call: _prove(call, written) if call.mask is not None else call)
    return gm


def _prove(call: AttentionCall, written: dict[int, list[fx.Node]]) -> AttentionCall:
    if call.region.opaque:
        return call
    elements = Elements()
    try:
        allowed = _allowed(call, elements)
        _refuse_shared_writes(elements, written)
    except Unproven as why:
        return call.refuse(f"explicit attn_mask, not proved to be only causal: {why}", _REMEDY)
    query = fake(call.query)
    length = query.shape[2] if query is not None else 0
    last = length - 1 if isinstance(length, int) else math.inf
    seen = allowed & Diagonals(((-last, last),))
    if seen.bands == ((-last, last),):
        return replace(call, mask=None, mask_nodes=tuple(elements.visited.items()))
    if seen.bands == ((0, last),):
        return replace(call, mask=None, is_causal=True, mask_nodes=tuple(elements.visited.items()))
    if len(seen.bands) == 1 and seen.bands[0][0] == 0:
        return call.refuse(f"sliding window: attn_mask shows each token the last {seen.bands[0][1] + 1:.0f} only")
    return call.refuse("attn_mask is neither causal nor full", _REMEDY)


def _allowed(call: AttentionCall, elements: Elements) -> Diagonals:
    """The diagonals `i - j` that a call's mask lets through."""
    mask, query, key = fake(call.mask), fake(call.query), fake(call.key)
    if mask is None or query is None or key is None or not 2 <= mask.dim() <= 4:
        raise Unproven("its shape is not known")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])[4 - mask.dim() :]
    names = ("b", "h", "i", "j")[4 - mask.dim() :]
    for size, expected in zip(mask.shape, full, strict=True):
        if size != expected and not (isinstance(size, int) and size == 1):
            raise Unproven(f"its shape {list(mask.shape)} does not fit {list(full)}")
    ones = [isinstance(size, int) and size == 1 for size in mask.shape]
    where = tuple(Affine() if one else coordinate(name) for one, name in zip(ones, names, strict=True))
    found = as_cases(elements.at(call.mask, call.region, where))
    if mask.dtype == torch.bool:
        return found.where(bool)
    # An added bias is a mask where it is 0 or takes the whole weight away.
    lowest = torch.finfo(mask.dtype).min
    if any(value != 0 and value > lowest for _, value in found.parts):
        raise Unproven("it adds a bias other than 0 and -inf")
    return found.where(lambda value: value == 0)


# --- in-place operations ----------------------------------------------------------------------------------------------


def _written_in_place(gm: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """Every in-place operation of the graph, by the memory that it writes to."""
    found: dict[int, list[fx.Node]] = {}
    for region in regions(gm):
        for node in region.gm.graph.nodes:
            if _is_write(node):
                for target in (node.args[0], node.kwargs.get("out")):
                    if (tensor := fake(target)) is not None:
                        found.setdefault(_memory(tensor), []).append(node)
    return found


def _is_write(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_"))
    # operator.iadd and its like write to tensors, too.
    return (
        in_place or "out" in node.kwargs or (name[:1] == "i" and name[1:] in ("add", "sub", "mul", "and", "or", "xor"))
    )


def _refuse_shared_writes(elements: Elements, written: dict[int, list[fx.Node]]) -> None:
    """A proof reads each node as if nothing wrote to it later. A fresh tensor written to by its only user is fine."""
    for node in elements.visited:
        tensor = fake(node)
        assert tensor is not None
        for write in written.get(_memory(tensor), []):
            base = write.args[0]
            only_user = isinstance(base, fx.Node) and is_fresh(base) and len(base.users) == 1
            if not (only_user and write in elements.visited):
                raise Unproven(f"it is changed in place, by {write.name}")


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
