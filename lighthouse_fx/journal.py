"""What this process compiled and ran so far: the records behind `reports()` and behind `strict=True`.

Records are made from the graph before any cache is asked, so that a warm cache loses nothing. Runs are counted
because only that tells whether rewritten graphs really took part in a step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .report import GraphReport

_KEPT = 256


@dataclass(slots=True)
class Runs:
    """How often graphs with at least one rewritten call were executed."""

    rewritten: int = 0


runs = Runs()
_reports: deque[GraphReport] = deque(maxlen=_KEPT)


def add(report: GraphReport) -> None:
    """Keep a graph's report; the oldest go when there are more than 256."""
    _reports.append(report)


def reports() -> tuple[GraphReport, ...]:
    """The graphs that the backend compiled in this process, oldest first, at most the last 256.

    Each has its attention calls, rewritten or with the reason why not, and the graph before and after.
    """
    return tuple(_reports)
