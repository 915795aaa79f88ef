"""`tune(shape)`: which pyramid a layer should have here. Candidates are predicted, the best measured, one recommended.

The rule: of the pyramids whose layer takes at most `share` of the time of dense attention, forward plus backward, and whose
memory fits, the one that keeps the most of the sequence, S/N; where that is the same to a hundredth, the one nearer to three
levels, then the faster one. If none qualifies, the recommendation is to stay dense, and says why. Where candidates are
measured, only they are recommended.

The start of `candidates.py` is measured first, and then, one by one, whichever the cost model, corrected by what the
measurements so far were off, holds for the best by the rule. When the time is over, the model answers for the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from lighthouse_fx.arguments import is_integer, is_number

from .candidates import START, Candidate, Measured, predicted
from .cost import Card, measure_card, predict_dense
from .layer import LayerShape, measure_dense, measure_function

_RUNS = 8  # a measurement takes about so many times what it measures


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The answer of `tune`: `print(tuning)`, `tuning.recommended.config`, `tuning.save_picture("tuning.png")`.

    Attributes:
        dense: milliseconds of dense attention; dense_measured: or predicted.
        share: of the dense time that was allowed; memory: bytes that were, None: any.
        candidates: from the one that keeps least; recommended: one of them, None where the layer should stay dense.
        correction: what the predictions of those not measured were multiplied by, after those that were.
        reason: why that one; remedy: what would change the answer, "" where a pyramid is recommended.
        stopped: why no more candidates were measured, "" where as many were as was asked for.
    """

    shape: LayerShape
    card: Card
    dense: float
    dense_measured: bool
    share: float
    memory: int | None
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    correction: float
    reason: str
    remedy: str
    stopped: str

    def save_json(self, path: Any) -> Any:
        """Write every figure, for programs. Returns the path."""
        from .tuning_figures import save_json

        return save_json(self, path)

    def save_picture(self, path: Any) -> Any:
        """Draw time against kept share; needs matplotlib, the extra `plot`. Returns the path."""
        from .tuning_figures import save_picture

        return save_picture(self, path)

    def __str__(self) -> str:
        from .tuning_figures import text

        return text(self)


