"""What a mask_mod of FlexAttention reads to tell documents apart, and the numbers of documents that follow from it.

    number[b, q_idx] == number[b, kv_idx]       every token's document              ->  Tables(number, holds="numbers")
    kv_idx >= first[document[q_idx]]            where the query's document begins   ->  Tables(document, first, holds="first")
    q_idx <= last[b, kv_idx]                    where the key's document ends       ->  Tables(last, holds="last")

The last two are torchtitan's. With a causal mask each keeps attention inside documents if its tables hold what they should,
which depends on data: the graph checks it in every step (`kernels/packed/attention.py`).

    numbers = lighthouse_fx.document_numbers(q, (document, first), "first")     # put into the graph, beside the user's
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..attention_call import fake
from ..ir.ops import operation_name
from .layouts import place_of
from .products import Unclear

_WHOLE = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Tables:
    """Tensors that a mask_mod reads one after the other: the first at `[b, token]` or `[token]`, others at what it gave."""

    nodes: tuple[fx.Node, ...]
    holds: str


def tables_of(condition: Any, batch: fx.Node, row: fx.Node, column: fx.Node) -> Tables | None:
    """The tables of a condition, as nodes of mask_mod's graph; None where it is no comparison of documents."""
    if not isinstance(condition, fx.Node) or len(condition.args) != 2 or condition.kwargs:
        return None
    name, (left, right) = operation_name(condition), condition.args
    if name == "eq":
        first, second = (_read(left, batch, x) or _read(right, batch, x) for x in (row, column))
        return Tables(first, "numbers") if first and first == second else None
    if name == "ge":
        left, right = right, left
    elif name != "le":
        return None
    if right is column:
        return Tables(nodes, "first") if (nodes := _read(left, batch, row)) else None
    if left is row:
        return Tables(nodes, "last") if (nodes := _read(right, batch, column)) else None
    return None


def _read(node: Any, batch: fx.Node, token: fx.Node) -> tuple[fx.Node, ...]:
    """What is read at a token, the first table first; nothing where that is not all there is to it."""
    if not isinstance(node, fx.Node) or operation_name(node) != "getitem":
        return ()
    table, at = node.args
    tensor, place = fake(table), at
    if isinstance(at, tuple):
        if len(at) != 2 or at[0] is not batch:
            return ()
        place = at[1]
    if not isinstance(table, fx.Node) or tensor is None or tensor.dtype not in _WHOLE or table.op != "placeholder":
        return ()
    if tensor.dim() != (2 if isinstance(at, tuple) else 1):
        return ()
    if place is token:
        return (table,)
    before = _read(place, batch, token)
    return (*before, table) if before else ()


def numbers_of(tables: Tables, query: fx.Node, before: fx.Node) -> fx.Node:
    """A node of int `[B, N]`, the number of each token's document, put in front of another. `tables` are of its graph.

    Raises:
        Unclear: where a table is not of the batch or length of the queries.
    """
    queries, tables_read = fake(query), [x for node in tables.nodes if (x := fake(node)) is not None]
    assert queries is not None and len(tables_read) == len(tables.nodes)
    batch, _, length, _ = queries.shape
    for table in tables_read:
        if (table is tables_read[0] and table.shape[-1] != length) or (table.dim() == 2 and table.shape[0] != batch):
            raise Unclear(f"the documents are of {list(table.shape)} tokens, its queries of {[batch, length]}")
    with before.graph.inserting_before(before), torch.no_grad():
        node = before.graph.call_function(
            torch.ops.lighthouse_fx.document_numbers.default, (query, list(tables.nodes), tables.holds)
        )
        node.meta = {**place_of(before), "example_value": tables_read[-1].new_empty((batch, length))}
    return node
