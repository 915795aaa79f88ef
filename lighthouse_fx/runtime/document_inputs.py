"""How a compiled graph gets the documents that are on: as two more inputs.

They are where each token's document begins, and what the CPU knows of the documents. The graph's wrapper supplies them, so
that nothing about the documents is constant in the graph, which is guarded on nothing but whether there are any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, fx

from lighthouse_fx.kernels.packed.attention import in_sequences
from lighthouse_fx.kernels.packed.plan import too_many
from lighthouse_fx.passes.attention_call import CALLS, DOCUMENTS, KNOWN
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.decide.document_input import sizes_when_run
from lighthouse_fx.report.report import AttentionRecord

from . import stage


def allow_document_input(gm: fx.GraphModule) -> fx.GraphModule:
    """Let the passes give a graph the documents that are on as an input (`passes/decide/document_input.py`).

    Returns:
        A copy, because Dynamo loads what its own graph has as inputs. Without documents, the graph itself.
    """
    return gm if stage.now().documents is None else _copy(gm)


def shape_of_documents() -> tuple[int, int] | None:
    """The shape `[B, N]` of the documents that are on, if there are any."""
    documents = stage.now().documents
    if documents is None:
        return None
    batch, tokens = documents.starts.shape
    return batch, tokens


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph, its nodes' metadata and what Dynamo wrote beside it; modules and subgraphs are shared."""
    copy = fx.GraphModule(gm, deepcopy(gm.graph))
    copy.meta.update(gm.meta)
    for name, value in vars(gm).items():
        vars(copy).setdefault(name, value)
    for old, new in zip(gm.graph.find_nodes(op="placeholder"), copy.graph.find_nodes(op="placeholder"), strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)
    return copy


def drop_unused_inputs(gm: fx.GraphModule) -> None:
    """After the passes: drop the inputs where nobody uses them."""
    if DOCUMENTS not in gm.meta:
        return
    if not gm.meta[DOCUMENTS].users:
        for name in (DOCUMENTS, KNOWN):
            gm.graph.erase_node(gm.meta.pop(name))
    gm.recompile()


def example_documents(gm: fx.GraphModule) -> list[Tensor]:
    """The example inputs to add for a rewritten graph: two, or none."""
    return [gm.meta[name].meta["example_value"] for name in (DOCUMENTS, KNOWN) if name in gm.meta]


def bind_documents(compiled: Callable[..., Any], gm: fx.GraphModule, config: LighthouseConfig) -> Callable[..., Any]:
    """A compiled graph that gets the documents that are on as its last inputs, if it has those inputs."""
    if DOCUMENTS not in gm.meta:
        return compiled
    selects = any(call.refusal is None for call in gm.meta[CALLS])
    device, sizes = gm.meta[DOCUMENTS].meta["example_value"].device, sizes_when_run(gm)

    def run(*args: Any) -> Any:
        on = stage.documents
        if on is None:
            raise RuntimeError("this graph was compiled inside documents() and runs outside: keep the backward inside, too")
        if tuple(on.starts.shape) != (shape := sizes(args)):
            raise ValueError(
                f"documents() has documents of {list(on.starts.shape)} tokens, and attention has queries of {list(shape)}: "
                "give [batch, tokens] of the batch that the model gets"
            )
        count = int(on.known[:, 0].max()) if in_sequences(device) else 0
        if count > config.max_documents:  # before the GPU finds it, and stops for good
            raise ValueError(f"documents() has {count} documents in a row: {too_many(config.max_documents)}")
        if selects:
            on.check(config)
        return compiled(*args, on.on(device), on.known)

    return run


def warn_of_unaware_calls(compiled: Callable[..., Any], calls: Sequence[AttentionRecord]) -> Callable[..., Any]:
    """A compiled graph that warns, once, where it runs inside documents and some of its calls ignore them.

    Such calls are the same with documents and without, so only the run can tell.
    """
    unaware = [call for call in calls if not call.rewritten and not call.inside_documents]
    if not unaware:
        return compiled
    which = ", ".join(dict.fromkeys(call.module or call.source or "a call" for call in unaware))
    warned = False

    def run(*args: Any) -> Any:
        nonlocal warned
        if stage.packed and not warned:
            warned = True
            warnings.warn(
                f"documents() is on, but attention that cannot be rewritten ignores it ({which}): there the model's own "
                "mask must keep documents apart; lighthouse_fx.reports() gives each reason",
                stacklevel=2,
            )
        return compiled(*args)

    return run
