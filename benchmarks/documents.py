"""One attention layer on packed documents beside the same layer on the undivided row, on a GPU.

Documents have random lengths, or one of them fills 75% or 90% of the row. They are given on the CPU; documents given on the GPU
are copied there, so they run the same.

    python benchmarks/documents.py                  results into benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lighthouse_fx
from lighthouse_fx import bench, timing
from lighthouse_fx.bench import LayerShape

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 12, 48, 192)
LAYERS = ((16_384, 1024), (98_304, 1536))  # tokens, topk
SHARES = (0.0, 0.75, 0.9)  # of the row, that one document fills at least


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


def measure(length: int, topk: int, counts: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Milliseconds of a layer, forward plus backward, launched as in training."""
    tokens = bench._inputs(LayerShape(length=length), length, device)
    options = {"levels": 3, "topk": topk}
    torch.compiler.reset()
    layer = torch.compile(bench._attention, backend="lighthouse", options=options, fullgraph=True)

    def milliseconds() -> float:
        bench._both(layer, tokens)
        return timing.milliseconds(lambda: bench._both(layer, tokens), device, captured=False)

    found: dict[str, Any] = {"length": length, "topk": topk, "undivided_ms": milliseconds(), "documents_ms": {}}
    for share in SHARES:
        found["documents_ms"][f"{share:.0%}"] = times = {}
        for count in track(counts, f"{length:,} tokens, one of {share:.0%}"):
            with lighthouse_fx.documents(cu_seqlens=lengths(count, length, first=share)):
                times[count] = milliseconds()
    return found


def main() -> int:
    args = flags()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    rows = [measure(*layer, args.counts, torch.device("cuda")) for layer in LAYERS]
    table = Table(title=f"times of the undivided row's, {torch.cuda.get_device_name()}, forward plus backward")
    for column in ("tokens", "undivided", "one document of", *map(str, args.counts)):
        table.add_column(column, justify="right")
    for row in rows:
        undivided = row["undivided_ms"]
        for share, times in row["documents_ms"].items():
            cells = (f"{time / undivided:.2f}x" for time in times.values())
            table.add_row(f"{row['length']:,}", f"{undivided:.2f} ms", share, *cells)
    Console().print(table)
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "documents.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
