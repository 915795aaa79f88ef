"""Reads the log of a training run: one JSON object a line, as `RunLog` writes them.

    {"kind": "run", ...}          what was run: one at the start, another for every time that it was resumed
    {"kind": "step", ...}         a training step; its loss is that of the stage's own attention
    {"kind": "validation", ...}   a loss under dense attention after so many steps
    {"kind": "event", ...}        a switch of stages, a warning, an error, or what the user noted

A run that is killed loses at most the line that it was writing. One that goes on from a checkpoint does some steps again:
what it writes from there on takes the place of what was there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1


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
        ValueError: a file that is no log, or one of a newer format.
    """
    path = Path(path)
    lines, torn = _objects(path)
    try:
        return _as_run(path, lines, torn)
    except (TypeError, KeyError, AttributeError) as error:  # a line of JSON, and not what RunLog writes
        raise ValueError(f"path={str(path)!r} holds a line that RunLog did not write ({error}): give a log as it was") from None


def _as_run(path: Path, lines: list[dict[str, Any]], torn: int) -> RunData:
    if not lines or lines[0].get("kind") != "run":
        raise ValueError(
            f"path={str(path)!r} is no log of a run: its first line is no header; give a file that RunLog wrote"
        )
    headers: list[Mapping[str, Any]] = []
    steps: dict[int, StepLine] = {}
    validation: dict[int, float] = {}
    events: list[tuple[int, Event]] = []  # each with the session that wrote it
    replaced = 0
    for line in lines:
        match line.pop("kind"):
            case "run":
                if line.get("format", 0) > FORMAT:
                    raise ValueError(
                        f"path={str(path)!r} has format {line['format']}, and this version reads up to {FORMAT}: "
                        "use a newer lighthouse-fx"
                    )
                headers.append(line)
            case "step":
                step = _step_line(line)
                again = [number for number in steps if number >= step.step]
                replaced += len(again)
                for number in again:
                    del steps[number]
                if again:  # the run went back: what came after this step never happened to this model
                    validation = {n: loss for n, loss in validation.items() if n <= step.step}
                    events = [
                        (session, event)
                        for session, event in events
                        if session == len(headers) or event.step is None or event.step < step.step
                    ]
                steps[step.step] = step
            case "validation":
                validation[int(line["step"])] = float(line["loss"])
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
    return value if value is None or math.isfinite(value) else str(float(value))


def _objects(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are whole, and how many are not."""
    found: list[dict[str, Any]] = []
    torn = 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:  # that of a text that is no UTF-8 is one, too
            torn += 1
            continue
        if isinstance(value, dict) and "kind" in value:
            found.append(value)
        else:
            torn += 1
    return found, torn


def _step_line(line: Mapping[str, Any]) -> StepLine:
    known = {field.name: line[field.name] for field in fields(StepLine) if field.name in line}
    if known.get("loss") is not None:
        known["loss"] = float(known["loss"])
    return StepLine(**known)
