"""`tune(shape)`: which pyramid a layer should have here. Candidates are predicted, the best measured, one recommended.

The rule: of the pyramids whose layer takes at most `share` of the time of dense attention, forward plus backward, and whose
memory fits, the one that keeps the most of the sequence, S/N; where that is the same to a hundredth, the one of fewer levels,
then the faster one. If none qualifies, the recommendation is to stay dense, and says why. Where candidates are measured, only
they are recommended.

The candidates start from three levels with pooling 4. More windows, a smaller pooling and another level keep more or spread it
more finely; fewer windows, a larger pooling and a dropped level save time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from .bench import LayerShape, LayerTimes, measure_layer
from .config import LighthouseConfig
from .cost import Card, Cost, measure_card, predict, predict_dense
from .passes.check import pyramid_over

_START = LighthouseConfig(levels=3, pooling=4)
_LEVELS = (3, 2, 4)
_POOLINGS = (4, 2, 8)
_TOKENS_PER_WINDOW = 64  # topk of the start: the paper's 1536 at 98,304 tokens
_TOPK_SCALES = (0.25, 0.5, 1, 2, 4, 8)
_QUOTA = 128
_LONGEST_DENSE_MS = 10_000.0  # predicted; beyond, dense attention is not run


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One pyramid. `failure` says why a measurement of it came to nothing, "" where it did not fail or was not tried."""

    config: LighthouseConfig
    length: int
    gathered: int
    predicted: Cost
    measured: LayerTimes | None = None
    failure: str = ""

    @property
    def kept(self) -> float:
        """Share of the sequence that is attended to, S/N."""
        return self.gathered / self.length

    @property
    def milliseconds(self) -> float:
        """Forward plus backward, measured if it was."""
        return self.measured.layer[1] if self.measured else self.predicted.milliseconds

    @property
    def memory(self) -> int:
        """Bytes that forward plus backward add at most, measured if they were."""
        known = self.measured.memory if self.measured else None
        return self.predicted.memory if known is None else known


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The answer of `tune`: `print(tuning)`, `tuning.recommended.config`, `tuning.save_picture("tuning.png")`.

    Attributes:
        dense: milliseconds of dense attention; dense_measured: or predicted.
        share: of the dense time that was allowed; memory: bytes that were, None: any.
        candidates: from the one that keeps least; recommended: one of them, None where the layer should stay dense.
        reason: why that one; remedy: what would change the answer, "" where a pyramid is recommended.
    """

    shape: LayerShape
    card: Card
    dense: float
    dense_measured: bool
    share: float
    memory: int | None
    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    reason: str
    remedy: str

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
    measure: int = 6,
    progress: Callable[[str], object] = lambda _: None,
) -> Tuning:
    """Recommend a pyramid for a layer.

    Args:
        shape: the layer; `shape_of(model, length)` finds a model's.
        share: the layer may take this share of the time of dense attention, forward plus backward.
        memory: bytes that forward plus backward of one layer may add, output and gradients included; None: any.
        device: where to measure; by default the GPU, or the CPU where there is none.
        card: the rates to predict with, such as `lighthouse_fx.cost.H100`; by default they are measured on the device.
        measure: how many candidates to measure, the predicted best first; 0: predict only, which with a card needs no GPU.
        progress: is told what is measured next.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    _check(shape, share=share, memory=memory, card=card, measure=measure)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if card is None:
        progress("the rates of this machine")
        card = measure_card(device, shape.dtype)
    found = [
        Candidate(config=config, length=shape.length, gathered=_gathered(shape, config), predicted=predict(shape, config, card))
        for config in candidates(shape.length)
    ]
    dense = predict_dense(shape, card)
    dense_measured = False
    for place in range(measure):
        candidate = _next(found, share * dense, memory)
        if candidate is None:
            break
        progress(f"{label(candidate)}, {place + 1} of at most {measure}")
        wanted = not dense_measured and dense < _LONGEST_DENSE_MS
        result = _measured(candidate, shape, device, card, dense=wanted)
        if result.measured and result.measured.dense:
            dense, dense_measured = result.measured.dense[1], True
        found[found.index(candidate)] = result
    found.sort(key=lambda c: (c.kept, c.config.levels, c.milliseconds))
    best, reason, remedy = _recommended(found, dense, share=share, memory=memory, measured_only=measure > 0)
    return Tuning(
        shape=shape,
        card=card,
        dense=dense,
        dense_measured=dense_measured,
        share=share,
        memory=memory,
        candidates=tuple(found),
        recommended=best,
        reason=reason,
        remedy=remedy,
    )


