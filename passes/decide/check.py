"""Decide for each call whether it can be rewritten exactly. Changes nothing in the graph.

out = scaled_dot_product_attention(q, k, v, is_causal=True)     ->  the same; its AttentionCall now has S, or a Refusal
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from lighthouse_fx.kernels import Pyramid, attend
from lighthouse_fx.kernels.geometry import half_of
from lighthouse_fx.kernels.ops.local_branch import lse_problem
from lighthouse_fx.kernels.packed.attention import document_problem
from lighthouse_fx.kernels.shapes import shape_problem, tensor_problem
from lighthouse_fx.kernels.torch_private import bounds, is_traceable_wrapper_subclass, is_unbacked

from ..attention_call import (
    CALLS,
    DENSE,
    DOCUMENTS,
    EXCLUDED,
    LAYERS,
    NO_GRADIENTS,
    PACKED,
    TRAINING,
    AttentionCall,
    Layer,
    Refusal,
    constant,
    fake,
    for_each_call,
)
from ..config import LighthouseConfig
from ..ir.subgraphs import Region
from ..masks.evaluate import is_one
from ..provenance.inputs import Inputs
from ..provenance.rows import BATCH, TOKEN, origin, place_in

_TRIED = 1 << 16  # lengths at most that are tried one by one


def check_attention(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Give every call its gathered length, or the reason why it stays dense.

    What depends on the stage comes last: a graph without rewritable calls is the same in every stage.
    """
    trains = gm.meta.get(TRAINING, lambda node: True)
    layer = gm.meta.get(LAYERS, lambda node: None)
    inputs = cache(lambda: Inputs(gm))
    for_each_call(gm, lambda call: _supported(call, inputs))
    for_each_call(gm, lambda call: replace(call, exact=call.doubt is None or config.assume_causal))
    for_each_call(gm, lambda call: _in_documents(call, gm.meta.get(DOCUMENTS), config, asked=PACKED in gm.meta))
    if excluded := gm.meta.get(EXCLUDED):  # in every stage and mode, so before what depends on these
        for_each_call(gm, lambda call: replace(call, refusal=excluded))
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
    gm.meta[CALLS] = tuple(_kept_inside(call, gm.meta.get(DOCUMENTS)) for call in gm.meta[CALLS])
    return gm


def pyramid_over(length: int, config: LighthouseConfig) -> Pyramid:
    """The pyramid that a configuration means over so many tokens."""
    levels, pooling, topk, quota = config.levels, config.pooling, config.topk, config.quota
    if topk is None:
        topk, quota = half_of(length, levels=levels, pooling=pooling, quota=quota)
    return Pyramid(
        length=length, levels=levels, pooling=pooling, topk=topk, quota=quota, keep_first=config.keep_first,
        causal_selection=config.causal_selection,
    )  # fmt: skip


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
        if isinstance(wanted, int) and layer is None:
            return call.refuse(
                f"dense_layers has the number {wanted}, and this call's layer has none in this graph",
                "compile the whole model, or let lighthouse_fx.compile(model, dense_layers=...) choose the blocks",
            )
        if excludes(wanted, module=call.module, layer=layer):
            return call.refuse(f"layer excluded: {wanted!r} is in dense_layers")
    return call


# --- calls that can be rewritten exactly ------------------------------------------------------------------------------


def _supported(call: AttentionCall, inputs: Callable[[], Inputs]) -> AttentionCall:
    query, key, value, out = (fake(x) for x in (call.query, call.key, call.value, call.node))
    if call.region.opaque:
        return call.refuse(f"inside {call.region.opaque}, whose body cannot be changed alone")
    if query is None or key is None or value is None or out is None:
        return call.refuse("the shapes of its arguments are not known in this graph")
    if _from_gather(call.query):
        return call.refuse("already Lighthouse attention, called by its functional form")
    if any(is_unbacked(size) for x in (query, key, value) for size in x.shape):
        return call.refuse("its sizes hang on data, so nothing is known of them before it runs", "pad to a size that is known")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if problem := tensor_problem(name, x):
            return call.refuse(problem)
    if _in_functorch(call.node, call.region):
        return call.refuse("inside a torch.func transform, such as vmap or grad", "apply it outside the compiled model")
    if call.mask is not None:
        return call.refuse("explicit attn_mask, not proved to be only causal", "pass is_causal=True and no attn_mask")
    if not isinstance(call.is_causal, bool) or not isinstance(call.enable_gqa, bool):
        return call.refuse("is_causal or enable_gqa is computed in the graph", "pass True or False")
    single = [x.dim() == 4 and is_one(x.shape[1]) for x in (query, key, value)]
    if single == [False, True, True]:  # one head of keys and values broadcasts to all queries, flag or not
        call = replace(call, enable_gqa=True)
    if problem := shape_problem(query.shape, key.shape, value.shape, enable_gqa=call.enable_gqa):
        return call.refuse(problem)
    if refusal := _cannot_dispatch(call, query, key, value):
        return replace(call, refusal=refusal)
    return replace(call, refusal=inputs().cross_attention(call))


