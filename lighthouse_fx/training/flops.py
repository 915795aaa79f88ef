"""Floating-point operations of attention that ran, and of dense attention in its place.

Source: SPEC.md, "Cost": forward 2*N^2*d*H where it is causal and twice that where not, backward 2.5 times the forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lighthouse_fx.report.report import AttentionRecord

BACKWARD = 2.5

HOW_COUNTED = (
    "attention only: for each attention call in the graphs that lighthouse compiled and that ran in the step, "
    "B*H*(D+Dv)*N^2 causal, twice that bidirectional, 3.5 times that with the backward; S in place of N where it was "
    "rewritten. What activation checkpointing computes again is left out, and so is attention in layers that lighthouse did "
    "not compile, which saves nothing. Dense attention is that over the whole row, whatever documents it holds"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFlops:
    """Operations of the calls of a step: as dense attention, and as they ran. `uncounted` calls have unknown sizes."""

    dense: int = 0
    ran: int = 0
    uncounted: int = 0

    @property
    def saved(self) -> int:
        """Operations that dense attention would have needed beyond those that ran."""
        return self.dense - self.ran


def count(calls: Iterable[AttentionRecord]) -> AttentionFlops:
    """Forward and backward of the calls."""
    dense = ran = uncounted = 0
    for call in calls:
        length, gathered = call.length, call.gathered if call.rewritten else call.length
        each = _per_pair(call)
        if each is None or not isinstance(length, int) or not isinstance(gathered, int):
            uncounted += 1  # dynamic shapes: the record has names in place of numbers
            continue
        dense += round((1 + BACKWARD) * each * length**2)
        ran += round((1 + BACKWARD) * each * gathered**2)
    return AttentionFlops(dense=dense, ran=ran, uncounted=uncounted)


def _per_pair(call: AttentionRecord) -> int | None:
    """Operations per query and key, those that a causal mask leaves out shared among the others."""
    sizes = *call.query[:2], *call.query[3:], *call.value[3:]
    if len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        return None
    batch, heads, dim, value_dim = (int(size) for size in sizes)
    return batch * heads * (dim + value_dim) * (1 if call.is_causal else 2)
