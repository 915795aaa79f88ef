"""Decide for each call whether it may be rewritten: whether Lighthouse attention can stand for it at all.

out = scaled_dot_product_attention(q, k, v, is_causal=True)     ->  the same; its AttentionCall is `exact`, or has a Refusal

Changes nothing in the graph. The answer depends on the graph alone, not on the stage. Whether a call that may be rewritten
should be, `policy.py` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from lighthouse_fx.kernels import Pyramid, attend
from lighthouse_fx.kernels.packed.attention import document_problem
from lighthouse_fx.kernels.shapes import shape_problem, tensor_problem
from lighthouse_fx.kernels.torch_private import is_traceable_wrapper_subclass, is_unbacked

from ..attention_call import DOCUMENTS, AttentionCall, Refusal, context_of, fake, for_each_call
from ..config import LighthouseConfig
from ..ir.subgraphs import Region
from ..masks.evaluate import is_one
from ..provenance.inputs import Inputs
from ..provenance.rows import BATCH, TOKEN, origin, place_in


def check_legality(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Refuse every call that cannot be rewritten exactly, with the reason."""
    inputs = cache(lambda: Inputs(gm))
    given, asked = gm.meta.get(DOCUMENTS), context_of(gm).packed is not None

    def judge(call: AttentionCall) -> AttentionCall:
        call = _supported(call, inputs)
        if call.refusal is not None:
            return call
        call = replace(call, exact=call.doubt is None or config.assume_causal)
        return _in_documents(call, given, config, asked=asked)

    for_each_call(gm, judge)
    return gm


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


def _from_gather(node: Any) -> bool:
    return isinstance(node, fx.Node) and "lighthouse_fx" in str(node.target) and "gather" in str(node.target)


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
