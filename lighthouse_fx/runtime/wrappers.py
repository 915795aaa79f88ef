"""What is done whenever a compiled graph runs: it is recorded, and what could make it silently wrong is an error.

An activation checkpoint runs the forward twice. Where the second run would be another attention than the first, the gradients
would belong to another function than the loss. And a graph may be used for what it was not compiled for, where its guards are
left out. Only the run can see either.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.utils import checkpoint

from lighthouse_fx.kernels.torch_private import in_backward
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord

from . import journal, stage
from .guards import Conditions
from .packed_rows import PackedRows

Compiled = Callable[..., Any]

_REMEDY = (
    "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False); "
    "in transformers, gradient_checkpointing_kwargs={'use_reentrant': False}"
)

# Checkpoint -> the stage and the documents of its forward.
_forwards: WeakKeyDictionary[Any, tuple[stage.Stage, PackedRows | None]] = WeakKeyDictionary()


def record_runs(compiled: Compiled, calls: Sequence[AttentionRecord]) -> Compiled:
    """A graph with attention that is the same in every stage."""

    def run(*args: Any) -> Any:
        journal.ran(calls, again=any(again for _, again in _checkpoints()))
        return compiled(*args)

    return run


def check_conditions(compiled: Compiled, conditions: Conditions) -> Compiled:
    """A graph that raises where it runs under other conditions than it was compiled for."""
    excused: stage.State | None = None

    def run(*args: Any) -> Any:
        nonlocal excused
        state = stage.now()
        if broken := conditions.broken(state):
            # Another thread may have changed the stage after the guards were evaluated: that is excused for one call.
            if state.thread == threading.get_ident() or excused is state or state is conditions.state:
                raise RuntimeError(
                    f"this graph was compiled {broken}: its guards were not evaluated. Leave out guard_filter_fn, and "
                    "torch.compiler.set_stance(skip_guard_eval_unsafe=True) in the first step after a change"
                )
            excused = state
        return compiled(*args)

    return run


def check_checkpoints(
    compiled: Compiled,
    calls: Sequence[AttentionRecord],
    own: LighthouseConfig | None,
    around: Sequence[ref[nn.Module]] = (),
) -> Compiled:
    """A graph that another stage, or documents, would compile differently; checkpoints must not mix it with another.

    Args:
        own: the backend's own options; None where the stage makes no difference.
        around: the modules around its attention.
    """
    rewritten = any(call.rewritten for call in calls)

    def run(*args: Any) -> Any:
        checkpoints = list(_checkpoints())
        again = any(again for _, again in checkpoints)
        if rewritten and not again and in_backward():
            raise RuntimeError(
                "Lighthouse attention runs forward inside a backward pass, in no checkpoint that is known here: an activation "
                "checkpoint that runs its forward without gradients and recomputes it (a torch.autograd.Function, as in "
                "unsloth, DeepSpeed, Megatron or fairscale) would have the loss of dense attention and the gradients of "
                f"Lighthouse attention: {_REMEDY}"
            )
        _check_against_forwards(checkpoints, own)
        if rewritten:
            _warn_of_pair(around)
        journal.ran(calls, again=again)
        return compiled(*args)

    return run


def check_reentrant(
    compiled: Compiled, calls: Sequence[AttentionRecord], around: Sequence[ref[nn.Module]], *, rewritten: bool
) -> Compiled:
    """A graph without gradients that may be rewritten with them. Reentrant checkpointing would run first one, then the other.

    Args:
        around: the modules around its attention; in eval mode it is dense with gradients too.
        rewritten: whether in the stage that is on now it would be rewritten; in another stage nobody knows.
    """
    compiled_in = stage.now().key

    def run(*args: Any) -> Any:
        state = stage.now()
        if (rewritten or state.key != compiled_in) and state.stage.kind != "dense" and trains():
            if _in_reentrant():
                raise RuntimeError(
                    "reentrant activation checkpointing around a model compiled with backend='lighthouse' would compute a "
                    f"dense forward and a Lighthouse recomputation: {_REMEDY}"
                )
            if not torch.is_inference_mode_enabled():
                _ran_dense.update(_alive(around))
        journal.ran(calls)
        return compiled(*args)

    def trains() -> bool:
        return not around or any((module := seen()) is None or module.training for seen in around)

    return run


# --- a pass without gradients, then one with ---------------------------------------------------------------------------

# Modules in training mode whose attention ran dense, as there were no gradients.
_ran_dense: WeakSet[nn.Module] = WeakSet()


def _warn_of_pair(around: Iterable[ref[nn.Module]]) -> None:
    """Warn where what ran without gradients in training mode runs with them: once for each time that the stage begins so."""
    pair = [module for module in _alive(around) if module in _ran_dense] if _ran_dense else []
    if pair:
        _ran_dense.clear()
        warnings.warn(
            "a model in training mode ran without gradients, where its attention is dense, and now runs with them, where it is "
            "Lighthouse attention. If both passes belong to one step (as in GradCache), compute both inside "
            "lighthouse_fx.dense(); if the first was an evaluation, call model.eval() before it",
            RuntimeWarning,
            stacklevel=2,
        )


def _alive(modules: Iterable[ref[nn.Module]]) -> list[nn.Module]:
    return [module for seen in modules if (module := seen()) is not None]


# --- checkpoints of torch ----------------------------------------------------------------------------------------------


def _check_against_forwards(checkpoints: Iterable[tuple[Any, bool]], own: LighthouseConfig | None) -> None:
    """Note the conditions of a checkpoint's forward, and raise where its recomputation runs under others."""
    state = stage.now()
    for forward, again in checkpoints:
        if not again:
            _forwards[forward] = state.stage, state.documents
            continue
        before, documents = _forwards.get(forward, (state.stage, state.documents))
        if documents is not state.documents and not (documents and documents.same_as(state.documents)):
            raise RuntimeError(
                "activation checkpointing runs a forward again under other documents: call backward() inside the same "
                "documents() block as the forward"
            )
        if own is not None and before.resolve(own) != state.stage.resolve(own):
            raise RuntimeError(
                f"activation checkpointing runs a forward of the stage {before} again in the stage {state.stage}, so "
                "the gradients would belong to another function than the loss: call backward() inside the same "
                "pretraining() or dense() block as the forward"
            )


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
