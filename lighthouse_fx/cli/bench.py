"""`lighthouse bench`: time one attention layer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lighthouse_fx.measure import layer, timing
from lighthouse_fx.measure.machine import describe

from .options import add_command, add_device, add_layer, add_pyramid, at_least_one, console, layer_of, pyramid_of

_WIDTH = 150  # the table's, also where a terminal is narrower
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
    parser = add_command(
        commands,
        "bench",
        summary="time one attention layer on this machine, beside dense attention",
        description=(
            "Times one attention layer, forward and backward: Lighthouse as the backend compiles it, dense attention, and "
            "stock attention on the gathered entries alone, which no layer around it can beat. The layer is first checked "
            "against plain PyTorch."
        ),
        examples="""
lighthouse bench --lengths 98304 --heads 32 --groups 8
lighthouse bench --levels 2 --lengths 16384 98304
lighthouse bench --json layer.json --picture layer.png
lighthouse bench --lengths 1024 --topk 32 --dtype float32 --device cpu
""",
    )
    parser.add_argument("--lengths", type=at_least_one, nargs="+", metavar="N", help="tokens; default: ten lengths, 4K to 1M")
    add_pyramid(parser, topk_default="by length, as published; with other levels or pooling, half of the tokens")
    add_layer(parser)
    parser.add_argument(
        "--dense-up-to", type=int, default=524_288, metavar="N", help="no dense attention beyond; default: 524288"
    )
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the figures (.png, .svg; extra 'plot')")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse bench`: measure, print the table, write what was asked for."""
    device = torch.device(options.device)
    usual = dict(_USUAL)  # another length takes the k of the nearest one
    given = pyramid_of(options, topk=None)
    published = given.topk is None and (given.levels, given.pooling) == (3, 4)
    lengths = options.lengths or list(usual)
    shapes = [layer_of(options, n) for n in lengths]
    configs = [
        replace(given, topk=usual[min(usual, key=lambda known, n=n: abs(known - n))]) if published else given  # type: ignore[misc]
        for n in lengths
    ]
    rows: list[layer.LayerTimes] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(shapes))
        bandwidth = timing.copy_bandwidth(device)
        for shape, config in zip(shapes, configs, strict=True):
            progress.update(task, description=f"N = {shape.length:,}")
            dense = shape.length <= options.dense_up_to
            rows.append(layer.measure_layer(shape, config, device, bandwidth=bandwidth, dense=dense))
            progress.advance(task)
    about = describe(device) | {
        "copy_bandwidth_TB_per_s": bandwidth / 1e12,
        "command": "lighthouse " + " ".join(sys.argv[1:]),
    }
    title = f"milliseconds on {about['card']}, {options.dtype}, torch {about['torch']}"
    out = console(_WIDTH)
    (out if out.width >= _WIDTH else Console(width=_WIDTH)).print(layer.table(rows, title))
    for row in rows:
        if row.launched_dense and row.launched[1] > 1.15 * row.layer[1]:
            out.print(
                f"N = {row.shape.length:,}: launched one by one, without a CUDA graph, {row.launched[1]:.2f} ms; "
                f"dense attention {row.launched_dense[1]:.2f} ms"
            )
    if options.json:
        layer.save_json(rows, options.json, about=about)
    if options.picture:
        layer.save_picture(rows, options.picture, title=f"One attention layer on {about['card']}")
    return 0
