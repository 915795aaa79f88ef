"""Lightning: a callback that compiles the module block by block and switches stages.

    Trainer(max_steps=1000, callbacks=[LighthouseCallback(TwoStage(1000))])
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lighthouse_fx.frontend.regional import compile
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.training.two_stage import TwoStage

from .steps import Steps


class LighthouseCallback(Callback):  # type: ignore[misc]  # lightning is not seen by mypy
    """Trains as a `TwoStage` says. `fit(ckpt_path=...)` goes on in the stage of the checkpoint's step.

    The module is compiled in place when fitting begins, with the other arguments (see `lighthouse_fx.compile`); a module that
    compiles itself in `configure_model`, as sharded strategies want it, goes with `compile_blocks=False`. The micro-batches
    of `accumulate_grad_batches` are in one stage; validation is dense. The loss of a step's last micro-batch is watched.
    """

    def __init__(
        self,
        schedule: TwoStage,
        config: LighthouseConfig | None = None,
        *,
        dense_layers: Sequence[int | str] | None = None,
        compile_blocks: bool = True,
        **compile_arguments: Any,
    ) -> None:
        self._steps = Steps(schedule)
        self._compile_arguments = {"config": config, "dense_layers": dense_layers, **compile_arguments}
        self._compile_blocks = compile_blocks
        self._compiled: object = None
        self._loaded: dict[str, Any] | None = None
        self._rewarmed = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile the module, and find out where the run is."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimisers, and Lightning counts the steps of each as one: "
                "LighthouseCallback takes a single one. Enter TwoStage.stage(step) in the module's training_step"
            )
        loaded, self._loaded = self._loaded, None
        self._steps.begin_run(trainer.global_step, trainer.estimated_stepping_batches, loaded)
        if self._compile_blocks and self._compiled is not pl_module:
            compile(pl_module, **self._compile_arguments)
            self._compiled = pl_module

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before a micro-batch."""
        self._steps.enter(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Scale the learning rate, where it is warmed up again; it is put back after the micro-batch."""
        self._rewarmed.enter_context(self._steps.schedule.rewarmed(optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a micro-batch; checkpoints are written later."""
        self._rewarmed.close()
        self._steps.leave()
        step = self._steps.schedule.step
        if trainer.global_step > step:
            self._steps.finish()
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None:  # Lightning has divided it by the number of micro-batches
                self._steps.observe_mean(float(loss) * trainer.accumulate_grad_batches, first=step, last=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no stage on; the last loss is known."""
        self._close()
        self._steps.end_run()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no stage on."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's state as of the last finished step."""
        return self._steps.saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: Lightning loads it for validation, too."""
        self._loaded = state_dict

    def _close(self) -> None:
        self._rewarmed.close()
        self._steps.leave()
