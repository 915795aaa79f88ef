"""One attention layer on packed documents beside the same layer on the undivided row, on a GPU.

Documents are given on the CPU, which is what the documentation asks for, and on the GPU, where nobody can say without waiting
how many they are. Their lengths are random; and, given on the CPU, also such that one document fills 90% of the row.

    python benchmarks/documents.py                  results into benchmarks/results/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lighthouse_fx
from lighthouse_fx import bench, timing
from lighthouse_fx.bench import LayerShape
from lighthouse_fx.documents import Documents

HERE = Path(__file__).resolve().parent
COUNTS = (1, 2, 4, 12, 48, 192)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=98_304)
    parser.add_argument("--topk", type=int, default=1536)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="how many documents, of random lengths")
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


def ways(total: int, counts: Sequence[int], device: torch.device) -> Iterator[tuple[str, int, Documents]]:
    """What is measured: how the documents are given, how many they are, and the documents."""
    for count in counts:
        random, uneven = lengths(count, total), lengths(count, total, first=0.9)
        yield "cpu", count, lighthouse_fx.documents(cu_seqlens=random)
        yield "uneven", count, lighthouse_fx.documents(cu_seqlens=uneven)
        numbers = torch.arange(count).repeat_interleave(random.diff())[None]
        yield "gpu", count, lighthouse_fx.documents(numbers.to(device))


def main() -> int:
    args = flags()
    if not torch.cuda.is_available():
        print("this benchmark needs a GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    device, shape = torch.device("cuda"), LayerShape(length=args.length)
    tokens = bench._inputs(shape, shape.length, device)
    options = {"topk": args.topk, "max_kept": 1.0}
    layer = torch.compile(bench._attention, backend="lighthouse", options=options, fullgraph=True)

    def milliseconds() -> float:
        """Of forward plus backward, launched as in training."""
        bench._both(layer, tokens)
        return timing.milliseconds(lambda: bench._both(layer, tokens), device, captured=False)

    undivided = milliseconds()
    found: dict[str, dict[int, float]] = {"cpu": {}, "uneven": {}, "gpu": {}}
    for way, count, documents in track(list(ways(args.length, args.counts, device)), "documents"):
        with documents:
            found[way][count] = milliseconds()
    table = Table(title=f"forward plus backward on {torch.cuda.get_device_name()}, {args.length:,} tokens, k={args.topk:,}")
    for column in ("documents", "given on the CPU", "", "one of 90%", "", "given on the GPU", ""):
        table.add_column(column, justify="right")
    table.add_row("undivided", f"{undivided:.2f} ms")
    for count in args.counts:
        times = [found[way][count] for way in found]
        table.add_row(str(count), *(cell for time in times for cell in (f"{time:.2f} ms", f"{time / undivided:.2f}x")))
    Console().print(table)
    about = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv)}
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {**about, "length": args.length, "topk": args.topk, "undivided_ms": undivided}
    figures |= {"documents_ms": found["cpu"], "one_of_90_percent_ms": found["uneven"], "on_gpu_ms": found["gpu"]}
    (args.out / "documents.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
