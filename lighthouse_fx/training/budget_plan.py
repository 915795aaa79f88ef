"""The rule by which `BudgetControl` gives budgets: buckets of `topk`, the thresholds between them, and a margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighthouse_fx.passes.config import check_fields

_MOST = 5  # with the dense stage and evaluation still below the 8 graphs that Dynamo keeps of one piece of code
_THRESHOLDS = (0.998, 0.999)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """What `BudgetControl` was told: see there."""

    topk: tuple[int, ...]
    every: int
    thresholds: tuple[float, ...]
    margin: float

    @classmethod
    def checked(cls, *, topk: Any, every: Any, thresholds: Any, margin: Any) -> BudgetPlan:
        """The plan from a user's arguments.

        Raises:
            TypeError, ValueError: naming the argument, its value and the remedy.
        """
        buckets = _topk(topk)
        between = _thresholds(thresholds, buckets)
        return cls(topk=buckets, every=_every(every), thresholds=between, margin=_margin(margin))

    @property
    def start(self) -> int:
        """The bucket in which all parts start: the middle one, of an even number the upper."""
        return len(self.topk) // 2

    def moved(self, bucket: int, entropy: float) -> int:
        """The bucket that follows from an entropy. NaN is neither above a threshold nor below."""
        while bucket + 1 < len(self.topk) and entropy > self.thresholds[bucket] + self.margin:
            bucket += 1
        while bucket > 0 and entropy < self.thresholds[bucket - 1] - self.margin:
            bucket -= 1
        return bucket

    def as_data(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {
            "topk": list(self.topk),
            "every": self.every,
            "thresholds": list(self.thresholds),
            "margin": self.margin,
        }


def _topk(topk: Any) -> tuple[int, ...]:
    if not isinstance(topk, Sequence) or isinstance(topk, str):
        raise TypeError(f"topk={topk!r} is a {type(topk).__name__}: give a tuple of buckets, such as (768, 1536, 3072)")
    for k in topk:
        check_fields({"topk": k})
    if not 2 <= len(topk) <= _MOST or list(topk) != sorted(set(topk)):
        raise ValueError(f"topk={tuple(topk)}: give 2 to {_MOST} buckets, rising, such as (768, 1536, 3072)")
    return tuple(topk)


def _every(every: Any) -> int:
    if not isinstance(every, int) or isinstance(every, bool):
        raise TypeError(f"every={every!r} is a {type(every).__name__}: give an integer, such as every=200")
    if every < 1:
        raise ValueError(f"every={every}: give 1 or more steps, such as every=200")
    return every


def _thresholds(thresholds: Any, topk: Sequence[int]) -> tuple[float, ...]:
    if thresholds is None:
        if len(topk) != len(_THRESHOLDS) + 1:
            raise ValueError(
                f"thresholds=None with {len(topk)} buckets in topk={tuple(topk)}: the default {_THRESHOLDS} is for "
                f"{len(_THRESHOLDS) + 1}; give {len(topk) - 1} thresholds"
            )
        return _THRESHOLDS
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str) or not all(map(_is_number, thresholds)):
        raise TypeError(f"thresholds={thresholds!r}: give a tuple of numbers in (0, 1), such as {_THRESHOLDS}")
    given = tuple(map(float, thresholds))
    if len(given) != len(topk) - 1 or list(given) != sorted(set(given)) or not all(0 < x < 1 for x in given):
        raise ValueError(
            f"thresholds={given}: give {len(topk) - 1}, rising and in (0, 1), one between each two buckets of "
            f"topk={tuple(topk)}"
        )
    return given


def _margin(margin: Any) -> float:
    if not _is_number(margin):
        raise TypeError(f"margin={margin!r} is a {type(margin).__name__}: give a number, such as margin=0.0002")
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin}: give 0 or more, and less than 1, such as margin=0.0002")
    return float(margin)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
