"""Which operations of a graph may write to which memory.

What reads a node long after it was made (the proof of a mask, keys taken from before they were repeated) is right only if
nothing writes to that memory. An operation is taken to write to all its arguments, unless it is known better.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import HigherOrderOperator, has_storage, pytree

from ..masks.rules import is_interpreted
from .internal_error import internal_error
from .ops import IN_PLACE_OPERATORS, PURE_OPERATORS, operation_name, schemas, works_in_place
from .subgraphs import regions

Writers = dict[int, list[fx.Node]]


def written(gm: fx.GraphModule) -> Writers:
    """The nodes of the graph that may write to memory, by that memory."""
    found: Writers = {}
    inside_first = list(reversed(regions(gm)))
    calls_of_regions = {caller.node for region in inside_first for caller in region.callers}
    for region in inside_first:
        for node in region.gm.graph.nodes:
            if node.op in ("call_function", "call_method", "call_module") and node not in calls_of_regions:
                for memory in memories(_may_write_to(node)):
                    found.setdefault(memory, []).append(node)
        # What a subgraph writes to, it writes to at every one of its callers.
        for placeholder in region.gm.graph.find_nodes(op="placeholder") if region.callers else ():
            writers = [node for memory in memories([placeholder]) for node in found.get(memory, ())]
            for memory in memories(operand for _, operand in region.operands(placeholder)) if writers else ():
                found.setdefault(memory, []).extend(writers)
    return found


def _may_write_to(node: fx.Node) -> Sequence[Any]:
    """The arguments that an operation may write to: all of them, unless it is known better."""
    if _is_pure(node):
        return ()
    return node.args[:1] if _writes_to_its_first_argument_only(node) else node.all_input_nodes


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node is an in-place operation of PyTorch, such as `triu_`, `*=` or `x[mask] = 0`, known to OPERATIONS."""
    return works_in_place(node) and is_interpreted(node)


def _is_pure(node: fx.Node) -> bool:
    name = operation_name(node)
    if any(_given(node).get(flag) not in (None, False) for flag in ("out", "inplace", "max_norm")):
        return False
    if node.target in IN_PLACE_OPERATORS:
        return False
    if isinstance(node.target, HigherOrderOperator):
        return str(node.target.name()) == "flex_attention" and all(map(_is_pure, _called_inside(node)))
    if node.target is builtins.getattr or node.target in PURE_OPERATORS or name in _PURE_NAMES:
        return True
    if is_interpreted(node) and not works_in_place(node):
        return True
    found = schemas(node)
    return bool(found) and not any(schema.is_mutable or _keeps_statistics(schema) for schema in found)


def _called_inside(node: fx.Node) -> list[fx.Node]:
    """What the subgraphs call that an operation is given: the score_mod and mask_mod of FlexAttention."""
    names = [x.target for x in pytree.tree_leaves(node.args) if isinstance(x, fx.Node) and x.op == "get_attr"]
    bodies = [getattr(node.graph.owning_module, str(name)) for name in names]
    return [x for body in bodies if isinstance(body, fx.GraphModule) for x in body.graph.nodes if x.op.startswith("call_")]


def _writes_to_its_first_argument_only(node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.target in IN_PLACE_OPERATORS:
        return True
    written = [
        [argument.alias_info and argument.alias_info.is_write for argument in s.arguments] for s in schemas(node)
    ]
    return bool(written) and all(flags and flags[0] and not any(flags[1:]) for flags in written)


def _given(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, as far as their names are known."""
    names = inspect.signature(node.target).parameters if inspect.isfunction(node.target) else ()
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _keeps_statistics(schema: torch.FunctionSchema) -> bool:
    """Batch norm writes to them, which its signature does not say."""
    return any(argument.name == "running_mean" for argument in schema.arguments)


def target_of_write(node: fx.Node) -> Sequence[Any]:
    """The argument that an operation writes all its other arguments into, where it is known to do that."""
    if node.op not in ("call_function", "call_method"):
        return ()
    try:
        return node.args[:1] if not _is_pure(node) and _writes_to_its_first_argument_only(node) else ()
    except Exception as error:
        internal_error(error, "the search for writes to tensors")
        return ()


def memories(values: Iterable[Any]) -> Iterator[int]:
    """The memory of every tensor that these nodes, or lists of nodes, stand for."""
    for node in pytree.tree_leaves(list(values)):
        for tensor in _tensors(node) if isinstance(node, fx.Node) else ():
            if has_storage(tensor):
                yield int(tensor.untyped_storage()._cdata)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("example_value")) if isinstance(x, torch.Tensor)]


_PURE_NAMES = frozenset({"cpu", "cuda", "multi_head_attention_forward", "normalize"})  # besides those that have a schema
