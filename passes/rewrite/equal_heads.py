"""Take one head of each group of equal key/value heads, however they came to be equal.

Before:
    wide = k.broadcast_to(B, N, G, R, D).flatten(2, 3).transpose(1, 2)          # Falcon: repeated, and only then rotated
    key  = wide * cos + rotate_half(wide) * sin                                 # values likewise
    out  = scaled_dot_product_attention(q, key, value)

After:
    getitem = key[:, ::R]                                   # its AttentionCall has this, and enable_gqa=True

Heads of a group are equal if they were repeated, each R times in a row, and everything since does the same to each of them.
Then their gradients pass through the same operations as well, and the one head of a group that is read may carry the sum.
`repeat_kv.py` has undone what was repeated last; there, nothing of the repeated heads remains.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..attention_call import AttentionCall, fake, for_each_call
from ..ir.aliasing import Writers, memories, written
from ..ir.internal_error import internal_error
from ..ir.ops import operation_name
from ..masks.evaluate import is_one
from ..provenance.rows import sizes

# Operations whose result at a place depends only on their arguments at that place, none of which they write to.
_PLACE_BY_PLACE = frozenset(
    {
        "add", "sub", "mul", "div", "neg", "to", "type", "type_as", "float", "double", "half",
        "bfloat16", "contiguous", "clone", "pow", "rsqrt", "sqrt", "square", "silu", "sigmoid", "tanh", "relu", "gelu",
    }
)  # fmt: skip
_EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
_RESHAPES = frozenset({"reshape", "view", "flatten"})
_NORMS = frozenset({"rms_norm", "layer_norm"})  # of the last dimensions, with weights for these
_EVERY = 0  # all entries along a dimension are equal: divisible by any length of a run, as gcd and % have it
_HEADS = 1


def undo_equal_heads(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Give each call one head of every group of keys and values that are equal."""
    writers = functools.cache(lambda: written(gm))
    for_each_call(gm, lambda call: _undone(call, writers))
    return gm


def _undone(call: AttentionCall, writers: Callable[[], Writers]) -> AttentionCall:
    key, value = fake(call.key), fake(call.value)
    if call.enable_gqa or key is None or value is None or not isinstance(heads := key.shape[_HEADS], int):
        return call
    read = [x for x in (call.key, call.value, call.score_key) if x is not None]
    runs = _Runs()
    try:
        run = math.gcd(heads, *(runs.along(x, _HEADS) for x in read))
        # The heads are read where the attention is, later than where they were made: nothing may write to what they rest on.
        changed = run > 1 and any(writers().get(memory) for memory in memories(runs.visited))
    except Exception as error:
        internal_error(error, "the search for repeated heads")
        return call
    if run <= 1 or changed:
        return call
    views: list[fx.Node] = []
    for node in read:
        narrow = (slice(None), slice(None, None, run))
        with call.node.graph.inserting_before(call.node):
            views.append(call.node.graph.call_function(operator.getitem, (node, narrow)))
        tensor = fake(node)
        assert tensor is not None, "its runs are known"
        views[-1].meta = {key: call.node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in call.node.meta}
        views[-1].meta["example_value"] = tensor[narrow]
    scored = views[2] if call.score_key is not None else None
    return replace(
        call, key=views[0], value=views[1], score_key=scored, enable_gqa=True, views=(*call.views, *views)
    )


