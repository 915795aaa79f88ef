"""What is done whenever a compiled graph runs: it is noted, and activation checkpoints must not mix two functions.

A checkpoint runs the forward twice. Where the second run would be another attention than the first, the gradients would
belong to another function than the loss. Only the run can see that: it is an error, with the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.utils import checkpoint

from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord

from . import journal, stage
from .documents import Documents

Compiled = Callable[..., Any]

# Checkpoint -> the stage and the documents of its forward.
_forwards: WeakKeyDictionary[Any, tuple[stage.Stage, Documents | None]] = WeakKeyDictionary()


def noted(compiled: Compiled, calls: Sequence[AttentionRecord]) -> Compiled:
    """A graph with attention that is the same in every stage."""

    def run(*args: Any) -> Any:
        journal.ran(calls, again=any(again for _, again in _checkpoints()))
        return compiled(*args)

    return run


def staged(compiled: Compiled, calls: Sequence[AttentionRecord], own: LighthouseConfig | None) -> Compiled:
    """A graph that another stage, or documents, would compile differently.

    Args:
        own: the backend's own options; None where the stage makes no difference.
    """

    def run(*args: Any) -> Any:
        checkpoints = list(_checkpoints())
        for forward, again in checkpoints:
            if not again:
                _forwards[forward] = stage.current, stage.documents
                continue
            before, documents = _forwards.get(forward, (stage.current, stage.documents))
            if documents is not stage.documents and not (documents and documents.same_as(stage.documents)):
                raise RuntimeError(
                    "activation checkpointing runs a forward again under other documents: call backward() inside the same "
                    "documents() block as the forward"
                )
            if own is not None and before.resolve(own) != stage.current.resolve(own):
                raise RuntimeError(
                    f"activation checkpointing runs a forward of the stage {before} again in the stage {stage.current}, so "
                    "the gradients would belong to another function than the loss: call backward() inside the same "
                    "pretraining() or dense() block as the forward"
                )
        journal.ran(calls, again=any(again for _, again in checkpoints))
        return compiled(*args)

    return run


def without_gradients(
    compiled: Compiled, calls: Sequence[AttentionRecord], modules: Iterable[nn.Module], *, rewritten: bool
) -> Compiled:
    """A graph without gradients that may be rewritten with them. Reentrant checkpointing would run first one, then the other.

    Args:
        modules: those around its attention; in eval mode it is dense with gradients too.
        rewritten: whether in the stage that is on now it would be rewritten; in another stage nobody knows.
    """
    around = [ref(module) for module in modules]
    compiled_in = stage.key

    def run(*args: Any) -> Any:
        if (rewritten or stage.key != compiled_in) and stage.current.kind != "dense" and trains() and _in_reentrant():
            raise RuntimeError(
                "reentrant activation checkpointing around a model compiled with backend='lighthouse' would compute a dense "
                "forward and a Lighthouse recomputation: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False); "
                "in transformers, gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        journal.ran(calls)
        return compiled(*args)

    def trains() -> bool:
        return not around or any((module := seen()) is None or module.training for seen in around)

    return run


def _frames() -> Iterator[FrameType]:
    """The functions of torch.utils.checkpoint that this call comes from, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is vars(checkpoint):
            yield frame
        frame = frame.f_back


def _in_reentrant() -> bool:
    running = (frame.f_code.co_qualname for frame in _frames())
    return not torch.is_inference_mode_enabled() and "CheckpointFunction.forward" in running


def _checkpoints() -> Iterator[tuple[Any, bool]]:
    """The non-reentrant checkpoints around this call, and whether each runs its forward again.

    PyTorch keeps an object per checkpoint, which its forward and its recomputation share.
    """
    for frame in _frames():
        if frame.f_code.co_name == "checkpoint" and (forward := frame.f_locals.get("gen")) is not None:
            inside = forward.gi_frame  # None once it has ended
            if inside is not None and (shared := inside.f_locals.get("new_frame")) is not None:
                yield shared, False
        elif frame.f_code.co_name == "unpack_hook" and (shared := frame.f_locals.get("frame")) is not None:
            yield shared, True
