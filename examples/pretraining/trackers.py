"""Live logging: TensorBoard, W&B and trackio, as far as they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

Tracker = Callable[[dict[str, float], int], Any]  # takes values and the step


def open_trackers(
    names: Sequence[str], out: Path, *, step: int, settings: dict[str, Any], closing: ExitStack
) -> list[Tracker]:
    """Open each, to go on at a step. A run that fails does not close them, so that they show it.

    Raises:
        ValueError: an unknown name. ImportError: one that is not installed.
    """
    opened: list[Tracker] = []
    for name in names:
        if name not in ("tensorboard", "wandb", "trackio"):
            raise ValueError(f"trackers has {name!r}: give some of tensorboard, wandb and trackio")
        try:
            library = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            raise ImportError(f"trackers has {name}, which is not installed: pip install {name}") from error
        if name == "tensorboard":
            writer = library.SummaryWriter(str(out / "tensorboard"), purge_step=step, flush_secs=10)
            closing.callback(writer.close)
            opened.append(partial(_add_scalars, writer))
        else:  # the two have one interface; a run that goes on is found again by its folder
            run = str(out.resolve()).strip("/").replace("/", "-")
            identity = {"id": run} if name == "wandb" else {}
            library.init(project="lighthouse-fx", name=run, config=settings, resume="allow", **identity)
            closing.callback(library.finish)
            opened.append(partial(_log, library))
    return opened


def _add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _log(library: Any, values: dict[str, float], step: int) -> None:
    library.log(values, step=step)
