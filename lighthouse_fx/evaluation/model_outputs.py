"""What validation asks of a model: logits for token numbers, and the loss of each token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_AT_ONCE = 1 << 24  # logits in float32, so that a long sequence with a large vocabulary needs no second copy of them all


def logits_of(model: nn.Module, ids: Tensor, *, call: Callable[..., Any] | None = None, **asked: Any) -> Tensor:
    """`[B, N]` token numbers to logits `[B, N, V]`, from a model that returns these, or has them as `.logits` or first.

    Args:
        call: what to call in place of the model.
        asked: further arguments, for models that know them; `use_cache=False` is always among them.

    Raises:
        TypeError: what the model returns is no logits.
    """
    known = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    arguments = {name: value for name, value in {"use_cache": False, **asked}.items() if name in known}
    out = (call or model)(ids, **arguments)
    found = getattr(out, "logits", out[0] if isinstance(out, tuple) else out)
    if not isinstance(found, Tensor) or found.dim() != 3 or not found.is_floating_point():
        shown = f"a tensor {list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(
            f"model={type(model).__name__} returned {shown} for token numbers {list(ids.shape)}: it has to return logits "
            "[batch, tokens, vocabulary], as a tensor, in `.logits` or as the first of a tuple"
        )
    return found


def last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits after the last token, `[B, V]`; models of transformers then compute no others."""
    return logits_of(model, ids, logits_to_keep=1)[:, -1]


@torch.no_grad()
def token_losses(
    model: nn.Module, rows: Tensor, *, targets: Tensor | None = None, call: Callable[..., Any] | None = None
) -> Tensor:
    """The loss of each next token in nats, float64 on the CPU. rows: `[B, N + 1]`; returns `[B, N]`.

    Args:
        targets: rows that the next tokens are taken from, by default the same.
        call: what to call in place of the model.
    """
    logits = logits_of(model, rows[:, :-1], call=call)  # [B, N, V]
    following = (rows if targets is None else targets)[:, 1:]  # [B, N]
    step = max(1, _AT_ONCE // (logits.shape[0] * logits.shape[2]))
    parts = [
        F.cross_entropy(some.transpose(1, 2).float(), wanted, reduction="none")
        for some, wanted in zip(logits.split(step, dim=1), following.split(step, dim=1), strict=True)
    ]
    return torch.cat(parts, dim=1).double().cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
