"""Find flash-attn's functions, called by the model itself. Changes nothing that the graph computes.

    out = flash_attn_func(q, k, v, causal=True)      # [B, N, H, D]     ->  an AttentionCall over views [B, H, N, D]
    out = flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, causal=True)      # [N, H, D], packed documents
                                                                        ->  the same over [1, H, N, D], inside its documents

Where the documents of `flash_attn_varlen_func` begin becomes a node, `lighthouse_fx.packed_starts`. It checks in every step
what flash-attn takes on trust, that the borders rise from 0 to N, are the same for queries and keys, and have no document
longer than `max_seqlen`. These documents hold, whatever `documents(...)` says.

Dynamo traces through `flash_attn_func` into its autograd function, so that the graph has

    out = autograd_function_apply(forward, backward, q, k, v)[0]         # forward calls flash_attn::_flash_attn_forward

A function that was allowed in the graph (`torch.compiler.allow_in_graph`) is one node instead. flash-attn itself needs a GPU
to be built: this was written after the code of its version 2.7, and tried with a stand-in that has its signatures, its custom
operators and its autograd function. Version 3 and the builds of Hugging Face's hub name their operators otherwise; those are
not recognised. Where one tensor is given twice (the borders, too), torch 2.13 does not trace an autograd function and breaks
the graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import HigherOrderOperator, set_grad_enabled

from ..attention_call import AttentionCall, Steps, add_calls, constant, fake
from ..ir.internal_error import internal_error
from ..ir.ops import operation_name
from ..ir.subgraphs import Region, regions
from .layouts import only_output, shown
from .products import Unclear, is_number
from .sdpa import module_path, source_line

_KEEP = "use scaled_dot_product_attention with is_causal=True"
_TURN: Steps = (("transpose", (1, 2)),)  # [B, N, H, D] <-> [B, H, N, D]
_UNPACK: Steps = (("unsqueeze", (0,)), *_TURN)  # [N, H, D] -> [1, H, N, D]
_PACK: Steps = (*_TURN, ("squeeze", (0,)))  # [1, H, N, D] -> [N, H, D]
_TWICE = "give cu_seqlens_k=cu_seqlens_q.clone(): Dynamo breaks the graph where an autograd function gets one tensor twice"
_OPERATORS = ("flash_attn.", "flashattn.")  # namespaces, the later ones first
_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")
# Arguments that have to be as here; those that change nothing are left out. -> what they do otherwise
_PLAIN: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "window_size": (((-1, -1), None), "sliding window"),
    "window_size_left": ((-1,), "sliding window"),
    "window_size_right": ((-1,), "sliding window"),
    "softcap": ((0, 0.0), "soft-capping"),
    "alibi_slopes": ((None,), "ALiBi"),
    "return_attn_probs": ((False,), "attention weights are returned"),
    "return_softmax": ((False,), "attention weights are returned"),
    "block_table": ((None,), "paged keys and values"),
    "leftpad_k": ((None,), "padded keys"),
    "seqused_k": ((None,), "unused keys"),
}
_BORDERS = ("cu_seqlens_q", "cu_seqlens_k")
_LONGEST = ("max_seqlen_q", "max_seqlen_k")
_KNOWN = frozenset(
    {"q", "k", "v", "dropout_p", "softmax_scale", "causal", "deterministic", "zero_tensors", *_BORDERS, *_LONGEST, *_PLAIN}
)


def find_flash_functions(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Add an `AttentionCall` for every attention that flash-attn computes, in graph order."""
    found, order = [], []
    for region in regions(gm):
        for node in list(region.gm.graph.nodes):
            order.append(node)
            if (name := _name(node)) in _FUNCTIONS:
                found.append(_understood(node, region, name, None))
            elif (inside := _operator(node, region)) is not None:
                found.append(_understood(node, region, str(inside.target), inside))
            elif _is_operator(node) and not region.opaque:
                found.append(_understood(node, region, str(node.target), None))
    add_calls(gm, found, order)
    return gm


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _operator(node: fx.Node, region: Region) -> fx.Node | None:
    """flash-attn's operator in the forward of an autograd function."""
    if not isinstance(node.target, HigherOrderOperator) or node.target.name() != "autograd_function_apply":
        return None
    body = _forward(node, region)
    inside = body.graph.nodes if body is not None else ()
    return next((x for x in inside if _is_operator(x)), None)


