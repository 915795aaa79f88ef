"""Lightning: a callback compiles the module and switches stages; checkpoints keep the stage.

    python examples/frameworks/lightning_callback.py [FOLDER]
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import PYRAMID, STEPS, Counting, llama

from lighthouse_fx import TwoStage
from lighthouse_fx.integrations.lightning import LighthouseCallback

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/lightning")


class Pretraining(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = llama()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


callback = LighthouseCallback(TwoStage(STEPS), PYRAMID, dense_layers=(0, -1))
trainer = pl.Trainer(
    max_steps=STEPS,
    accumulate_grad_batches=2,
    callbacks=[callback, ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_last=True)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
last = folder / "last.ckpt"
data = torch.utils.data.DataLoader(Counting(), batch_size=4)
trainer.fit(Pretraining(), data, ckpt_path=last if last.exists() else None)
