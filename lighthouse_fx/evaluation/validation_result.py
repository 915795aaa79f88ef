"""What a validation found, in words: findings with the figures they rest on, a table, JSON and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.report.text import as_text, or_dash

from . import validation_figures
from .future_leak_result import FutureLeak, Leak, said
from .passkey import CHANCE, PasskeyResult

Answer = Literal["yes", "no", "unclear"]
_LEARNT = 0.05  # nats better than guessing
_STYLES = {"yes": "green", "no": "red", "unclear": "yellow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A question, its answer, and why."""

    question: str
    answer: Answer
    text: str


# Student's t of 95% for so few windows, by their number; for more, two standard errors.
_SURE = {1: math.inf, 2: 12.7, 3: 4.3, 4: 3.2, 5: 2.8, 6: 2.6, 7: 2.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """A difference between two losses of the same tokens: its mean and its standard error over so many windows."""

    mean: float
    error: float
    windows: int

    @property
    def sign(self) -> int:
        """1 or -1 where it is further from nothing than two standard errors, or more for a few windows, otherwise 0."""
        return 0 if not abs(self.mean) > _SURE.get(self.windows, 2.0) * self.error else 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:+.4f} nats (standard error {self.error:.4f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLoss:
    """The mean loss of the tokens `start` to `end` of a window; `lighthouse` is None where nothing was rewritten."""

    start: int
    end: int
    dense: float
    lighthouse: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """The compiled model's logits against the eager model's, and the attention calls that ran for them."""

    difference: float
    tolerance: float
    calls: int
    rewritten: int

    @property
    def passed(self) -> bool:
        """Not so for NaN."""
        return self.difference <= self.tolerance and self.rewritten == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The figures of a validation and what follows from them.

    Attributes:
        dense_loss: nats per token under dense attention. guessing: of a model to which all tokens are alike.
        lighthouse_loss: under Lighthouse attention, which is no likelihood; None where no attention call can be
            rewritten. gap: dense minus Lighthouse loss.
        context_gain: how much lower the loss of a window's last quarter is than that of the same tokens after only half of
            the window's text; None for windows that are too short for that.
        positions: the loss by where in the window a token is. calls: what became of each attention call.
        inference, leak, passkey: None where that was not asked for.
    """

    title: str
    config: LighthouseConfig
    windows: int
    length: int
    dense_loss: float
    guessing: float
    lighthouse_loss: float | None
    gap: Paired | None
    context_gain: Paired | None
    positions: tuple[PositionLoss, ...]
    calls: tuple[AttentionRecord, ...]
    inference: Inference | None
    leak: FutureLeak | None
    passkey: PasskeyResult | None

    @property
    def passed(self) -> bool:
        """Whether the model is sound: its loss is a number and, as far as that was checked, inference is dense and causal."""
        dense = self.inference is None or self.inference.passed
        return math.isfinite(self.dense_loss) and dense and (self.leak is None or self.leak.dense[0].reading != "leaks")

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The questions that were asked, answered. Differences count from two standard errors on."""
        return tuple(self._findings())

    def _findings(self) -> Iterator[Finding]:
        if (inference := self.inference) is not None:
            yield Finding(
                question="Is inference dense?",
                answer="yes" if inference.passed else "no",
                text=f"compiled and eager logits differ by at most {inference.difference:.2g} "
                f"(allowed: {inference.tolerance:.2g}); "
                f"{inference.rewritten} of {inference.calls} attention calls that ran were rewritten",
            )
        yield self._trained()
        if (gain := self.context_gain) is not None:
            yield Finding(
                question="Does a longer context help?",
                answer=_answer(gain.sign, 1),
                text=f"the last quarter of {self.length:,} tokens has a loss lower by {gain.mean:+.4f} nats (standard error "
                f"{gain.error:.4f}) with all tokens before it than with at most {self.length - self.length // 2:,}",
            )
        if (leak := self.leak) is not None:
            if leak.lighthouse:
                yield _no_leak("Is Lighthouse attention free of leaks from the future?", leak.lighthouse[0])
            yield _no_leak("Is dense attention free of leaks from the future?", leak.dense[0])
        if (found := self.passkey) is not None:
            yield Finding(
                question="Are passkeys found?",
                answer="yes" if found.accuracy - CHANCE > 2 * found.error else "no",
                text=f"{found.accuracy:.0%} of the digits, over {len(found.lengths)} lengths up to {max(found.lengths):,} "
                f"tokens and {len(found.depths)} depths; guessing finds {CHANCE:.0%}",
            )

    def _trained(self) -> Finding:
        question = "Is dense attention trained?"
        if not math.isfinite(self.dense_loss):
            return Finding(question=question, answer="no", text=f"the dense loss is {self.dense_loss}")
        if self.dense_loss > self.guessing - _LEARNT:
            text = f"the dense loss, {self.dense_loss:.4f} nats, is no better than guessing, {self.guessing:.4f}"
            return Finding(question=question, answer="no", text=text)
        if self.gap is None:
            reasons = "; ".join(dict.fromkeys(call.reason for call in self.calls)) or "none was found"
            text = f"no attention call runs under Lighthouse, so there is nothing to compare with: {reasons}"
            return Finding(question=question, answer="unclear", text=text)
        text = f"dense loss minus Lighthouse loss: {self.gap}"
        if self.gap.sign > 0:
            text += "; the model is at home in Lighthouse attention: stage 2, dense steps, has still to come or to go on"
        return Finding(question=question, answer=_answer(self.gap.sign, -1), text=text)

    def table(self) -> Group:
        """Losses by position and findings, for rich."""
        losses = Table()
        for column in ("tokens", "dense loss", "Lighthouse loss*"):
            losses.add_column(column, justify="right")
        for at in self.positions:
            losses.add_row(f"{at.start:,} to {at.end:,}", f"{at.dense:.4f}", or_dash(at.lighthouse, ".4f"))
        losses.add_section()
        losses.add_row("all", f"{self.dense_loss:.4f}", or_dash(self.lighthouse_loss, ".4f"))
        answers = Table(title="findings", title_justify="left")
        for column in ("question", "answer", "why"):
            answers.add_column(column, overflow="fold")
        for finding in self.findings:
            answer = Text(finding.answer, style=_STYLES[finding.answer])
            answers.add_row(Text(finding.question), answer, Text(finding.text))
        note = Text("* no likelihood: the choice of windows sees later tokens", style="dim italic")
        asked: list[RenderableType] = [self.leak.table()] if self.leak else []
        asked += [self._passkeys()] if self.passkey else []
        return Group(Text(self._headline()), losses, note, *asked, answers)

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        (console or Console()).print(self.table())

    def __str__(self) -> str:
        return as_text(self.table(), width=150)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"passed": self.passed, "findings": [asdict(finding) for finding in self.findings]} | asdict(self)

    def save(self, folder: str | Path) -> list[Path]:
        """Write `validation.json`, `position_loss.png` and, where passkeys were asked for, `passkey.png`.

        The pictures need matplotlib, the extra `plot`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "validation.json", folder / "position_loss.png"]
        written[0].write_text(json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        validation_figures.save_positions(self, written[1])
        if self.passkey is not None:
            written.append(folder / "passkey.png")
            validation_figures.save_passkeys(self.passkey, written[2], title=self.title)
        return written

    def _headline(self) -> str:
        rewritten = sum(call.rewritten for call in self.calls)
        return (
            f"{self.title}: loss of {self.windows} windows of {self.length:,} tokens, nats per token; "
            f"{rewritten} of {len(self.calls)} attention calls rewritten for the Lighthouse loss"
        )

    def _passkeys(self) -> Table:
        assert self.passkey is not None
        table = Table(title=f"passkeys found, of {self.passkey.trials} each, by depth", title_justify="left")
        table.add_column("tokens", justify="right")
        for depth in self.passkey.depths:
            table.add_column(f"{depth:.0%}", justify="right")
        for length, row in zip(self.passkey.lengths, self.passkey.found, strict=True):
            table.add_row(f"{length:,}", *(f"{cell:.0%}" for cell in row))
        return table


def _answer(sign: int, wanted: int) -> Answer:
    return "unclear" if sign == 0 else "yes" if sign == wanted else "no"


def _no_leak(question: str, leak: Leak) -> Finding:
    answers: dict[str, Answer] = {"none seen": "yes", "leaks": "no", "unclear": "unclear"}
    return Finding(question=question, answer=answers[leak.reading], text=said(leak))


def _finite(value: Any) -> Any:
    """The same data with words for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
