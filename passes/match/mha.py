"""Find attention of `nn.MultiheadAttention`, as in PyTorch's Transformer layers. Changes nothing that the graph computes.

    out = multi_head_attention_forward(x, x, x, E, H, in_weight, in_bias, ..., out_weight, out_bias, ...)[0]        # [N, B, E]

is one function, which projects its inputs, attends and projects the output. It becomes an AttentionCall, as if it were written

    q, k, v = linear(x, in_weight, in_bias).unflatten(-1, (3, H, D)).permute(2, 1, 3, 0, 4)                   # [3, B, H, N, D]
    out     = linear(scaled_dot_product_attention(q, k, v, ...).permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)

The projections of its inputs are put into the graph to show what is attended to; only those of rewritten calls remain.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lighthouse_fx.kernels.torch_private import fused_encoder_layer, fused_multi_head_attention

from ..attention_call import AttentionCall, Steps, add_calls, fake
from ..ir.internal_error import internal_error
from ..ir.subgraphs import Region, regions
from .layouts import only_output, place_of, shown, unused_outputs
from .products import Unclear
from .sdpa import module_path, source_line

_KEEP = "use a module that calls scaled_dot_product_attention itself"
# What these layers are computed by without gradients, as far as PyTorch's fast path is on.
_FUSED = frozenset({fused_encoder_layer, fused_multi_head_attention})
_SEQUENCE_FIRST: Steps = (("permute", (2, 0, 1, 3)), ("flatten", (2,)), ("contiguous", ()))  # [B, H, N, D] -> [N, B, E]
# Arguments that have to be as here -> what they do otherwise, what to do about it
_PLAIN: Mapping[str, tuple[Any, str, str]] = {
    "need_weights": (False, "returns the attention weights, too", "call it with need_weights=False"),
    "key_padding_mask": (
        None, "hides keys by key_padding_mask", "call it without key_padding_mask, and pack with lighthouse_fx.documents"
    ),
    "bias_k": (None, "has a key of its own beside the tokens' (add_bias_kv)", ""),
    "bias_v": (None, "has a value of its own beside the tokens' (add_bias_kv)", ""),
    "add_zero_attn": (False, "has a key of zeros beside the tokens' (add_zero_attn)", ""),
    "static_k": (None, "is given keys that are projected already", ""),
    "static_v": (None, "is given values that are projected already", ""),
}  # fmt: skip


def find_multi_head(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Add an `AttentionCall` for every `multi_head_attention_forward`, in graph order."""
    found, order = [], []
    for region in regions(gm):
        nodes = list(region.gm.graph.nodes)
        found += [_understood(node, region) for node in nodes if node.target is F.multi_head_attention_forward]
        found += [_fused(node, region) for node in nodes if node.target in _FUSED]
        order += nodes
    add_calls(gm, found, order)
    return gm


def _fused(node: fx.Node, region: Region) -> AttentionCall:
    call = AttentionCall(node=node, region=region, module=module_path(node), source=source_line(node))
    return call.refuse(
        "without gradients PyTorch computes the layer by one operator, its fast path",
        "torch.backends.mha.set_fastpath_enabled(False)",
    )


def _understood(node: fx.Node, region: Region) -> AttentionCall:
    call = AttentionCall(node=node, region=region, module=module_path(node), source=source_line(node))
    views: list[fx.Node] = []
    try:
        given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        return _as_call(call, given.arguments, views)
    except Unclear as why:
        return replace(call, views=tuple(views)).refuse(f"nn.MultiheadAttention {why.reason}", why.remedy or _KEEP)
    except Exception as error:
        return replace(call, views=tuple(views), refusal=internal_error(error, "reading a call of nn.MultiheadAttention"))


