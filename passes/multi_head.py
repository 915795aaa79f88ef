"""Find attention of `nn.MultiheadAttention`, as in PyTorch's Transformer layers. Changes nothing that the graph computes.

    out = multi_head_attention_forward(x, x, x, E, H, in_weight, in_bias, ..., out_weight, out_bias, ...)[0]        # [N, B, E]

is one function, which projects its inputs, attends and projects the output. It becomes an AttentionCall, as if it were written

    q, k, v = linear(x, in_weight, in_bias).unflatten(-1, (3, H, D)).permute(2, 1, 3, 0, 4)                   # [3, B, H, N, D]
    out     = linear(scaled_dot_product_attention(q, k, v, ...).permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)

The projections of its inputs are put into the graph to show what is attended to; only those of rewritten calls remain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels.torch_private import fused_encoder_layer, fused_multi_head_attention
from .call import AttentionCall, Steps, add_calls, fake
from .find import module_path, source_line
from .layouts import only_output, place_of, unused_outputs
from .products import Unclear
from .regions import Region, regions

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
    except Exception:  # whatever a user's graph holds, failing to understand it must not fail the compilation
        refused = replace(call, views=tuple(views))
        return refused.refuse("nn.MultiheadAttention is called in a way that is not understood", _KEEP)


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
    put = _Put(call.node, views)
    if given["is_causal"]:  # the function takes this on trust and reads no mask, and so does what replaces it
        mask = None
    elif mask is not None:
        hides = fake(mask)
        asks = fake(given["query"])
        if hides is None or asks is None or hides.dtype not in (like.dtype, asks.dtype):  # under autocast they differ
            raise Unclear("is called with a mask of another dtype than its tensors", "give a mask of their dtype")
        if hides.dim() == 3:  # [B H, N, N]
            mask = put("unflatten", mask, 0, (-1, given["num_heads"]))
    query, key, value = _projected(given, like.dtype, put)
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


class _Put:
    """Puts nodes before one, each a view or a linear layer, and remembers them."""

    def __init__(self, before: fx.Node, views: list[fx.Node]) -> None:
        self._before, self._views = before, views

    def __call__(self, method: str, x: fx.Node, *arguments: Any) -> fx.Node:
        with self._before.graph.inserting_before(self._before):
            node = self._before.graph.call_method(method, (x, *arguments))
        return self._known(node, getattr(fake(x), method)(*arguments))

    def linear(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, dtype: torch.dtype) -> fx.Node:
        """Under autocast it runs in another dtype than its arguments have: `dtype`."""
        with self._before.graph.inserting_before(self._before):
            node = self._before.graph.call_function(F.linear, (x, weight, bias))
        given, matrix = fake(x), fake(weight)
        assert given is not None and matrix is not None, "arguments of a traced function"
        with torch.no_grad():  # not by running it, which torch 2.11 does not do for a symbolic length
            value = given.new_empty((*given.shape[:-1], matrix.shape[0]), dtype=dtype)
        return self._known(node, value.requires_grad_(given.requires_grad or matrix.requires_grad))

    def _known(self, node: fx.Node, value: Tensor) -> fx.Node:
        node.meta = {**place_of(self._before), "example_value": value}
        self._views.append(node)
        return node


def _projected(given: Mapping[str, Any], dtype: torch.dtype, put: _Put) -> list[fx.Node]:
    """Query, key and value, `[B, H, N, D]`."""
    inputs = [given[name] for name in ("query", "key", "value")]
    heads, bias = given["num_heads"], given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in ("q", "k", "v")]
    elif inputs[0] is inputs[1] is inputs[2]:
        together = put.linear(inputs[0], given["in_proj_weight"], bias, dtype)  # [N, B, 3 E]
        apart = put("permute", put("unflatten", together, -1, (3, heads, -1)), 2, 1, 3, 0, 4)  # [3, B, H, N, D]
        return [put("select", apart, 0, i) for i in range(3)]
    else:
        weights = _thirds(given["in_proj_weight"], put)
    biases = [None] * 3 if bias is None else _thirds(bias, put)
    projected = [put.linear(x, w, b, dtype) for x, w, b in zip(inputs, weights, biases, strict=True)]  # [N, B, E]
    return [put("permute", put("unflatten", x, -1, (heads, -1)), 1, 2, 0, 3) for x in projected]


def _thirds(parameter: fx.Node, put: Callable[..., fx.Node]) -> list[fx.Node]:
    """The parts of a parameter `[3 E, ...]` that project queries, keys and values."""
    apart = put("unflatten", parameter, 0, (3, -1))
    return [put("select", apart, 0, i) for i in range(3)]
