"""`lighthouse profile`: where the time of a step goes, dense and with Lighthouse."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lighthouse_fx.measure import profile_figures
from lighthouse_fx.measure.cost import Card, measure_card
from lighthouse_fx.measure.layer import check_gathers
from lighthouse_fx.measure.profile import profile
from lighthouse_fx.measure.profile_steps import Step, is_compiled, layer_step, llama_step, model_step
from lighthouse_fx.passes.config import LighthouseConfig

from .options import (
    add_command,
    add_dense_layers,
    add_device,
    add_layer,
    add_pyramid,
    at_least_one,
    call_function,
    config_from,
    console,
    layer_of,
    pyramid_of,
)

_WIDTH = 150  # where there is no terminal, whose width is known


def add_parser(commands: Any) -> None:
    """The options of `lighthouse profile`."""
    parser = add_command(
        commands,
        "profile",
        summary="say where a training step's time goes, dense and Lighthouse",
        description=(
            "Profiles training steps, dense and with Lighthouse: selection, gather, attention, scatter and the rest, with the "
            "rates reached beside the peaks of this machine. A step is that of one attention layer, of a small Llama with "
            "random weights, or of a model of yours."
        ),
        examples="""
lighthouse profile --length 98304 --topk 1536
lighthouse profile llama --picture profile.png
lighthouse profile my_module:model_and_inputs
lighthouse profile --length 1024 --topk 32 --dtype float32 --device cpu
""",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", default="layer",
        help="'layer' (the default), 'llama', or package.module:function of yours that returns (model, inputs)",
    )  # fmt: skip
    parser.add_argument("--length", type=at_least_one, default=32_768, metavar="N", help="tokens; default: 32768")
    add_layer(parser)
    parser.add_argument(
        "--layers", type=at_least_one, default=8, metavar="COUNT", help="of the Llama, its first and last dense; default: 8"
    )
    add_pyramid(parser, topk_default="1024; of a model of yours all three are those of LighthouseConfig()")
    add_dense_layers(parser)
    parser.add_argument("--steps", type=int, default=3, metavar="COUNT", help="to record of each kind; default: 3")
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="to compare with; default: a large matrix product's")
    parser.add_argument("--peak-bandwidth-tb", type=float, metavar="X", help="the same in TB/s; default: a large copy's")
    add_device(parser)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw two stacked bars (.png, .svg; extra 'plot')")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """`lighthouse profile`: print the table, draw the picture."""
    device = torch.device(options.device)
    step = _step(options, device)
    with Console(stderr=True).status("profiling") as status:
        status.update("profiling: the rates of this machine")
        card = _with_peaks(measure_card(device, options.dtype), options)
        found = profile(
            step,
            device=device,
            card=card,
            steps=options.steps,
            progress=lambda what: status.update(f"profiling: {what}"),
        )
    console(_WIDTH).print(profile_figures.table(found))
    if options.picture:
        print(f"written: {found.save_picture(options.picture)}")
    return 0


def _step(options: argparse.Namespace, device: torch.device) -> Step:
    if ":" in options.model:
        model, inputs = _called(options.model)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        moved = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs)
        config = _of_model(options, model)
        return model_step(model.to(device), moved, config, dense_layers=options.dense_layers)
    config = pyramid_of(options, topk=1024)
    shape = layer_of(options, options.length)
    check_gathers(shape.length, config, config.max_kept)
    if options.model == "layer":
        return layer_step(shape, config, device)
    if options.model == "llama":
        return llama_step(shape, config, device, layers=options.layers)
    raise ValueError(f"MODEL={options.model!r}: give 'layer', 'llama' or package.module:function")


def _of_model(options: argparse.Namespace, model: torch.nn.Module) -> LighthouseConfig:
    given = config_from(options, model)
    if (given is not None or options.dense_layers is not None) and is_compiled(model):
        raise ValueError(f"MODEL={options.model!r} is compiled, with options of its own: leave out those given here")
    return replace(given, dense_layers=()) if given else LighthouseConfig()


def _with_peaks(card: Card, options: argparse.Namespace) -> Card:
    if options.peak_tflops is not None:
        card = replace(card, matmul=options.peak_tflops * 1e12)
    if options.peak_bandwidth_tb is not None:
        card = replace(card, bandwidth=options.peak_bandwidth_tb * 1e12)
    return card


def _called(name: str) -> tuple[Any, Any]:
    """What `module:function` returns: the model and its inputs."""
    made = call_function(name)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module) or isinstance(made[1], dict):
        raise TypeError(f"MODEL={name!r} returned a {type(made).__name__}: it has to return (model, inputs), inputs in a tuple")
    return made