class _Runs:
    """Finds how many entries in a row are surely equal, and remembers in `visited` the nodes that this rests on."""

    def __init__(self) -> None:
        self.visited: dict[fx.Node, None] = {}
        self._known: dict[tuple[fx.Node, int], int] = {}

    def along(self, node: Any, dim: int) -> int:
        """The length R such that the first R entries along a dimension are equal, the next R, and so on; `_EVERY`."""
        tensor = fake(node)
        if tensor is None:
            return 1
        dim %= tensor.dim()
        if is_one(tensor.shape[dim]):
            return _EVERY
        if (node, dim) not in self._known:
            self._known[node, dim] = found = self._along(node, tensor, dim)
            if found != 1:
                self.visited[node] = None
        return self._known[node, dim]

    def _along(self, node: fx.Node, tensor: torch.Tensor, dim: int) -> int:
        name = operation_name(node)
        if name in _PLACE_BY_PLACE:
            return math.gcd(*(self._broadcast(x, tensor, dim) for x in node.all_input_nodes if fake(x) is not None))
        if name == "cat":
            return self._joined(node, dim)
        source = node.args[0] if node.args else None
        before = fake(source)
        if before is None:
            return 1
        if name in _EXPANDS:
            return self._broadcast(source, tensor, dim)
        if name in _RESHAPES:
            return self._reshaped(source, sizes(before), sizes(tensor), dim)
        if name == "transpose":
            swapped = [x % tensor.dim() for x in node.args[1:] if isinstance(x, int)]
            return self.along(source, sum(swapped) - dim if dim in swapped else dim) if len(swapped) == 2 else 1
        if name in _NORMS and len(node.args) > 1 and isinstance(node.args[1], (tuple, list)):
            return self.along(source, dim) if dim < tensor.dim() - len(node.args[1]) else 1
        if name == "repeat_interleave":
            given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
            repeats, at = given.get("repeats"), given.get("dim")
            if not isinstance(repeats, int) or not isinstance(at, int):
                return 1
            return self.along(source, dim) * (repeats if at % tensor.dim() == dim else 1)
        if name == "getitem":
            return self._indexed(source, node.args[1], before.dim(), dim)
        return 1

    def _broadcast(self, source: Any, into: torch.Tensor, dim: int) -> int:
        """Along a dimension of what a tensor is broadcast to, or into."""
        before, after = sizes(fake(source)), sizes(into)  # type: ignore[arg-type]
        shift = len(after) - len(before)
        fits = shift >= 0 and all(size in (1, of) for size, of in zip(before, after[shift:], strict=True))
        if not fits:
            return 1
        return _EVERY if dim < shift else self.along(source, dim - shift)

    def _joined(self, node: fx.Node, dim: int) -> int:
        """Along another dimension than that in which tensors are joined."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        at = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        tensor = fake(node)
        if not isinstance(parts, (tuple, list)) or not isinstance(at, int) or tensor is None or at % tensor.dim() == dim:
            return 1
        if any((x := fake(part)) is None or x.dim() != tensor.dim() for part in parts):
            return 1
        return math.gcd(*(self.along(part, dim) for part in parts))

    def _reshaped(self, source: Any, before: list[Any], after: list[Any], dim: int) -> int:
        """Along a dimension that stays, or that others are merged into, between dimensions that stay."""
        lead = next((n for n, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), min(len(before), len(after)))
        if dim < lead:
            return self.along(source, dim)
        behind = len(after) - 1 - dim  # dimensions after this one
        merged = before[dim : len(before) - behind]
        if lead != dim or before[len(before) - behind :] != after[dim + 1 :] or math.prod(merged) != after[dim]:
            return 1
        run = 1
        for place in reversed(range(dim, dim + len(merged))):
            if (found := self.along(source, place)) != _EVERY:
                return run * found
            run *= int(before[place])
        return _EVERY

    def _indexed(self, source: Any, index: Any, rank: int, dim: int) -> int:
        """Along a dimension that is kept whole."""
        items = list(index) if isinstance(index, tuple) else [index]
        if not all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items):  # True is no number here
            return 1
        if Ellipsis not in items:
            items.append(Ellipsis)
        place = items.index(Ellipsis)
        missing = rank - sum(item is not None and item is not Ellipsis for item in items)
        items[place : place + 1] = [slice(None)] * missing
        kept = [item for item in items if not isinstance(item, int)]  # one for each dimension of the result
        if kept[dim] != slice(None):
            return 1
        at = [n for n, item in enumerate(items) if not isinstance(item, int)][dim]
        return self.along(source, sum(item is not None for item in items[:at]))
