"""Give each caller of a shared subgraph one of its own while the passes run, and share again those that came out equal.

    a = invoke_subgraph(body, "body", x, weight0)           a = invoke_subgraph(body, "body", x, weight0)
    b = invoke_subgraph(body, "body", a, weight1)     ->    b = invoke_subgraph(body_1, "body_1", a, weight1)

`nested_compile_region` lets blocks share a subgraph whose nodes name the modules of its first caller alone. Whether a call is
rewritten also depends on its module: its mode, its place among the layers, its path. With a subgraph each, every caller is
judged and reported like a block that shares nothing; `share_again` keeps what the region is for, one compilation.
"""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import count
from typing import Any

from torch import fx

from ..ir.subgraphs import Caller, regions

_COPY_OF = "lighthouse_copy_of"  # in a copy's meta: the name of the subgraph that it copies


def separate_callers(gm: fx.GraphModule) -> None:
    """Give every caller of a subgraph but the first a copy of its own, whose nodes name the caller's modules."""
    while shared := next((x for x in regions(gm) if len(x.callers) > 1 and not x.opaque), None):
        first, *others = shared.callers
        for caller in others:
            parent, attribute = caller.region.gm, _attribute(caller)
            copy = _copy(shared.gm, *_renaming(first, caller))
            copy.meta[_COPY_OF] = attribute.target
            name = next(x for n in count(1) if not hasattr(parent, x := f"{attribute.target}_caller_{n}"))
            setattr(parent, name, copy)
            with parent.graph.inserting_before(caller.node):
                own = parent.graph.get_attr(name)
            own.meta = dict(attribute.meta)
            _call(caller.node, own, name)
            if not attribute.users:
                parent.graph.erase_node(attribute)
            parent.recompile()


def share_again(gm: fx.GraphModule) -> None:
    """Let callers share a subgraph again where the passes made the same of it, and drop the copies."""
    for region in regions(gm):
        parent, kept = region.gm, dict[str, list[fx.Node]]()
        for node in [x for x in parent.graph.nodes if x.op == "call_function"]:
            for attribute in [x for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr"]:
                body = getattr(parent, str(attribute.target), None)
                if not isinstance(body, fx.GraphModule):
                    continue
                known = kept.setdefault(str(body.meta.get(_COPY_OF, attribute.target)), [])
                same = next((x for x in known if _equal(getattr(parent, str(x.target)), body)), None)
                if same is None:
                    known.append(attribute)
                elif same.target != attribute.target:
                    _call(node, same, str(same.target))
                    parent.graph.erase_node(attribute)
                    delattr(parent, str(attribute.target))
        parent.recompile()


def _attribute(caller: Caller) -> fx.Node:
    """The node that fetches the subgraph that a caller calls: it comes before the operands."""
    attributes = [x for x in caller.node.args[: caller.first_operand] if isinstance(x, fx.Node) and x.op == "get_attr"]
    return attributes[-1]


def _call(node: fx.Node, attribute: fx.Node, name: str) -> None:
    """Make a caller call another subgraph. `invoke_subgraph` also takes a name, by which compilations are kept."""
    args = list(node.args)
    place = next(n for n, x in enumerate(args) if isinstance(x, fx.Node) and x.op == "get_attr")
    args[place] = attribute
    if place + 1 < len(args) and isinstance(args[place + 1], str):
        args[place + 1] = name
    node.args = tuple(args)


def _copy(body: fx.GraphModule, old: str, new: str) -> fx.GraphModule:
    """A subgraph and the subgraphs in it, with one module's path for another's; parameters and buffers are shared."""
    copy = fx.GraphModule(body, deepcopy(body.graph))
    copy.meta = dict(body.meta)
    for node in copy.graph.nodes:
        if node.op == "get_attr" and isinstance(inner := getattr(copy, str(node.target), None), fx.GraphModule):
            setattr(copy, str(node.target), _copy(inner, old, new))
        if old != new and (stack := node.meta.get("nn_module_stack")):
            node.meta["nn_module_stack"] = {
                key: (_renamed(_plain(path), old, new), *rest) for key, (path, *rest) in stack.items()
            }
    return copy


# --- whose modules a caller's are -------------------------------------------------------------------------------------


def _renaming(first: Caller, other: Caller) -> tuple[str, str]:
    """The path of a module of the first caller, and the path that the other caller has in its place."""
    stacks = [[path for path, *_ in (x.node.meta.get("nn_module_stack") or {}).values()] for x in (first, other)]
    if all(stacks) and (old := _plain(stacks[0][-1])) != (new := _plain(stacks[1][-1])):
        return old, new
    for ours, theirs in zip(first.node.args[first.first_operand :], other.node.args[other.first_operand :], strict=True):
        old, new = _source(ours), _source(theirs)
        if "_parameters" in old and "_parameters" in new and old != new:
            left, right = old.split("."), new.split(".")
            while left and right and left[-1] == right[-1]:
                del left[-1], right[-1]
            return ".".join(left), ".".join(right)
    return "", ""


def _source(operand: Any) -> str:
    """The path of the variable behind an input of the whole graph, or ""."""
    source = getattr(operand.meta.get("grapharg"), "source", None) if isinstance(operand, fx.Node) else None
    name = getattr(source, "name", "")
    return _plain(name() if callable(name) else name)  # a method before torch 2.13


def _plain(path: str) -> str:
    """`L['self']._modules['layers']._modules['0'].attn` -> `L['self'].layers.0.attn`"""
    path = re.sub(r"getattr\(([^()]*), '([^']+)'\)", r"\1.\2", path)
    return re.sub(r"\._modules\[(['\"])(.+?)\1\]", r".\2", path)


def _renamed(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


# --- equal subgraphs --------------------------------------------------------------------------------------------------


def _equal(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Whether two subgraphs are the same operations, in the same order, on the same constants."""
    if a is b:
        return True
    places = [{node: f"%{n}" for n, node in enumerate(x.graph.nodes)} for x in (a, b)]
    if len(places[0]) != len(places[1]):
        return False
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        if x.op == y.op == "get_attr":
            one, two = getattr(a, str(x.target), None), getattr(b, str(y.target), None)
            same = _equal(one, two) if isinstance(one, fx.GraphModule) and isinstance(two, fx.GraphModule) else one is two
        else:
            same = x.op == y.op and (x.op in ("placeholder", "output") or x.target == y.target)
        arguments = (
            repr(fx.map_arg((node.args, node.kwargs), place.__getitem__))
            for node, place in zip((x, y), places, strict=True)
        )
        if not same or len(set(arguments)) > 1:
            return False
    return True
