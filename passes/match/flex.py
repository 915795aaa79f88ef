"""Find FlexAttention. Changes nothing that the graph computes.

    out = flex_attention(q, k, v, score_mod, (..., mask_mod), scale, ...)[0]    ->  an AttentionCall, or the reason why not

What the two functions do is proved from their own graphs: `score_mod` has to give back the score, and `mask_mod` to be
`q_idx >= kv_idx`, always true, or within documents (`document_tables.py`), whose numbers are then put into the graph.

FlexAttention asks `mask_mod` only in the partial blocks of a `BlockMask`: not in its full blocks, and what the lists of blocks
leave out is never seen. `create_block_mask` makes the lists of the same mask_mod, but `BlockMask.from_kv_blocks` takes any
(block-sparse attention is written that way, with a mask_mod that is causal or always true). So a mask_mod alone proves
nothing. The lists are proved where no block_mask was given, when the graph itself makes one block of everything. Elsewhere
they may hold anything: of a causal call, also within documents, the graph checks them in every step
(`kernels/ops/block_lists.py`), and any other stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from lighthouse_fx.kernels.torch_private import HigherOrderOperator

from ..attention_call import AttentionCall, add_calls, fake
from ..ir.aliasing import writes_in_place
from ..ir.internal_error import internal_error
from ..ir.ops import operation_name
from ..ir.subgraphs import Region, regions
from ..masks.diagonals import EVERY, Diagonals, Unproven, as_cases, coordinate
from ..masks.evaluate import ORIGIN, Elements, is_one
from ..masks.rules import OPERATIONS, is_interpreted
from .document_tables import Tables, numbers_of, tables_of
from .layouts import only_output, unused_outputs
from .products import Unclear, is_number
from .sdpa import module_path, source_line

_KEEP = "use scaled_dot_product_attention with is_causal=True"
_CAUSAL = Diagonals(((0, float("inf")),))
_LONGEST = 2**31 - 1  # positions are int32
_ALL = 1 << 30  # the size of a block that no sequence exceeds, as flex_attention itself takes it


def find_flex(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Add an `AttentionCall` for every `flex_attention`, in graph order."""
    found, order = [], []
    for region in regions(gm):
        for node in region.gm.graph.nodes:
            order.append(node)
            if isinstance(node.target, HigherOrderOperator) and node.target.name() == "flex_attention":
                found.append(_understood(node, region))
    add_calls(gm, found, order)
    return gm


def _understood(node: fx.Node, region: Region) -> AttentionCall:
    call = AttentionCall(node=node, region=region, module=module_path(node), source=source_line(node))
    try:
        query, key, value, score_mod, block_mask, scale, _, _, captured = node.args
        call = replace(call, query=query, key=key, value=value)
        unused = unused_outputs(node)
        out = only_output(node, unused)
        if out is None:
            raise Unclear("flex_attention also returns the log-sum-exp of its scores", "call it without return_lse")
        _check_score_mod(_body(region, score_mod))
        lengths = [x.shape[2] if (x := fake(y)) is not None and isinstance(x.shape[2], int) else _LONGEST for y in (query, key)]
        masked = _mask_mod(_body(region, block_mask[-1]), captured, *lengths)  # type: ignore[index, arg-type]
        call = replace(call, is_causal=masked.causal, own_documents=masked.documents is not None)
        if masked.documents is not None:
            numbers = numbers_of(masked.documents, query, node)  # type: ignore[arg-type]
            call = replace(call, documents=numbers, views=(numbers,))
        call = replace(call, blocks=_blocks_to_check(call, block_mask))
        if not is_number(scale) or not scale > 0:  # type: ignore[operator]
            raise Unclear(f"flex_attention's scale is {scale}", "give a positive Python number")
        heads = [tensor.shape[1] for x in (query, key) if (tensor := fake(x)) is not None]
        parts: list[Any] = [*unused, node, score_mod, block_mask[-1]]  # type: ignore[index]
        return replace(
            call,
            node=out,
            scale=scale,
            enable_gqa=heads[0] is not heads[1] and heads[0] != heads[1],
            own_nodes=tuple((x, region) for x in parts),
        )
    except Unclear as why:
        return call.refuse(why.reason, why.remedy or _KEEP)
    except Exception as error:
        return replace(call, refusal=internal_error(error, "reading a call of flex_attention"))


def _body(region: Region, function: Any) -> fx.GraphModule:
    body = getattr(region.gm, str(function.target))
    assert isinstance(body, fx.GraphModule)
    return body


def _result(body: fx.GraphModule) -> Any:
    (output,) = body.graph.find_nodes(op="output")
    result = output.args[0]
    return result[0] if isinstance(result, (tuple, list)) else result


def _check_score_mod(body: fx.GraphModule) -> None:
    first, *_ = body.graph.find_nodes(op="placeholder")
    changes = [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]
    if changes or _result(body) is not first:
        steps = ", ".join(node.name for node in changes[:4])
        raise Unclear(f"flex_attention's score_mod changes scores: {steps or 'it returns something else'}")


# --- mask_mod ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masked:
    causal: bool
    documents: Tables | None


