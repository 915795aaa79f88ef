"""The guards of this package: what has to stay the same for a compiled graph to be used again.

Dynamo takes the value that a guard expects when compilation ends, the passes read it when it begins, and another thread may
change the stage between. So both read `stage`, below, which shows a thread that compiles what was on when it began.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from weakref import ref

from torch import nn

from lighthouse_fx.kernels.torch_private import (
    AttrSource,
    Guard,
    GuardBuilder,
    ImportSource,
    InstructionTranslator,
    Source,
    TracingContext,
)

from .stage import State, now


class _Guarded:
    """What guards read."""

    @property
    def key(self) -> str:
        return now().key

    @property
    def packed(self) -> bool:
        return now().packed


stage = _Guarded()


def guard_on_stage() -> None:
    """Make the graph that is being compiled valid only for the stage that is on now."""
    add_guard(AttrSource(_source_of_stage(), "key"))


def guard_on_documents() -> None:
    """Make the graph that is being compiled valid only while documents are on, or while none are, as now."""
    add_guard(AttrSource(_source_of_stage(), "packed"))


def _source_of_stage() -> Source:
    """`stage` as guards reach it: by attributes, from the package that every frame can import."""
    return AttrSource(AttrSource(AttrSource(ImportSource("lighthouse_fx"), "runtime"), "guards"), "stage")


def add_guard(source: Source) -> None:
    """Make the graph that is being compiled valid only while the value at `source` equals what it is now."""
    context = TracingContext.try_get()
    if context is not None:  # None where a user calls the backend by hand: nothing is cached then
        context.guards_context.dynamo_guards.add(Guard(source, GuardBuilder.EQUALS_MATCH))


def source_name(source: Source) -> str:
    """The Python expression of a source, over the frame's variables `L` and `G`."""
    name = source.name
    return name() if callable(name) else name  # a method before torch 2.13


# --- the same, checked again when the graph runs -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a graph was compiled for, so that its wrapper can tell whether the guards were evaluated at all.

    `torch.compile(options={"guard_filter_fn": ...})` and the stance `skip_guard_eval_unsafe` leave guards out.

    Attributes:
        state: the stage and the documents at the time of compilation.
        stage, documents: whether the graph depends on which stage is on, and on whether documents are on.
        modes: the flags `training` that it depends on, by their expressions.
        around: the modules around attention that can be rewritten.
        code: the outermost function in the graph.
    """

    state: State
    stage: bool
    documents: bool
    modes: Mapping[str, bool] = field(default_factory=dict)
    around: tuple[ref[nn.Module], ...] = ()
    code: CodeType | None = field(default_factory=lambda: _root_code())

    def broken(self, state: State) -> str:
        """Which of them no longer holds, in words; "" where all hold."""
        if self.stage and state.key != self.state.key:
            return f"for the stage {self.state.key}, and runs in the stage {state.key}"
        if self.documents and state.packed != self.state.packed:
            inside, outside = "inside documents()", "outside documents()"
            first, then = (inside, outside) if self.state.packed else (outside, inside)
            return f"{first}, and runs {then}"
        return self._broken_mode() if self.modes else ""

    def _broken_mode(self) -> str:
        frame = self._frame()
        if frame is None:
            return ""
        scope = {"L": frame.f_locals, "G": frame.f_globals}
        for name, training in self.modes.items():
            try:
                found = eval(name, scope)  # the same expression that Dynamo's own guards evaluate
            except (LookupError, AttributeError):
                continue  # the frame has dropped the variable since
            if found is not training:
                first, then = ("train", "eval") if training else ("eval", "train")
                return f"for {name.removesuffix('.training')} in {first} mode, and runs in {then} mode"
        return ""

    def _frame(self) -> FrameType | None:
        """The compiled function's frame, which calls the graph: its code is another, of the same name and place."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and self.code is not None:
            code = frame.f_code
            if (code.co_name, code.co_filename, code.co_firstlineno) == (
                self.code.co_name,
                self.code.co_filename,
                self.code.co_firstlineno,
            ):
                return frame
            frame = frame.f_back
        return None


def _root_code() -> CodeType | None:
    """The code of the outermost function in the graph that is being compiled."""
    try:
        code: CodeType = InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None
    return code
