"""What this process compiled and ran so far: the records behind `reports()` and behind `strict=True`.

Records are made from the graph before any cache is asked, so that a warm cache loses nothing. What runs can be
watched, because only that tells whether rewritten graphs really took part in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from lighthouse_fx.report.report import AttentionRecord, GraphReport

_KEPT = 256


_reports: deque[GraphReport] = deque(maxlen=_KEPT)
_watching: list[list[AttentionRecord]] = []
_counting: list[list[AttentionRecord]] = []


def add(report: GraphReport) -> None:
    """Keep a graph's report; the oldest go when there are more than 256."""
    _reports.append(report)


def reports() -> tuple[GraphReport, ...]:
    """The graphs that the backend compiled in this process, oldest first, at most the last 256.

    Each has its attention calls, rewritten or with the reason why not, and the graph before and after.
    """
    return tuple(_reports)


def ran(calls: Sequence[AttentionRecord], *, again: bool = False) -> None:
    """A graph with these attention calls is about to run; `again`, where it recomputes an activation checkpoint."""
    for seen in _watching:
        seen.extend(calls)
    if torch.is_grad_enabled() and not again:
        for seen in _counting:
            seen.extend(calls)


def watch() -> AbstractContextManager[list[AttentionRecord]]:
    """Collect the attention calls of all graphs that run meanwhile."""
    return _collect(_watching)


def count() -> AbstractContextManager[list[AttentionRecord]]:
    """Collect the attention calls that train meanwhile, each once: not those without gradients, nor recomputations."""
    return _collect(_counting)


@contextmanager
def _collect(watchers: list[list[AttentionRecord]]) -> Iterator[list[AttentionRecord]]:
    seen: list[AttentionRecord] = []
    watchers.append(seen)
    try:
        yield seen
    finally:
        del watchers[next(place for place, other in enumerate(watchers) if other is seen)]
