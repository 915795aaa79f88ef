"""Tell self-attention from cross-attention: query and key are projections of the same activation, row by row.

    source, target = embed(batch.chunk(2, dim=1))        q = Wq(target), k = Wk(source)       ->  cross-attention
    y = norm(x)                                          q = rope(Wq(y)) * scale, k = rope(Wk(y))     ->  self-attention

Query and key are followed back together, the latest node first, until both have come to the same place. A place is a node and
how the rows of the attention lie in it (`axes.py`), so that two halves of one tensor are two places.

What is multiplied or added behind the projections, such as rotary tables or a scale for each token, neither shows nor refutes
anything. Nor do the inputs of the graph that query and key are made of: they may be the same for two parts of one tensor.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import other_names

from ..attention_call import AttentionCall, Refusal, fake
from ..ir.aliasing import memories, target_of_write
from ..ir.internal_error import internal_error
from ..ir.ops import operation_name
from ..ir.subgraphs import Caller, Region, regions
from .axes import Rows, rows_of
from .operations import step_back

_ONE_ARGUMENT = (
    "give the sequence as one argument, from which the module takes queries, keys and values; or give a clone"
)


_NUMBERS = (int, float, torch.Size, torch.SymInt, torch.SymFloat, torch.SymBool)
_UNWRITTEN = frozenset(f"{how}{what}" for what in ("empty", "zeros", "ones", "full") for how in ("", "new_")) | {
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
}


class _Side(Flag):
    """Who comes to a node, and whether over a projection."""

    QUERY, KEY, PROJECTED_QUERY, PROJECTED_KEY = 1, 2, 4, 8


_QUERIES, _KEYS = _Side.QUERY | _Side.PROJECTED_QUERY, _Side.KEY | _Side.PROJECTED_KEY
_PROJECTED = _Side.PROJECTED_QUERY | _Side.PROJECTED_KEY


@dataclass(frozen=True, slots=True)
class _Data:
    """What a value is made of: inputs of the graph that carry data, or parameters alone."""

    inputs: frozenset[fx.Node] = frozenset()
    matrix: bool = False  # it is made of parameters alone, and is more than a scale or a bias


@dataclass(slots=True)
class _Met:
    """How far query and key were followed."""

    common: dict[tuple[fx.Node, Rows], _Side] = field(default_factory=dict)  # where both came, and nothing behind that
    ends: dict[tuple[fx.Node, Rows], _Side] = field(
        default_factory=dict
    )  # where one of them could be followed no further
    mixed: bool = False  # on the way lies an operation of which only the shapes are known


class Inputs:
    """What the values of a graph and its subgraphs are made of."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._data: dict[fx.Node, _Data] = {}
        self._writes: dict[int, list[fx.Node]] = {}  # to memory, by operations that write to their first argument alone
        self._order: dict[fx.Node, int] = {}  # subgraphs behind what calls them
        self._read(gm)

    def cross_attention(self, call: AttentionCall) -> Refusal | None:
        """Why a call may be attention from one sequence to another."""
        try:
            return next((why for way in _ways(call.region) if (why := self._compare(call, way)) is not None), None)
        except Exception as error:
            return internal_error(error, "following query and key")

    # --- forward: data -----------------------------------------------------------------------------------------------

    def _read(self, gm: fx.GraphModule) -> None:
        sharing: dict[int, list[fx.Node]] = {}
        for region in regions(gm):
            for node in region.gm.graph.nodes:
                self._order[node] = len(self._order)
                sources: Sequence[Any] = node.all_input_nodes
                if node.op == "placeholder" and not (sources := [outer for _, outer in region.operands(node)]):
                    self._data[node] = _of_input(node)
                elif _is_of_shapes(node):
                    self._data[node] = _Data()
                else:
                    self._data[node] = self._joined(sources)
                for memory in memories([node]):
                    sharing.setdefault(memory, []).append(node)
                for memory in memories(target_of_write(node)):
                    self._writes.setdefault(memory, []).append(node)
                    for other in sharing.get(memory, ()):
                        self._data[other] = self._joined([other, node])

    def _joined(self, nodes: Sequence[Any]) -> _Data:
        parts = [self._data[node] for node in nodes if isinstance(node, fx.Node) and node in self._data]
        inputs = frozenset[fx.Node]().union(*(part.inputs for part in parts))
        return _Data(inputs, any(part.matrix for part in parts) and not inputs)

    def _varies(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self._data and bool(self._data[node].inputs)

    # --- backward: rows ----------------------------------------------------------------------------------------------

    def _compare(self, call: AttentionCall, way: Mapping[Region, Caller]) -> Refusal | None:
        met = self._follow(call, way)
        reached = _Side(0)
        for side in (*met.common.values(), *met.ends.values()):
            reached |= side
        alone = [self._data[x].matrix for x in (call.query, call.key)]
        if alone[0] != alone[1]:
            return self._refusal(call)
        queries, keys = (
            [where for where, side in met.ends.items() if side & one]
            for one in (_Side.PROJECTED_QUERY, _Side.PROJECTED_KEY)
        )
        shared = [node for (node, _), side in met.common.items() if side & _PROJECTED]
        if reached & _PROJECTED == _PROJECTED:
            one_sided = not queries or not keys if call.is_causal is True else not queries and not keys
            if not shared or not one_sided or (met.mixed and len(shared) > 1):
                return self._refusal(call)
        elif _parts_of_one(met.ends) or (reached & _PROJECTED and not shared and call.is_causal is not True):
            return self._refusal(call)
        for node in shared if not alone[0] else ():
            if names := other_names(node):
                return Refusal(
                    reason=f"it may be cross-attention: one tensor is given as {' and '.join(names)}",
                    remedy=_ONE_ARGUMENT,
                )
        return None

    def _follow(self, call: AttentionCall, way: Mapping[Region, Caller]) -> _Met:
        """Go back from query and key, the latest node first: when its turn comes, all ways to a node are known."""
        met = _Met()
        waiting: dict[tuple[fx.Node, Rows], _Side] = {}
        arrived: dict[fx.Node, dict[Rows, None]] = {}
        regions_of: dict[fx.Node, Region] = {}
        queue: list[tuple[int, int, tuple[fx.Node, Rows]]] = []
        count = itertools.count()

        def add(node: Any, rows: Rows, side: _Side, region: Region) -> None:
            if not self._varies(node):
                return
            where = (node, rows)
            if side not in (known := waiting.get(where, _Side(0))):
                regions_of[node] = region
                waiting[where] = known | side
                arrived.setdefault(node, {})[rows] = None
                heapq.heappush(queue, (-self._order[node], next(count), where))

        for node, side in ((call.query, _Side.QUERY), (call.key, _Side.KEY)):
            add(node, rows_of(fake(node)), side, call.region)
        while queue:
            *_, where = heapq.heappop(queue)
            (node, rows), side, region = where, waiting[where], regions_of[where[0]]
            for other in arrived[node]:
                if other.tokens == rows.tokens and rows.tokens in (other.dims, rows.dims):  # all features, and some of them
                    side |= waiting[node, other]
            if side & _QUERIES and side & _KEYS and node not in call.views:
                met.common[where] = side
                continue
            if node.op == "placeholder" and region in way:
                caller = way[region]
                index = list(region.gm.graph.find_nodes(op="placeholder")).index(node)
                add(caller.node.args[caller.first_operand + index], rows, side, caller.region)
                continue
            step = step_back(node, rows, self._varies, self._written_to(node))
            if step is None or not any(self._varies(x) for x, _ in step.operands):
                met.ends[where] = side
                continue
            met.mixed |= step.mixes
            if (step.projects or step.mixes) and any(self._data[x].matrix for x in node.all_input_nodes):
                side = _projected(side)
            for operand, place in step.operands:
                add(operand, place, side, region)
        return met

    def _written_to(self, node: fx.Node) -> list[fx.Node]:
        """What writes to a node's memory, unless that belongs to another node, which comes later on the way back."""
        own = set(memories([node]))
        if own & set(memories(node.all_input_nodes)):
            return []
        return [write for memory in own for write in self._writes.get(memory, ()) if write is not node]

    def _refusal(self, call: AttentionCall) -> Refusal:
        asks, answers = (
            ", ".join(sorted(node.name for node in self._data[x].inputs)) or "parameters alone"
            for x in (call.query, call.key)
        )
        if asks == answers:
            what = "its query and key are not shown to be made of the same tokens of one activation"
            return Refusal(reason=f"it may be cross-attention: {what}")
        return Refusal(reason=f"cross-attention: its query is made of {asks}, its key of {answers}")


def _of_input(node: fx.Node) -> _Data:
    """Numbers, vectors and buffers carry no data."""
    tensor = fake(node)
    if tensor is None or tensor.dim() < 2 or "_buffers_" in node.name:
        return _Data()
    return _Data(matrix=True) if isinstance(tensor, torch.nn.Parameter) else _Data(inputs=frozenset({node}))


def _is_of_shapes(node: fx.Node) -> bool:
    """Whether nothing but shapes goes into a value: it is a number, or a tensor that was not written to yet."""
    return isinstance(node.meta.get("example_value"), _NUMBERS) or operation_name(node) in _UNWRITTEN


def _projected(side: _Side) -> _Side:
    found = _Side(0)
    if side & _QUERIES:
        found |= _Side.PROJECTED_QUERY
    return found | _Side.PROJECTED_KEY if side & _KEYS else found


def _parts_of_one(ends: Mapping[tuple[fx.Node, Rows], _Side]) -> bool:
    """Whether query and key come from different rows of one tensor."""
    queries, keys = (
        {node: rows.tokens for (node, rows), side in ends.items() if side & one} for one in (_QUERIES, _KEYS)
    )
    return any(queries[node] != keys[node] for node in queries.keys() & keys.keys())


def _ways(region: Region) -> Iterator[dict[Region, Caller]]:
    """The ways into a subgraph from the outermost graph: who called each of the regions around it."""
    if not region.callers:
        yield {}
    for caller in region.callers:
        for way in _ways(caller.region):
            yield {**way, region: caller}
