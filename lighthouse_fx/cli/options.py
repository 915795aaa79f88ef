"""What several commands share: their help, a model named on the command line, a layer and the configuration as options."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lighthouse_fx.frontend.existing_compilation import setting_of
from lighthouse_fx.measure.layer import LayerShape
from lighthouse_fx.passes.config import SCORERS, LighthouseConfig

MODEL_HELP = "package.module:function of yours that returns {returns}, or a transformers model: a folder, or a name"


_HELP_WIDTH = 78  # of a terminal of 80 columns


def add_command(commands: Any, name: str, *, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command with its help: a line in the list of commands, a paragraph, and examples below the options, one a line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, _HELP_WIDTH),
        epilog="examples:\n" + textwrap.indent(examples.strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """The options that make up a `LighthouseConfig`; what is not given is the model's own, or the default."""
    group = parser.add_argument_group("Lighthouse attention; default: as compiled, or LighthouseConfig()")
    group.add_argument("--levels", type=int, metavar="L", help="levels of the pyramid; 1 is dense attention")
    group.add_argument("--pooling", type=int, metavar="P", help="windows of one level in a window of the next")
    group.add_argument("--topk", type=int, metavar="K", help="windows expanded per level; default: for half of the sequence")
    group.add_argument("--scorer", choices=SCORERS, help="what ranks windows")
    group.add_argument("--max-kept", type=float, metavar="SHARE", help="dense where more of the tokens would be gathered")
    add_dense_layers(group)


def add_dense_layers(parser: Any) -> None:
    """Which layers stay dense."""
    parser.add_argument(
        "--dense-layers", nargs="*", type=_layer, metavar="LAYER", help="layers that stay dense: numbers (-1: the last), names"
    )


def add_layer(parser: argparse.ArgumentParser) -> None:
    """The options that make up the shape of an attention layer, but for its length."""
    parser.add_argument("--heads", type=int, default=8, metavar="H", help="query heads; default: 8")
    parser.add_argument("--groups", type=int, metavar="G", help="key/value heads; default: as many as query heads")
    parser.add_argument("--dim", type=int, default=128, metavar="D", help="head dimension; default: 128")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="default: bfloat16"
    )


def add_pyramid(parser: argparse.ArgumentParser, *, topk_default: str) -> None:
    """The pyramid that is measured."""
    parser.add_argument("--levels", type=int, metavar="L", help="levels of the pyramid; default: 3")
    parser.add_argument("--pooling", type=int, metavar="P", help="windows of a level in one of the next; default: 4")
    parser.add_argument("--topk", type=int, metavar="K", help=f"windows expanded per level; default: {topk_default}")


def pyramid_of(options: argparse.Namespace, *, topk: int | None) -> LighthouseConfig:
    """The pyramid that was given; `topk` where none was."""
    return LighthouseConfig(**{"levels": 3, "pooling": 4, "topk": topk} | _given(options))


def layer_of(options: argparse.Namespace, length: int) -> LayerShape:
    """The layer that was given."""
    groups = options.heads if options.groups is None else options.groups
    return LayerShape(length=length, heads=options.heads, groups=groups, dim=options.dim, dtype=options.dtype)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where to run."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    help = "where to run; default: a GPU where there is one, or else the CPU"
    parser.add_argument("--device", default=best, type=_device, help=help)


def console(width: int) -> Console:
    """Standard output, of the terminal's width, or where it is none, of this one."""
    return Console(width=None if sys.stdout.isatty() else width)


def config_from(options: argparse.Namespace, model: Any) -> LighthouseConfig | None:
    """The configuration that was given, over the one that the model is compiled with, if it is; None if none was given."""
    given = _given(options)
    return replace(setting_of(model).config, **given) if given else None


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {f.name: value for f in fields(LighthouseConfig) if (value := getattr(options, f.name, None)) is not None}


def is_function(name: str) -> bool:
    """Whether a model is named as `module:function`, and not as a folder or a name on the hub."""
    return ":" in name and not Path(name).exists()


def call_function(name: str) -> Any:
    """What `module:function` returns. Modules beside which the command runs are found.

    Raises:
        ValueError: no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"MODEL={name!r} cannot be called ({error}): give package.module:function") from error
    finally:
        sys.path.remove(os.getcwd())
    return function()


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device: give cuda or cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU here that this PyTorch can use: give cpu")
    return text


def at_least_one(text: str) -> int:
    """A number of tokens, for `type=`."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens: give an integer of at least 1")
    return number


def above_zero(text: str) -> float:
    """An amount, for `type=`."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount: give a number above 0")
    return number


def _layer(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text
