"""Prove of explicit masks that they are only the causal mask, or no mask at all. Changes nothing in the graph.

    i = arange(N)[:, None]; j = arange(N); mask = j <= i
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)     ->  its AttentionCall now says is_causal=True, mask=None

The proof is exact, from the operations that build the mask (`elements.py`). A mask that depends on any input of the graph
is not proved, whatever that input holds today.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .call import DENSE, AttentionCall, fake, for_each_call
from .elements import ORIGIN, Elements, is_one, operation_name
from .operations import OPERATIONS, is_fresh, is_interpreted
from .regions import Region, regions
from .symbolic import Cases, Diagonals, Unproven, as_cases, coordinate

_Bands = tuple[tuple[float, float], ...]
_Writers = dict[int, list[fx.Node]]
_Nodes = tuple[tuple[fx.Node, Region], ...]
_ANY_LENGTH = 2**32  # no symbolic size is greater
_REMEDY = (
    "pass is_causal=True and no attn_mask; with transformers, call the model without attention_mask and position_ids"
)


def prove_masks(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Turn calls with a provable mask into causal (or full) calls; refuse the others with what stands in the way."""
    if DENSE not in gm.meta:
        written = functools.cache(lambda: _written(gm))
        for_each_call(gm, lambda call: _prove(call, written) if call.mask is not None else call)
    return gm


def _prove(call: AttentionCall, written: Callable[[], _Writers]) -> AttentionCall:
    if call.region.opaque:
        return call
    try:
        bands, last, visited = _seen(call, written())
    except Unproven as why:
        return call.refuse(f"explicit attn_mask, not proved to be only causal: {why}", _REMEDY)
    except Exception:  # whatever a user's graph holds, failing to understand it must not fail the compilation
        return call.refuse(
            "explicit attn_mask, not proved to be only causal: its construction was not understood", _REMEDY
        )
    if bands == ((-last, last),):
        return replace(call, mask=None, mask_nodes=visited)
    if bands == ((0, last),):
        return replace(call, mask=None, is_causal=True, mask_nodes=visited)
    if len(bands) == 1 and bands[0][0] == 0:
        return call.refuse(f"sliding window: attn_mask shows each token the last {bands[0][1] + 1:.0f} only")
    return call.refuse("attn_mask is neither causal nor full", _REMEDY)


def _seen(call: AttentionCall, written: _Writers) -> tuple[_Bands, float, _Nodes]:
    """The bands of diagonals `i - j` that a call's mask lets through, the last diagonal, and the nodes that build the mask."""
    mask, query, key = fake(call.mask), fake(call.query), fake(call.key)
    if mask is None or query is None or key is None or query.dim() != 4 or not 2 <= mask.dim() <= 4:
        raise Unproven("its shape is not known")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])[4 - mask.dim() :]
    if any(size != expected and not is_one(size) for size, expected in zip(mask.shape, full, strict=True)):
        raise Unproven(f"its shape {list(mask.shape)} does not fit {list(full)}")
    names = "bhij"[4 - mask.dim() :]
    sizes = {name: size if isinstance(size, int) else _ANY_LENGTH for name, size in zip(names, full, strict=True)}
    elements = Elements(OPERATIONS, sizes)
    where = tuple(ORIGIN if is_one(size) else coordinate(name) for size, name in zip(mask.shape, names, strict=True))
    allowed = _allowed(as_cases(elements.at(call.mask, call.region, where)), mask.dtype)
    _refuse_shared_writes(elements.visited, written)
    length = query.shape[2]
    last = length - 1 if isinstance(length, int) else math.inf
    return (allowed & Diagonals(((-last, last),))).bands, last, tuple(elements.visited.items())


def _allowed(mask: Cases, dtype: torch.dtype) -> Diagonals:
    """The diagonals on which a mask lets the key be seen."""
    if dtype == torch.bool:
        return mask.where(bool)
    # An added bias is a mask where it is 0 or takes the whole weight away. NaN is neither; Elements does not let it through.
    lowest = torch.finfo(dtype).min
    if not all(value == 0 or value <= lowest for _, value in mask.parts):
        raise Unproven("it adds a bias other than 0 and -inf")
    return mask.where(lambda value: value == 0)


# --- writes to memory -------------------------------------------------------------------------------------------------
# A proof reads each node as if nothing wrote to it. So every use of the memory that it read must be known not to write.


