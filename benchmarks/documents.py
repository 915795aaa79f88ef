"""Packed documents beside the undivided row, on a GPU: one attention layer alone, and a small Llama, all rewritten.

Documents have random lengths, or one of them fills 75% or 90% of the row. They are given on the CPU; documents given on the GPU
are copied there, so they run the same.

    python benchmarks/documents.py                  results into benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.measure import layer as bench
from lighthouse_fx.measure import timing
from lighthouse_fx.measure.layer import LayerShape

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 12, 48, 192)
LENGTHS = ((16_384, 1024), (98_304, 1536))  # tokens, topk
SHARES = (0.0, 0.75, 0.9)  # of the row, that one document fills at least
LAYERS = 4  # of the Llama
DEVICE = torch.device("cuda")


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="how many documents")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def lengths(count: int, total: int, first: float = 0.0) -> Tensor:
    """Borders of documents of random lengths that fill a row; the first fills at least a share of it."""
    shares = torch.rand(count).add(0.2)
    if first and count > 1:
        shares[0] = shares[1:].sum() * first / (1 - first)
    bounds = (shares.cumsum(0) / shares.sum() * total).long()
    bounds[-1] = total
    return torch.cat([bounds.new_zeros(1), bounds])


def layer(length: int, topk: int) -> Callable[[], object]:
    """Forward plus backward of one attention layer, 8 heads of 128."""
    tokens = bench._inputs(LayerShape(length=length), length, DEVICE)
    attention = torch.compile(
        bench._attention, backend="lighthouse", options={"levels": 3, "topk": topk}, fullgraph=True, dynamic=False
    )
    return lambda: bench._both(attention, tokens)


def llama(length: int, topk: int) -> Callable[[], object]:
    """Forward plus backward of a Llama with layers as the paper's: width 1024, 8 heads of 128, FFN 1536. All are rewritten."""
    shape = LlamaConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(DEVICE, torch.bfloat16).train()
    lighthouse_fx.compile(model, LighthouseConfig.paper(topk=topk), dense_layers=(), dynamic=False)
    tokens = torch.randint(0, 256, (1, length), device=DEVICE)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        model.zero_grad()

    return step


def measure(
    make: Callable[[int, int], Callable[[], object]], length: int, topk: int, counts: Sequence[int]
) -> dict[str, Any]:
    """Milliseconds, launched as in training."""
    torch.compiler.reset()
    call = make(length, topk)

    def milliseconds() -> float:
        call()
        return timing.milliseconds(call, DEVICE, captured=False)

    found: dict[str, Any] = {"length": length, "topk": topk, "undivided_ms": milliseconds(), "documents_ms": {}}
    for share in SHARES:
        found["documents_ms"][f"{share:.0%}"] = times = {}
        for count in track(counts, f"{make.__name__}, {length:,} tokens, one of {share:.0%}"):
            with lighthouse_fx.documents(cu_seqlens=lengths(count, length, first=share)):
                times[count] = milliseconds()
    return found


def main() -> int:
    args = flags()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv)}
    found = {make.__name__: [measure(make, *of, args.counts) for of in LENGTHS] for make in (layer, llama)}
    for name, rows in found.items():
        title = f"{name}: times of the undivided row's, {about['card']}, forward plus backward"
        table = Table(title=title, title_justify="left")
        for column in ("tokens", "undivided", "one document of", *map(str, args.counts)):
            table.add_column(column, justify="right")
        for row in rows:
            for share, times in row["documents_ms"].items():
                cells = (f"{time / row['undivided_ms']:.2f}x" for time in times.values())
                table.add_row(f"{row['length']:,}", f"{row['undivided_ms']:.2f} ms", share, *cells)
        Console(width=120).print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "documents.json").write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
