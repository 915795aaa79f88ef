"""What callbacks of trainers share: a stage that is entered in one hook and left in another."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lighthouse_fx.training.two_stage import TwoStage


class Steps:
    """Drives a schedule from hooks. A trainer counts the steps; the schedule is told."""

    def __init__(self, schedule: TwoStage) -> None:
        if not isinstance(schedule, TwoStage):
            raise TypeError(
                f"schedule={schedule!r} is a {type(schedule).__name__}: give lighthouse_fx.TwoStage(max_steps)"
            )
        self.schedule = schedule
        self.saved: dict[str, Any] = schedule.state_dict()
        """The state as of the last finished step: micro-batches of an unfinished one do not count."""
        self._open = ExitStack()

    def begin_run(self, step: int, total_steps: int, saved: dict[str, Any] | None) -> None:
        """Training begins, or goes on.

        Args:
            step: the trainer's number of finished steps; total_steps: how many it will make in all.
            saved: the schedule's state in the checkpoint that it goes on from, if there was one.

        Raises:
            ValueError: trainer and schedule disagree, or a model that was trained on is trained from step 0 again.
        """
        self.leave()
        mine = self.schedule.total_steps
        if total_steps != mine:
            raise ValueError(
                f"the trainer makes {total_steps} steps, and the schedule has total_steps={mine}: give the trainer "
                f"max_steps={mine}, or make TwoStage({total_steps}, ...)"
            )
        if saved is not None:
            self.schedule.load_state_dict(saved)
        elif step < self.schedule.step:
            raise ValueError(
                f"the trainer begins at step {step}, and this schedule is at step {self.schedule.step} of {mine}, so the model "
                "was trained already: resume from a checkpoint. For another model make another TwoStage; to train a "
                "finished model on, use no schedule, for it is dense"
            )
        if step != self.schedule.step:
            self.schedule.seek(step)
        self.saved = self.schedule.state_dict()

    def enter(self, step: int) -> None:
        """A step begins, or a micro-batch of it."""
        self.leave()
        self._open.enter_context(self.schedule.stage(step))

    def leave(self) -> None:
        """The stage ends, if one is on."""
        self._open.close()

    def finish(self) -> None:
        """The optimiser step is done. Its loss comes later."""
        self.leave()
        self.schedule.finish(conclude=False)
        self.saved = self.schedule.state_dict()

    def end_run(self) -> None:
        """Training ends; if all steps are done, the schedule tells so."""
        self.leave()
        if self.schedule.finished:
            self.schedule.conclude()

    def observe_mean(self, loss: float, *, first: int, last: int) -> None:
        """Have the mean loss of some steps watched, unless they are of both stages."""
        if self.schedule.is_dense(first) == self.schedule.is_dense(last):
            self.schedule.observe(last, loss)
            self.saved = self.schedule.state_dict()