def _is_operator(node: fx.Node) -> bool:
    return str(node.target).startswith(_OPERATORS) and "_forward" in str(node.target)


def _forward(node: fx.Node, region: Region) -> fx.GraphModule | None:
    first = node.args[0]
    body = getattr(region.gm, str(first.target), None) if isinstance(first, fx.Node) else None
    return body if isinstance(body, fx.GraphModule) else None


def _understood(node: fx.Node, region: Region, name: str, inside: fx.Node | None) -> AttentionCall:
    packed = "varlen" in name
    call = AttentionCall(
        node=node, region=region, module=module_path(node), source=source_line(node), own_documents=packed
    )
    views: list[fx.Node] = []
    try:
        if inside is None and _is_operator(node):
            where = "without gradients or after a graph break"
            remedy = _TWICE if packed else ""
            raise Unclear(f"flash-attn's operator is called outside its autograd function, {where}", remedy)
        unused = [x for x in node.users if x.target is operator.getitem and not x.users]  # in a checkpoint, with torch 2.11
        out = node if inside is None else only_output(node, unused)
        if out is None:
            raise Unclear("flash-attn also returns the log-sum-exp of its scores", "leave out return_attn_probs")
        given = _arguments(node) if inside is None else _arguments_inside(node, region, inside)
        _check_plain(given)
        query, key, value = (shown(given[n], _UNPACK if packed else _TURN, out, views) for n in ("q", "k", "v"))
        tensors = [fake(x) for x in (query, key, value, out)]
        if len({(x.dtype, x.device) for x in tensors if x is not None}) != 1:
            raise Unclear("query, key, value and output differ in dtype", "convert them to one dtype first")
        documents = _starts(given, query, out, views) if packed else None
    except Unclear as why:
        return replace(call, views=tuple(views)).refuse(why.reason, why.remedy or _KEEP)
    except Exception as error:
        return replace(call, views=tuple(views), refusal=internal_error(error, "reading a call of flash-attn"))
    heads = [tensor.shape[1] for tensor in tensors[:2] if tensor is not None]
    functions: list[Any] = [] if inside is None else [*unused, node, *node.args[:2]]
    return replace(
        call,
        node=out,
        query=query,
        key=key,
        value=value,
        is_causal=given["causal"],
        scale=given["softmax_scale"],
        dropout_p=given["dropout_p"],
        documents=documents,
        views=tuple(views),
        enable_gqa=heads[0] != heads[1],
        own_nodes=tuple((x, region) for x in functions),
        steps=(*(_PACK if packed else _TURN), ("contiguous", ())),
    )


