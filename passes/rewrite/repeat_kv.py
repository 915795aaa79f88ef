"""Undo repeated key/value heads, so that attention and all around it work on the real ones. Changes nothing in the graph.

    keys = k[:, :, None].expand(B, G, R, N, D).reshape(B, G * R, N, D)      # and values alike; or repeat_interleave
    out  = scaled_dot_product_attention(q, keys, values)    ->  its AttentionCall now has k and v, and enable_gqa=True

Models write this where their attention takes no grouped heads. Undone, a group of query heads shares one selection, as where
the model passes `enable_gqa=True` (SPEC.md, "Score and select"), and the repeated tensors are gone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..attention_call import AttentionCall, constant, fake, for_each_call
from ..ir.aliasing import Writers, memories, written
from ..ir.internal_error import internal_error
from ..ir.ops import operation_name
from ..masks.evaluate import is_one


def undo_repeated_heads(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Give each call its keys and values as they were before their heads were repeated."""
    writers = functools.cache(lambda: written(gm))
    for_each_call(gm, lambda call: _undone(call, writers))
    return gm


def _undone(call: AttentionCall, writers: Callable[[], Writers]) -> AttentionCall:
    key, value = _unrepeated(call.key), _unrepeated(call.value)
    if call.enable_gqa or key is None or value is None:
        return call
    narrow = fake(key[0]), fake(value[0])
    if narrow[0] is None or narrow[1] is None or narrow[0].shape[1] != narrow[1].shape[1]:
        return call
    # The keys are read where the attention is, later than where they were repeated: nothing may write to them.
    try:
        changed = any(writers().get(memory) for memory in memories([key[0], value[0]]))
    except Exception as error:
        internal_error(error, "the search for writes to tensors")
        return call
    if changed:
        return call
    chain = {node: call.region for node in (*key[1], *value[1])}
    return replace(call, key=key[0], value=value[0], enable_gqa=True, repeat_nodes=tuple(chain.items()))


def _unrepeated(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The tensor `[B, G, N, D]` whose heads a node repeats, each R times in a row, and the nodes that do it."""
    chain: list[fx.Node] = []
    node = _without_copies(node, chain)
    if not isinstance(node, fx.Node):
        return None
    if operation_name(node) == "repeat_interleave":
        return _interleaved(node, chain)
    return _expanded(node, chain)


def _interleaved(node: fx.Node, chain: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
    given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
    source, repeats = given.get("input"), constant(given.get("repeats"))
    tensor = fake(source)
    if not isinstance(source, fx.Node) or tensor is None or tensor.dim() != 4:
        return None
    if not isinstance(repeats, int) or given.get("dim") not in (1, -3):
        return None
    return source, [*chain, node]


def _expanded(node: fx.Node, chain: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]] | None:
    """`[B, G, N, D]` -> `[B, G, 1, N, D]` -> `[B, G, R, N, D]` -> `[B, G * R, N, D]`"""
    chain.append(node)
    wide = _without_copies(_input(node, "reshape", "view", "flatten"), chain)
    split = _input(wide, "expand", "broadcast_to", "expand_as")
    source = _input(split, "unsqueeze", "getitem")
    if wide is None or split is None or source is None or not _splits_heads(split):
        return None
    out, grown, one, narrow = (tuple(x.shape) if (x := fake(n)) is not None else () for n in (node, wide, split, source))
    if [len(out), len(grown), len(one), len(narrow)] != [4, 5, 5, 4]:
        return None
    grown_alone = is_one(one[2]) and (*grown[:2], *grown[3:]) == (*one[:2], *one[3:]) == narrow
    if not grown_alone or out != (narrow[0], narrow[1] * grown[2], *narrow[2:]):
        return None
    return source, [*chain, wide, split]


def _without_copies(node: Any, chain: list[fx.Node]) -> Any:
    """What a node copies into contiguous memory, or the node itself; the copies are added to the chain."""
    while (source := _input(node, "contiguous")) is not None:
        chain.append(node)
        node = source
    return node


def _input(node: Any, *names: str) -> fx.Node | None:
    """What an operation of one of these names is applied to."""
    if not isinstance(node, fx.Node) or operation_name(node) not in names or not node.args:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _splits_heads(node: fx.Node) -> bool:
    """Whether a node adds a dimension after the heads, and does nothing else."""
    if operation_name(node) == "unsqueeze":
        given = dict(zip(("input", "dim"), node.args, strict=False)) | dict(node.kwargs)
        return given.get("dim") in (2, -3)
    index = node.args[1] if operation_name(node) == "getitem" else None
    if not isinstance(index, tuple) or len(index) < 3 or index[2] is not None:
        return False
    return all(isinstance(item, slice) and item == slice(None) for item in (*index[:2], *index[3:]))
