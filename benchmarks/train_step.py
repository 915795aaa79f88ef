"""One optimiser step of the paper's model, dense and under two pyramids, in one run: checkpointed, compiled block by block.

    python benchmarks/train_step.py                             30 layers, 98,304 tokens: needs a large GPU
    python benchmarks/train_step.py --seq-len 2048 --layers 4   a small one

The pyramids are the default, half of the tokens, and the paper's. All runs have the same weights, tokens and optimiser; dense
attention is the fastest stock kernel for the card.
The model is that of arXiv 2605.06554 (SPEC.md, "Two stages"): d_model 1024, 8 heads of 128, FFN 1536; its vocabulary is bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.kernels.sdpa import in_order, preferred
from lighthouse_fx.measure.machine import describe

HERE = Path(__file__).resolve().parent
console = Console(width=120)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=int, default=98_304)
    add("--layers", type=int, default=30)
    add("--width", type=int, default=1024)
    add("--heads", type=int, default=8)
    add("--mlp", type=int, default=1536)
    add("--topk", type=int, default=1536, help="of the paper's pyramid")
    add("--dense-layers", type=int, nargs="*", default=[0, 1, -2, -1])
    add("--steps", type=int, default=3, help="timed steps, after one that compiles and one that warms up")
    add("--no-checkpoint", action="store_true")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=HERE / "results", help="folder for JSON and picture")
    return parser.parse_args()


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.seq_len,
        attn_implementation="sdpa",
        use_cache=False,
    )
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = LlamaForCausalLM(config).to(args.device, dtype).train()
    if not args.no_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def measure(args: argparse.Namespace, name: str, config: LighthouseConfig | None) -> dict[str, Any]:
    """Seconds of a step, the peak memory and what was rewritten; without a configuration, of dense attention."""
    torch._dynamo.reset()
    model = build(args)
    on_gpu = args.device.startswith("cuda")
    if config is None:
        for block in model.model.layers:
            block.compile()
    else:
        lighthouse_fx.compile(model, config, dense_layers=tuple(args.dense_layers))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu, foreach=False if not on_gpu else None
    )
    tokens = torch.randint(0, 256, (1, args.seq_len), device=args.device)
    known = len(lighthouse_fx.reports())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    fastest = in_order(preferred(torch.device(args.device))) if on_gpu else nullcontext()
    with fastest:
        for _ in track(range(args.steps + 2), description=f"{name} steps", console=Console(stderr=True), transient=True):
            start = time.perf_counter()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert loss.isfinite()  # waits for the device, too
            seconds.append(time.perf_counter() - start)
    graphs = lighthouse_fx.reports()[known:]
    return {
        "run": name,
        "seconds": median(seconds[2:]),
        "all_seconds": seconds,
        "tokens_per_second": args.seq_len / median(seconds[2:]),
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rewritten": [graph.summary() for graph in graphs],
    }


def save_picture(results: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 2.8))
    bars = axis.barh([r["run"] for r in results], [r["seconds"] for r in results], color=["#888888", "#d9480f", "#d9480f"])
    axis.bar_label(bars, labels=[f"{r['seconds']:.2f} s" for r in results], padding=4)
    axis.set(xlabel="seconds per optimiser step", title=title, xlim=(0, 1.15 * max(r["seconds"] for r in results)))
    axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    args = flags()
    results = []
    configs = {"dense": None, "default": LighthouseConfig(), "paper's pyramid": LighthouseConfig.paper(topk=args.topk)}
    for name, config in configs.items():
        results.append(measure(args, name, config))
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    dense = results[0]
    about = describe(torch.device(args.device))
    shape = f"{args.layers} layers, {dense['parameters'] / 1e6:.0f}M parameters, {args.seq_len:,} tokens"
    result = Table(title=f"One optimiser step on {about['card']}: {shape}", title_justify="left")
    for column in ("run", "seconds", "tokens/s", "peak memory", "over dense"):
        result.add_column(column, justify="right")
    for r in results:
        peak = f"{r['peak_GB']:.1f} GB" if r["peak_GB"] is not None else "-"
        times = f"{dense['seconds'] / r['seconds']:.2f}x"
        result.add_row(r["run"], f"{r['seconds']:.3f}", f"{r['tokens_per_second']:,.0f}", peak, times)
    console.print(result)
    console.print("\n".join(dict.fromkeys(line for r in results for line in r["rewritten"])))
    args.out.mkdir(parents=True, exist_ok=True)
    about |= {"command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]), "model": shape}
    path = args.out / "train_step.json"
    path.write_text(json.dumps({**about, "runs": results}, indent=1) + "\n", encoding="utf-8")
    save_picture(results, args.out / "train_step.png", shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
