"""Decide for each call whether it can be rewritten exactly. Changes nothing in the graph.

out = scaled_dot_product_attention(q, k, v, is_causal=True)     ->  the same; its AttentionCall now has S, or a Refusal
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from lighthouse_fx.config import LighthouseConfig

from ..kernels import Pyramid
from ..kernels.shapes import shape_problem, tensor_problem
from .call import CALLS, DENSE, LAYERS, NO_GRADIENTS, TRAINING, AttentionCall, Layer, constant, fake, for_each_call
from .regions import regions


def check_attention(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Give every call its gathered length, or the reason why it stays dense.

    What depends on the stage comes last: a graph without rewritable calls is the same in every stage.
    """
    trains = gm.meta.get(TRAINING, lambda node: True)
    layer = gm.meta.get(LAYERS, lambda node: None)
    data = _data_behind(gm) if gm.meta[CALLS] else {}
    for_each_call(gm, lambda call: _supported(call, data))
    if (without := gm.meta.get(NO_GRADIENTS)) is None:
        for_each_call(gm, lambda call: _trains(call, trains))
    for_each_call(gm, lambda call: replace(call, rewritable=True))
    if without is None and (refusal := gm.meta.get(DENSE)):
        for_each_call(gm, lambda call: replace(call, refusal=refusal))
    if not config.assume_causal:
        for_each_call(gm, lambda call: replace(call, refusal=call.doubt))
    for_each_call(gm, lambda call: _exclude(call, config, layer(call.node)))
    for_each_call(gm, lambda call: _worthwhile(call, config, guard=without is None))
    if without is not None:  # last, so that it is left to calls that would be rewritten but for this
        for_each_call(gm, lambda call: replace(call, refusal=without))
    return gm


def pyramid_of(call: AttentionCall, config: LighthouseConfig) -> Pyramid:
    """The pyramid over a call's tokens."""
    query = fake(call.query)
    assert query is not None, "checked before"
    return pyramid_over(query.shape[2], config)


def pyramid_over(length: int, config: LighthouseConfig) -> Pyramid:
    """The pyramid that a configuration means over so many tokens."""
    return Pyramid(
        length=length,
        levels=config.levels,
        pooling=config.pooling,
        topk=config.topk,
        quota=config.quota,
        keep_first=config.keep_first,
    )


# --- layers that are to stay dense ------------------------------------------------------------------------------------


def excludes(wanted: int | str, *, module: str, layer: Layer | None) -> bool:
    """Whether an entry of `dense_layers` means a module: a pattern by its path, a number by its layer."""
    if isinstance(wanted, str):
        return fnmatchcase(module, wanted) or fnmatchcase(module, f"{wanted}.*")
    return layer is not None and wanted in (layer.number, layer.number - layer.count)


def unmatched(config: LighthouseConfig, names: Iterable[str], layers: Iterable[Layer]) -> list[int | str]:
    """The entries of `dense_layers` that mean no module of a model at all.

    Args:
        names: paths of the model's modules; layers: a layer of each of its lists of layers.
    """
    names, layers = list(names), list(layers)
    return [
        wanted
        for wanted in config.dense_layers
        if (
            names and not any(excludes(wanted, module=name, layer=None) for name in names)
            if isinstance(wanted, str)
            else layers and not any(-layer.count <= wanted < layer.count for layer in layers)
        )
    ]


def _exclude(call: AttentionCall, config: LighthouseConfig, layer: Layer | None) -> AttentionCall:
    for wanted in config.dense_layers:
        if isinstance(wanted, int) and len(call.region.callers) > 1:
            return call.refuse(
                f"dense_layers has the number {wanted}, and several layers share this call's subgraph",
                "name the layers by a pattern, or compile without nested_compile_region",
            )
        if isinstance(wanted, int) and layer is None:
            return call.refuse(
                f"dense_layers has the number {wanted}, and this call's layer has none in this graph",
                "compile the whole model, or let lighthouse_fx.compile(model, dense_layers=...) choose the blocks",
            )
        if excludes(wanted, module=call.module, layer=layer):
            return call.refuse(f"layer excluded: {wanted!r} is in dense_layers")
    return call


# --- calls that can be rewritten exactly ------------------------------------------------------------------------------


