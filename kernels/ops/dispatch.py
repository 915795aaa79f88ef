"""Which kernels serve a tensor: Triton's on CUDA where Triton is installed, otherwise the plain PyTorch twins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference

_traced: ContextVar[bool] = ContextVar("lighthouse_fx_traced", default=False)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def serving(device: torch.device) -> str:
    """The name of what serves a device, for reports: "Triton" or "plain PyTorch"."""
    return "Triton" if device.type == "cuda" and _triton_installed() else "plain PyTorch"


def kernels_for(x: Tensor) -> ModuleType:
    """The module whose functions serve a tensor; both modules have the same ones."""
    if serving(x.device) != "Triton":
        return reference
    from .. import triton  # imported late: Triton is optional, and slow to import

    return triton


@contextmanager
def traced() -> Iterator[None]:
    """While a graph is traced through kernels: their launches become nodes of the graph."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


def launchable(kernel: Any) -> Any:
    """A Triton kernel as it has to be called now: itself, or wrapped for tracing (which costs a millisecond a call)."""
    return torch.library.wrap_triton(kernel) if _traced.get() else kernel
