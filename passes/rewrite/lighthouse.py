"""Rewrite the calls that passed every check.

Before:
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=s)

After:
    select  = lighthouse_fx.select(q, k, v, ...)            -> entries = select[0], slots = select[1]
    gather  = lighthouse_fx.gather(q, entries, slots, ...)
    gather1 = lighthouse_fx.gather(k, entries, slots, ...)
    gather2 = lighthouse_fx.gather(v, entries, slots, ...)
    inner   = scaled_dot_product_attention(gather, gather1, gather2, is_causal=True, scale=s)
    out     = lighthouse_fx.scatter(inner, entries, slots, N, ...)

`select` reads what the scorer is to read, which for the `norm` scorer may be q and k before a norm (`qk_norm.py`).

Where the mask is only assumed to be causal, the entries hang on a check of it (`kernels/ops/causal_mask.py`):
    check   = lighthouse_fx.check_causal(mask, ...)         -> entries = select[0] + check
where the mask is applied, which in attention by hand is before its output. So they do on a check of the lists of blocks that
FlexAttention is given (`kernels/ops/block_lists.py`).

On a GPU, and where a kernel is asked for, `inner` is `lighthouse_fx.attention`: the same, and which stock kernel runs it.
Where it stays inside documents, `inner` is `lighthouse_fx.attention_in_documents`, and it, select and scatter also take where
each token's document begins, and it alone what the CPU knows of documents. A call that stays dense and is kept inside
documents becomes that alone, on all tokens:
    inner   = lighthouse_fx.attention_in_documents(q, k, v, arange(N), starts, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lighthouse_fx.kernels import REVISION
from lighthouse_fx.kernels.geometry import tokens_of_tile
from lighthouse_fx.kernels.reference.scorers import require_fla
from lighthouse_fx.kernels.sdpa import has_choice, require_package, resolved

from ..attention_call import CALLS, DOCUMENTS, KNOWN, AttentionCall, fake
from ..config import LighthouseConfig
from ..decide.check import pyramid_over
from ..ir.subgraphs import Region, brought
from ..match.sdpa import is_attention
from .replace import replace_node

_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack")
_TOKEN_LAYOUT = (("transpose", (1, 2)), ("contiguous", ()), ("transpose", (1, 2)))  # as scatter's: models may view it
_OPS = torch.ops.lighthouse_fx
REWRITTEN_FROM = "lighthouse_call"  # node.meta: the index of the attention call that a node belongs to


def rewrite_attention(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Replace each accepted call by select, three gathers, `scaled_dot_product_attention` on S entries, and scatter.

    Of the others, replace those that are kept inside documents by attention inside documents.
    """
    changed = []
    if any(call.refusal is None and call.scorer == "gla" and _on_gpu(call) for call in gm.meta[CALLS]):
        require_fla()
    if any(call.refusal is None for call in gm.meta[CALLS]):
        require_package(config.kernel)
    for index in range(len(gm.meta[CALLS])):
        call = gm.meta[CALLS][index]  # as the rewrites before it left it
        call.node.meta[REWRITTEN_FROM] = index
        if call.replaced:
            users = _mask_users(call, gm.meta[CALLS])
            result = _rewrite(call, config, index, users, gm.meta.get(DOCUMENTS), gm.meta.get(KNOWN))
            gm.meta[CALLS] = replace_node(call.node, result, gm.meta[CALLS])
            call.node.graph.erase_node(call.node)
            changed.append(call.region.gm)
    for region_gm in dict.fromkeys(changed):
        region_gm.graph.lint()
        region_gm.recompile()
    return gm


def _on_gpu(call: AttentionCall) -> bool:
    out = fake(call.node)
    return out is not None and out.device.type == "cuda"


def _mask_users(call: AttentionCall, calls: Sequence[AttentionCall]) -> str:
    """The calls whose mask is this call's, by the first. Equal for all of them: equal checks become one when compiled."""
    if call.unproved is None:
        return ""
    mask = _origin(call.unproved, call.region)
    users = [other for other in calls if other.unproved is not None and _origin(other.unproved, other.region) is mask]
    name = _name(users[0])
    return name if len(users) == 1 else f"{name} and {len(users) - 1} more"


def _name(call: AttentionCall) -> str:
    return f"{call.module or 'an attention call'} ({Path(call.source).name})"


def _origin(node: Any, region: Region) -> Any:
    """What a subgraph's input is outside of it, where only one place calls the subgraph."""
    while node.op == "placeholder" and len(operands := region.operands(node)) == 1:
        ((region, node),) = operands
    return node


