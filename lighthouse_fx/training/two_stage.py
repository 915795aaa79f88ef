"""`TwoStage`: which stage of training a step belongs to, in a run that may be stopped and resumed at any step.

    steps 0 .. lighthouse_steps - 1: Lighthouse attention  ->  steps up to total_steps: dense attention

The stage follows from the number of the optimiser step and from nothing else, so a resumed run is in the right one as soon
as it knows its step. It is switched by `pretraining()` and `dense()`: the compiled model is the same, and recompiles once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lighthouse_fx.arguments import check_integer, check_number
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.runtime.stage import dense, pretraining
from lighthouse_fx.version import __version__

from .recovery import Recovery, StageEvent
from .saved_config import DEFAULTS_0_1_0, differences, restore_config, save_config

_log = logging.getLogger("lighthouse_fx")
RECOMMENDED_FRACTION = 0.5
_PLAN = ("total_steps", "lighthouse_steps", "rewarm_steps")


class TwoStage:
    """The schedule of a pre-training run.

        schedule = TwoStage(16_000)
        for step in schedule:                     # goes on where load_state_dict left off
            with schedule.stage():                # forward and backward of every micro-batch of the step
                loss = model(batch(step)).loss
                loss.backward()
            optimizer.step(); optimizer.zero_grad()
            schedule.finish(loss)                 # the step is done; needed only to save here or to have the loss watched
            save(model, optimizer, schedule.state_dict())

    A loop that counts for itself gives the number: `schedule.stage(step)`. Steps are optimiser steps over the whole run, so
    they never go back (numbers that begin again with each epoch do, which is an error); micro-batches of one step share its
    number and so its stage. Keep the backward inside: activation checkpointing runs the forward again there.

    Only pre-training is for this class. Evaluation needs no stage, being dense by itself under `no_grad()` or `eval()`;
    `stage()` with gradients off is an error. A finished run's model is an ordinary dense model: steps past the end are an
    error, and to load a finished run's state into another plan is one, too. *Fine-tuning is never guessed*, not from a small
    learning rate, from its plan, or from the weights, which look alike: the rule is that whoever trains a finished model on
    uses no TwoStage and compiles without this backend, or stays in `lighthouse_fx.dense()`.

    Args:
        total_steps: optimiser steps of both stages together, at least 1.
        lighthouse_steps: how many of them run under Lighthouse attention, 0 to `total_steps`; or
        fraction: the same as a share, rounded to the nearest step (a half to the even one). Without either, a half, as our own
            runs recommend (docs/evidence.md); the paper's is 0.625.
        config: stage 1's, in the place of the compiled model's own options.
        rewarm_steps: R, over which the learning rate rises again after the switch; 0 is off. See `lr_factor`.
        window: how many losses are averaged to tell that the loss has recovered (see `lighthouse_fx.recovery`).
        on_event: called with each `StageEvent` once it is known. Every event goes to the logger `lighthouse_fx` as well.

    Raises:
        TypeError, ValueError: a bad argument, naming it, its value and the remedy.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        lighthouse_steps: int | None = None,
        fraction: float | None = None,
        config: LighthouseConfig | None = None,
        rewarm_steps: int = 0,
        window: int = 32,
        on_event: Callable[[StageEvent], None] | None = None,
    ) -> None:
        check_integer("total_steps", total_steps, least=1)
        check_integer("rewarm_steps", rewarm_steps, least=0)
        check_integer("window", window, least=1)
        if config is not None and not isinstance(config, LighthouseConfig):
            raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
        self.total_steps = total_steps
        self.lighthouse_steps = _lighthouse_steps(total_steps, lighthouse_steps, fraction)
        self.config = config
        self.rewarm_steps = rewarm_steps
        self.on_event = on_event
        self._window = window
        self._step = 0
        self._place = "between"  # steps; or the present one is "given" by a loop, or "entered"
        self._looping = False
        self._recovery = self._new_recovery()
        if self.lighthouse_steps == total_steps:
            warnings.warn(
                f"lighthouse_steps={self.lighthouse_steps} is all of total_steps, so the model never trains under the dense "
                "attention that it will be used with: leave some steps dense, such as fraction=0.5",
                RuntimeWarning,
                stacklevel=2,
            )

    # --- where the run is ---------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step that is under way, or else the next one; `total_steps` when all are done."""
        return self._step

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self._step >= self.total_steps

    def is_dense(self, step: int | None = None) -> bool:
        """Whether a step, by default the one that `step` tells, belongs to stage 2."""
        return (self._step if step is None else step) >= self.lighthouse_steps

    def __iter__(self) -> Iterator[int]:
        """The steps that are left. A step is done when the next is asked for, if not by `finish` before."""
        if self._place == "entered":
            raise RuntimeError(self._ambiguous("a new loop begins"))
        self._looping = True
        try:
            while not self.finished:
                self._place = "given"
                yield self._step
                if self._place != "between":
                    self.finish()
        finally:
            self._looping = False

    def __repr__(self) -> str:
        where = "finished" if self.finished else f"step {self._step}, {'dense' if self.is_dense() else 'Lighthouse'}"
        return f"TwoStage({self.total_steps}, lighthouse_steps={self.lighthouse_steps}): {where}"

    # --- a step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, step: int | None = None) -> Iterator[None]:
        """The stage of a step, as a context for its forward and backward passes, or as a decorator.

        Args:
            step: its number from 0 in the whole run. Without it, the step of the loop over this schedule.

        Raises:
            RuntimeError: gradients are off, or there is no loop to take the step from.
            TypeError, ValueError: a step that does not belong to the plan, or an earlier one than before.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "schedule.stage() is for training steps, and gradients are off here (no_grad or inference_mode): evaluate "
                "without it, attention is dense then in every stage"
            )
        self._go_to(step)
        if self._place != "entered" and self._step == self.lighthouse_steps > 0:
            self._tell(self._switch())
        self._place = "entered"
        with dense() if self.is_dense() else pretraining(self.config):
            yield

    def finish(self, loss: float | torch.Tensor | None = None, *, conclude: bool = True) -> None:
        """The optimiser step is done: what is saved from here on belongs to the next one.

        Args:
            loss: the step's training loss, which is watched for the jump at the switch and the recovery. A tensor is read,
                which waits for its device.
            conclude: after the last step, tell that the run is finished. False where its loss is observed later.
        """
        if self._place == "between":
            raise RuntimeError(f"schedule.finish() ends no step: step {self._step} was not begun by stage() or a loop")
        step, self._step, self._place = self._step, self._step + 1, "between"
        if loss is not None:
            self.observe(step, loss)
        if self.finished and conclude:
            self.conclude()

    def conclude(self) -> None:
        """Tell that all steps are done, and how the loss took the switch."""
        verdict = self._recovery.verdict() if 0 < self.lighthouse_steps < self.total_steps else "it had one stage"
        message = f"all {self.total_steps} steps are done: {verdict}"
        self._tell(StageEvent(kind="finished", step=self.total_steps - 1, message=message))

    def observe(self, step: int, loss: float | torch.Tensor) -> None:
        """Have the loss of a step watched that `finish` was not given, as where a trainer tells it later."""
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        for event in self._recovery.observe(step, value):
            self._tell(event)

    # --- the learning rate ----------------------------------------------------------------------------------------

    def lr_factor(self, step: int | None = None) -> float:
        """What the planned learning rate of a step, by default the present one, is multiplied with.

        `min(1, (step - lighthouse_steps + 1) / rewarm_steps)` in stage 2: R equal steps up from `1 / R` to 1. In stage 1,
        and with `rewarm_steps=0`, it is 1.
        """
        into = (self._step if step is None else step) - self.lighthouse_steps
        if into < 0 or self.rewarm_steps == 0 or self.lighthouse_steps == 0:
            return 1.0
        return min(1.0, (into + 1) / self.rewarm_steps)

    @contextmanager
    def rewarmed(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """`with schedule.rewarmed(optimizer): optimizer.step()`: the learning rates times `lr_factor`, and back again.

        As they are put back, any learning-rate scheduler goes on as if nothing had been done.
        """
        factor = self.lr_factor()
        before = [group["lr"] for group in optimizer.param_groups]
        if factor != 1.0:
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate * factor
        try:
            yield
        finally:
            if factor != 1.0:
                for group, rate in zip(optimizer.param_groups, before, strict=True):
                    group["lr"] = rate

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the plan, the next step and the losses that are watched. Numbers and lists only.

        Raises:
            RuntimeError: inside a step, when nobody can know whether the optimiser has stepped.
        """
        if self._place == "entered":
            raise RuntimeError(self._ambiguous("the state is saved"))
        plan = {name: getattr(self, name) for name in _PLAN}
        return plan | {
            "config": None if self.config is None else save_config(self.config),
            "defaults": save_config(LighthouseConfig()),  # what a model that was compiled without options rests on
            "version": __version__,
            "step": self._step,
            "recovery": self._recovery.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. A plan without a config takes that of the state.

        Args:
            state: what `state_dict()` returned, in this version or an earlier one. A configuration that was saved before a
                field existed means attention as it was then.

        Raises:
            TypeError, ValueError: the state is damaged (naming the field), or is of another plan, or was saved under other
                defaults that the run may rest on. To change the plan of a run on purpose: `seek(state["step"])`.
        """
        _check_state(state)
        others = {name: state[name] for name in _PLAN if state[name] != getattr(self, name)}
        if others and state["step"] >= state["total_steps"]:
            raise ValueError(
                f"state is of a run whose {state['total_steps']} steps are all done, and this plan has "
                f"{self.total_steps}: its model is dense now. To train it on, use no TwoStage and stay in "
                "lighthouse_fx.dense(); to lengthen the pre-training on purpose, schedule.seek(state['step'])"
            )
        if others:
            mine = {name: getattr(self, name) for name in others}
            raise ValueError(
                f"state has {others}, and this plan {mine}: make TwoStage as the run was begun; to change the plan on "
                "purpose, schedule.seek(state['step'])"
            )
        config = self._config_of(state)
        recovery = self._new_recovery()
        recovery.load_state_dict(state["recovery"])
        self.seek(state["step"])
        self.config, self._recovery = config, recovery
        if self.finished:
            warnings.warn(
                f"state is of a finished run: all {self.total_steps} steps are done, so a loop over this schedule has no step, "
                "and the model is dense from here on",
                RuntimeWarning,
                stacklevel=2,
            )

    def seek(self, step: int) -> None:
        """Go to a step, earlier or later; whatever step is under way is dropped, and losses watched so far are forgotten.

        For frameworks that restore the number of the step themselves, and for going back to an earlier checkpoint.
        """
        check_integer("step", step, least=0)
        if step > self.total_steps:
            raise ValueError(f"step={step} is beyond total_steps={self.total_steps}: give 0 to {self.total_steps}")
        self._step, self._place = step, "between"
        self._recovery = self._new_recovery()

    # --- inside ---------------------------------------------------------------------------------------------------

    def _go_to(self, step: int | None) -> None:
        if step is None and not self._looping:
            raise RuntimeError(
                "schedule.stage() does not know the step: call it inside `for step in schedule:`, or give it the number of the "
                "step, schedule.stage(step)"
            )
        step = self._step if step is None else step
        check_integer("step", step, least=0)
        if step >= self.total_steps:
            raise ValueError(
                f"step={step} does not belong to this plan, 0 to {self.total_steps - 1}: the run is over and its model is "
                "dense. To train on, use no TwoStage and stay in lighthouse_fx.dense(). If this number counts micro-batches, "
                "give that of the optimiser step"
            )
        if step < self._step:
            raise ValueError(
                f"step={step} comes after step {self._step}: give the number of the optimiser step in the whole run, not in "
                "an epoch; schedule.seek(step) goes back on purpose"
            )
        if step > self._step:
            self._step, self._place = step, "between"

    def _config_of(self, state: dict[str, Any]) -> LighthouseConfig | None:
        """Stage 1's configuration in a run that goes on from a state."""
        if state.get("config") is not None:
            saved = restore_config(state["config"], name="state['config']")
            if self.config not in (None, saved):
                raise ValueError(
                    f"state is of a run under {saved}, and this plan has {self.config}: give the config that the run was begun "
                    "with; to change it on purpose, schedule.seek(state['step'])"
                )
            return saved
        if self.config is not None:
            raise ValueError(
                f"state is of a run under the compiled model's own options, and this plan has config={self.config}: leave it "
                "out; to change it on purpose, schedule.seek(state['step'])"
            )
        # The model's options are not known here. Those that were not given are the defaults, which may have changed.
        before = restore_config(state.get("defaults", DEFAULTS_0_1_0), name="state['defaults']")
        changed = differences(before, LighthouseConfig())
        if changed and state["step"] < self.lighthouse_steps:
            raise ValueError(
                "state is of a run under the compiled model's own options in lighthouse-fx "
                f"{state.get('version', '0.1.0')}, and defaults have changed since: {changed}. To go on as the run was begun, "
                "compile the model with all its options, or give TwoStage the config, and call schedule.seek(state['step'])"
            )
        return None

    def _new_recovery(self) -> Recovery:
        return Recovery(switch=self.lighthouse_steps, window=self._window)

    def _switch(self) -> StageEvent:
        level = self._recovery.level
        so_far = "" if level is None else f", the loss so far is {level:.4f}"
        return StageEvent(
            kind="switch", step=self._step, message=f"step {self._step}: dense attention from here on{so_far}", level=level
        )

    def _tell(self, event: StageEvent) -> None:
        _log.info("%s", event.message)
        if self.on_event is not None:
            self.on_event(event)

    def _ambiguous(self, what: str) -> str:
        return (
            f"{what} inside step {self._step}, and whether the optimiser has taken that step is not known: call "
            f"schedule.finish() after optimizer.step(), or schedule.seek({self._step}) to do the step again"
        )


def _lighthouse_steps(total: int, steps: int | None, fraction: float | None) -> int:
    if steps is not None and fraction is not None:
        raise TypeError(f"lighthouse_steps={steps!r} and fraction={fraction!r}: give one of them, such as fraction=0.5")
    fraction = RECOMMENDED_FRACTION if fraction is None else fraction
    if steps is not None:
        check_integer("lighthouse_steps", steps, least=0)
        if steps > total:
            raise ValueError(f"lighthouse_steps={steps} is more than total_steps={total}: give 0 to {total}")
        return steps
    check_number("fraction", fraction, least=0, most=1, example=0.5)
    if fraction > 0 and round(total * fraction) == 0:
        raise ValueError(
            f"fraction={fraction} of total_steps={total} is no whole step: give lighthouse_steps=1, or fraction=0 for a dense "
            "run"
        )
    return round(total * fraction)


def _check_state(state: Any) -> None:
    """A damaged state is an error that names the field, before anything is changed."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state={state!r} is a {type(state).__name__}: give what state_dict() returned")
    if missing := {*_PLAN, "step", "recovery"} - state.keys():
        raise ValueError(f"state={state!r} has no {sorted(missing)}: give what state_dict() returned")
    for name in (*_PLAN, "step"):
        check_integer(f"state[{name!r}]", state[name], least=0)
    if state["step"] > state["total_steps"]:
        raise ValueError(f"state['step']={state['step']} is beyond state['total_steps']={state['total_steps']}: it is damaged")
