"""Rewrite the calls that passed every check.

Before:
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=s)

After: what `kernels.attend` does, traced
    select  = lighthouse_fx.select(q, k, v, ...)            -> entries = select[0], slots = select[1]
    gather  = lighthouse_fx.gather(q, entries, slots, ...)
    gather1 = lighthouse_fx.gather(k, entries, slots, ...)
    gather2 = lighthouse_fx.gather(v, entries, slots, ...)
    inner   = scaled_dot_product_attention(gather, gather1, gather2, None, 0.0, True, scale=s)
    out     = lighthouse_fx.scatter(inner, entries, slots, N, ...)

`select` reads what the scorer is to read, which for the `norm` scorer may be q and k before a norm (`qk_norm.py`).

Where the mask is only assumed to be causal, the entries depend on a check of it (`kernels/ops/causal_mask.py`):
    check   = lighthouse_fx.check_causal(mask, ...)         -> entries = select[0] + check
where the mask is applied, which in unfused attention is before its output. So they do on a check of the lists of blocks that
FlexAttention is given (`kernels/ops/block_lists.py`).

On a GPU, and where a kernel is asked for, `inner` is `lighthouse_fx.attention`: the same, and which stock kernel runs it.
Where it stays inside documents, `inner` is `lighthouse_fx.attention_in_documents`, and it, select and scatter also take where
each token's document begins, and it alone what the CPU knows of documents. A call that stays dense and is kept inside
documents becomes that alone, on all tokens:
    inner   = lighthouse_fx.attention_in_documents(q, k, v, arange(N), starts, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lighthouse_fx.kernels import REVISION, attend
from lighthouse_fx.kernels.packed.attention import attention_in_documents
from lighthouse_fx.kernels.reference.scorers import require_fla
from lighthouse_fx.kernels.sdpa import require_package, resolved

from ..attention_call import CALLS, DOCUMENTS, KNOWN, AttentionCall, ScoreMask, Steps, fake
from ..config import LighthouseConfig
from ..ir.subgraphs import Region, brought
from ..pyramid import pyramid_over
from .replace import insert, replace_node

_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack")
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
    call: AttentionCall, config: LighthouseConfig, index: int, mask_users: str, documents: fx.Node | None, known: fx.Node | None
) -> fx.Node:
    """Put what takes a call's place into the graph, and return its output."""
    meta = {name: call.node.meta[name] for name in _KEPT_META if name in call.node.meta} | {REWRITTEN_FROM: index}

    def put(function: Callable[..., Tensor], *arguments: Any, before: fx.Node = call.node) -> fx.Node:
        node: fx.Node = insert(function, *arguments, before=before, meta=meta)
        return node

    q, k, v, starts = call.query, call.key, call.value, call.documents
    given = starts is not None and starts is documents  # by `documents(...)`; otherwise by the model itself
    if given:
        starts = brought(starts, call.region)
    elif starts is not None and starts.target is not _OPS.packed_starts.default:
        starts = put(_OPS.document_starts.default, starts)
    known = brought(known, call.region) if given and known is not None else None
    checks = []
    if call.unproved is not None:
        # Where the mask is applied: later, something else may have been written to it.
        applied = call.score_mask.node if call.score_mask else call.node
        checks.append(put(partial(_check_mask, call.score_mask, mask_users), call.unproved, before=applied))
    for lists in call.blocks:
        compared = None if given else starts  # what the call's mask_mod compares
        checks.append(put(partial(_check_blocks, _name(call)), q, compared, lists))
    attend_ = partial(_attend_inside if call.kept_inside else _attend, call, config)
    scored = call.score_query, call.score_key
    result = put(attend_, q, k, v, scored, starts, known, tuple(checks), call.dropout_p, call.scale, call.projection)
    result.meta["example_value"] = call.node.meta["example_value"]
    return result


def _attend(
    call: AttentionCall,
    config: LighthouseConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scored: tuple[Tensor | None, Tensor | None],
    starts: Tensor | None,
    known: Tensor | None,
    checks: Sequence[Tensor],
    dropout_p: float,
    scale: float | None,
    projection: Sequence[Tensor | None],
) -> Tensor:
    out = attend(
        q, k, v, pyramid_over(q.shape[2], config),
        scorer=call.scorer, dilation=config.dilation, is_causal=call.is_causal, scale=scale, enable_gqa=call.enable_gqa,
        dropout_p=dropout_p, kernel=resolved(q.device, config.kernel), starts=starts, known=known,
        max_documents=_most_documents(call, config), score_q=scored[0], score_k=scored[1], checks=checks,
        local_window=config.local_window,
    )  # fmt: skip
    return lay_out(out, call.steps, projection)


def _attend_inside(
    call: AttentionCall,
    config: LighthouseConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scored: tuple[Tensor | None, Tensor | None],
    starts: Tensor,
    known: Tensor | None,
    checks: Sequence[Tensor],
    dropout_p: float,
    scale: float | None,
    projection: Sequence[Tensor | None],
) -> Tensor:
    """Dense attention inside documents: all tokens are entries."""
    entries = torch.arange(q.shape[2], dtype=torch.int32, device=k.device).expand(*k.shape[:2], -1)  # [B, G, N]
    for zero in checks:
        entries = entries + zero
    out: Tensor = attention_in_documents(
        q, k, v, entries, starts, 1, config.pooling, 1, 0, dropout_p, scale, call.enable_gqa, config.max_documents,
        resolved(q.device, config.kernel), known,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # lies as scatter's output does: models may view it
    return lay_out(out, call.steps, projection)


def lay_out(out: Tensor, steps: Steps, projection: Sequence[Tensor | None]) -> Tensor:
    """An output `[B, H, N, D]` as a call gives it: after its `steps` and its `projection`."""
    for method, arguments in steps:
        out = getattr(out, method)(*arguments)
    return F.linear(out, *projection) if projection else out  # type: ignore[arg-type]


def _most_documents(call: AttentionCall, config: LighthouseConfig) -> int:
    """How many documents a row may hold: as many as flash-attn is told of, where it is."""
    if call.documents is not None and call.documents.target is _OPS.packed_starts.default:
        borders = fake(call.documents.args[1])
        if borders is not None and isinstance(borders.shape[0], int):
            return min(config.max_documents, borders.shape[0] - 1)
    return config.max_documents


def _check_mask(applied: ScoreMask | None, users: str, mask: Tensor) -> Tensor:
    hides = applied is not None and applied.fill is not None and applied.hides
    zero: Tensor = _OPS.check_causal(mask.logical_not() if hides else mask, users, REVISION)
    return zero


def _check_blocks(name: str, q: Tensor, starts: Tensor | None, lists: tuple[Any, ...]) -> Tensor:
    zero: Tensor = _OPS.check_blocks(*lists[:4], starts, q.shape[2], *lists[4:], name, REVISION)
    return zero
