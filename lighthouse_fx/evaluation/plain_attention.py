"""Plain attention in the place of a call in a graph, for `verify`.

    out = flash_attn_func(q, k, v, causal=True)     ->      out = scaled_dot_product_attention(q, k, v, is_causal=True)

`verify` judges by float64, which flash-attn does not take: calls of it that stay dense are computed like this on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lighthouse_fx.kernels.packed.attention import starts_of
from lighthouse_fx.passes import CALLS, AttentionCall
from lighthouse_fx.passes.attention_call import fake
from lighthouse_fx.passes.ir.subgraphs import regions
from lighthouse_fx.passes.match.flash_attn import find_flash_functions
from lighthouse_fx.passes.rewrite.cleanup import remove_leftovers
from lighthouse_fx.passes.rewrite.lighthouse import REWRITTEN_FROM, lay_out
from lighthouse_fx.passes.rewrite.replace import replace_node


def without_flash_attn(gm: fx.GraphModule) -> None:
    """Compute plainly what flash-attn computes in a graph, where it is understood."""
    known, gm.meta[CALLS] = gm.meta[CALLS], ()
    find_flash_functions(gm, (), config=None)
    found = len(gm.meta[CALLS])
    calls = (*gm.meta[CALLS], *known)
    for index in range(found):
        if calls[index].refusal is None:
            _, calls = put_plain(calls[index], calls)
    gm.meta[CALLS] = tuple(call for call in calls[:found] if call.refusal)  # what showed their arguments
    remove_leftovers(gm, (), config=None)
    gm.meta[CALLS] = calls[found:]
    for region in regions(gm):
        region.gm.recompile()


def put_plain(call: AttentionCall, calls: Sequence[AttentionCall]) -> tuple[fx.Node, tuple[AttentionCall, ...]]:
    """Put plain attention of a call's arguments in its place; it belongs to the same call.

    Returns:
        The new node, and the calls, which read it.
    """
    laid_out, is_causal = layout_of(call), bool(call.is_causal)

    def form(
        query: Tensor, key: Tensor, value: Tensor, numbers: Tensor | None, dropout_p: float, scale: float | None
    ) -> Tensor:
        starts = None if numbers is None else starts_of(numbers)
        return laid_out(plain(query, key, value, is_causal, scale, starts, dropout_p), ())

    with call.node.graph.inserting_after(call.node):
        arguments = (call.query, call.key, call.value, call.documents, call.dropout_p, call.scale)
        node = call.node.graph.call_function(form, arguments)
    if REWRITTEN_FROM in call.node.meta:
        node.meta[REWRITTEN_FROM] = call.node.meta[REWRITTEN_FROM]
    calls = replace_node(call.node, node, calls)
    erase(call)
    return node, calls


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    starts: Tensor | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Dense attention. Inside documents, where there are any, it must be causal: `starts` int32 `[B, N]`."""
    mask = None if starts is None else (starts[:, :, None] == starts[:, None, :]).tril()[:, None]  # [B, 1, N, N]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal and mask is None, scale=scale, enable_gqa=True
    )


def layout_of(call: AttentionCall) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """What turns an output `[B, H, N, D]` into the call's own, in memory too: what follows may view it.

    It is given the output and the tensors of the call's `projection`.
    """
    like = fake(call.node)
    assert like is not None, "checked when it was found"
    shape, strides = list(like.shape), list(like.stride())

    def laid_out(out: Tensor, projection: Sequence[Tensor]) -> Tensor:
        out = lay_out(out, call.steps, projection)
        if list(out.shape) != shape or list(out.stride()) == strides:
            return out
        return torch.empty_strided(shape, strides, dtype=out.dtype, device=out.device).copy_(out)

    return laid_out


def erase(call: AttentionCall) -> None:
    """Take away the nodes that compute a call's attention, so that they neither run nor use random numbers."""
    nodes = [call.node, *(node for node, _ in call.own_nodes)]
    while dead := [node for node in nodes if not node.users]:
        for node in dead:
            nodes.remove(node)
            node.graph.erase_node(node)