def _as_call(call: AttentionCall, given: Mapping[str, Any], views: list[fx.Node]) -> AttentionCall:
    for name, (plain, meaning, remedy) in _PLAIN.items():
        if given[name] is not plain:
            raise Unclear(meaning, remedy)
    unused = unused_outputs(call.node)
    out = only_output(call.node, unused)
    like, mask = fake(out), given["attn_mask"]
    if out is None or like is None:
        raise Unclear("is called in a way that is not understood")
    if like.dim() != 3:
        raise Unclear("is given one sequence without a batch", "give it a batch of one, x[None]")
    if not isinstance(given["is_causal"], bool) or not isinstance(given["training"], bool):
        raise Unclear("is called with an is_causal or a training that is computed in the graph", "give True or False")
    if given["key"] is given["value"] is not given["query"]:
        raise Unclear("attends from one sequence to another, as cross-attention")
    if given["is_causal"]:  # the function takes this on trust and reads no mask, and so does what replaces it
        mask = None
    elif mask is not None:
        hides = fake(mask)
        asks = fake(given["query"])
        if hides is None or asks is None or hides.dtype not in (like.dtype, asks.dtype):  # under autocast they differ
            raise Unclear("is called with a mask of another dtype than its tensors", "give a mask of their dtype")
        if hides.dim() == 3:  # [B H, N, N]
            mask = shown(mask, (("unflatten", (0, (-1, given["num_heads"]))),), call.node, views)
    query, key, value = _projected(given, like.dtype, call.node, views)
    return replace(
        call,
        node=out,
        query=query,
        key=key,
        value=value,
        mask=mask,
        is_causal=given["is_causal"],
        dropout_p=given["dropout_p"] if given["training"] else 0.0,
        views=tuple(views),
        own_nodes=tuple((x, call.region) for x in (*unused, call.node)),
        steps=_SEQUENCE_FIRST,
        projection=(given["out_proj_weight"], given["out_proj_bias"]),
    )


def _projected(given: Mapping[str, Any], dtype: torch.dtype, before: fx.Node, views: list[fx.Node]) -> list[fx.Node]:
    """Query, key and value, `[B, H, N, D]`."""
    inputs = [given[name] for name in ("query", "key", "value")]
    heads, bias = given["num_heads"], given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in ("q", "k", "v")]
    elif inputs[0] is inputs[1] is inputs[2]:
        together = _linear(inputs[0], given["in_proj_weight"], bias, dtype, before, views)  # [N, B, 3 E]
        steps = ("unflatten", (-1, (3, heads, -1))), ("permute", (2, 1, 3, 0, 4))
        return _each(shown(together, steps, before, views), before, views)  # of [3, B, H, N, D]
    else:
        weights = _thirds(given["in_proj_weight"], before, views)
    biases = [None] * 3 if bias is None else _thirds(bias, before, views)
    projected = [_linear(*each, dtype, before, views) for each in zip(inputs, weights, biases, strict=True)]  # [N, B, E]
    return [shown(x, (("unflatten", (-1, (heads, -1))), ("permute", (1, 2, 0, 3))), before, views) for x in projected]


def _thirds(parameter: fx.Node, before: fx.Node, views: list[fx.Node]) -> list[fx.Node]:
    """The parts of a parameter `[3 E, ...]` that project queries, keys and values."""
    return _each(shown(parameter, (("unflatten", (0, (3, -1))),), before, views), before, views)


def _each(three: fx.Node, before: fx.Node, views: list[fx.Node]) -> list[fx.Node]:
    return [shown(three, (("select", (0, i)),), before, views) for i in range(3)]


def _linear(
    x: fx.Node, weight: fx.Node, bias: fx.Node | None, dtype: torch.dtype, before: fx.Node, views: list[fx.Node]
) -> fx.Node:
    """A linear layer. Under autocast it runs in another dtype than its arguments have: `dtype`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(F.linear, (x, weight, bias))
    given, matrix = fake(x), fake(weight)
    assert given is not None and matrix is not None, "arguments of a traced function"
    with torch.no_grad():  # not by running it, which torch 2.11 does not do for a symbolic length
        value = given.new_empty((*given.shape[:-1], matrix.shape[0]), dtype=dtype)
    value.requires_grad_(given.requires_grad or matrix.requires_grad)
    node.meta = {**place_of(before), "example_value": value}
    views.append(node)
    return node
