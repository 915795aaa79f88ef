"""Decide for each call that may be rewritten whether it should be: stage, modes, excluded layers, and whether it is worth it.

out = scaled_dot_product_attention(q, k, v, is_causal=True)     ->  the same; its AttentionCall now has S, or a Refusal

Changes nothing in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.kernels.ops.local_branch import lse_problem
from lighthouse_fx.kernels.torch_private import bounds

from ..attention_call import (
    CALLS,
    DOCUMENTS,
    AttentionCall,
    Layer,
    PassContext,
    Refusal,
    constant,
    context_of,
    fake,
    for_each_call,
)
from ..config import LighthouseConfig
from ..pyramid import pyramid_over

_TRIED = 1 << 16  # lengths at most that are tried one by one


def check_policy(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Give every call that is left its gathered length, or the reason why it stays dense."""
    context = context_of(gm)
    for_each_call(gm, lambda call: _decide(call, config, context))
    gm.meta[CALLS] = tuple(_keep_inside(call, gm.meta.get(DOCUMENTS)) for call in gm.meta[CALLS])
    return gm


def _decide(call: AttentionCall, config: LighthouseConfig, context: PassContext) -> AttentionCall:
    """The order matters: what depends on the stage comes last, as a graph without rewritable calls serves every stage."""
    gradients = context.no_gradients is None
    refusal = context.excluded  # in every stage and mode
    if refusal is None and gradients:
        refusal = _does_not_train(call, context.training)
    if refusal is not None:
        return replace(call, refusal=refusal)
    call = replace(call, rewritable=True)
    refusal = context.dense if gradients else None
    if refusal is None and not config.assume_causal:
        refusal = call.doubt
    if refusal is None:
        refusal = _excluded(call, config, context.layer(call.node))
    if refusal is not None:
        return replace(call, refusal=refusal)
    call = _worthwhile(call, config, guard=gradients)
    # Missing gradients last, so that they are the reason for calls alone that would be rewritten but for them.
    return call if call.refusal is not None else replace(call, refusal=context.no_gradients)


def _keep_inside(call: AttentionCall, given: fx.Node | None) -> AttentionCall:
    """A call that stays dense by policy is still kept inside documents; what is not exact knows nothing of them."""
    if call.refusal is None or given is None or call.documents is not given:
        return call
    return replace(call, kept_inside=True) if call.exact else replace(call, documents=None)


def _does_not_train(call: AttentionCall, training: Callable[[fx.Node], bool | None]) -> Refusal | None:
    out = fake(call.node)
    if out is None or not out.requires_grad:
        return Refusal(reason="needs no gradient: nothing trains through this call")
    trains = training(call.node)
    if trains is None:
        return Refusal(
            reason="a module calls it from outside this graph, and eval() of that module would go unseen",
            remedy="compile the module, not the function; if it is compiled, the graph breaks before: TORCH_LOGS=graph_breaks",
        )
    return None if trains else Refusal(reason="its module is in eval mode")


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


def _excluded(call: AttentionCall, config: LighthouseConfig, layer: Layer | None) -> Refusal | None:
    for wanted in config.dense_layers:
        if isinstance(wanted, int) and layer is None:
            return Refusal(
                reason=f"dense_layers has the number {wanted}, and this call's layer has none in this graph",
                remedy="compile the whole model, or let lighthouse_fx.compile(model, dense_layers=...) choose the blocks",
            )
        if excludes(wanted, module=call.module, layer=layer):
            return Refusal(reason=f"layer excluded: {wanted!r} is in dense_layers")
    return None


# --- whether it is worth it -------------------------------------------------------------------------------------------


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
