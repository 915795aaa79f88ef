"""`lighthouse explain MODEL`: what the backend would do with a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighthouse_fx.extras import transformers
from lighthouse_fx.frontend.explain import explain
from lighthouse_fx.report.report import Report

from .options import MODEL_HELP, add_command, add_config, at_least_one, call_function, config_from, console, is_function

_WIDTH = 180  # where there is no terminal, whose width is known


def add_parser(commands: Any) -> None:
    """The options of `lighthouse explain`."""
    parser = add_command(
        commands,
        "explain",
        summary="say what would be rewritten in a model, and why the rest not",
        description=(
            "Traces a model as torch.compile(model, backend='lighthouse') would and prints one row per attention call: "
            "rewritten, or the reason why not. Nothing is trained or computed, no weights are loaded, and no GPU is needed. "
            "The exit status is 1 where nothing would be rewritten."
        ),
        examples="""
lighthouse explain path/to/model --length 98304
lighthouse explain my_module:model_and_inputs --topk 512 --out graph.html
""",
    )
    returns = "(model, inputs), the inputs a tensor or a tuple of what the model is called with"
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP.format(returns=returns) + " (only its config.json is read)")
    parser.add_argument(
        "--length", type=at_least_one, default=8192, metavar="N", help="tokens, for a transformers model; default: 8192"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="save the graph before and after: .svg, .html or .json")
    add_config(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse explain`: print the report, save the picture. The exit status is 1 where nothing would be rewritten."""
    if is_function(options.model):
        model, inputs = _pair(options.model, call_function(options.model))
        report = explain(model, *inputs, config=config_from(options, model))
    else:
        report = _of_transformers(options)
    report.print(console(_WIDTH))
    if options.out:
        print(f"written: {report.save(options.out)}")
    return 0 if report.rewritten else 1


def _pair(name: str, made: Any) -> tuple[Any, tuple[Any, ...]]:
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise TypeError(f"{name!r} returned a {type(made).__name__}: it has to return (model, inputs)")
    model, inputs = made
    if isinstance(inputs, dict):
        raise TypeError(f"{name!r} returned a dict as inputs: give a tensor, or a tuple of what the model is called with")
    return model, inputs if isinstance(inputs, tuple) else (inputs,)


def _of_transformers(options: argparse.Namespace) -> Report:
    library = transformers()
    described = library.AutoConfig.from_pretrained(options.model)
    described.use_cache = False  # as in training
    with torch.device("meta"):  # shapes are all that a trace needs: no memory for the weights
        model: nn.Module = library.AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")
        ids = torch.zeros(1, options.length, dtype=torch.long)
    return explain(model.train(), ids, config=config_from(options, model))
