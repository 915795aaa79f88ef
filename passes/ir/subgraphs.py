"""The graph and the subgraphs of higher-order operations inside it, such as activation checkpointing.

call = tag_activation_checkpoint(wrap_body_0, x, weight)      a Region of its own: wrap_body_0, whose placeholders
                                                               stand for x and weight
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from lighthouse_fx.kernels.torch_private import HigherOrderOperator

# Operations that run their subgraph as it stands, whose operands follow the subgraph's own argument.
# name -> arguments between the subgraph and its first operand
_TRANSPARENT = {
    "tag_activation_checkpoint": 0,
    "wrap_activation_checkpoint": 0,
    "wrap": 0,
    "wrap_with_set_grad_enabled": 0,
    "wrap_with_autocast": 0,
    "invoke_subgraph": 1,
    "inductor_compiled_code": 0,
}

_STANDS_FOR = "lighthouse_stands_for"


@dataclass(frozen=True, eq=False)
class Caller:
    """One call of a subgraph: the node, where it stands, and the position of its first operand."""

    region: Region
    node: fx.Node
    first_operand: int


@dataclass(frozen=True, eq=False)
class Region:
    """A graph, who calls it (nobody, for the outermost), and the operation that makes it off limits, if any."""

    gm: fx.GraphModule
    name: str = ""
    callers: tuple[Caller, ...] = ()
    opaque: str = ""

    def operands(self, placeholder: fx.Node) -> list[tuple[Region, Any]]:
        """What a placeholder of this region stands for, at each caller. Empty for an input of the whole graph."""
        index = list(self.gm.graph.find_nodes(op="placeholder")).index(placeholder)
        return [(caller.region, caller.node.args[caller.first_operand + index]) for caller in self.callers]


def brought(node: fx.Node, region: Region) -> fx.Node:
    """A node of the outermost graph, as a region sees it: itself, or a new placeholder that every caller passes it to."""
    if not region.callers:
        return node
    graph = region.gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    known: fx.Node | None = next((x for x in placeholders if x.meta.get(_STANDS_FOR) is node), None)
    if known is not None:
        return known
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
        inner: fx.Node = graph.placeholder(node.name)
    inner.meta = {**node.meta, _STANDS_FOR: node}
    for caller in region.callers:
        operands = caller.node.args[: caller.first_operand + len(placeholders)]
        rest = caller.node.args[len(operands) :]
        caller.node.args = (*operands, brought(node, caller.region), *rest)
        caller.region.gm.recompile()
    return inner


def regions(gm: fx.GraphModule) -> list[Region]:
    """The outermost graph and every subgraph, each once, callers before what they call."""
    return list(_walk(Region(gm=gm)))


def _walk(region: Region) -> Iterator[Region]:
    yield region
    callers: dict[str, list[Caller]] = {}
    opaque: dict[str, str] = {}
    for node in region.gm.graph.nodes:
        if node.op != "call_function":
            continue
        operation = _operation_name(node.target)
        for position, argument in enumerate(node.args):
            for subgraph in _subgraphs(region.gm, argument):
                if operation in _TRANSPARENT and isinstance(argument, fx.Node):
                    first = position + 1 + _TRANSPARENT[operation]
                    callers.setdefault(subgraph, []).append(Caller(region, node, first))
                else:
                    opaque[subgraph] = operation
        for argument in node.kwargs.values():
            for subgraph in _subgraphs(region.gm, argument):
                opaque[subgraph] = operation
    for name in dict.fromkeys([*callers, *opaque]):
        inside = getattr(region.gm, name)
        yield from _walk(
            Region(
                gm=inside,
                name=f"{region.name}.{name}".lstrip("."),
                callers=tuple(callers.get(name, ())),
                opaque=region.opaque or opaque.get(name, ""),
            )
        )


def _operation_name(target: Any) -> str:
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return str(getattr(target, "__name__", target))


def _subgraphs(gm: fx.GraphModule, argument: Any) -> Iterator[str]:
    """Names of the graph modules among an argument: a get_attr node, or a list of them (as `cond` and `switch` take)."""
    nodes = argument if isinstance(argument, (list, tuple)) else (argument,)
    for node in nodes:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            continue
        if isinstance(getattr(gm, str(node.target), None), fx.GraphModule):
            yield str(node.target)
