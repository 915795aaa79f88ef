"""`future_leak(model, tokens)`: does the model predict a token from what follows it?

    t0 t1 ... tc | tc+1 ... tN        the loss at tc, which predicts tc+1
    t0 t1 ... tc | other text         the same loss, of the same tc+1; what it rises by had leaked

A causal model cannot tell the two rows apart at the tokens up to the cut, so its rise is 0, but for rounding. Lighthouse
attention ranks windows by all the tokens of a row, so an output may depend on later tokens, and training learns to use what
it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lighthouse_fx.arguments import check_integer
from lighthouse_fx.frontend.as_trained import AsTrained
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.runtime import stage

from .future_leak_result import FutureLeak, Leak
from .model_outputs import evaluating, token_losses

CUTS = 96
_REACH = 8  # tokens before the cut that are looked at
_SKIPPED = 8  # the first eighth of a row is not cut: there every model knows little


def future_leak(
    model: nn.Module,
    tokens: Tensor,
    cuts: int = CUTS,
    *,
    config: LighthouseConfig | None = None,
    other: Tensor | None = None,
    reach: int = _REACH,
    batch: int = 1,
    seed: int = 0,
) -> FutureLeak:
    """Measure how much the loss at a token rises when all that follows it is replaced by other text.

    The model is run in eval mode without gradients, under the attention that it trains with (as `validate` does, in any
    stage and without Inductor) and under dense attention. Rows are cut at random places; inside `documents(...)` at the last
    token of a document whose successor belongs to the same document.

    Args:
        model: a causal language model, compiled or not: token numbers `[B, N]` to logits `[B, N, V]`.
        tokens: held-out text, token numbers `[B, N + 1]`, on any device.
        cuts: how many places to cut at, over all rows; the standard error falls with its square root.
        config: the Lighthouse attention; by default as the model is compiled, otherwise `LighthouseConfig()`.
        other: the text that replaces, of the shape of `tokens`; by default the next row, of a single row its other half.
        reach: how many tokens before a cut are looked at, the last one included.
        batch: rows at once; inside `documents(...)` all rows are run at once.
        seed: of the places.

    Returns:
        A `FutureLeak`: `print(result)`, `result.lighthouse.mean` in nats, `result.reading`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a Module")
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rows, others = check_rows("tokens", tokens).to(device), None if other is None else check_rows("other", other).to(device)
    check_integer("reach", reach, least=1, example=_REACH)
    check_integer("batch", batch, least=1)
    lighthouse = AsTrained(model, config, inside_documents=stage.documents is not None)
    with evaluating(model):
        return measure_leak(model, lighthouse, rows, cuts, other=others, reach=reach, batch=batch, seed=seed)


