"""Warns when a run's loss drifts above that of a dense reference run.

The rule. Two losses of the same number of steps are compared, the run's minus the reference's (between two of its points the
reference is a straight line; outside them nothing is compared). When the mean of the last `smooth` differences has been above
the margin for `patience` comparisons in a row, there is one warning, and another only after it has been below again.

What is compared is dense: validation losses where the run and the reference have them, otherwise training losses of the
dense stage. A training loss under Lighthouse attention is not a likelihood, so it is never compared. In the Lighthouse
stage a model is not yet at home in dense attention, and its dense loss lies above that of a dense run by design (the paper
reports 1.1 to 1.6 nats at the switch, gone within 1,000 to 1,500 steps of 6,000): a wider margin holds there.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lighthouse_fx.arguments import check_integer, check_number

from .run_file import RunData, read_run

_LONGEST_RECOVERY = 1500  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """When a loss counts as too high.

    Args:
        margin: nats above the reference, in the dense stage.
        lighthouse_margin: nats above it in the Lighthouse stage and for `recovery` steps after the switch.
        recovery: steps that the dense stage may take to recover; None: half of the Lighthouse steps, 1,500 at most.
        smooth: differences in a mean; patience: means in a row.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """

    margin: float = 0.1
    lighthouse_margin: float = 2.0
    recovery: int | None = None
    smooth: int = 3
    patience: int = 3

    def __post_init__(self) -> None:
        for name, usual in (("margin", 0.1), ("lighthouse_margin", 2.0)):
            check_number(name, getattr(self, name), above=0, example=usual)
        for name, least in (("recovery", 0), ("smooth", 1), ("patience", 1)):
            if name != "recovery" or self.recovery is not None:
                check_integer(name, getattr(self, name), least=least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Losses of a dense run, by step: on held-out text, and in training."""

    name: str
    validation: Mapping[int, float] = field(default_factory=dict)
    training: Mapping[int, float] = field(default_factory=dict)


def read_reference(path: str | Path) -> Reference:
    """The dense losses of another run's log, or of a CSV file.

    Args:
        path: a log of `RunLog`, of which validation losses and the training losses of dense steps count; or a `.csv` with the
            columns `step` and `loss`, which is taken for dense loss on held-out text, as `validation_loss` is; a column
            `training_loss` is dense loss in training.

    Raises:
        ValueError: no such columns, something that is no number, or no loss at all.
    """
    path = Path(path)
    if path.suffix == ".csv":
        found = _from_csv(path)
    else:
        run = read_run(path)
        dense = {s.step: s.loss for s in run.steps if s.stage == "dense" and s.loss is not None}
        found = Reference(name=path.name, validation=_finite(run.validation), training=_finite(dense))
    if not found.validation and not found.training:
        raise ValueError(f"path={str(path)!r} has no loss under dense attention: give a dense run, or a CSV of step,loss")
    return found


