"""One training run of two stages: the steps, their speed, and validation under dense attention all the way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from text import Text
from torch import Tensor, nn

import lighthouse_fx

WARM_UP_STEPS = 2  # first steps of a stage, which compile: left out of every speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What both runs share: steps, tokens and optimiser."""

    steps: int
    lighthouse_steps: int
    length: int
    batch: int
    lr: float
    warmup: int
    seed: int
    validate_every: int

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then level across both stages, then down to nothing over the last fifth."""
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (0.2 * self.steps))

    def validates_after(self, step: int) -> bool:
        """Whether validation follows this many steps."""
        return step % self.validate_every == 0 or step in (self.lighthouse_steps, self.steps)


@dataclass(slots=True, kw_only=True)
class Stage:
    """Some steps of a run under one kind of attention."""

    attention: str  # "lighthouse" or "dense"
    first: int
    steps: int
    context: Callable[[], AbstractContextManager[None]]
    seconds: list[float] = field(default_factory=list)  # of each step
    losses: list[float] = field(default_factory=list)  # training loss of each step, under this stage's attention

    @property
    def step_seconds(self) -> float:
        """Median time of a step, compilation and warm-up left out."""
        return statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)

    @property
    def compile_seconds(self) -> float:
        """What the steps took beyond their median speed. The second run finds graphs that the first compiled."""
        return max(0.0, sum(self.seconds) - len(self.seconds) * self.step_seconds)


@dataclass(slots=True, kw_only=True)
class Run:
    """A finished run. Validation is by number of steps, one loss per held-out window, always under dense attention."""

    name: str
    stages: list[Stage]
    validation: dict[int, list[float]] = field(default_factory=dict)
    peak_bytes: int = 0

    def loss_at(self, step: int) -> float:
        """Mean validation loss after some steps, nats per byte."""
        return statistics.fmean(self.validation[step])

    @property
    def seconds(self) -> float:
        """Time of all steps at the median speed of their stage, compilation left out."""
        return sum(stage.steps * stage.step_seconds for stage in self.stages)

    def seconds_until(self, step: int) -> float:
        """The same for the first steps only."""
        return sum(min(max(step - stage.first, 0), stage.steps) * stage.step_seconds for stage in self.stages)


def stages(plan: Plan, *, lighthouse: bool) -> list[Stage]:
    """Stage 1 with Lighthouse, stage 2 dense. The dense run is cut at the same step, so that both can be compared."""
    first = ("lighthouse", lighthouse_fx.pretraining) if lighthouse else ("dense", lighthouse_fx.dense)
    cut, rest = plan.lighthouse_steps, plan.steps - plan.lighthouse_steps
    both = [
        Stage(attention=first[0], first=0, steps=cut, context=first[1]),
        Stage(attention="dense", first=cut, steps=rest, context=lighthouse_fx.dense),
    ]
    return [stage for stage in both if stage.steps > 0]


def train(
    name: str,
    model: nn.Module,
    text: Text,
    plan: Plan,
    validation: Tensor,
    *,
    lighthouse: bool,
    log: lighthouse_fx.RunLog,
    budget: lighthouse_fx.BudgetControl | None = None,
    measured_on: Tensor | None = None,
) -> Run:
    """Train a model in place; with `lighthouse`, stage 1 runs under Lighthouse attention.

    Under a budget control it measures on the given windows [B, N], by default on each step's own.
    """
    run = Run(name=name, stages=stages(plan, lighthouse=lighthouse))
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = Optimizer(model)
    text_columns = TextColumn("{task.description}"), TextColumn("{task.fields[state]}")
    bar = Progress(text_columns[0], BarColumn(20), MofNCompleteColumn(), text_columns[1], TimeRemainingColumn())
    with bar:
        task = bar.add_task(name, total=plan.steps, state="compiling")
        for number, stage in enumerate(run.stages, start=1):
            bar.update(task, description=f"{name} run, stage {number}")
            for step in range(stage.first, stage.first + stage.steps):
                windows = text.batch(step, batch=plan.batch, length=plan.length, seed=plan.seed).to(device)
                started = time.perf_counter()
                model.train()
                with log.step(step, tokens=plan.batch * plan.length) as logged:
                    # The backward belongs inside too: activation checkpointing runs the forward again there.
                    seen = windows[:, :-1] if measured_on is None else measured_on
                    with stage.context(), budget.step(step, seen) if budget else nullcontext():
                        loss = mean_loss(model, windows)
                        loss.backward()
                    optimizer.step(plan.rate(step))
                    logged.loss = loss.item()  # waits for the device
                stage.losses.append(logged.loss)
                stage.seconds.append(time.perf_counter() - started)
                speed = plan.batch * plan.length / stage.step_seconds
                bar.update(task, advance=1, state=f"loss {stage.losses[-1]:.3f}, {speed:,.0f} tokens/s")
                if plan.validates_after(step + 1):
                    run.validation[step + 1] = validate(model, validation, batch=plan.batch)
                    log.validation(step + 1, run.loss_at(step + 1))
    if device.type == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated(device)
    return run


def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-byte cross-entropy in nats. windows: [B, N + 1]."""
    logits = model(windows[:, :-1]).logits  # [B, N, 256]
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, windows: Tensor, *, batch: int) -> list[float]:
    """The loss of each held-out window under dense attention, whatever the stage."""
    model.eval()
    losses: list[float] = []
    with lighthouse_fx.dense():
        for rows in windows.split(batch):  # equal batches, so that nothing is compiled again
            logits = model(rows[:, :-1]).logits.float()  # [B, N, 256]
            losses += F.cross_entropy(logits.mT, rows[:, 1:], reduction="none").mean(dim=1).tolist()
    return losses


class Optimizer:
    """AdamW with gradient clipping. A model of lower precision gets master weights in float32."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else w.detach().float().requires_grad_() for w in self.weights]
        self.adam = torch.optim.AdamW(self.masters, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at a learning rate; gradients are gone afterwards."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