def _written(gm: fx.GraphModule) -> _Writers:
    """The nodes of the graph that may write to memory, by that memory."""
    found: _Writers = {}
    inside_first = list(reversed(regions(gm)))
    calls_of_regions = {caller.node for region in inside_first for caller in region.callers}
    for region in inside_first:
        for node in region.gm.graph.nodes:
            if node.op in ("call_function", "call_method", "call_module") and node not in calls_of_regions:
                for memory in _memories(_may_write_to(node)):
                    found.setdefault(memory, []).append(node)
        # What a subgraph writes to, it writes to at every one of its callers.
        for placeholder in region.gm.graph.find_nodes(op="placeholder") if region.callers else ():
            writers = [node for memory in _memories([placeholder]) for node in found.get(memory, ())]
            for memory in _memories(operand for _, operand in region.operands(placeholder)) if writers else ():
                found.setdefault(memory, []).extend(writers)
    return found


def _may_write_to(node: fx.Node) -> Sequence[Any]:
    """The arguments that an operation may write to: all of them, unless it is known better."""
    if _is_pure(node):
        return ()
    return node.args[:1] if _writes_to_its_first_argument_only(node) else node.all_input_nodes


def _is_pure(node: fx.Node) -> bool:
    name = operation_name(node)
    if any(_given(node).get(flag) not in (None, False) for flag in ("out", "inplace", "max_norm")):
        return False
    if node.target is builtins.getattr or node.target in _PURE_OPERATORS or name in _PURE_METHODS:
        return True
    if is_interpreted(node) and not name.endswith("_"):
        return True
    schemas = _schemas(node)
    return bool(schemas) and not any(schema.is_mutable or _keeps_statistics(schema) for schema in schemas)


def _writes_to_its_first_argument_only(node: fx.Node) -> bool:
    if not node.args:
        return False
    if node.target in _IN_PLACE_OPERATORS:
        return True
    written = [
        [argument.alias_info and argument.alias_info.is_write for argument in s.arguments] for s in _schemas(node)
    ]
    return bool(written) and all(first and not any(others) for first, *others in written)


def _given(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, as far as their names are known."""
    names = inspect.signature(node.target).parameters if inspect.isfunction(node.target) else ()
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _schemas(node: fx.Node) -> list[torch.FunctionSchema]:
    """The signatures, with what they write to, of PyTorch's and custom operations. Empty if unknown."""
    if isinstance(node.target, torch._ops.OpOverload):
        return [node.target._schema]
    custom = isinstance(node.target, torch._ops.OpOverloadPacket)
    packet = node.target if custom else getattr(torch.ops.aten, operation_name(node) or "?", None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return []
    found = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return [schema for schema in found if not any(a.is_out and a.name not in node.kwargs for a in schema.arguments)]


def _keeps_statistics(schema: torch.FunctionSchema) -> bool:
    """Batch norm writes to them, which its signature does not say."""
    return any(argument.name == "running_mean" for argument in schema.arguments)


def _refuse_shared_writes(visited: Mapping[fx.Node, Region], written: _Writers) -> None:
    """A fresh tensor written to by its only user, through which the proof went, is fine; any other write is not."""
    for node in visited:
        memories = list(_memories([node]))
        if len(memories) != 1:
            raise Unproven(f"the memory of {node.name} is not known")
        for write in written.get(memories[0], ()):
            base = write.args[0] if write.args else None
            only_user = isinstance(base, fx.Node) and is_fresh(base) and len(base.users) == 1
            if not (only_user and write in visited):
                raise Unproven(f"it may be changed in place, by {write.name}")


def _memories(values: Iterable[Any]) -> Iterator[int]:
    """The memory of every tensor that these nodes, or lists of nodes, stand for."""
    for node in pytree.tree_leaves(list(values)):
        for tensor in _tensors(node) if isinstance(node, fx.Node) else ():
            if torch._C._has_storage(tensor):
                yield int(tensor.untyped_storage()._cdata)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("example_value")) if isinstance(x, torch.Tensor)]


_PURE_METHODS = frozenset({"cpu", "cuda"})  # besides those that have a schema
_PURE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in (
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "inv", "invert", "is_", "is_not", "le", "lshift",
        "lt", "matmul", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "truth", "xor",
    )
)  # fmt: skip
_IN_PLACE_OPERATORS: frozenset[Callable[..., Any]] = frozenset(
    getattr(operator, name)
    for name in (
        "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv",
        "ixor", "setitem",
    )
)  # fmt: skip
