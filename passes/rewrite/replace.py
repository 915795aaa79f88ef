"""Put a node in the place of an attention call: in the graph, and in what is known of the other calls.

    y = sdpa(q, k, v)               y = scatter(...)
    z = sdpa(y, k, v)       ->      z = sdpa(y, k, v)       # its AttentionCall has the new y as its query

A call may read another one's output as its query, key, value, mask, scored tensor or documents. Its `AttentionCall` names that
output's node, so replacing the node in the graph alone is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from ..attention_call import AttentionCall, ScoreMask


def replace_node(
    old: fx.Node, new: fx.Node, calls: Sequence[AttentionCall], *, keep: Callable[[fx.Node], bool] = lambda user: False
) -> tuple[AttentionCall, ...]:
    """Let everything that reads one node read another.

    Args:
        calls: the attention calls that may read it.
        keep: which users go on reading the old node.

    Returns:
        The calls, reading the new node. `AttentionCall.node` stays: it identifies the call.
    """
    old.replace_all_uses_with(new, delete_user_cb=lambda user: not keep(user))
    return tuple(replace(_substitute(call, old, new), node=call.node) for call in calls)


def _substitute(record: Any, old: fx.Node, new: fx.Node) -> Any:
    """A record with one node for another, however deep in its fields."""

    def of(value: Any) -> Any:
        if isinstance(value, ScoreMask):
            return _substitute(value, old, new)
        return new if value is old else value

    return replace(record, **{field.name: map_aggregate(getattr(record, field.name), of) for field in fields(record)})