def _mask_mod(body: fx.GraphModule, captured: Sequence[Any], rows: int, columns: int) -> _Masked:
    """What a mask_mod proves to be."""
    batch, head, row, column, *inner = body.graph.find_nodes(op="placeholder")
    outer = dict(zip(inner, captured, strict=True))
    positions = {
        node: coordinate(name) for node, name in zip((batch, head, row, column), ("b", "h", "i", "j"), strict=True)
    }
    sizes = {"b": _LONGEST, "h": _LONGEST, "i": rows, "j": columns}
    elements = Elements(OPERATIONS, sizes, _as_made, positions)
    for node in body.graph.nodes:
        if node.op not in ("placeholder", "output") and (not is_interpreted(node) or writes_in_place(node)):
            raise Unclear(f"flex_attention's mask_mod is not proved to be only causal: it depends on {node.name}")
    seen, documents = EVERY, None
    for condition in _conditions(_result(body)):
        if (tables := tables_of(condition, batch, row, column)) is not None:
            if documents not in (None, tables):
                raise Unclear("flex_attention's mask_mod compares two kinds of documents")
            documents = tables
            continue
        try:
            seen = seen & as_cases(elements.at(condition, Region(gm=body), (), condition)).where(bool)
        except Unproven as why:
            raise Unclear(f"flex_attention's mask_mod is not proved to be only causal: {why}") from why
    if seen not in (EVERY, _CAUSAL) or (seen == EVERY and documents is not None and documents.holds != "numbers"):
        (low, high), *others = seen.bands or ((0, 0),)
        if not others and low == 0 and high >= 0 and seen.bands:
            raise Unclear(f"sliding window: flex_attention's mask_mod shows each token the last {high + 1:.0f} only")
        raise Unclear("flex_attention's mask_mod is neither causal nor full")
    if documents is not None:
        documents = replace(documents, nodes=tuple(outer[node] for node in documents.nodes))
    return _Masked(causal=seen == _CAUSAL, documents=documents)


def _as_made(node: Any, reader: fx.Node) -> Any:
    """What a tensor holds where nothing is written in place, which is checked elsewhere."""
    return node


def _conditions(node: Any) -> list[Any]:
    """The conditions that all have to hold."""
    if isinstance(node, fx.Node) and operation_name(node) in ("bitwise_and", "logical_and"):
        return [condition for part in node.args for condition in _conditions(part)]
    return [node]


# --- its blocks -------------------------------------------------------------------------------------------------------


def _blocks_to_check(call: AttentionCall, block_mask: Any) -> tuple[tuple[Any, ...], ...]:
    """The lists that the graph has to check, as `AttentionCall.blocks` holds them; none where it says itself what they are."""
    try:
        _check_one_block(call, block_mask)
        return ()
    except Unproven as why:
        if not call.is_causal:
            raise Unclear(
                f"flex_attention is given a block_mask, which may leave out blocks that its mask_mod shows: {why}", _KEEP
            ) from why
    query = fake(call.query)
    by_query, by_key, sizes = block_mask[2:6], block_mask[6:10], block_mask[-3:-1]
    found = []
    for lists, keys in ((by_query, False), (by_key, True)):
        count, indices, full_count, full_indices = lists
        if count is None and keys:
            continue  # there is no backward to be wrong
        for node, rank in ((count, 3), (indices, 4), (full_count, 3), (full_indices, 4)):
            tensor = fake(node)
            fits = tensor is not None and query is not None and tensor.dim() == rank and not tensor.is_floating_point()
            if node is not None and not (fits and all(map(_broadcasts, tensor.shape[:2], query.shape[:2]))):  # type: ignore[union-attr]
                raise Unclear("the lists of flex_attention's block_mask have not the batch and heads of its queries")
        found.append((*lists, *sizes, keys))
    return tuple(found)


def _broadcasts(size: Any, of: Any) -> bool:
    return is_one(size) or bool(size == of)


def _check_one_block(call: AttentionCall, block_mask: Any) -> None:
    """Raise unless the graph itself says that every query's block lists the one block of all keys, as a partial one."""
    _, _, count, indices, full_count, *_ = block_mask
    if full_count is not None or any(size < _ALL for size in block_mask[-3:-1]):
        raise Unproven("its lists of blocks are made elsewhere")
    for node, expected in ((count, 1), (indices, 0)):
        tensor = fake(node)
        if tensor is None or tensor.numel() != 1:
            raise Unproven("its lists of blocks are made elsewhere")
        elements = Elements(OPERATIONS, {}, _as_made)
        found = as_cases(elements.at(node, call.region, (ORIGIN,) * tensor.dim(), node))
        if [value for _, value in found.parts] != [expected]:
            raise Unproven("its lists of blocks are not those of all keys")
        if set(elements.visited) != {node} or not _only_read(node):
            raise Unproven("its lists of blocks may be changed in place")


def _only_read(node: fx.Node) -> bool:
    """Whether a list of blocks is used as flex_attention itself does, which orders it by query under vmap."""
    for user in node.users:
        name = getattr(user.target, "__name__", str(user.target))
        if name in ("_add_batch_dim", "unsqueeze"):
            if not _only_read(user):
                return False
        elif name not in ("flex_attention", "new_zeros", "lt", "where"):
            return False
    return True