def _supported(call: AttentionCall, data: Mapping[fx.Node, _Data]) -> AttentionCall:
    query, key, value, out = (fake(x) for x in (call.query, call.key, call.value, call.node))
    if call.region.opaque:
        return call.refuse(f"inside {call.region.opaque}, whose body cannot be changed alone")
    if query is None or key is None or value is None or out is None:
        return call.refuse("the shapes of its arguments are not known in this graph")
    if _from_gather(call.query):
        return call.refuse("already Lighthouse attention, called by its functional form")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if problem := tensor_problem(name, x):
            return call.refuse(problem)
    if _in_functorch(call.node):
        return call.refuse("inside a torch.func transform, such as vmap or grad", "apply it outside the compiled model")
    if call.mask is not None:
        return call.refuse("explicit attn_mask, not proved to be only causal", "pass is_causal=True and no attn_mask")
    if not isinstance(call.is_causal, bool) or not isinstance(call.enable_gqa, bool):
        return call.refuse("is_causal or enable_gqa is computed in the graph", "pass True or False")
    if problem := shape_problem(query.shape, key.shape, value.shape, enable_gqa=call.enable_gqa):
        return call.refuse(problem)
    asks, answers = data[call.query], data[call.key]
    if asks.projected and answers.projected and asks.inputs != answers.inputs:
        names = (", ".join(sorted(node.name for node in side.inputs)) or "parameters alone" for side in (asks, answers))
        return call.refuse("cross-attention: its query is made of {}, its key of {}".format(*names))
    return call


@dataclass(frozen=True, slots=True)
class _Data:
    """What a value is made of: the graph's inputs that carry data, and whether they met a matrix of parameters.

    Only values that met one tell self-attention, whose query and key are projections of the same data, from cross-attention:
    a function of query, key and value alone has three different inputs either way.
    """

    inputs: frozenset[fx.Node] = frozenset()
    projected: bool = False
    matrix: bool = False  # it is made of parameters alone, and is more than a scale or a bias


def _data_behind(gm: fx.GraphModule) -> dict[fx.Node, _Data]:
    """For every node of the graph and its subgraphs. Numbers, vectors and buffers carry no data."""
    found: dict[fx.Node, _Data] = {}
    for region in regions(gm):
        for node in region.gm.graph.nodes:
            sources: Sequence[Any] = node.all_input_nodes
            if node.op == "placeholder" and not (sources := [outer for _, outer in region.operands(node)]):
                tensor = fake(node)
                if tensor is None or tensor.dim() < 2 or "_buffers_" in node.name:
                    found[node] = _Data()
                elif isinstance(tensor, torch.nn.Parameter):
                    found[node] = _Data(matrix=True)
                else:
                    found[node] = _Data(inputs=frozenset({node}))
                continue
            parts = [found[source] for source in sources if isinstance(source, fx.Node) and source in found]
            inputs = frozenset[fx.Node]().union(*(part.inputs for part in parts))
            matrix = any(part.matrix for part in parts)
            found[node] = _Data(inputs, matrix or any(part.projected for part in parts), matrix and not inputs)
    return found


def _trains(call: AttentionCall, trains: Callable[[fx.Node], bool | None]) -> AttentionCall:
    out = fake(call.node)
    if out is None or not out.requires_grad:
        return call.refuse("needs no gradient: nothing trains through this call")
    training = trains(call.node)
    if training is None:
        return call.refuse(
            "a module calls it from outside this graph, and eval() of that module would go unseen",
            "compile the module, not the function; if it is compiled, the graph breaks before: TORCH_LOGS=graph_breaks",
        )
    return call if training else call.refuse("its module is in eval mode")


def _from_gather(node: Any) -> bool:
    return isinstance(node, fx.Node) and "lighthouse_fx" in str(node.target) and "gather" in str(node.target)


def _in_functorch(node: fx.Node) -> bool:
    """Whether a transform (`torch.func.vmap`, `grad`, ...) is open at this node: Dynamo brackets it by these calls."""
    depth = 0
    for other in node.graph.nodes:
        if other is node:
            return depth > 0
        name = getattr(other.target, "__name__", "") if other.op == "call_function" else ""
        if name.endswith("_increment_nesting"):
            depth += 1
        elif name.endswith("_decrement_nesting"):
            depth -= 1
    return False


def _worthwhile(call: AttentionCall, config: LighthouseConfig, *, guard: bool) -> AttentionCall:
    pyramid = pyramid_of(call, config)
    if isinstance(pyramid.length, torch.SymInt) and not guard:
        return call
    length, gathered = pyramid.length, pyramid.gathered
    call = replace(call, gathered=gathered)
    # With dynamic shapes these comparisons become guards: crossing the boundary compiles once more.
    if length < pyramid.widest:
        return call.refuse(
            f"{constant(length)} tokens are fewer than one coarsest window of {pyramid.widest}",
            "use fewer levels or a smaller pooling factor",
        )
    kept, of = config.max_kept.as_integer_ratio()
    if gathered * of > kept * length:
        share = "" if isinstance(gathered, torch.SymInt) else f", {gathered / length:.0%} of the tokens,"
        return call.refuse(
            f"not worth it: {gathered} of {length} tokens{share} would be gathered, more than max_kept={config.max_kept}",
            "use a smaller topk, or raise max_kept",
        )
    return call