class LossMonitor:
    """Compares a run with a reference, as losses come in."""

    def __init__(self, reference: Reference, rule: Divergence | None = None) -> None:
        self.reference = reference
        self.rule = rule or Divergence()
        self._validation = _Comparison(reference.validation, self.rule)
        self._training = _Comparison(reference.training, self.rule)
        self._dense_since: int | None = 0
        self._validated = False

    def training(self, step: int, loss: float, *, stage: str) -> str:
        """A step's loss. Returns the warning that is due, or "". A loss that is no number is always one."""
        if stage == "lighthouse":
            self._dense_since = None
        elif self._dense_since is None:
            self._dense_since = step
        if not math.isfinite(loss):
            return f"the training loss is {loss}"
        if stage == "lighthouse" or self._validated:
            return ""
        return self._say(self._training.above(step, loss, self._margin(step)), "training loss of the dense stage")

    def validation(self, step: int, loss: float) -> str:
        """A dense validation loss. Returns the warning that is due, or ""."""
        self._validated = self._validated or bool(self.reference.validation)
        if not math.isfinite(loss):
            return f"the dense validation loss is {loss}"
        return self._say(self._validation.above(step, loss, self._margin(step)), "dense validation loss")

    def catch_up(self, run: RunData) -> None:
        """Take in what a run that goes on has written so far, and was warned of then."""
        losses = [(s.step, s.loss, s.stage) for s in run.steps if s.loss is not None]
        held_out = [(step, loss, "") for step, loss in run.validation.items()]
        for step, loss, stage in sorted(losses + held_out, key=lambda point: point[0]):
            if stage:
                self.training(step, loss, stage=stage)
            else:
                self.validation(step, loss)

    def _margin(self, step: int) -> float:
        since = self._dense_since
        recovery = min(_LONGEST_RECOVERY, (since or 0) // 2) if self.rule.recovery is None else self.rule.recovery
        settled = since == 0 or (since is not None and step >= since + recovery)
        return self.rule.margin if settled else self.rule.lighthouse_margin

    def _say(self, above: float | None, what: str) -> str:
        if above is None:
            return ""
        return (
            f"the {what} is {above:.3f} nats above {self.reference.name} (mean of the last {self.rule.smooth} comparisons), "
            f"{self.rule.patience} times in a row beyond the margin"
        )


class _Comparison:
    """One curve against its reference."""

    def __init__(self, reference: Mapping[int, float], rule: Divergence) -> None:
        self._points = sorted(reference.items())
        self._rule = rule
        self._last: deque[float] = deque(maxlen=rule.smooth)
        self._in_a_row = 0

    def above(self, step: int, loss: float, margin: float) -> float | None:
        """How far the loss is above, when that is to be said now."""
        expected = self._at(step)
        if expected is None:
            return None
        self._last.append(loss - expected)
        if len(self._last) < self._rule.smooth:
            return None
        mean = fmean(self._last)
        self._in_a_row = self._in_a_row + 1 if mean > margin else 0
        return mean if self._in_a_row == self._rule.patience else None

    def _at(self, step: int) -> float | None:
        """The reference at a step, on the line between its neighbours."""
        place = bisect_right(self._points, step, key=lambda point: point[0])
        if place and self._points[place - 1][0] == step:
            return self._points[place - 1][1]
        if not 0 < place < len(self._points):
            return None
        (left, low), (right, high) = self._points[place - 1 : place + 1]
        return low + (high - low) * (step - left) / (right - left)


def _finite(losses: Mapping[int, float]) -> dict[int, float]:
    return {step: loss for step, loss in losses.items() if math.isfinite(loss)}


def _from_csv(path: Path) -> Reference:
    curves: dict[str, dict[int, float]] = {"validation_loss": {}, "training_loss": {}}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        try:
            columns = set(reader.fieldnames or ())
            if "step" not in columns or not columns & {"loss", *curves}:
                raise ValueError(
                    f"path={str(path)!r} has the columns {sorted(columns)}: give step,loss in its first line"
                )
            for row in reader:
                for name in columns & {"loss", *curves}:
                    if row[name]:  # others are losses that were taken at other steps
                        step, loss = _point(row["step"], name, row[name], f"path={str(path)!r}, line {reader.line_num}")
                        curves.get(name, curves["validation_loss"])[step] = loss
        except (csv.Error, UnicodeDecodeError) as error:
            where = f"path={str(path)!r}, after line {reader.line_num},"
            raise ValueError(f"{where} is no CSV ({error}): give step,loss in each line") from error
    return Reference(
        name=path.name, validation=_finite(curves["validation_loss"]), training=_finite(curves["training_loss"])
    )


def _point(step: str | None, name: str, loss: str, where: str) -> tuple[int, float]:
    try:
        return int(step or ""), float(loss)
    except ValueError:
        raise ValueError(f"{where} has step={step!r}, {name}={loss!r}: give an integer and a number") from None
