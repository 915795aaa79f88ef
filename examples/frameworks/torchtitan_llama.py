"""torchtitan 0.3: its Llama 3, its override mechanism and its compile call, in a loop of our own.

    python examples/frameworks/torchtitan_llama.py

In torchtitan's own trainer the same is, on the command line,

    --override.imports lighthouse_fx.integrations.torchtitan.causal_attention --compile.enable --compile.backend lighthouse

or, on a GPU, with `documents` for `causal_attention`, which leaves it the FlexAttention that it has, inside packed documents.
It has no hook around a step, so there each stage is a run of its own with the same checkpoint folder, the first inside
`lighthouse_fx.pretraining(config)` and the second inside `lighthouse_fx.dense()`.
"""

import torch
from tiny import PYRAMID, STEPS, Counting
from torchtitan.config import CompileConfig
from torchtitan.config.override import OverrideConfig, apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import apply_compile
from torchtitan.models.llama3 import llama3_configs

from lighthouse_fx import TwoStage

config = llama3_configs["debugmodel"](attn_backend="flex")
del config.layers[2:]  # small enough for a CPU
apply_overrides(OverrideConfig(imports=["lighthouse_fx.integrations.torchtitan.causal_attention"]), config)
model = config.build()
model.init_states()
one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
apply_compile(model, compile_config=CompileConfig(enable=True, backend="lighthouse"), parallel_dims=one)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = TwoStage(STEPS, config=PYRAMID)
data = Counting()
for step in schedule:
    with schedule.stage():
        ids = torch.stack([data[(step * 4 + row) % len(data)]["input_ids"] for row in range(4)])  # [B, N]
        logits = model(ids)  # [B, N, vocabulary]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.finish(loss)
    print(f"step {step}: loss {loss.item():.4f}")