def candidates(length: int) -> Iterator[LighthouseConfig]:
    """The pyramids that are worth a look over so many tokens, the start first; each keeps another number of entries."""
    start = max(1, length // _TOKENS_PER_WINDOW)
    seen: set[tuple[int, int]] = set()
    for levels in _LEVELS:
        for pooling in _POOLINGS:
            for scale in _TOPK_SCALES:
                config = replace(_START, levels=levels, pooling=pooling, topk=_whole(start * scale))
                pyramid = pyramid_over(length, config)
                kept = int(pyramid.gathered) / length
                if pyramid.coarse < 2 or kept > _START.max_kept or (levels, int(pyramid.gathered)) in seen:
                    continue
                seen.add((levels, int(pyramid.gathered)))
                yield config


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


def label(candidate: Candidate) -> str:
    """A candidate in a few signs: levels, pooling, windows."""
    return f"L{candidate.config.levels} p{candidate.config.pooling} k{candidate.config.topk:,}"


# --- the rule ---------------------------------------------------------------------------------------------------------


def _recommended(
    found: list[Candidate], dense: float, *, share: float, memory: int | None, measured_only: bool
) -> tuple[Candidate | None, str, str]:
    """The one, why, and what would change a refusal. Where some were measured, only those are recommended."""
    usable = [c for c in found if not c.failure and (c.measured or not measured_only)]
    if not usable:
        return None, "no pyramid could be measured" if found else "the sequence is too short for any pyramid", (
            "give a longer sequence, or measure=0 to have the cost predicted"
        )
    fast = [c for c in usable if c.milliseconds <= share * dense]
    if not fast:
        best = min(usable, key=lambda c: c.milliseconds)
        return None, (
            f"no pyramid takes at most {share:.0%} of the dense {dense:.3g} ms; "
            f"the fastest, {label(best)}, takes {best.milliseconds / dense:.0%}"
        ), f"stay dense at this length, or allow share={min(1.0, best.milliseconds / dense + 0.01):.2f}"
    fits = [c for c in fast if memory is None or c.memory <= memory]
    if not fits:
        least = min(c.memory for c in fast)
        return None, (
            f"no pyramid that is fast enough fits into {memory or 0:,} bytes; the smallest adds {least:,}"
        ), f"allow memory={least}, or shorten the sequence"
    best = max(fits, key=_rank)
    return best, (
        f"keeps the most of the sequence, {best.kept:.1%}, of those that take at most {share:.0%} of dense attention's time"
        + ("" if memory is None else f" and {memory / 1e6:,.0f} MB")
    ), ""


def _next(found: list[Candidate], limit: float, memory: int | None) -> Candidate | None:
    """What to measure next: the best by the rule as far as can be predicted, or else the fastest; None after the last.

    Predictions are corrected by what the measurements so far were off, so a poor model of a card costs measurements only.
    """
    ratios = [c.measured.layer[1] / c.predicted.milliseconds for c in found if c.measured]
    limit /= median(ratios) if ratios else 1.0
    rest = [c for c in found if not c.measured and not c.failure]
    fast = [c for c in rest if c.milliseconds <= limit and (memory is None or c.memory <= memory)]
    if fast:
        return max(fast, key=_rank)
    return min(rest, key=lambda c: c.milliseconds, default=None)


def _rank(candidate: Candidate) -> tuple[float, int, float]:
    """The rule's order, the best last."""
    return round(candidate.kept, 2), -candidate.config.levels, -candidate.milliseconds


def _measured(
    candidate: Candidate, shape: LayerShape, device: torch.device, card: Card, *, dense: bool
) -> Candidate:
    try:
        times = measure_layer(shape, candidate.config, device, bandwidth=card.bandwidth, dense=dense)
    except torch.OutOfMemoryError:
        return replace(candidate, failure="out of memory")
    return replace(candidate, measured=times)


def _gathered(shape: LayerShape, config: LighthouseConfig) -> int:
    return int(pyramid_over(shape.length, config).gathered)


def _whole(topk: float) -> int:
    """A number of windows that tiles divide well: a multiple of the usual quota where it is larger than that."""
    return max(1, round(topk)) if topk < _QUOTA else round(topk / _QUOTA) * _QUOTA


def _check(shape: Any, *, share: Any, memory: Any, card: Any, measure: Any) -> None:
    if not isinstance(shape, LayerShape):
        raise TypeError(f"shape={shape!r} is a {type(shape).__name__}: give a LayerShape, or shape_of(model, length)")
    for name in ("length", "heads", "groups", "dim"):
        value = getattr(shape, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: give an integer of at least 1")
    if shape.heads % shape.groups:
        raise ValueError(f"groups={shape.groups} does not divide heads={shape.heads}: give a divisor, as many as the model has")
    if shape.dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype={shape.dtype!r}: give 'bfloat16', 'float16' or 'float32'")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"share={share!r} is not in (0, 1]: give a share of dense attention's time, such as 0.1")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory={memory!r}: give a number of bytes, such as 2 * 10**9, or None for any")
    if card is not None and not isinstance(card, Card):
        raise TypeError(f"card={card!r} is a {type(card).__name__}: give a Card, such as lighthouse_fx.cost.H100")
    if isinstance(measure, bool) or not isinstance(measure, int) or measure < 0:
        raise ValueError(f"measure={measure!r}: give how many candidates to measure, 0 to predict only")
