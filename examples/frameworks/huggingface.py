"""Hugging Face Trainer: a callback compiles the model and switches stages; resuming keeps the stage.

    python examples/frameworks/huggingface.py [FOLDER]
"""

import sys
from pathlib import Path

from tiny import PYRAMID, STEPS, Counting, llama
from transformers import Trainer, TrainingArguments

from lighthouse_fx import TwoStage
from lighthouse_fx.integrations.huggingface import LighthouseCallback

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/huggingface")
arguments = TrainingArguments(
    output_dir=str(folder),
    max_steps=STEPS,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    logging_steps=1,
    save_steps=2,
    eval_strategy="steps",
    eval_steps=3,
    use_cpu=True,
    report_to=[],
)
callback = LighthouseCallback(TwoStage(STEPS), PYRAMID, dense_layers=(0, -1))
trainer = Trainer(
    model=llama(), args=arguments, train_dataset=Counting(), eval_dataset=Counting(), callbacks=[callback]
)
trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
