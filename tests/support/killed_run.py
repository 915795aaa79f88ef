"""A two-stage run that kills itself: `python killed_run.py FOLDER [WHERE STEP]`. Used by test_schedule.py.

It goes on from FOLDER/last.pt if there is one, saves after each second step and at the switch, and appends every step's
number, stage and loss (its bits) to FOLDER/losses. WHERE is "backward" (gradients are there, the optimiser has not stepped),
"stepped" (it has, nothing is saved) or "saved" (all is on disk).
"""

import os
import signal
import sys
from pathlib import Path

import torch
from small_models import FIELDS, Model, inputs, passes_only

from lighthouse_fx import TwoStage
from lighthouse_fx.runtime import stage

STEPS, SWITCH, MICRO = 8, 4, 2


def main(folder: Path, where: str = "", at: str = "-1") -> None:
    torch.manual_seed(0)
    model = Model(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = TwoStage(STEPS, lighthouse_steps=SWITCH, rewarm_steps=3, window=2)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "plan": plan}
    last = folder / "last.pt"
    if last.exists():
        for name, state in torch.load(last).items():
            parts[name].load_state_dict(state)
    for layer in model.layers:
        layer.compile(backend=passes_only, options=dict(FIELDS))

    def die(here: str, step: int) -> None:
        if (here, str(step)) == (where, at):
            os.kill(os.getpid(), signal.SIGKILL)

    for step in schedule:
        losses = []
        for micro in range(MICRO):
            torch.manual_seed(step * MICRO + micro)
            with schedule.stage():
                loss = (model(x := inputs()) - x.roll(1, 1)).square().mean()
                loss.backward()
                kind = stage.current.kind
            losses.append(loss.detach())
        die("backward", step)
        with schedule.rewarmed(optimizer):
            optimizer.step()
        plan.step()
        optimizer.zero_grad()
        mean = torch.stack(losses).mean()
        schedule.finish(mean)
        with (folder / "losses").open("a") as log:
            log.write(f"{step} {kind} {mean.double().item().hex()}\n")
        die("stepped", step)
        if schedule.step % 2 == 0 or schedule.step == SWITCH:
            torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
            os.replace(folder / "new.pt", last)
        die("saved", step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
