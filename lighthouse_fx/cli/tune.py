"""`lighthouse tune`: recommend a pyramid for a layer, by measuring on this machine or by the cost model alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lighthouse_fx.extras import transformers
from lighthouse_fx.measure import tuning_figures
from lighthouse_fx.measure.cost import H100, Card
from lighthouse_fx.measure.layer import LayerShape
from lighthouse_fx.measure.tune import Tuning, shape_of, tune

from .options import above_zero, add_command, add_device, add_layer, console, layer_of

_WIDTH = 120  # where there is no terminal, whose width is known
_BESIDE = 2  # what is measured beside the candidates: the machine's rates, and dense attention


def add_parser(commands: Any) -> None:
    """The options of `lighthouse tune`."""
    parser = add_command(
        commands,
        "tune",
        summary="recommend levels, pooling and topk for an attention layer",
        description=(
            "Recommends a pyramid for an attention layer over N tokens: of those that take at most --share of dense "
            "attention's time and fit into --memory, the one that keeps the most of the sequence. The most promising are "
            "measured on this machine as far as --seconds allow, the others predicted; with --predict all are, and no GPU is "
            "needed. The exit status is 1 where the layer should stay dense."
        ),
        examples="""
lighthouse tune 98304 --predict
lighthouse tune 98304 --predict --heads 32 --groups 8 --share 0.05
lighthouse tune 98304 --memory 1.5 --json tune.json --picture tune.png
""",
    )
    parser.add_argument("length", type=int, metavar="N", help="tokens in the sequence")
    parser.add_argument(
        "--model", metavar="NAME", help="take the heads of this transformers model, folder or name; reads its config.json only"
    )
    add_layer(parser)
    parser.add_argument(
        "--share", type=float, default=0.1, help="of dense attention's time that the layer may take; default: 0.1"
    )
    parser.add_argument(
        "--memory", type=above_zero, metavar="GB", help="that the layer may add, gradients included; default: any amount"
    )
    parser.add_argument("--measure", type=int, default=8, metavar="COUNT", help="pyramids to measure at most; default: 8")
    parser.add_argument("--seconds", type=above_zero, default=120.0, metavar="S", help="to measure for at most; default: 120")
    parser.add_argument(
        "--predict", action="store_true", help="measure nothing: predict for an H100, or for a card of the two rates below"
    )
    parser.add_argument("--attention-tflops", type=float, metavar="X", help="TFLOP/s that stock attention reaches there")
    parser.add_argument("--bandwidth-tb", type=float, metavar="X", help="TB/s of a copy there, read plus written")
    add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, anew after every measurement")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw time against kept share (.png, .svg; extra 'plot')")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse tune`: print the table and the recommendation, write the figures, draw the picture."""
    shape = _shape(options)
    measure = 0 if options.predict else options.measure
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("predicting", total=measure + _BESIDE, completed=-1)

        def begin(what: str) -> None:
            progress.update(task, description=f"measuring {what}", advance=1)

        def keep(found: Tuning) -> None:
            if options.json:
                found.save_json(options.json)

        found = tune(
            shape,
            share=options.share,
            memory=None if options.memory is None else max(1, int(options.memory * 1e9)),
            device=options.device,
            card=_card(options),
            measure=measure,
            seconds=options.seconds,
            progress=begin,
            so_far=keep,
        )
    console(_WIDTH).print(tuning_figures.table(found))
    keep(found)
    for path in (options.json, options.picture and found.save_picture(options.picture)):
        if path:
            print(f"written: {path}")
    return 0 if found.recommended else 1


def _shape(options: argparse.Namespace) -> LayerShape:
    if options.model is None:
        return layer_of(options, options.length)
    library = transformers("--model", instead="give --heads and --dim")
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
