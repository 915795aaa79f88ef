"""`RunLog`: writes down a training run, step by step, so that anybody can check later what ran and what it saved.

    log = RunLog("run.jsonl", model=model, seed=0)
    for number, batch in enumerate(batches):
        with stage, log.step(number, tokens=batch.numel()) as step:
            loss = model(batch).loss
            loss.backward()
            optimizer.step(); optimizer.zero_grad()
            step.loss = loss.item()
    log.validation(len(batches), dense_loss)

What a step's stage is, and what it saved, is not taken from anybody's word: it is that of the graphs that ran in it.
`lighthouse report run.jsonl` shows the log; `run_file` says what the lines mean.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighthouse_fx.arguments import check_integer
from lighthouse_fx.frontend.existing_compilation import setting_of
from lighthouse_fx.measure import machine
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.runtime import journal
from lighthouse_fx.version import __version__

from . import flops
from .loss_monitor import Divergence, LossMonitor, Reference, read_reference
from .run_file import FORMAT, StepLine, number, read_run
from .saved_config import differences, restore_config, save_config


class RunLog:
    """The log of one training run, a file of JSON lines. Each line is written at once and whole; an existing log is continued.

    Args:
        path: the file; missing folders are made. One RunLog writes it at a time: of several ranks let the first write, or give
            each a file of its own.
        model: its size is noted, and the options that it is compiled with.
        config: these options, if they cannot be found out from the model.
        seed: of the run; device: the one it runs on, by default that of the model's parameters.
        reference: losses of a dense run to compare with (`Reference`, or the path of a log or CSV file); rule: when to warn.
        about: whatever else belongs into the header, as JSON.

    Raises:
        ValueError: the file exists and is no log; or the reference is none.
        BlockingIOError: another RunLog, of this or another process, is writing the file.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: nn.Module | None = None,
        config: LighthouseConfig | None = None,
        seed: int | None = None,
        device: torch.device | str | None = None,
        reference: Reference | str | Path | None = None,
        rule: Divergence | None = None,
        **about: Any,
    ) -> None:
        self.path = Path(path)
        self._device = torch.device(device or _device_of(model))
        self._monitor: LossMonitor | None = None
        if reference is not None:
            self._monitor = LossMonitor(
                reference if isinstance(reference, Reference) else read_reference(reference), rule
            )
        self._before: StepLine | None = None
        self._earlier: list[StepLine] = []  # of the file that is continued, until the first step
        if config is None and model is not None:
            config = setting_of(model).config
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, and for appending: a line is one call of the system, so a killed process leaves all lines before it.
        self._file = self.path.open("ab", buffering=0)
        try:
            _lock(self._file, self.path)
            changed = self._continue(config) if os.fstat(self._file.fileno()).st_size else ""
            self._torn = _is_torn(self.path)
        except BaseException:
            self._file.close()
            raise
        self._write(
            "run",
            format=FORMAT,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            config=save_config(config) if config else None,
            card=machine.describe(self._device)["card"],
            versions=machine.versions() | {"lighthouse-fx": __version__},
            parameters=sum(p.numel() for p in model.parameters()) if model is not None else None,
            seed=seed,
            command=machine.command(),
            flops_counted=flops.HOW_COUNTED,
            reference=self._monitor.reference.name if self._monitor else None,
            rule=asdict(self._monitor.rule) if self._monitor else None,
            **about,
        )
        if changed:
            self._warn(None, f"the run goes on under other options than it was begun with: {changed}")

    def step(self, step: int, *, tokens: int | None = None) -> Step:
        """Watch a training step: a context manager around forward, backward and update.

        Set its `loss`. It takes the time of its block, so end with something that waits for the device, as `loss.item()` does.
        After an exception an event says so, and there is no step.
        """
        check_integer("step", step, least=0)
        if tokens is not None:
            check_integer("tokens", tokens, least=0)
        return Step(self, step, tokens)

    def validation(self, step: int, loss: float) -> None:
        """Write the loss on held-out text under dense attention, after so many steps."""
        check_integer("step", step, least=0)
        self._write("validation", step=step, loss=number(float(loss)))
        if self._monitor:
            self._warn(step, self._monitor.validation(step, float(loss)))

    def event(self, name: str, *, step: int | None = None, text: str = "", **more: Any) -> None:
        """Write what happened: "switch" and "warm-up", say, or any other name. What is in `more` must be JSON."""
        if step is not None:
            check_integer("step", step, least=0)
        self._write("event", event=name, step=step, text=text, **more)

    def close(self) -> None:
        """Close the file. Nothing is lost without it."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _continue(self, config: LighthouseConfig | None) -> str:
        """Take in what the file holds. Returns which options were others then, or ""."""
        earlier = read_run(self.path)
        self._earlier = list(earlier.steps)
        if self._monitor:
            self._monitor.catch_up(earlier)
        before = earlier.headers[-1].get("config")
        if before is None or config is None:
            return ""
        return differences(restore_config(before, name=f"path={str(self.path)!r}, config"), config)

    # --- what a step writes -------------------------------------------------------------------------------------------

    def _finish(self, step: int, *, loss: Any, tokens: int | None, seconds: float, calls: list[AttentionRecord]) -> None:
        rewritten = [call for call in calls if call.rewritten]
        counted = flops.count(calls)
        lengths = [(c.length, c.gathered) for c in rewritten or calls if isinstance(c.length, int)]
        length, gathered = max(lengths, key=lambda pair: pair[0], default=(None, None))
        line = StepLine(
            step=step,
            stage="lighthouse" if rewritten else "dense",
            loss=None if loss is None else float(loss),
            tokens=tokens,
            seconds=seconds,
            length=length,
            gathered=gathered if rewritten and isinstance(gathered, int) else None,
            calls=len(calls),
            rewritten=len(rewritten),
            dense_flops=counted.dense,
            saved_flops=counted.saved,
            uncounted=counted.uncounted,
            memory=machine.peak_memory(self._device),
        )
        self._write("step", **(asdict(line) | {"loss": number(line.loss), "tokens_per_second": line.tokens_per_second}))
        if self._earlier:  # steps after a checkpoint are done again, and another run begins at 0
            self._before = next((x for x in reversed(self._earlier) if x.step < step), None)
            self._earlier = []
        before, self._before = self._before, line
        if before is not None and before.stage != line.stage:
            self.event("switch", step=step, text=f"from {before.stage} to {line.stage} attention")
        elif before is not None and line.rewritten < before.rewritten:
            self._warn(
                step,
                f"{line.rewritten} attention calls ran rewritten, and {before.rewritten} in the step before: "
                "see lighthouse_fx.reports() for those that fell back to dense attention",
            )
        if line.loss is None:
            return
        if self._monitor:
            self._warn(step, self._monitor.training(step, line.loss, stage=line.stage))
        elif not math.isfinite(line.loss):
            self._warn(step, f"the training loss is {line.loss}")

    def _warn(self, step: int | None, text: str) -> None:
        if text:
            self.event("warning", step=step, text=text)
            where = str(self.path) if step is None else f"step {step}"
            warnings.warn(f"{where}: {text}", RuntimeWarning, stacklevel=4)

    def _write(self, kind: str, **content: Any) -> None:
        """Write a line whole.

        Raises:
            OSError: it was not, as on a full disk. What there is of it is left behind as a line of its own.
        """
        line = json.dumps({"kind": kind, **content}, allow_nan=False).encode() + b"\n"
        left = memoryview(b"\n" + line if self._torn else line)
        while left:
            try:
                written = self._file.write(left)
            except OSError as error:
                said = f"a line of the run log was not written ({error.strerror})"
                raise OSError(error.errno, said, str(self.path)) from error
            left = left[written:]
            self._torn = bool(left)  # the file ends within a line


class Step:
    """One training step that is being watched; `loss` is its loss, a number, and `tokens` how many it trained on."""

    def __init__(self, log: RunLog, step: int, tokens: int | None) -> None:
        self.loss: float | None = None
        self.tokens = tokens
        self._log, self._step = log, step

    def __enter__(self) -> Step:
        self._counting: AbstractContextManager[list[AttentionRecord]] = journal.count()
        self._calls = self._counting.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        seconds = time.perf_counter() - self._started
        self._counting.__exit__(None, None, None)
        if error is not None:
            self._log.event("error", step=self._step, text=f"{type(error).__name__}: {error}")
        else:
            self._log._finish(self._step, loss=self.loss, tokens=self.tokens, seconds=seconds, calls=self._calls)


def _device_of(model: nn.Module | None) -> torch.device:
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is not None:
        return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _lock(file: FileIO, path: Path) -> None:
    """Keep other writers out, until the file is closed or the process ends.

    Raises:
        BlockingIOError: another RunLog is writing the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        said = (
            "another RunLog is writing this file, and their steps would replace each other: let one rank write, or give each "
            f"a file of its own, such as {path.stem}.rank1{path.suffix}"
        )
        raise BlockingIOError(error.errno, said, str(path)) from error
    except OSError as error:  # some network file systems have no locks
        warnings.warn(f"{path} cannot be locked ({error.strerror}): see that one process writes it", stacklevel=3)


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
