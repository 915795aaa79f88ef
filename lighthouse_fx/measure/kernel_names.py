"""Which part of a step each kernel of a GPU, or each op of a CPU, belongs to.

Selection, gather and scatter have names of their own. Two kernels serve twice: `_collect_kernel` is gather in the forward and
the gradient of scatter in the backward, `_spread_kernel` is scatter and the gradient of gather. The data decides the order on
the device: what is collected is attended to next, and what is spread was attended to last. So the next attention kernel, or
the last one, forward or backward, tells which it is, also where activation checkpointing runs a forward inside the backward.
In the same way attention that follows a collection is that on S, any other is dense. Attention calls that run side by side on
several streams cannot be told apart like this, nor attention inside a scorer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PARTS = (
    "selection",
    "gather",
    "attention on S",
    "scatter",
    "scatter backward",
    "attention on S backward",
    "gather backward",
    "dense attention",
    "dense attention backward",
    "rest",
)

# Inductor appends numbers to the kernels that it launches itself. Its own, triton_..., may carry an attention's name.
_OURS = re.compile(r"_(score|select|collect|spread)_kernel(_\d+)*")
_INDUCTOR = re.compile(r"triton_")
# cuDNN; FlashAttention of any version; memory-efficient attention; what the backwards of the first two do before and after.
_ATTENTION = re.compile(r"sdpa|flash|fmha|dot_do_o|convert_dq", re.IGNORECASE)
_BACKWARD = re.compile(r"bprop|bwd|backward|cutlassB|dot_do_o|convert_dq", re.IGNORECASE)
_AROUND = re.compile(r"dot_do_o|convert_dq|preprocess|postprocess|clear", re.IGNORECASE)

_CPU_OPS = {
    "lighthouse_fx::select": "selection",
    "lighthouse_fx::gather": "gather",
    "lighthouse_fx::gather_backward": "gather backward",
    "lighthouse_fx::scatter": "scatter",
    "lighthouse_fx::scatter_backward": "scatter backward",
}
_CPU_ATTENTION = re.compile(r"aten::_?scaled_dot_product_\w*attention\w*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A kernel or op that ran, in microseconds."""

    name: str
    start: float
    duration: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributed:
    """An event and its part. `call` is whether it counts as one call of it: one of the kernels of an attention does."""

    event: Event
    part: str
    call: bool = True


def attribute_kernels(events: Sequence[Event]) -> list[Attributed]:
    """The part of each kernel on a GPU, in the order of time."""
    events = sorted(events, key=lambda event: event.start)
    kinds = [_kind(event.name) for event in events]
    ahead: list[str] = []  # the next attention, seen from each event
    following = ""
    for kind in reversed(kinds):
        following = kind if kind.startswith("attention") else following
        ahead.append(following)
    ahead.reverse()
    result: list[Attributed] = []
    behind, on_entries = "", False
    for event, kind, following in zip(events, kinds, ahead, strict=True):
        part, call = kind, True
        if kind == "score":
            part, call = "selection", False
        elif kind == "select":
            part = "selection"
        elif kind == "collect":
            part, on_entries = "scatter backward" if following == "attention backward" else "gather", True
        elif kind == "spread":
            part, on_entries = "gather backward" if behind == "attention backward" else "scatter", False
        elif kind.startswith("attention"):
            behind = kind
            part = kind.replace("attention", "attention on S" if on_entries else "dense attention")
            call = not _AROUND.search(event.name)
        result.append(Attributed(event=event, part=part, call=call))
    return result


def attribute_ops(events: Sequence[Event]) -> list[Attributed]:
    """The part of each op on a CPU, in the order of time; what an op calls is not counted again, and the rest left out."""
    result: list[Attributed] = []
    end, on_entries = 0.0, False
    for event in sorted(events, key=lambda event: (event.start, -event.duration)):
        part = _CPU_OPS.get(event.name, "")
        if event.start < end or not (part or _CPU_ATTENTION.fullmatch(event.name)):
            continue
        end = event.start + event.duration
        if part in ("gather", "scatter backward"):
            on_entries = True
        elif part in ("scatter", "gather backward"):
            on_entries = False
        if not part:
            part = "attention on S" if on_entries else "dense attention"
            part += " backward" if event.name.endswith("backward") else ""
        result.append(Attributed(event=event, part=part))
    return result


def _kind(name: str) -> str:
    if ours := _OURS.fullmatch(name):
        return ours[1]
    if _INDUCTOR.match(name) or not _ATTENTION.search(name):
        return "rest"
    return "attention backward" if _BACKWARD.search(name) else "attention"
