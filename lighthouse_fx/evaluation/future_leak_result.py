"""What a measurement of the leak found: by distance, under Lighthouse and under dense attention, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.report.text import as_text

Reading = Literal["leaks", "none seen", "unclear"]
LIMIT = 0.02  # nats: a leak that is smaller for certain counts as none


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """The rise of the loss so many tokens before the cut, in nats: its mean and standard error over the cuts."""

    distance: int
    mean: float
    error: float
    cuts: int

    @property
    def most(self) -> float:
        """The mean and two standard errors."""
        return self.mean + 2 * self.error

    @property
    def reading(self) -> Reading:
        """"none seen" where `most` is at most `LIMIT`; "leaks" where the mean is two standard errors above 0."""
        if self.most <= LIMIT:
            return "none seen"
        return "leaks" if self.mean > 2 * self.error else "unclear"

    def __str__(self) -> str:
        return f"{self.mean:+.4f} nats (standard error {self.error:.4f}, with two of them at most {self.most:+.4f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureLeak:
    """How much the loss at a token owes to the tokens that follow it.

    Attributes:
        dense, lighthouse: by distance from the cut, 0 first; lighthouse is None where no attention call is rewritten.
        at_documents: whether rows were cut at the ends of documents.
        calls: what became of each attention call under Lighthouse attention.
    """

    title: str
    config: LighthouseConfig
    length: int
    at_documents: bool
    dense: tuple[Leak, ...]
    lighthouse: tuple[Leak, ...] | None
    calls: tuple[AttentionRecord, ...]

    @property
    def reading(self) -> Reading:
        """Of the attention that the model trains with, at the last token before the cut."""
        return (self.lighthouse or self.dense)[0].reading

    def table(self) -> Group:
        """The rise by distance, and how it is read, for rich."""
        where = "the last tokens of documents" if self.at_documents else "random places"
        head = f"{self.title}: rise of the loss where all that follows is replaced, nats; {self.length:,} tokens, at {where}"
        table = Table()
        table.add_column("tokens before the cut", justify="right")
        for column in ("Lighthouse", "standard error", "dense", "standard error", "cuts"):
            table.add_column(column, justify="right")
        for number, dense in enumerate(self.dense):
            other = self.lighthouse[number] if self.lighthouse else None
            cells = (f"{other.mean:+.4f}", f"{other.error:.4f}") if other else ("-", "-")
            table.add_row(str(dense.distance), *cells, f"{dense.mean:+.4f}", f"{dense.error:.4f}", str(dense.cuts))
        return Group(Text(head), table, *map(Text, self._words()))

    def _words(self) -> list[str]:
        rewritten = sum(call.rewritten for call in self.calls)
        if self.lighthouse:
            words = [f"Lighthouse attention ({rewritten} of {len(self.calls)} calls): {said(self.lighthouse[0])}"]
        else:
            reasons = "; ".join(dict.fromkeys(call.reason for call in self.calls)) or "none was found"
            words = [f"Lighthouse attention: no attention call is rewritten, so only dense attention was measured: {reasons}"]
        return [*words, f"Dense attention: {said(self.dense[0])}"]

    def __str__(self) -> str:
        return as_text(self.table(), width=150)


def said(leak: Leak) -> str:
    """The reading of a leak and the figures that it rests on."""
    remedy = ": take more cuts" if leak.reading == "unclear" else ""
    return f"{leak.reading}{remedy}; the loss of a token rises by {leak} when all that follows it is replaced"
