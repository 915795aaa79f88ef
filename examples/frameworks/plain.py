"""Plain PyTorch: pre-train in two stages, with a checkpoint after each step that the run goes on from.

    python examples/frameworks/plain.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from tiny import PYRAMID, STEPS, Counting, llama

import lighthouse_fx

checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else "out") / "last.pt"
model = lighthouse_fx.compile(llama(), PYRAMID, dense_layers=(0, -1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = lighthouse_fx.TwoStage(STEPS, on_event=lambda event: print(event.message))
parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
if checkpoint.exists():
    for name, state in torch.load(checkpoint).items():
        parts[name].load_state_dict(state)

data = Counting()
for step in schedule:
    with schedule.stage():  # the backward, too: activation checkpointing runs the forward again there
        ids = torch.stack([data[(step * 8 + row) % len(data)]["input_ids"] for row in range(8)])  # [B, N]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.finish(loss)
    print(f"step {step}: loss {loss.item():.4f}")
    checkpoint.parent.mkdir(exist_ok=True)
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