def tune(
    shape: LayerShape,
    *,
    share: float = 0.1,
    memory: int | None = None,
    device: torch.device | str | None = None,
    card: Card | None = None,
    measure: int = 8,
    seconds: float = 120.0,
    progress: Callable[[str], object] = lambda _: None,
    so_far: Callable[[Tuning], object] = lambda _: None,
) -> Tuning:
    """Recommend a pyramid for a layer.

    Args:
        shape: the layer; `shape_of(model, length)` finds a model's.
        share: the layer may take this share of the time of dense attention, forward plus backward.
        memory: bytes that forward plus backward of one layer may add, output and gradients included; None: any.
        device: where to measure; by default the GPU, or the CPU where there is none.
        card: the rates to predict with, such as `lighthouse_fx.measure.cost.H100`; by default they are measured on the device.
        measure: how many candidates to measure, the predicted best first; 0: predict only, which with a card needs no GPU.
        seconds: to measure for; no measurement is begun that is expected to end later, and the model answers for the rest.
        progress: is told what is measured next.
        so_far: is given the answer after every measurement, as it would be if that were the last.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    _check(shape, share=share, memory=memory, card=card, measure=measure, seconds=seconds)
    end = time.monotonic() + seconds
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if card is None:
        progress("the rates of this machine")
        card = measure_card(device, shape.dtype)
    found = predicted(shape, card)
    dense = predict_dense(shape, card)
    # A quarter of the time at most: it is one figure of many.
    dense_measured = measure > 0 and bool(found) and _RUNS * dense / 1000 < (end - time.monotonic()) / 4
    if dense_measured:
        progress("dense attention")
        try:
            dense = measure_dense(shape, device)
        except torch.OutOfMemoryError:
            dense_measured = False

    def answer(stopped: str = "") -> Tuning:
        ratio = _correction(found)
        corrected = sorted((_corrected(c, ratio) for c in found), key=lambda c: (c.kept, c.config.levels, c.milliseconds))
        best, reason, remedy = _recommended(corrected, dense, share=share, memory=memory)
        return Tuning(
            shape=shape,
            card=card,
            dense=dense,
            dense_measured=dense_measured,
            share=share,
            memory=memory,
            candidates=tuple(corrected),
            recommended=best,
            correction=ratio,
            reason=reason,
            remedy=remedy,
            stopped=stopped,
        )

    longest = 0.0
    wanted = min(measure, len(found))
    for place in range(wanted):
        begun = time.monotonic()
        candidate = _next(found, share * dense, memory, (end - begun) / _RUNS)
        if candidate is None or begun + longest > end:
            return answer(f"{place} of {wanted} candidates were measured in the {seconds:g} s given")
        progress(f"{candidate.label}, {place + 1} of at most {wanted}")
        found[found.index(candidate)] = _measured(candidate, shape, device)
        longest = max(longest, time.monotonic() - begun)
        so_far(answer())
    return answer()


def shape_of(model: Any, length: int, *, dtype: str | None = None) -> LayerShape:
    """The attention layers of a transformers model, read from its config, which may also be given itself.

    Args:
        dtype: by default that of the model's parameters, and bfloat16 where there are none.

    Raises:
        ValueError: the model's config does not say how many heads there are.
    """
    described: Any = getattr(model, "config", model)
    described = getattr(described, "text_config", described)
    heads = getattr(described, "num_attention_heads", None)
    width = getattr(described, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ValueError(
            f"model={type(model).__name__} has no config with num_attention_heads and hidden_size: "
            "give a LayerShape(length=..., heads=..., groups=..., dim=...)"
        )
    if dtype is None:
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        dtype = str(next((p.dtype for p in parameters), torch.bfloat16)).removeprefix("torch.")
    return LayerShape(
        length=length,
        heads=heads,
        groups=getattr(described, "num_key_value_heads", None) or heads,
        dim=getattr(described, "head_dim", None) or width // heads,
        dtype=dtype,
    )


# --- the rule ---------------------------------------------------------------------------------------------------------


def _recommended(
    found: list[Candidate], dense: float, *, share: float, memory: int | None
) -> tuple[Candidate | None, str, str]:
    """The one, why, and what would change a refusal. Where some were measured, only those are recommended."""
    tried = [c for c in found if c.measured]
    usable = tried or [c for c in found if not c.failure]
    if not usable or (not tried and len(usable) < len(found)):
        return None, "no pyramid could be measured" if found else "the sequence is too short for any pyramid", (
            "give a longer sequence" + (", or measure=0 (--predict) to have the cost predicted" if found else "")
        )
    fast = [c for c in usable if c.milliseconds <= share * dense]
    if not fast:
        best = min(usable, key=lambda c: c.milliseconds)
        needed = best.milliseconds / dense + 0.01
        return None, (
            f"no pyramid takes at most {share:.0%} of the dense {dense:.3g} ms; "
            f"the fastest, {best.label}, takes {best.milliseconds / dense:.0%}"
        ), f"allow share={needed:.2f}" if needed <= 1 else "Lighthouse gains with longer sequences"
    fits = [c for c in fast if memory is None or c.memory <= memory]
    if not fits:
        least = min(c.memory for c in fast)
        return None, (
            f"no pyramid that is fast enough fits into {memory or 0:,} bytes; the smallest adds {least:,}"
        ), f"allow memory={least} (--memory {math.ceil(least / 1e7) / 100:g}, in GB), or shorten the sequence"
    best = max(fits, key=_rank)
    return best, (
        f"keeps the most of the sequence, {best.kept:.1%}, of those {'measured' if tried else 'predicted'} "
        f"that take at most {share:.0%} of dense attention's time"
        + ("" if memory is None else f" and {memory / 1e6:,.0f} MB")
    ), ""


def _next(found: list[Candidate], limit: float, memory: int | None, longest: float) -> Candidate | None:
    """What to measure next: the start, then the best by the rule as far as can be predicted, or else the fastest.

    Only what takes `longest` seconds at most; None: nothing is left that does.
    """
    ratio = _correction(found)
    rest = [c for c in (_corrected(c, ratio) for c in found) if not c.measured and not c.failure]
    rest = [c for c in rest if c.milliseconds / 1000 <= longest]
    fits = [c for c in rest if memory is None or c.memory <= memory]
    fast = [c for c in fits if c.milliseconds <= limit]
    if any(c.config == found[0].config for c in fits):
        return found[0]
    best = max(fast, key=_rank) if fast else min(fits or rest, key=lambda c: c.milliseconds, default=None)
    return None if best is None else next(c for c in found if c.config == best.config)


def _correction(found: list[Candidate]) -> float:
    """How much longer the measured ones took than was predicted, so that a poor model of a card costs measurements only."""
    ratios = [c.measured.milliseconds / c.predicted.milliseconds for c in found if c.measured]
    return median(ratios) if ratios else 1.0


def _corrected(candidate: Candidate, ratio: float) -> Candidate:
    if candidate.measured:
        return candidate
    cost = candidate.predicted
    return replace(candidate, predicted=replace(cost, milliseconds=ratio * cost.milliseconds))


def _rank(candidate: Candidate) -> tuple[float, int, float]:
    """The rule's order, the best last."""
    return round(candidate.kept, 2), -abs(candidate.config.levels - START.levels), -candidate.milliseconds


def _measured(candidate: Candidate, shape: LayerShape, device: torch.device) -> Candidate:
    try:
        milliseconds, memory = measure_function(shape, candidate.config, device)
    except torch.OutOfMemoryError:
        return replace(candidate, failure="out of memory")
    return replace(candidate, measured=Measured(milliseconds=milliseconds, memory=memory))


def _check(shape: Any, *, share: Any, memory: Any, card: Any, measure: Any, seconds: Any) -> None:
    if not isinstance(shape, LayerShape):
        raise TypeError(f"shape={shape!r} is a {type(shape).__name__}: give a LayerShape, or shape_of(model, length)")
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(f"share={share!r} is not in (0, 1]: give a share of dense attention's time, such as 0.1")
    if memory is not None and (not is_integer(memory) or memory < 1):
        raise ValueError(f"memory={memory!r}: give a number of bytes, such as 2 * 10**9, or None for any")
    if card is not None and not isinstance(card, Card):
        raise TypeError(f"card={card!r} is a {type(card).__name__}: give a Card, such as lighthouse_fx.measure.cost.H100")
    if not is_integer(measure) or measure < 0:
        raise ValueError(f"measure={measure!r}: give how many candidates to measure, 0 to predict only")
    if not is_number(seconds) or not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: give how many seconds to measure for, such as 120")
