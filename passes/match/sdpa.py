"""Find the attention calls. Changes nothing in the graph.

    out = scaled_dot_product_attention(q, k, v, is_causal=True)     ->  the same, with an AttentionCall in gm.meta

Every spelling of the arguments is brought to one form. Attention that other functions compute is found by the passes that
follow: a user must see each attention that stays dense, and why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..attention_call import CALLS, MODULE, AttentionCall
from ..ir.subgraphs import Region, regions

_SDPA = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_POSITIONAL = 6  # scale and enable_gqa are keyword-only


def find_attention(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Put an `AttentionCall` for every attention into `gm.meta`, in graph order, subgraphs after their callers."""
    gm.meta[CALLS] = tuple(
        _as_call(node, region)
        for region in regions(gm)
        for node in region.gm.graph.nodes
        if is_attention(node)
    )
    return gm


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a `scaled_dot_product_attention` call."""
    return node.op == "call_function" and node.target in _SDPA


def _as_call(node: fx.Node, region: Region) -> AttentionCall:
    given: dict[str, Any] = dict(zip(_ARGUMENTS[:_POSITIONAL], node.args, strict=False)) | dict(node.kwargs)
    return AttentionCall(
        node=node,
        region=region,
        module=module_path(node),
        source=source_line(node),
        query=given["query"],
        key=given["key"],
        value=given["value"],
        mask=given.get("attn_mask"),
        dropout_p=given.get("dropout_p", 0.0),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node was traced in, as `named_modules` spells it, or ""."""
    if MODULE in node.meta:
        return str(node.meta[MODULE])
    stack = node.meta.get("nn_module_stack") or {}
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def clean_path(source: str) -> str:
    """`L['self']._modules['layers']._modules['0'].attn` -> `layers.0.attn`, as far as the text alone tells."""
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", source)
    path = re.sub(r"getattr\((.+?), '(\w+)'\)", r"\1.\2", path)
    path = re.sub(r"\[['\"]?([\w.]+)['\"]?\]", r".\1", path)
    return bare(re.sub(r"^[LG]\.\w+\.?", "", path))


def bare(path: str) -> str:
    """A module's path without the wrappers that compilers and checkpointing put around modules."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_compiled_call_impl.block."):  # the last by regional.py
        path = path.replace(wrapper, "")
    return path


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the call in the user's code, or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return "{}:{}".format(*frames[-1]) if frames else ""
