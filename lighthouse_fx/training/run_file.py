"""Reads the log of a training run: one JSON object a line, as `RunLog` writes them.

    {"kind": "run", ...}          what was run: one at the start, another for every time that it was resumed
    {"kind": "step", ...}         a training step; its loss is that of the stage's own attention
    {"kind": "validation", ...}   a loss under dense attention after so many steps
    {"kind": "event", ...}        a switch of stages, a warning, an error, or what the user noted

A run that is killed loses at most the line that it was writing. One that goes on from a checkpoint does some steps again:
what it writes from there on takes the place of what was there. The types of each line are checked here, once, so that whoever
shows a run may rely on them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lighthouse_fx.arguments import is_integer, is_number

FORMAT = 1
_WIDEST = 2**63  # no count is larger
_LARGEST = 1e100  # no loss and no time is larger, and sums of these do not overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLine:
    """One training step.

    Attributes:
        stage: "lighthouse" where any attention call ran rewritten, otherwise "dense".
        loss: under the stage's own attention: with Lighthouse it is not a language-model likelihood.
        tokens, seconds: of this process, whatever is in the step; None where they were not given.
        length: N; gathered: S, of the longest rewritten call; calls, rewritten: attention calls that trained.
        dense_flops: what dense attention needs for these calls; saved_flops: how much of it did not run.
        memory: the most bytes in use so far.
    """

    step: int
    stage: str
    loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    length: int | None = None
    gathered: int | None = None
    calls: int = 0
    rewritten: int = 0
    dense_flops: int = 0
    saved_flops: int = 0
    uncounted: int = 0
    memory: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """None where tokens or time are not known."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a step (None: at none), with what else was noted."""

    name: str
    step: int | None
    text: str = ""
    more: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run as it stands in its log.

    Attributes:
        headers: what was run, first and at every resumption.
        steps: in order; validation: dense loss by number of steps; torn: lines that were not whole.
        replaced: steps that a later session did again.
    """

    path: Path
    headers: tuple[Mapping[str, Any], ...]
    steps: tuple[StepLine, ...]
    validation: Mapping[int, float]
    events: tuple[Event, ...]
    torn: int = 0
    replaced: int = 0

    @property
    def stages(self) -> dict[str, list[StepLine]]:
        """The steps by stage, in the order in which stages first occur."""
        found: dict[str, list[StepLine]] = {}
        for step in self.steps:
            found.setdefault(step.stage, []).append(step)
        return found

    def named(self, name: str) -> list[Event]:
        """The events of one name."""
        return [event for event in self.events if event.name == name]


def read_run(path: str | Path) -> RunData:
    """Read a log, as far as it was written.

    Raises:
        ValueError: a file that is no log, one of a newer format, or a line that RunLog did not write, by its number.
    """
    path = Path(path)
    lines, torn = _objects(path)
    if not lines or lines[0][1].get("kind") != "run":
        raise ValueError(f"path={str(path)!r} is no log of a run: line 1 is no header; give a file that RunLog wrote")
    for place, line in lines:
        _check_line(line, f"path={str(path)!r}, line {place}")
    headers: list[Mapping[str, Any]] = []
    steps: dict[int, StepLine] = {}
    validation: dict[int, float] = {}
    events: list[tuple[int, Event]] = []  # each with the session that wrote it
    replaced = 0
    for _, line in lines:
        match line.pop("kind"):
            case "run":
                headers.append(line)
            case "step":
                step = _step_line(line)
                again = []
                while steps and (last := next(reversed(steps))) >= step.step:
                    again.append(steps.pop(last))
                replaced += len(again)
                if again:  # the run went back: what came after this step never happened to this model
                    validation = {n: loss for n, loss in validation.items() if n <= step.step}
                    events = [
                        (session, event)
                        for session, event in events
                        if session == len(headers) or event.step is None or event.step < step.step
                    ]
                steps[step.step] = step
            case "validation":
                validation[line["step"]] = float(line["loss"])
            case "event":
                name, at, text = line.pop("event"), line.pop("step", None), line.pop("text", "")
                events.append((len(headers), Event(name=name, step=at, text=text, more=line)))
    return RunData(
        path=path,
        headers=tuple(headers),
        steps=tuple(steps.values()),
        validation=dict(sorted(validation.items())),
        events=tuple(event for _, event in events),
        torn=torn,
        replaced=replaced,
    )


def number(value: float | None) -> float | str | None:
    """A number as JSON has it: strict JSON knows neither NaN nor infinity, so they are words, which `float` reads."""
    if value is None or abs(value) < _LARGEST:
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _objects(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """The lines that are whole, by their numbers from 1, and how many are not."""
    found: list[tuple[int, dict[str, Any]]] = []
    torn = 0
    for place, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, or brackets without end
            torn += 1
            continue
        if isinstance(value, dict) and value.get("kind") in ("run", *_LINES):
            found.append((place, value))
        else:
            torn += 1
    return found, torn


def _step_line(line: Mapping[str, Any]) -> StepLine:
    known = {field.name: line[field.name] for field in fields(StepLine) if field.name in line}
    if known.get("loss") is not None:
        known["loss"] = float(known["loss"])
    return StepLine(**known)


# --- the types of a line ----------------------------------------------------------------------------------------------


def _is_count(value: Any) -> bool:
    return is_integer(value) and 0 <= value < _WIDEST


def _is_loss(value: Any) -> bool:
    """A number, or a word for one that JSON does not have (`number`)."""
    return value in ("nan", "inf", "-inf") if isinstance(value, str) else is_number(value) and abs(value) < _LARGEST


def _is_time(value: Any) -> bool:
    return is_number(value) and (value == 0 or 1e-9 <= value < _LARGEST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_Checks = Mapping[str, tuple[Callable[[Any], bool], str]]
_COUNT = (_or_none(_is_count), "a count or null")
_HEADER: _Checks = {
    "format": (_is_count, "a count"),
    "card": (_or_none(_is_text), "a text"),
    "parameters": _COUNT,
    "flops_counted": (_or_none(_is_text), "a text"),
}
_LINES: Mapping[str, _Checks] = {
    "step": {
        "step": (_is_count, "a count"),
        "stage": (lambda value: value in ("lighthouse", "dense"), "'lighthouse' or 'dense'"),
        "loss": (_or_none(_is_loss), "a number or null"),
        "tokens": _COUNT,
        "seconds": (_or_none(_is_time), "seconds or null"),
        "length": _COUNT,
        "gathered": _COUNT,
        **{name: (_is_count, "a count") for name in ("calls", "rewritten", "dense_flops", "saved_flops", "uncounted")},
        "memory": _COUNT,
    },
    "validation": {"step": (_is_count, "a count"), "loss": (_is_loss, "a number")},
    "event": {"event": (_is_text, "a text"), "step": _COUNT, "text": (_is_text, "a text")},
}
_NEEDED = {"run": (), "step": ("step", "stage"), "validation": ("step", "loss"), "event": ("event",)}


def _check_line(line: Mapping[str, Any], where: str) -> None:
    """Each known field has the type that `RunLog` gives it; others are the user's.

    Raises:
        ValueError: naming the file, the line and the field.
    """
    kind = line["kind"]
    if is_integer(line.get("format")) and line["format"] > FORMAT:
        raise ValueError(
            f"{where} has format {line['format']}, and this version reads up to {FORMAT}: use a newer lighthouse-fx"
        )
    wrong = [f"no {name}" for name in _NEEDED[kind] if name not in line]
    wrong += [
        f"{name}={line[name]!r}, which has to be {wanted}"
        for name, (fits, wanted) in (_HEADER if kind == "run" else _LINES[kind]).items()
        if name in line and not fits(line[name])
    ]
    if wrong:
        said = f"holds a line that RunLog did not write ({kind} with {'; '.join(wrong)})"
        raise ValueError(f"{where} {said}: remove it, or give the log as it was")
