"""What figures belong to: the card, the versions, the command that was given, and the memory in use."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """The card and the versions that figures belong to."""
    versions: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return {"card": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"} | versions
    import triton

    return {"card": torch.cuda.get_device_name(device), "triton": triton.__version__} | versions


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in ("lighthouse-fx", "torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line of this process."""
    return " ".join([Path(sys.executable).name, *sys.argv])


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use so far: of the card's memory, or on a CPU of the process's; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
