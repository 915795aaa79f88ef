"""`documents(...)`: attention of packed rows stays inside each document, in models compiled with the backend.

    with lighthouse_fx.documents(numbers):          # forward and backward
        loss = model(tokens); loss.backward()

The compiled graph gets two more inputs, where each token's document begins and what the CPU knows of the documents, and its
wrapper supplies them from here; so nothing about the documents is baked into the graph, which is guarded on nothing but
whether there are any. What is computed: `kernels/packed/attention.py`; attention that stays dense by choice (excluded layers,
the dense stage, evaluation, short sequences) is kept inside documents, too, on all tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.kernels.packed.attention import crowded_out, in_sequences, starts_of
from lighthouse_fx.kernels.packed.plan import summary, too_many
from lighthouse_fx.passes.attention_call import CALLS, DOCUMENTS, KNOWN, PACKED
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.decide.check import pyramid_over
from lighthouse_fx.passes.decide.document_input import sizes_when_run
from lighthouse_fx.report.report import AttentionRecord

from . import dynamo, stage


def starts_from(document_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Where each token's document begins, int32 `[B, N]`, from either form.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    if (document_ids is None) == (cu_seqlens is None):
        raise TypeError(
            "give either document_ids, an integer tensor [batch, tokens], or cu_seqlens, an integer tensor [documents + 1]"
        )
    name, given = ("document_ids", document_ids) if document_ids is not None else ("cu_seqlens", cu_seqlens)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        shown = f"has dtype {given.dtype}" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
        raise TypeError(f"{name} {shown}: give an integer tensor")
    if document_ids is not None:
        if document_ids.dim() != 2 or 0 in document_ids.shape:
            raise ValueError(f"{name} has shape {list(document_ids.shape)}: give [batch, tokens], one number for each token")
        return starts_of(document_ids)
    assert cu_seqlens is not None
    bounds = cu_seqlens.long()
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bool((bounds.diff() < 0).any()) or bounds[-1] < 1:
        raise ValueError(f"{name}={bounds.tolist()}: give one packed row's borders, such as [0, 100, 250], from 0 and rising")
    return bounds[:-1].repeat_interleave(bounds.diff()).int()[None]


class Documents:
    """What `documents` returns: a context manager. `starts` int32 `[B, N]` on the CPU, where each token's document begins.

    On are the documents entered last among those not left yet, in whichever order they are left. `known`: how many they are and
    how long (`kernels/packed/plan.py`). `alone`: each row is one document. That is no documents at all.
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts.cpu()
        self.alone = not bool(self.starts.any())
        self.known = summary(self.starts)
        self._copies = {x.device: x for x in (starts, self.starts)}
        self._checked: set[LighthouseConfig] = set()

    def __enter__(self) -> Documents:
        if torch.compiler.is_compiling():
            raise RuntimeError("documents() was entered inside a compiled function: enter it around the compiled call")
        stage.enter_documents(self)
        return self

    def __exit__(self, *error: object) -> None:
        stage.leave_documents(self)

    def __str__(self) -> str:
        return f"documents {list(self.starts.shape)}"

    def same_as(self, other: Documents | None) -> bool:
        """Whether these are the same documents."""
        return other is not None and (self is other or torch.equal(self.starts, other.starts))

    def on(self, device: torch.device) -> Tensor:
        """`starts` on a device; copied there once."""
        if device not in self._copies:
            self._copies[device] = self.starts.to(device, non_blocking=True)
        return self._copies[device]

    def crowded_out(self, config: LighthouseConfig) -> int:
        """How many windows at borders of documents a configuration cannot expand, over all rows.

        Tokens below them are attended to by nobody and may be left without attention output: choose a larger topk.
        """
        return int(crowded_out(self.starts, self._pyramid(config)).sum())

    def _pyramid(self, config: LighthouseConfig) -> Pyramid:
        return pyramid_over(self.starts.shape[1], config)

    def check(self, config: LighthouseConfig) -> None:
        """Warn, once, of windows that are crowded out."""
        if config in self._checked:
            return
        self._checked.add(config)
        if missing := self.crowded_out(config):
            topk = self._pyramid(config).topk
            warnings.warn(
                f"documents(): {missing} windows at borders of documents are more than topk={topk} expands in their "
                "tiles; tokens below them are not attended to and may get no attention output: use a larger topk or fewer, "
                "longer documents",
                stacklevel=2,
            )


def documents(document_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Documents:
    """Keep attention inside the documents of packed rows, in models compiled with the backend, as a context manager.

    Args:
        document_ids: integer `[B, N]`: tokens with equal numbers beside each other are one document.
        cu_seqlens: integer `[documents + 1]`, the borders of one packed row, `[0, ..., N]`; instead of `document_ids`.

    Give tensors on the CPU, as a data loader makes them: those on a GPU are waited for and copied there, once. So kernels can
    be told how many documents there are, windows that the budget cannot expand are warned of, and rows of one document each are
    treated as what they are. Keep the backward inside the context.
    Dense attention stays inside documents as well, in excluded layers, the dense stage and evaluation. Only attention that the
    backend cannot rewrite at all does not (a warning says so): there the model's own mask has to do it. What is computed:
    README, "Packed documents".

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    return Documents(starts_from(document_ids, cu_seqlens=cu_seqlens))


# --- in a graph -------------------------------------------------------------------------------------------------------


def prepared(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph that the passes may give the documents that are on as an input (`passes/decide/document_input.py`).

    A copy, because Dynamo loads what its own graph has as inputs. Without documents, the graph itself.
    """
    if stage.documents is None:
        return gm
    gm = dynamo.copied(gm)
    gm.meta[PACKED] = tuple(stage.documents.starts.shape)
    return gm


def settle_input(gm: fx.GraphModule) -> None:
    """After the passes: drop the inputs where nobody uses them."""
    gm.meta.pop(PACKED, None)
    if DOCUMENTS not in gm.meta:
        return
    if not gm.meta[DOCUMENTS].users:
        for name in (DOCUMENTS, KNOWN):
            gm.graph.erase_node(gm.meta.pop(name))
    gm.recompile()


def example_of(gm: fx.GraphModule) -> list[Tensor]:
    """The example inputs to add for a rewritten graph: two, or none."""
    return [gm.meta[name].meta["example_value"] for name in (DOCUMENTS, KNOWN) if name in gm.meta]


def heeded(
    compiled: Callable[..., Any], gm: fx.GraphModule, calls: Sequence[AttentionRecord], config: LighthouseConfig
) -> Callable[..., Any]:
    """A compiled graph that gets the documents that are on, if it has an input for them, and warns of calls that ignore them.

    Such calls are the same with documents and without, so only the run can tell.
    """
    unaware = [call for call in calls if not call.rewritten and not call.inside_documents]
    compiled = supplied(compiled, gm, config)
    if not unaware:
        return compiled
    which = ", ".join(dict.fromkeys(call.module or call.source or "a call" for call in unaware))
    warned = False

    def run(*args: Any) -> Any:
        nonlocal warned
        if stage.packed and not warned:
            warned = True
            warnings.warn(
                f"documents() is on, and attention that is left as it is does not heed it ({which}): there the model's own "
                "mask has to keep documents apart; lighthouse_fx.reports() says why each stays so",
                stacklevel=2,
            )
        return compiled(*args)

    return run


def supplied(compiled: Callable[..., Any], gm: fx.GraphModule, config: LighthouseConfig) -> Callable[..., Any]:
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
