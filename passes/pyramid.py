"""The pyramid that a configuration means over a sequence: here a `topk` that follows the length gets its value."""

from __future__ import annotations

from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.kernels.geometry import half_of

from .config import LighthouseConfig


def pyramid_over(length: int, config: LighthouseConfig) -> Pyramid:
    """The pyramid that a configuration means over so many tokens."""
    levels, pooling, topk, quota = config.levels, config.pooling, config.topk, config.quota
    if topk is None:
        topk, quota = half_of(length, levels=levels, pooling=pooling, quota=quota)
    return Pyramid(
        length=length, levels=levels, pooling=pooling, topk=topk, quota=quota, keep_first=config.keep_first,
        causal_selection=config.causal_selection,
    )  # fmt: skip
