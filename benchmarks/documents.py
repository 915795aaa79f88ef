"""One attention layer on packed documents beside the same layer on the undivided row, on a GPU.

    python benchmarks/documents.py                  results into benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lighthouse_fx
from lighthouse_fx import bench, timing
from lighthouse_fx.bench import LayerShape
from lighthouse_fx.config import LighthouseConfig

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 12, 48, 192)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=98_304)
    parser.add_argument("--topk", type=int, default=1536)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="how many documents, of random lengths")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def lengths(count: int, total: int) -> Tensor:
    """Random lengths of documents that fill a row, each at least 16 tokens."""
    cuts = torch.rand(count).add(0.2).cumsum(0)
    bounds = (cuts / cuts[-1] * total).long()
    bounds[-1] = total
    return torch.cat([bounds.new_zeros(1), bounds])


def measured(shape: LayerShape, config: LighthouseConfig, borders: Tensor | None, device: torch.device) -> float:
    """Milliseconds of forward plus backward, launched as in training."""
    torch._dynamo.reset()
    tokens = bench._inputs(shape, shape.length, device)
    options = {"topk": config.topk, "max_kept": 1.0}
    layer = torch.compile(bench._attention, backend="lighthouse", options=options, fullgraph=True)

    def run() -> object:
        return bench._both(layer, tokens)

    if borders is None:
        run()
        return timing.milliseconds(run, device, captured=False)
    with lighthouse_fx.documents(cu_seqlens=borders):
        run()
        return timing.milliseconds(run, device, captured=False)


def main() -> int:
    args = flags()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device, shape, config = torch.device("cuda"), LayerShape(length=args.length), LighthouseConfig(topk=args.topk)
    undivided = measured(shape, config, None, device)
    found = {n: measured(shape, config, lengths(n, args.length), device) for n in track(args.counts, "documents")}
    table = Table(title=f"forward plus backward on {torch.cuda.get_device_name()}, {args.length:,} tokens, k={args.topk:,}")
    for column in ("documents", "ms", "over undivided"):
        table.add_column(column, justify="right")
    table.add_row("undivided", f"{undivided:.2f}", "")
    for count, time in found.items():
        table.add_row(str(count), f"{time:.2f}", f"{time / undivided:.2f}x")
    Console().print(table)
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv)}
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {**about, "length": args.length, "topk": args.topk, "undivided_ms": undivided, "documents_ms": found}
    (args.out / "documents.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
