"""Libraries that only some uses need: imported when they are used, and an error that says what to install without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lighthouse_fx.report.text import printable


def transformers(purpose: str = "a model's name or folder", *, instead: str = "") -> Any:
    """The library.

    Args:
        purpose: what needs it; instead: what else there is to do.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")  # by name: mypy would take our folder for the `kernels` it imports
    except ImportError as error:
        also = f", or {instead}" if instead else ""
        raise ImportError(f"{purpose} needs transformers: pip install transformers{also}") from error


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib's to draw on, in inches; no window and no setting of matplotlib's has a part in it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'lighthouse-fx[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def as_label(text: str) -> str:
    r"""A text of unknown origin as matplotlib shows it letter by letter: no formula between two `$`, no control characters."""
    return printable(text).replace("$", r"\$")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write it, in a folder that is made where there is none. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
