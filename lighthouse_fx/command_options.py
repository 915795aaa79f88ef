"""What several commands share: a model named on the command line, and the fields of the configuration as options."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import SCORERS, LighthouseConfig

MODEL_HELP = "package.module:function of yours that returns {returns}, or a transformers model: a folder, or a name"


def add_config(parser: argparse.ArgumentParser) -> None:
    """The options that make up a `LighthouseConfig`; what is not given is the model's own, or the default."""
    group = parser.add_argument_group("Lighthouse attention; by default as the model is compiled, or LighthouseConfig()")
    group.add_argument("--levels", type=int, metavar="L", help="levels of the pyramid; 1 is dense attention")
    group.add_argument("--pooling", type=int, metavar="P", help="windows of one level in a window of the next")
    group.add_argument("--topk", type=int, metavar="K", help="windows expanded per level, over the whole sequence")
    group.add_argument("--scorer", choices=SCORERS, help="what ranks windows")
    group.add_argument("--max-kept", type=float, metavar="SHARE", help="dense where more of the tokens would be gathered")
    group.add_argument(
        "--dense-layers", nargs="*", type=_layer, metavar="LAYER", help="layers that stay dense: numbers (-1: the last), names"
    )


def config_from(options: argparse.Namespace) -> LighthouseConfig | None:
    """The configuration that was given, None if none was."""
    given = {f.name: value for f in fields(LighthouseConfig) if (value := getattr(options, f.name, None)) is not None}
    return LighthouseConfig(**given) if given else None


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


def transformers() -> Any:
    """The library.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")  # by name: mypy would take our folder for the `kernels` it imports
    except ImportError as error:
        raise ImportError("a model's name or folder needs transformers: pip install transformers") from error


def _layer(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text
