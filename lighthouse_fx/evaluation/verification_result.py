"""What `verify` found, as data: one check per quantity and dtype, the tolerances, a table and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text
from torch import Tensor

from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.report.text import as_text

Quantity = Literal[
    "the attention it replaces",
    "selection",
    "output",
    "gradients of q, k, v",
    "ops and their plain twins",
    "loss",
    "gradients of parameters",
]
# Differences relative to the largest value. Rounding is 1e-16 and 1e-7; a layer or a sum over tokens adds some of it up.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of the rewritten with the functional form.

    Attributes:
        where: the attention's module, or "whole model"; what: the quantity, "the attention it replaces" being what the model's
            own nodes compute beside plain attention of the arguments that were found; dtype: of both runs.
        difference: the largest difference over the largest value, or for "selection" how many entries differ.
    """

    where: str
    what: Quantity
    dtype: str
    difference: float

    @property
    def tolerance(self) -> float | None:
        """The largest difference that passes. None: not judged, as windows that score alike may swap in float32."""
        if self.what != "selection":
            return TOLERANCES[self.dtype]
        return 0.0 if self.dtype == "float64" else None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.tolerance is None or self.difference <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The result of `verify`. `print(verification)` shows the table.

    Attributes:
        checks: all comparisons; those after a selection that differs are missing, for they would compare two computations.
        calls: the attention calls as they ran, rewritten or not, with reasons.
        moved, entries: how many entries float32 selects otherwise than float64, of how many.
        notes: what was not compared, and why.
    """

    title: str
    checks: tuple[Check, ...]
    calls: tuple[AttentionRecord, ...]
    moved: int
    entries: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check passed, and float64 was compared up to the gradients of the parameters."""
        whole = any(c.what == "gradients of parameters" and c.dtype == "float64" for c in self.checks)
        return whole and all(check.passed for check in self.checks)

    def table(self) -> Table:
        """The checks as a rich table, one row per place and quantity."""
        verdict = "passed" if self.passed else "FAILED: do not train with this; please report it"
        rewritten = sum(call.rewritten for call in self.calls)
        title = f"{self.title}: {verdict} ({rewritten} of {len(self.calls)} attention calls rewritten)"
        table = Table(title=Text(title), title_justify="left", caption_justify="left")
        caption = (
            "Numbers are the largest difference between the rewritten model and one that calls lighthouse_attention, over the "
            f"largest value; up to {TOLERANCES['float64']:g} in float64 and {TOLERANCES['float32']:g} in float32 pass. "
            f"Selection: entries that differ. float32 selects {self.moved:,} of {self.entries:,} entries otherwise than "
            "float64, which is rounding where windows score alike. The attention it replaces: what the model's own nodes "
            "compute beside plain attention of the arguments that were found."
        )
        table.caption = Text("\n".join([caption, *(f"note: {note}" for note in self.notes)]))
        for column in ("where", "what", "float64", "float32"):
            table.add_column(column, overflow="fold")
        for where, what in dict.fromkeys((check.where, check.what) for check in self.checks):
            found = [check for check in self.checks if (check.where, check.what) == (where, what)]
            cells = [_cell([check for check in found if check.dtype == dtype]) for dtype in TOLERANCES]
            style = None if all(check.passed for check in found) else "red"
            table.add_row(*map(Text, (where, what, *cells)), style=style)
        return table

    def __str__(self) -> str:
        return as_text(self.table(), width=140)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over the largest expected value of all the tensors; infinite for shapes that differ or NaN."""
    largest, apart = 0.0, 0.0
    for a, b in zip(found, expected, strict=True):
        if a.dim() and b.dim() and a.shape != b.shape:
            return float("inf")
        if not a.numel() and not b.numel():
            continue
        largest = max(largest, float(b.detach().abs().max()))
        gap = float((a.detach() - b.detach()).abs().max())
        if gap != gap:
            return float("inf")
        apart = max(apart, gap)
    return 0.0 if apart == 0.0 else apart / largest if largest else float("inf")


def _cell(checks: Sequence[Check]) -> str:
    """A module that runs several times has a row for the largest of its differences."""
    if not checks:
        return "-"
    worst = max(checks, key=lambda check: check.difference)
    number = f"{worst.difference:.0f}" if worst.what == "selection" else f"{worst.difference:.1e}"
    return number if worst.passed else f"{number} (too large)"