def _cannot_dispatch(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Refusal | None:
    """Whether a tensor subclass has no way to run the operators, told by running them on what Dynamo saw."""
    kinds = {type(x).__name__: None for x in (query, key, value) if is_traceable_wrapper_subclass(x)}
    if not kinds:
        return None
    pyramid = Pyramid(length=query.shape[2], levels=1, pooling=2, topk=1)
    try:
        with torch.no_grad():
            attend(query, key, value, pyramid, is_causal=call.is_causal, enable_gqa=call.enable_gqa)
    except (NotImplementedError, TypeError) as error:
        return Refusal(
            reason=f"its arguments are of {', '.join(kinds)}, which cannot run Lighthouse's operators ({error})",
            remedy="give plain tensors, or let the subclass's __torch_dispatch__ run operators that it does not know",
        )
    return None


def _in_documents(
    call: AttentionCall, given: fx.Node | None, config: LighthouseConfig, *, asked: bool
) -> AttentionCall:
    """Whether attention can be kept inside documents, where that is asked for, by the graph or by `documents(...)`."""
    if call.documents is None and not asked:
        return call
    call = replace(call, documents=call.documents or given)
    query, value, numbers = fake(call.query), fake(call.value), fake(call.documents)
    assert query is not None and value is not None, "checked before"
    reason = document_problem(query, value, config.kernel)
    if not call.is_causal:
        reason = "attention that is not causal is not kept inside documents"
    elif numbers is None:
        reason = "its batch or length does not follow from the shapes of the graph's inputs, so documents may not fit it"
    elif tuple(numbers.shape) != (query.shape[0], query.shape[2]):
        reason = f"the documents are of {list(numbers.shape)} tokens, its queries of {[query.shape[0], query.shape[2]]}"
    elif call.documents is given and {BATCH, TOKEN} & {
        atom.kind for atom in origin(call.query, place_in(query))[-1] if atom.size != 1
    }:
        reason = "its first and third dimensions are not those of a batch and its tokens, so documents do not fit it"
    elif numbers.device != query.device:
        reason = f"the documents are on {numbers.device}, its queries on {query.device}"
    return replace(call, documents=None).refuse(reason) if reason else call


def _kept_inside(call: AttentionCall, given: fx.Node | None) -> AttentionCall:
    """A call that stays dense by policy is still kept inside documents; what is not exact knows nothing of them."""
    if call.refusal is None or given is None or call.documents is not given:
        return call
    return replace(call, kept_inside=True) if call.exact else replace(call, documents=None)


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


def _too_many(pyramid: Pyramid, config: LighthouseConfig) -> bool:
    """Whether more are gathered than is worth it. No guard where a symbolic length cannot change that."""
    if isinstance(pyramid.length, torch.SymInt):
        least, most = bounds(pyramid.length)
        if all(not config.keeps_too_much(pyramid.gathered_below(n), n) for n in (least, most)):
            return False
        if most - least < _TRIED and _always_too_many(config, least, most):
            return True
    return config.keeps_too_much(pyramid.gathered, pyramid.length)


@cache
def _always_too_many(config: LighthouseConfig, least: int, most: int) -> bool:
    return all(config.keeps_too_much(pyramid_over(n, config).gathered, n) for n in range(least, most + 1))


def _fewer(config: LighthouseConfig) -> str:
    if config.topk:
        return "use a smaller topk, or raise max_kept"
    return f"give {'a smaller quota, ' if config.quota else ''}a topk, more levels or a larger pooling"


def _in_functorch(node: fx.Node, region: Region) -> bool:
    """Whether a transform (`torch.func.vmap`, `grad`, ...) is open at a node: Dynamo brackets it by these calls.

    It may be open where the node's subgraph is called.
    """
    if any(_in_functorch(caller.node, caller.region) for caller in region.callers):
        return True
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
    query = fake(call.query)
    assert query is not None, "checked before"
    if isinstance(query.shape[2], torch.SymInt) and not guard:
        return call
    pyramid = pyramid_over(query.shape[2], config)
    length, gathered = pyramid.length, pyramid.gathered
    call = replace(call, gathered=gathered, local_window=config.local_window)
    # With dynamic shapes these comparisons become guards: crossing the boundary compiles once more.
    if config.local_window and length <= config.local_window:
        return call.refuse(
            f"{constant(length)} tokens are no more than local_window={config.local_window}, so dense attention is what the "
            "local branch would be",
            "use a smaller local_window",
        )
    if config.local_window and (problem := lse_problem(config.kernel)) is not None:
        return call.refuse(problem, "use kernel='auto', or local_window=0")
    if length < pyramid.widest:
        return call.refuse(
            f"{constant(length)} tokens are fewer than one coarsest window of {pyramid.widest}",
            "use fewer levels or a smaller pooling factor",
        )
    if _too_many(pyramid, config):
        share = "" if isinstance(gathered, torch.SymInt) else f", {gathered / length:.0%} of the tokens,"
        return call.refuse(
            f"not worth it: {gathered} of {length} tokens{share} would be gathered, more than max_kept={config.max_kept}",
            _fewer(config),
        )
    # How many heads there are, and how wide, is the model's business. Where dynamic=True makes symbols of them, each becomes a
    # guard: Inductor (torch 2.11) fails on strides that hang on them.
    for x in (fake(call.query), fake(call.key), fake(call.value)):
        assert x is not None, "checked before"
        for dim in (1, 3):
            int(x.shape[dim])
    return call
