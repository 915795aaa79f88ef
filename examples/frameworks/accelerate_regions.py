"""Accelerate: `compile_regions` compiles equal blocks with one graph; its checkpoints keep the schedule.

    python examples/frameworks/accelerate_regions.py [FOLDER]

It compiles all blocks alike. To keep the first and last ones dense, call `lighthouse_fx.compile(model)` in its place.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from tiny import PYRAMID, STEPS, Counting, llama

from lighthouse_fx import TwoStage

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/accelerate")
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = compile_regions(llama(), backend="lighthouse", options={**asdict(PYRAMID)})
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
model, optimizer, batches = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(Counting(), batch_size=4)
)
schedule = TwoStage(STEPS)
accelerator.register_for_checkpointing(schedule)
if folder.exists():
    accelerator.load_state(str(folder))

batch = iter(accelerator.skip_first_batches(batches, 2 * schedule.step))
for step in schedule:
    for _ in range(2):
        with accelerator.accumulate(model), schedule.stage():
            loss = model(**next(batch)).loss
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    schedule.finish(loss)
    print(f"step {step}: loss {loss.item():.4f}")
    accelerator.save_state(str(folder))