def _rewrite(
    call: AttentionCall,
    config: LighthouseConfig,
    index: int,
    mask_users: str,
    documents: fx.Node | None,
    known: fx.Node | None,
) -> fx.Node:
    graph, node = call.node.graph, call.node
    q, k, v = call.query, call.key, call.value
    fakes = {n: n.meta["example_value"] for n in (q, k, v, node)}
    if call.kept_inside:
        config = replace(config, levels=1, topk=1, quota=None)  # all tokens are entries, whatever the length
    pyramid = pyramid_over(fakes[q].shape[2], config)
    batch, groups = fakes[k].shape[:2]

    def add(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, op: str) -> fx.Node:
        new = graph.create_node(op, target, args, kwargs)
        new.meta = {name: node.meta[name] for name in _KEPT_META if name in node.meta}
        new.meta |= {"example_value": value, REWRITTEN_FROM: index}
        return new

    def function(target: Any, *args: Any, value: Any = None, **kwargs: Any) -> fx.Node:
        return add(target, args, kwargs, value, "call_function")

    def empty(like: fx.Node, *shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        x: torch.Tensor = fakes[like]
        with torch.no_grad():
            return x.new_empty(shape, dtype=dtype or x.dtype)

    levels, pooling = config.levels, config.pooling
    # The scale matters to a scorer that attends; elsewhere it would only tie the selection to a traced number.
    scale = call.scale if call.scorer != "norm" else None
    with graph.inserting_before(node):
        length = pyramid.length
        if isinstance(length, torch.SymInt):
            length = add("size", (q, 2), {}, length, "call_method")
        topk: Any = pyramid.topk
        if isinstance(topk, torch.SymInt):  # a topk that follows the length: whole tiles of it
            of_tile = tokens_of_tile(pyramid.quota_, levels=levels, pooling=pooling)
            tiles = function(operator.floordiv, length, of_tile, value=pyramid.tiles)
            topk = function(operator.mul, tiles, pyramid.quota_, value=topk)
        index_tensors = (
            empty(k, batch, groups, pyramid.gathered, dtype=torch.int32),
            empty(k, batch, groups, pyramid.size, dtype=torch.int32),
        )
        starts: tuple[fx.Node, ...] = ()
        most: int = config.max_documents
        if call.documents is not None and call.documents is documents:
            starts = (brought(documents, call.region),)
            known = brought(known, call.region) if known is not None else None
        elif call.documents is not None and call.documents.target is _OPS.packed_starts.default:
            starts = (call.documents,)
            borders = fake(call.documents.args[1])
            if borders is not None and isinstance(borders.shape[0], int):  # as many as flash-attn is told of
                most = min(most, borders.shape[0] - 1)
        elif call.documents is not None:
            fakes[call.documents] = call.documents.meta["example_value"]
            like = empty(call.documents, batch, pyramid.length, dtype=torch.int32)
            starts = (function(_OPS.document_starts.default, call.documents, value=like),)
        if call.kept_inside:
            places = empty(k, pyramid.gathered, dtype=torch.int32)
            entries = function(torch.arange, length, dtype=torch.int32, device=places.device, value=places)
            counts = [add("size", (k, dim), {}, fakes[k].shape[dim], "call_method") for dim in (0, 1)]
            entries = add("expand", (entries, *counts, -1), {}, index_tensors[0], "call_method")
        else:
            selection = function(
                _OPS.select.default,
                call.score_query or q, call.score_key or k, v, levels, pooling, topk, pyramid.quota or 0,
                config.keep_first, call.scorer, config.dilation, call.is_causal, scale, REVISION, *starts,
                value=index_tensors,
            )  # fmt: skip
            entries, slots = (function(operator.getitem, selection, i, value=index_tensors[i]) for i in (0, 1))
        if call.unproved is not None:
            zero, form = empty(k, dtype=torch.int32), call.score_mask
            with graph.inserting_before(form.node if form else node):  # later, something else may have been written to it
                mask = call.unproved
                if form and form.fill is not None and form.hides:
                    mask = function(torch.logical_not, mask, value=torch.logical_not(mask.meta["example_value"]))
                check = function(_OPS.check_causal.default, mask, mask_users, REVISION, value=zero)
            entries = function(operator.add, entries, check, value=index_tensors[0])
        for count, indices, full_count, full_indices, *rest in call.blocks:
            own = starts if call.documents is not documents else ()  # what its mask_mod compares
            check = function(
                _OPS.check_blocks.default,
                count, indices, full_count, full_indices, own[0] if own else None, length, *rest, _name(call), REVISION,
                value=empty(k, dtype=torch.int32),
            )  # fmt: skip
            entries = function(operator.add, entries, check, value=index_tensors[0])
        gathered = (q, k, v) if call.kept_inside else [
            function(
                _OPS.gather.default,
                x, entries, slots, levels, pooling, REVISION,
                value=empty(x, *fakes[x].shape[:2], pyramid.gathered, fakes[x].shape[3]),
            )
            for x in (q, k, v)
        ]  # fmt: skip
        out = fakes[node] if is_attention(node) else empty(node, *fakes[q].shape[:3], fakes[v].shape[3])
        attended = empty(node, *out.shape[:2], pyramid.gathered, out.shape[3])
        if starts:
            inner = function(
                _OPS.attention_in_documents.default,
                *gathered, entries, *starts, levels, pooling, topk, pyramid.quota or 0,
                call.dropout_p, call.scale, call.enable_gqa,
                most, resolved(out.device, config.kernel), known if call.documents is documents else None,
                value=attended,
            )  # fmt: skip
        elif not has_choice(out.device, config.kernel):
            target = node.target if is_attention(node) else F.scaled_dot_product_attention
            inner = function(target, *gathered, value=attended, **_carried_over(call))
        else:
            inner = function(
                _OPS.attention.default,
                *gathered, call.dropout_p, call.is_causal, call.scale, call.enable_gqa,
                resolved(out.device, config.kernel),
                value=attended,
            )  # fmt: skip
        result = inner if call.kept_inside else function(
            _OPS.scatter.default,
            inner, entries, slots, length, levels, pooling, call.is_causal, REVISION, *starts,
            value=out,
        )  # fmt: skip
        for method, arguments in (*(_TOKEN_LAYOUT if call.kept_inside else ()), *call.steps):
            out = getattr(out, method)(*arguments)
            result = add(method, (result, *arguments), {}, out, "call_method")
        if call.projection:
            result = function(F.linear, result, *call.projection, value=fakes[node])
    return result


def _carried_over(call: AttentionCall) -> dict[str, Any]:
    """The call's own keyword arguments, as it gave them; a mask that proved causal is gone."""
    kept = {
        "dropout_p": call.dropout_p,
        "is_causal": call.is_causal,
        "scale": call.scale,
        "enable_gqa": call.enable_gqa,
    }
    usual = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {name: value for name, value in kept.items() if isinstance(value, fx.Node) or value != usual[name]}
