"""`lighthouse bench`: time one attention layer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import bench, timing
from .config import LighthouseConfig
from .machine import describe

# (N, k), as in the table of the measured baseline
_USUAL = (
    (4_096, 256),
    (8_192, 512),
    (16_384, 1024),
    (32_768, 1024),
    (65_536, 1024),
    (98_304, 1536),
    (131_072, 1024),
    (262_144, 1024),
    (524_288, 1024),
    (1_048_576, 1024),
)


def add_parser(commands: Any) -> None:
    """The options of `lighthouse bench`."""
    parser = commands.add_parser("bench", help="time one attention layer on this machine, beside dense attention")
    parser.description = (
        "Times one attention layer, forward and backward: Lighthouse as the backend compiles it, dense attention, and "
        "attention on the gathered sub-sequence alone, which nothing around it can beat."
    )
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens; default: 4K to 1M")
    parser.add_argument("--topk", type=int, metavar="K", help="windows expanded per level; default: by length, as published")
    parser.add_argument("--levels", type=int, default=3, metavar="L")
    parser.add_argument("--pooling", type=int, default=4, metavar="P")
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="query heads")
    parser.add_argument("--groups", type=int, metavar="G", help="key/value heads; default: as many as query heads")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="head dimension")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--dense-up-to", type=int, default=524_288, metavar="N", help="no dense attention beyond")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the figures (.png, .svg)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse bench`: measure, print the table, write what was asked for."""
    device = torch.device(options.device)
    usual = dict(_USUAL)  # another length takes the k of the nearest one
    lengths = options.lengths or list(usual)
    shapes = [
        bench.LayerShape(
            length=n, heads=options.heads, groups=options.groups or options.heads, dim=options.dim, dtype=options.dtype
        )
        for n in lengths
    ]
    configs = [
        LighthouseConfig(
            levels=options.levels,
            pooling=options.pooling,
            topk=options.topk or usual[min(usual, key=lambda known, n=n: abs(known - n))],  # type: ignore[misc]
        )
        for n in lengths
    ]
    rows: list[bench.LayerTimes] = []
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(shapes))
        bandwidth = timing.copy_bandwidth(device)
        for shape, config in zip(shapes, configs, strict=True):
            progress.update(task, description=f"N = {shape.length:,}")
            dense = shape.length <= options.dense_up_to
            rows.append(bench.measure_layer(shape, config, device, bandwidth=bandwidth, dense=dense))
            progress.advance(task)
    about = describe(device) | {
        "copy_bandwidth_TB_per_s": bandwidth / 1e12,
        "command": "lighthouse " + " ".join(sys.argv[1:]),
    }
    title = f"milliseconds on {about['card']}, {options.dtype}, torch {about['torch']}"
    wide = console if console.width >= 150 else Console(width=150)
    wide.print(bench.table(rows, title))
    for row in rows:
        if row.launched_dense and row.launched[1] > 1.15 * row.layer[1]:
            console.print(
                f"N = {row.shape.length:,}: launched one by one, without a CUDA graph, {row.launched[1]:.2f} ms; "
                f"dense attention {row.launched_dense[1]:.2f} ms"
            )
    if options.json:
        bench.save_json(rows, options.json, about=about)
    if options.picture:
        bench.save_picture(rows, options.picture, title=f"One attention layer on {about['card']}")
    return 0
