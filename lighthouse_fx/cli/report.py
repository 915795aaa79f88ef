"""`lighthouse report run.jsonl`: show the log of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lighthouse_fx.training import run_page
from lighthouse_fx.training.loss_monitor import read_reference
from lighthouse_fx.training.run_file import read_run

from .options import add_command, console

_WIDTH = 150  # where there is no terminal, whose width is known


def add_parser(commands: Any) -> None:
    """The options of `lighthouse report`."""
    parser = add_command(
        commands,
        "report",
        summary="show the log of a training run: losses, speed, what was saved",
        description=(
            "Shows the log that lighthouse_fx.RunLog wrote of a training run: a table here, and with --out a page of HTML "
            "with curves that needs no other file and no network. The run may still be going on, or may have been killed."
        ),
        examples="""
lighthouse report run.jsonl
lighthouse report run.jsonl --reference dense.jsonl --out run.html
""",
    )
    parser.add_argument("log", type=Path, metavar="RUN.jsonl", help="the log")
    parser.add_argument("--out", type=Path, metavar="RUN.html", help="write the page (draws with matplotlib, extra 'plot')")
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="a dense run to draw beside it: another log, or a CSV of step,loss"
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write scalars for TensorBoard (extra 'tensorboard')"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse report`: print the table, write what was asked for."""
    if options.reference and not options.out:
        raise ValueError("--reference is drawn on the page, and there is none: give --out run.html, too")
    data = read_run(options.log)
    reference = read_reference(options.reference) if options.reference else None
    console(_WIDTH).print(run_page.summary(data))
    if options.out:
        print(f"written: {run_page.save_page(data, options.out, reference=reference)}")
    if options.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard is not installed: pip install 'lighthouse-fx[tensorboard]'") from error
        with SummaryWriter(str(options.tensorboard)) as writer:
            run_page.write_scalars(data, writer)
        print(f"written: {options.tensorboard}")
    return 0
