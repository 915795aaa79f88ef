"""litgpt: its own `pretrain.setup`, whose compile call takes torch's default backend; the data enters the stages.

    python examples/frameworks/litgpt_pretrain.py [FOLDER]

litgpt has no hook around a step, but it asks for each batch in turn, and what a generator holds open while it waits lasts
until the next one is asked for: the forward and backward of that batch. Needs num_workers=0. To resume, give
`schedule.seek` the number of the step.
"""

import sys
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from tiny import PYRAMID, STEPS, TOKENS, Counting
from torch.utils.data import DataLoader, IterableDataset

from lighthouse_fx import TwoStage

MICRO = 2
schedule = TwoStage(STEPS, config=PYRAMID, on_event=lambda event: print(event.message))


class Staged(IterableDataset):
    def __iter__(self):
        for step in schedule:
            for micro in range(MICRO):
                with schedule.stage():
                    yield rows(4 * (step * MICRO + micro))


def rows(first):
    ids = [Counting()[first + row]["input_ids"] for row in range(4)]
    return torch.stack([torch.cat([row, row[:1]]) for row in ids])  # [B, N + 1]


class Data(DataModule):
    def connect(self, **settings): ...

    def train_dataloader(self):
        return DataLoader(Staged(), batch_size=None)

    def val_dataloader(self):
        return DataLoader([rows(0)], batch_size=None)


torch.compiler.set_default_backend("lighthouse")
tokens = STEPS * MICRO * 4 * TOKENS
pretrain.setup(
    "pythia-14m",
    Config(block_size=TOKENS, n_layer=2, n_head=4, n_embd=32, padded_vocab_size=64),
    out_dir=Path(sys.argv[1] if len(sys.argv) > 1 else "out/litgpt"),
    data=Data(),
    train=TrainArgs(global_batch_size=4 * MICRO, micro_batch_size=4, max_tokens=tokens, max_norm=1.0, lr_warmup_steps=1),
    eval=EvalArgs(interval=3, max_iters=1, final_validation=False),
    precision="32-true",
    devices=1,
    logger_name="csv",
)
