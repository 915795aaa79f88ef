"""What was compiled and ran so far: the records behind `reports()` and behind `strict=True`.

Reports are kept for the whole process. They are made from the graph before any cache is asked, so that a warm cache loses
nothing. What runs can be watched, thread by thread, because only that tells whether rewritten graphs took part in a step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from lighthouse_fx.report.report import AttentionRecord, GraphReport

_KEPT = 256


_reports: deque[GraphReport] = deque(maxlen=_KEPT)
_limits: list[str] = []


class _Watchers(threading.local):
    """The lists that collect what this thread runs."""

    def __init__(self) -> None:
        self.watching: list[list[AttentionRecord]] = []
        self.counting: list[list[AttentionRecord]] = []


_watchers = _Watchers()


def add(report: GraphReport) -> None:
    """Keep a graph's report; the oldest go when there are more than 256."""
    _reports.append(report)


def reports() -> tuple[GraphReport, ...]:
    """The graphs that the backend compiled in this process, oldest first, at most the last 256.

    Each has its attention calls, rewritten or with the reason why not, and the graph before and after.
    """
    return tuple(_reports)


def note_recompile_limit(function: str) -> None:
    """A function has as many graphs as Dynamo keeps: for another one, its code would run as it is written."""
    _limits.append(function)


def recompile_limits() -> Sequence[str]:
    """The functions that had as many graphs as Dynamo keeps, in the order in which that came about."""
    return _limits


def is_watched() -> bool:
    """Whether somebody looks at what this thread runs, and so will see what stays dense."""
    return bool(_watchers.watching)


def ran(calls: Sequence[AttentionRecord], *, again: bool = False) -> None:
    """A graph with these attention calls is about to run; `again`, where it recomputes an activation checkpoint."""
    for seen in _watchers.watching:
        seen.extend(calls)
    if torch.is_grad_enabled() and not again:
        for seen in _watchers.counting:
            seen.extend(calls)


def watch() -> AbstractContextManager[list[AttentionRecord]]:
    """Collect the attention calls of all graphs that run meanwhile in this thread."""
    return _collect(_watchers.watching)


def count() -> AbstractContextManager[list[AttentionRecord]]:
    """Collect the attention calls that train meanwhile in this thread, each once: neither without gradients nor recomputed."""
    return _collect(_watchers.counting)


@contextmanager
def _collect(watchers: list[list[AttentionRecord]]) -> Iterator[list[AttentionRecord]]:
    seen: list[AttentionRecord] = []
    watchers.append(seen)
    try:
        yield seen
    finally:
        del watchers[next(place for place, other in enumerate(watchers) if other is seen)]
