"""Hugging Face `Trainer`: a callback that compiles the model block by block and switches stages.

    Trainer(model=model, args=args, ..., callbacks=[LighthouseCallback(TwoStage(args.max_steps))])

Trainer's own `torch_compile_backend` takes no backend that it does not know, so leave `torch_compile` off.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lighthouse_fx.frontend.regional import compile
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.training.two_stage import TwoStage

from .steps import Steps

_KEY = "lighthouse_fx"


class LighthouseCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not seen by mypy
    """Trains as a `TwoStage` says. Resuming from a checkpoint goes on in the stage of its step.

    The model is compiled in place when training begins, with the other arguments (see `lighthouse_fx.compile`). A step's
    micro-batches are in one stage; evaluation is dense. Losses are watched as Trainer logs them, which are means over
    `logging_steps`, so `window` counts logs. With `rewarm_steps` the learning rate is scaled around each optimiser step, and
    Trainer logs the planned one.

    An exception inside a step leaves the stage of that step on: call `close()` if the process goes on to something else.
    """

    def __init__(
        self,
        schedule: TwoStage,
        config: LighthouseConfig | None = None,
        *,
        dense_layers: Sequence[int | str] | None = None,
        **compile_arguments: Any,
    ) -> None:
        self._steps = Steps(schedule)
        self._compile_arguments = {"config": config, "dense_layers": dense_layers, **compile_arguments}
        self._compiled: object = None
        self._rewarmed = ExitStack()
        self._logged = 0

    def close(self) -> None:
        """Leave the stage that is on, if one is."""
        self._rewarmed.close()
        self._steps.leave()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compile the model, and find out where the run is."""
        self.close()
        if args.torch_compile:
            raise ValueError(
                "torch_compile=True would compile the whole model once more: leave it off, LighthouseCallback compiles the "
                "blocks"
            )
        saved = state.stateful_callbacks.get(_KEY)
        self._steps.begin_run(state.global_step, state.max_steps, saved)
        if self._steps.schedule.finished:
            raise ValueError(
                f"the checkpoint is of a finished run, all {state.max_steps} steps are done, and Trainer would make one more: "
                "its model is dense. To train it on, leave LighthouseCallback out"
            )
        self._logged = state.global_step
        model = kwargs["model"]
        if self._compiled is not model:
            compile(model, **self._compile_arguments)
            self._compiled = model

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step."""
        self._steps.enter(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scale the learning rate, where it is warmed up again."""
        self._rewarmed.enter_context(self._steps.schedule.rewarmed(kwargs["optimizer"]))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the learning rate back."""
        self._rewarmed.close()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimiser step, before Trainer logs, evaluates and saves."""
        self._steps.finish()
        self._keep(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Watch the mean loss since the last log."""
        loss = (logs or {}).get("loss")
        if loss is not None and state.global_step > self._logged:
            self._steps.observe_mean(float(loss), first=self._logged, last=state.global_step - 1)
            self._logged = state.global_step
            self._keep(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave no stage on; the last loss is known."""
        self.close()
        self._steps.end_run()

    def _keep(self, state: TrainerState) -> None:
        # Trainer writes this dict into trainer_state.json. Its own protocol would make a new callback of what it reads,
        # without the schedule's `on_event`.
        state.stateful_callbacks[_KEY] = self._steps.saved
