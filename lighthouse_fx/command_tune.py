"""`lighthouse tune`: recommend a pyramid for a layer, by measuring on this machine or by the cost model alone."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import tuning_figures
from .bench import LayerShape
from .cost import H100, Card
from .tuning import shape_of, tune

_WIDTH = 120  # where there is no terminal, whose width is known


def add_parser(commands: Any) -> None:
    """The options of `lighthouse tune`."""
    parser = commands.add_parser("tune", help="recommend levels, pooling and topk for an attention layer")
    parser.description = (
        "Recommends a pyramid: of those whose layer takes at most --share of dense attention's time and fits into --memory, "
        "the one that keeps the most of the sequence. The likely ones are measured here; with --predict nothing is, and no "
        "GPU is needed. The exit status is 1 where the layer should stay dense."
    )
    parser.add_argument("length", type=int, metavar="N", help="tokens")
    parser.add_argument(
        "--model", metavar="NAME", help="a transformers model, folder or name, for its heads; only its config.json is read"
    )
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="query heads; default: 8")
    parser.add_argument("--groups", type=int, metavar="G", help="key/value heads; default: as many as query heads")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="head dimension; default: 128")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--share", type=float, default=0.1, help="of dense attention's time for a layer; default: 0.1")
    parser.add_argument("--memory", type=float, metavar="GB", help="that a layer may add, gradients included; default: any")
    parser.add_argument("--measure", type=int, default=6, metavar="COUNT", help="candidates to measure; default: 6")
    parser.add_argument("--predict", action="store_true", help="measure nothing; for an H100, unless rates are given")
    parser.add_argument("--attention-tflops", type=float, metavar="X", help="rate of stock attention, for --predict")
    parser.add_argument("--bandwidth-tb", type=float, metavar="X", help="TB a second of a copy, for --predict")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw time against kept share (.png, .svg; extra 'plot')")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse tune`: print the table and the recommendation, draw the picture."""
    shape = _shape(options)
    with Console(stderr=True).status("measuring") as status:
        found = tune(
            shape,
            share=options.share,
            memory=None if options.memory is None else int(options.memory * 1e9),
            device=options.device,
            card=_card(options),
            measure=0 if options.predict else options.measure,
            progress=lambda what: status.update(f"measuring {what}"),
        )
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(tuning_figures.table(found))
    if options.picture:
        print(f"written: {found.save_picture(options.picture)}")
    return 0 if found.recommended else 1


def _shape(options: argparse.Namespace) -> LayerShape:
    if options.model is None:
        groups = options.heads if options.groups is None else options.groups
        return LayerShape(
            length=options.length, heads=options.heads, groups=groups, dim=options.dim, dtype=options.dtype
        )
    try:
        library = importlib.import_module("transformers")  # by name: mypy would take our folder for the `kernels` it imports
    except ImportError as error:
        raise ImportError("--model needs transformers: pip install transformers, or give --heads and --dim") from error
    return shape_of(library.AutoConfig.from_pretrained(options.model), options.length, dtype=options.dtype)


def _card(options: argparse.Namespace) -> Card | None:
    """The rates that were given, an H100's for what was not; None: measure them."""
    attention, bandwidth = options.attention_tflops, options.bandwidth_tb
    if not options.predict:
        if attention is not None or bandwidth is not None:
            raise ValueError("--attention-tflops and --bandwidth-tb are for --predict: without it both are measured")
        return None
    if attention is None and bandwidth is None:
        return H100
    return Card(
        name="the card given",
        matmul=H100.matmul,
        attention=H100.attention if attention is None else attention * 1e12,
        bandwidth=H100.bandwidth if bandwidth is None else bandwidth * 1e12,
    )