def measure_leak(
    model: nn.Module,
    lighthouse: AsTrained,
    rows: Tensor,
    cuts: int,
    *,
    other: Tensor | None = None,
    reach: int = _REACH,
    batch: int = 1,
    seed: int = 0,
) -> FutureLeak:
    """The leak of a model in eval mode. Arguments: `future_leak`; rows: `[B, N + 1]` on the model's device."""
    check_integer("cuts", cuts, least=2, example=CUTS)
    if other is None:
        other = rows.roll(1, dims=0) if len(rows) > 1 else rows.roll(rows.shape[1] // 2, dims=1)
    if other.shape != rows.shape or torch.equal(other, rows):
        what = "the same text" if other.shape == rows.shape else f"of shape {list(other.shape)}"
        raise ValueError(f"other is {what} and tokens has shape {list(rows.shape)}: give other text of the same shape")
    ends = _ends(rows)
    places = _draw(ends, cuts, generator=torch.Generator().manual_seed(seed))  # [rounds, B]
    at_once = len(rows) if stage.documents is not None else batch
    parts = list(zip(rows.split(at_once), other.split(at_once), places.split(at_once, dim=1), strict=True))

    def measure(call: Callable[..., Any] | None) -> Tensor:
        """The rise of the loss at each cut and at the tokens before it, `[cuts, reach]`; NaN before the row begins."""
        return torch.cat([_rises(model, call, *part, reach=reach) for part in parts])

    with torch.compiler.set_stance("force_eager"):
        dense = measure(None)
    approximate = measure(lighthouse)
    calls = tuple(lighthouse.calls)
    return FutureLeak(
        title=type(getattr(model, "_orig_mod", model)).__name__,
        config=lighthouse.config,
        length=rows.shape[1] - 1,
        at_documents=stage.documents is not None,
        dense=_summary(dense),
        lighthouse=_summary(approximate) if any(call.rewritten for call in calls) else None,
        calls=calls,
    )


def check_rows(name: str, rows: Any) -> Tensor:
    """Token numbers `[B, N + 1]` as int64.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(rows, Tensor) or rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        shown = f"has dtype {rows.dtype}" if isinstance(rows, Tensor) else f"is a {type(rows).__name__}"
        raise TypeError(f"{name} {shown}: give token numbers, an integer tensor [B, N + 1]")
    if rows.dim() != 2 or not len(rows) or rows.shape[1] < 3:
        raise ValueError(f"{name} has shape {list(rows.shape)}: give token numbers [B, N + 1], at least one row of N = 2")
    return rows.long()


def _rises(
    model: nn.Module, call: Callable[..., Any] | None, rows: Tensor, other: Tensor, places: Tensor, *, reach: int
) -> Tensor:
    """`[rounds * B, reach]`: each round cuts every row once. rows, other: `[B, N + 1]`; places: `[rounds, B]`."""
    column = torch.arange(rows.shape[1], device=rows.device)
    before = token_losses(model, rows, call=call)  # [B, N]
    found = []
    for at in places:  # [B]
        mixed = torch.where(column <= at[:, None].to(rows.device), rows, other)  # [B, N + 1]
        after = token_losses(model, mixed, targets=rows, call=call)
        seen = at[:, None] - torch.arange(reach)  # [B, reach]
        rise = (after - before).gather(1, seen.clamp(min=0))
        found.append(rise.masked_fill(seen < 0, math.nan))
    return torch.cat(found)


def _ends(rows: Tensor) -> list[Tensor]:
    """For each row, the tokens after which it may be cut: each has a successor among the inputs, which is replaced."""
    length = rows.shape[1] - 1
    if stage.documents is None:
        return [torch.arange(length // _SKIPPED, length - 1)] * len(rows)
    starts = stage.documents.starts  # [B, N]
    if list(starts.shape) != [len(rows), length]:
        raise ValueError(f"tokens has shape {list(rows.shape)} inside documents() of {list(starts.shape)}: give [B, N + 1]")
    begins = starts == torch.arange(length)
    last = begins.roll(-1, dims=1)  # [B, N], the last token of each document
    last[:, -1] = True
    ends = [row.nonzero().flatten() - 1 for row in last]
    ends = [end[(end >= 0) & (starts[n, end.clamp(min=0)] == starts[n, end + 1])] for n, end in enumerate(ends)]
    if short := [n for n, end in enumerate(ends) if not len(end)]:
        raise ValueError(f"documents() has no document of two tokens in row {short[0]} of tokens: leave out such rows")
    return ends


def _draw(ends: list[Tensor], cuts: int, *, generator: torch.Generator) -> Tensor:
    """Places `[rounds, B]`, so many rounds that there are at least `cuts`; none twice in a row before all were taken."""
    rounds = -(-cuts // len(ends))
    drawn = []
    for row in ends:
        orders = [row[torch.randperm(len(row), generator=generator)] for _ in range(-(-rounds // len(row)))]
        drawn.append(torch.cat(orders)[:rounds])
    return torch.stack(drawn, dim=1)


def _summary(rises: Tensor) -> tuple[Leak, ...]:
    """By distance from the cut. rises: `[cuts, reach]`, NaN where there is no token."""
    found = []
    for distance, column in enumerate(rises.T):
        known = column[~column.isnan()]
        if len(known) > 1:
            error = known.std().item() / len(known) ** 0.5
            found.append(Leak(distance=distance, mean=known.mean().item(), error=error, cuts=len(known)))
    return tuple(found)
