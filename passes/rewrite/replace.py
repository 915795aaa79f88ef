"""Put the operations of a function into a graph, and a node in the place of an attention call.

    y = sdpa(q, k, v)               y = scatter(...)        # what `insert(attend, q, k, v, ...)` has traced
    z = sdpa(y, k, v)       ->      z = sdpa(y, k, v)       # its AttentionCall has the new y as its query

A call may read another one's output as its query, key, value, mask, scored tensor or documents. Its `AttentionCall` names that
output's node, so replacing the node in the graph alone is not enough.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate

from lighthouse_fx.kernels.torch_private import fake_mode_of, pytree

from ..attention_call import AttentionCall, ScoreMask


def insert(function: Callable[..., Any], *arguments: Any, before: fx.Node, meta: Mapping[str, Any]) -> Any:
    """Put the operations that a function performs into a graph, as AOTAutograd will see them.

    The function is traced on the fake tensors that Dynamo saw, so the same code serves eager mode and graphs. Operators with
    autograd formulas of their own stay whole, sizes that are symbols stay symbols.

    Args:
        arguments: nodes, constants, and nested tuples of them.
        before: the node that the operations go before.
        meta: what the metadata of each new node begins with.

    Returns:
        The node of the function's result.
    """
    leaves, structure = pytree.tree_flatten(arguments)
    nodes = list(dict.fromkeys(x for x in leaves if isinstance(x, fx.Node)))

    def on_values(*values: Any) -> Any:
        given: dict[Any, Any] = dict(zip(nodes, values, strict=True))
        return function(*pytree.tree_unflatten([given[x] if isinstance(x, fx.Node) else x for x in leaves], structure))

    values = [node.meta["example_value"] for node in nodes]
    with torch.no_grad(), fake_mode_of(values):
        traced = make_fx(on_values, pre_dispatch=True)(*values)
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    with before.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], copies.__getitem__)
            if node not in copies and not (node.target is operator.getitem and not node.users):  # one of several outputs
                copies[node] = before.graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {**meta, "example_value": node.meta.get("val")}
    raise AssertionError("a graph ends with its output")


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
