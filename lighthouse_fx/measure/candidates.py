"""The pyramids that `tune` looks at, and what is known of each: predicted, and measured where there was time.

They start from three levels with pooling 4, the paper's. Where memory and time allow more, more windows, a smaller pooling or
another level keep more of the sequence or spread it more finely; where time is short, fewer windows, a larger pooling or a
dropped level save it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.pyramid import pyramid_over

from .cost import Card, Cost, predict
from .layer import LayerShape

START = LighthouseConfig(levels=3, pooling=4, max_kept=0.75)
_LEVELS = (3, 2, 4)
_POOLINGS = (4, 2, 8)
_TOKENS_PER_WINDOW = 64  # topk of the start: the paper's 1536 at 98,304 tokens
_TOPK_SCALES = (0.25, 0.5, 1, 2, 4, 8)
_QUOTA = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Forward plus backward of one layer: milliseconds, and the bytes that it adds, None where they cannot be known."""

    milliseconds: float
    memory: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One pyramid.

    Attributes:
        change: what it changes of the start, "the start" for that itself.
        predicted: by the cost model; of a candidate that was not measured, corrected by those that were.
        failure: why a measurement of it came to nothing, "" where it did not fail or was not tried.
    """

    config: LighthouseConfig
    length: int
    gathered: int
    change: str
    predicted: Cost
    measured: Measured | None = None
    failure: str = ""

    @property
    def label(self) -> str:
        """A few signs: levels, pooling, windows."""
        return f"L{self.config.levels} p{self.config.pooling} k{self.config.topk:,}"

    @property
    def config_text(self) -> str:
        """How to write its configuration down."""
        config = self.config
        return f"LighthouseConfig(levels={config.levels}, pooling={config.pooling}, topk={config.topk})"

    @property
    def kept(self) -> float:
        """Share of the sequence that is attended to, S/N."""
        return self.gathered / self.length

    @property
    def milliseconds(self) -> float:
        """Forward plus backward, measured if it was."""
        return self.measured.milliseconds if self.measured else self.predicted.milliseconds

    @property
    def memory(self) -> int:
        """Bytes that forward plus backward add at most, measured if they were."""
        known = self.measured.memory if self.measured else None
        return self.predicted.memory if known is None else known


def candidates(length: int) -> Iterator[LighthouseConfig]:
    """The pyramids that are worth a look over so many tokens, the start first; each keeps another number of entries."""
    start = _start_windows(length)
    seen: set[tuple[int, int]] = set()
    for levels in _LEVELS:
        for pooling in _POOLINGS:
            for scale in sorted(_TOPK_SCALES, key=lambda scale: scale != 1):
                config = replace(START, levels=levels, pooling=pooling, topk=_whole(start * scale))
                pyramid = pyramid_over(length, config)
                kept = int(pyramid.gathered) / length
                if pyramid.coarse < 2 or kept > START.max_kept or (levels, int(pyramid.gathered)) in seen:
                    continue
                seen.add((levels, int(pyramid.gathered)))
                yield config


def predicted(shape: LayerShape, card: Card) -> list[Candidate]:
    """Every candidate of a layer with its predicted cost, the start first."""
    return [
        Candidate(
            config=config,
            length=shape.length,
            gathered=int(pyramid_over(shape.length, config).gathered),
            change=_change(config, shape.length),
            predicted=predict(shape, config, card),
        )
        for config in candidates(shape.length)
    ]


def _change(config: LighthouseConfig, length: int) -> str:
    start, topk = _whole(_start_windows(length)), pyramid_over(length, config).topk
    changes = [
        words
        for words, (now, before) in {
            "level more": (config.levels, START.levels),
            "level fewer": (START.levels, config.levels),
            "finer": (START.pooling, config.pooling),
            "coarser": (config.pooling, START.pooling),
            "more windows": (topk, start),
            "fewer windows": (start, topk),
        }.items()
        if now > before
    ]
    return ", ".join(changes) or "the start"


def _start_windows(length: int) -> int:
    return max(1, length // _TOKENS_PER_WINDOW)


def _whole(topk: float) -> int:
    """A number of windows that tiles divide well: a multiple of the usual quota where it is larger than that."""
    return max(1, round(topk)) if topk < _QUOTA else round(topk / _QUOTA) * _QUOTA
