"""The rule by which `BudgetControl` gives budgets: buckets of `topk`, the thresholds between them, and a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighthouse_fx.arguments import check_integer, check_number, is_number
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
        check_integer("every", every, least=1, example=200)
        check_number("margin", margin, least=0, below=1, example=0.0002)
        return cls(topk=buckets, every=every, thresholds=between, margin=float(margin))

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


def _thresholds(thresholds: Any, topk: Sequence[int]) -> tuple[float, ...]:
    if thresholds is None:
        if len(topk) != len(_THRESHOLDS) + 1:
            raise ValueError(
                f"thresholds=None with {len(topk)} buckets in topk={tuple(topk)}: the default {_THRESHOLDS} is for "
                f"{len(_THRESHOLDS) + 1}; give {len(topk) - 1} thresholds"
            )
        return _THRESHOLDS
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str) or not all(map(is_number, thresholds)):
        raise TypeError(f"thresholds={thresholds!r}: give a tuple of numbers in (0, 1), such as {_THRESHOLDS}")
    given = tuple(map(float, thresholds))
    if len(given) != len(topk) - 1 or list(given) != sorted(set(given)) or not all(0 < x < 1 for x in given):
        raise ValueError(
            f"thresholds={given}: give {len(topk) - 1}, rising and in (0, 1), one between each two buckets of "
            f"topk={tuple(topk)}"
        )
    return given