def _starts(given: Mapping[str, Any], query: fx.Node, before: fx.Node, views: list[fx.Node]) -> fx.Node:
    """A node that gives and checks where documents begin, from the borders as they are where the attention is."""
    borders, longest = [given[name] for name in _BORDERS], [given[name] for name in _LONGEST]
    attended, *tensors = (fake(x) for x in (query, *borders))
    for name, tensor in zip(_BORDERS, tensors, strict=True):
        if tensor is None or tensor.dim() != 1 or tensor.dtype != torch.int32 or tensor.device != attended.device:  # type: ignore[union-attr]
            raise Unclear(f"flash-attn's {name} is no int32 tensor of one dimension on the queries' device")
    if tensors[0].shape != tensors[1].shape or tensors[0].shape[0] < 2:  # type: ignore[union-attr]
        sizes = " and ".join(str(tensor.shape[0]) for tensor in tensors)  # type: ignore[union-attr]
        raise Unclear(f"flash-attn's cu_seqlens_q and cu_seqlens_k have {sizes} borders, so they are not one sequence's")
    for name, length in zip(_LONGEST, longest, strict=True):
        if not isinstance(constant(length), (int, torch.SymInt)):
            raise Unclear(f"flash-attn's {name} is not a number", "give a Python number, such as int(lengths.max())")
    with before.graph.inserting_before(before):
        node = before.graph.call_function(torch.ops.lighthouse_fx.packed_starts.default, (query, *borders, *longest))
    node.meta = {key: before.meta[key] for key in ("nn_module_stack", "stack_trace") if key in before.meta}
    with torch.no_grad():
        node.meta["example_value"] = attended.new_empty((1, attended.shape[2]), dtype=torch.int32)  # type: ignore[union-attr]
    views.append(node)
    return node


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function of flash-attn's, as its own signature names them."""
    package = str(getattr(node.target, "__module__", ""))
    if package.partition(".")[0] != "flash_attn":
        raise Unclear(f"{_name(node)} of {package or 'an unknown package'} is called directly")
    signature = inspect.signature(node.target)  # type: ignore[arg-type]
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    usual = {name: parameter.default for name, parameter in signature.parameters.items()}
    for name, value in bound.arguments.items():
        if name not in _KNOWN and value is not usual[name]:
            raise Unclear(f"flash-attn is called with {name}={value}")
    return dict(bound.arguments)


def _arguments_inside(node: fx.Node, region: Region, inside: fx.Node) -> dict[str, Any]:
    """The arguments of the operator, as nodes outside the autograd function, which has to do nothing else."""
    body = _forward(node, region)
    assert body is not None
    schema = getattr(inside.target, "_schema", None) or inside.target.default._schema  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema.arguments), inside.args, strict=False)) | dict(inside.kwargs)
    if unknown := given.keys() - _KNOWN:
        raise Unclear(f"flash-attn's operator is called with {', '.join(sorted(unknown))}")
    outer = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
    first, result = _attended(body, inside, fake(given["v"]))
    for x in body.graph.nodes:
        if x in (inside, first, result) or x.op in ("placeholder", "output"):
            continue
        if operation_name(x) not in ("getitem", "size") and x.target is not set_grad_enabled:
            raise Unclear(f"flash-attn's autograd function also computes {x.name}")
    return {name: outer[value] if isinstance(value, fx.Node) else value for name, value in given.items()}


def _attended(body: fx.GraphModule, inside: fx.Node, value: Any) -> tuple[fx.Node, fx.Node]:
    """The operator's first output, and what the autograd function returns of it: all, or a slice that is all."""
    (output,) = body.graph.find_nodes(op="output")
    returned: Any = output.args[0]
    result, *_ = returned[0]  # before torch 2.13 what the backward may need follows; `only_output` sees that nothing takes it
    source = result
    if operation_name(result) == "getitem" and result.args[0] is not inside:
        source, (dots, part) = result.args
        if dots is not Ellipsis or part != slice(None, value.shape[-1], None):
            raise Unclear("flash-attn pads the head dimension", "give a head dimension divisible by 8")
    if operation_name(source) != "getitem" or source.args != (inside, 0):
        raise Unclear("flash-attn's autograd function returns something other than its attention")
    return source, result


def _check_plain(given: Mapping[str, Any]) -> None:
    for name, (plain, meaning) in _PLAIN.items():
        value = given.get(name, plain[0])
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, fx.Node) or value not in plain:
            raise Unclear(f"{meaning}: flash-attn is called with {name}={value}")
    if not isinstance(given["causal"], bool):
        raise Unclear("flash-attn's causal is computed in the graph", "pass True or False")
    scale, dropout = given["softmax_scale"], constant(given["dropout_p"])
    if scale is not None and not (is_number(scale) and scale > 0):
        raise Unclear(f"flash-attn's softmax_scale is {scale}", "give a positive Python number")
    if not is_number(dropout):
        raise Unclear("flash-attn's dropout_p is computed in the graph", "give a Python number")
