"""Exact values of mask elements, as functions of the query position `i` and the key position `j`.

An element is one of
    Affine   an integer such as `i - j + 3`, or with other coordinates, which a mask must not depend on in the end
    Quotient such an integer divided by a constant, rounded down: the number of a chunk of positions
    Cases    a Python constant on each of a few sets of diagonals, such as {i >= j: True, i < j: False}
Whatever is neither raises `Unproven`, with the reason. Nothing is ever approximated or tried out at small sizes: a sliding
window that is wider than the sample would pass for causal.

Values are exact numbers, and tensors hold them in some dtype. `in_dtype` is where the two meet: a number that its dtype
would round or wrap around is `Unproven`. So is NaN, which no comparison tells from a mask.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_Band = tuple[float, float]

# Whole numbers of smaller magnitude than this are exact. A dtype not listed here is never trusted with positions.
_EXACT_POSITIONS = {torch.int32: 2**31, torch.int64: 2**63, torch.float32: 2**24, torch.float64: 2**53}


@dataclass(frozen=True, slots=True)
class Diagonals:
    """A set of diagonals `d = i - j`: sorted, disjoint bands `lowest <= d <= highest`."""

    bands: tuple[_Band, ...]

    def __and__(self, other: Diagonals) -> Diagonals:
        cuts = ((max(a[0], b[0]), min(a[1], b[1])) for a in self.bands for b in other.bands)
        return Diagonals(tuple(sorted(band for band in cuts if band[0] <= band[1])))

    def __invert__(self) -> Diagonals:
        edges = [-math.inf, *itertools.chain.from_iterable((low - 1, high + 1) for low, high in self.bands), math.inf]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        return Diagonals(
            tuple((low, high) for low, high in gaps if low <= high and low < math.inf and high > -math.inf)
        )

    def __or__(self, other: Diagonals) -> Diagonals:
        return ~(~self & ~other)


EVERY = Diagonals(((-math.inf, math.inf),))
NOWHERE = Diagonals(())


class Unproven(Exception):
    """The value cannot be told from the graph alone; the message says why. On the diagonals `false` it is surely False.

    `node`: the operation of whose own result that is so, where it is not one of its arguments.
    """

    def __init__(self, why: str, false: Diagonals = NOWHERE, node: Any = None) -> None:
        super().__init__(why)
        self.false, self.node = false, node


@dataclass(frozen=True, slots=True)
class Affine:
    """`sum(coefficient * coordinate) + constant`; coordinates are integers from 0 on."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Affine) -> Affine:
        terms = dict(self.terms)
        for name, factor in other.terms:
            terms[name] = terms.get(name, 0) + factor
        kept = tuple(sorted((name, factor) for name, factor in terms.items() if factor))
        return Affine(kept, self.constant + other.constant)

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple((name, f * factor) for name, f in self.terms if factor), self.constant * factor)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    @property
    def is_natural(self) -> bool:
        """Surely not negative, whatever the coordinates."""
        return all(f > 0 for _, f in self.terms) and self.constant >= 0

    def magnitude(self, sizes: Mapping[str, int]) -> int:
        """At least its greatest absolute value, with coordinates below these sizes."""
        return abs(self.constant) + sum(abs(factor) * sizes[name] for name, factor in self.terms)


@dataclass(frozen=True, slots=True)
class Cases:
    """A constant on each of some disjoint sets of diagonals, which together are all."""

    parts: tuple[tuple[Diagonals, Any], ...]

    def where(self, wanted: Callable[[Any], bool]) -> Diagonals:
        """The diagonals on which the constant is as wanted."""
        found = NOWHERE
        for diagonals, value in self.parts:
            if wanted(value):
                found = found | diagonals
        return found


@dataclass(frozen=True, slots=True)
class Quotient:
    """`numerator // divisor`: the number of a chunk of positions."""

    numerator: Affine
    divisor: int


Element = Affine | Cases | Quotient


def coordinate(name: str) -> Affine:
    """The coordinate itself."""
    return Affine(((name, 1),))


def element(value: Any) -> Element:
    """A constant as an element."""
    if isinstance(value, torch.SymInt):
        if not value.node.expr.is_number:
            raise Unproven("it is built with a number that depends on the shapes")
        value = int(value.node.expr)
    if isinstance(value, bool | float):
        return Cases(((EVERY, value),))
    if isinstance(value, int):
        return Affine(constant=value)
    raise Unproven(f"it depends on {value!r}")


def as_cases(value: Element) -> Cases:
    """An element that is constant piece by piece, as such."""
    if isinstance(value, Cases):
        return value
    if isinstance(value, Quotient) or value.terms:
        raise Unproven("it depends on a position other than by comparing query and key")
    return Cases(((EVERY, value.constant),))


def as_affine(value: Element) -> Affine:
    """An element that is an integer function of the coordinates, as such."""
    if isinstance(value, Affine):
        return value
    if isinstance(value, Cases) and len(value.parts) == 1 and _is_whole(constant := value.parts[0][1]):
        return Affine(constant=int(constant))
    raise Unproven("an index in it is not a plain range of positions")


def _is_whole(constant: Any) -> bool:
    return math.isfinite(constant) and constant == int(constant)


def in_dtype(value: Element, dtype: torch.dtype, sizes: Mapping[str, int]) -> Element:
    """An element as a tensor of this dtype holds it; not proved if it is not exact there."""
    if isinstance(value, Quotient):
        in_dtype(value.numerator, dtype, sizes)
        return value
    if isinstance(value, Affine) and value.terms:
        if value.magnitude(sizes) >= _EXACT_POSITIONS.get(dtype, 0):
            raise Unproven(f"positions in it are not exact in {dtype}")
        return value
    cases = as_cases(apply(lambda constant: _constant_in(constant, dtype), value))
    # A whole number that is the same everywhere takes part in the arithmetic of positions.
    whole = dtype != torch.bool and len(cases.parts) == 1 and _is_whole(cases.parts[0][1])
    return as_affine(cases) if whole else cases


def _constant_in(constant: Any, dtype: torch.dtype) -> Any:
    if dtype == torch.bool and not math.isnan(constant):
        return bool(constant)
    if dtype == torch.bool or not _fits(constant, dtype):
        raise Unproven(f"{float(constant)} in it is not exact in {dtype}")
    return constant if dtype.is_floating_point else int(constant)


def _fits(constant: Any, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a number exactly, as a normal number. Also true of computing in a wider dtype, as fusion may."""
    if dtype.is_complex:
        return False
    if not dtype.is_floating_point:
        return _is_whole(constant) and torch.iinfo(dtype).min <= constant <= torch.iinfo(dtype).max
    if math.isinf(constant) or constant == 0:
        return True
    info = torch.finfo(dtype)
    if not info.tiny <= abs(constant) <= info.max or float(constant) != constant:
        return False
    return (math.frexp(constant)[0] * 2 / info.eps).is_integer()


def apply(function: Callable[..., Any], *values: Element) -> Element:
    """An element-wise function of elements that are constant piece by piece."""
    parts: list[tuple[Diagonals, Any]] = []
    for choice in itertools.product(*(as_cases(value).parts for value in values)):
        diagonals = EVERY
        for where, _ in choice:
            diagonals = diagonals & where
        if diagonals.bands:
            parts.append((diagonals, function(*(constant for _, constant in choice))))
    return Cases(tuple(parts))


def compare(relation: str, left: Element, right: Element) -> Cases:
    """`left < right` and its like: `relation` is one of lt, le, gt, ge, eq, ne."""
    if relation in ("gt", "ge"):
        return compare({"gt": "lt", "ge": "le"}[relation], right, left)
    if relation == "ne":
        return _boolean(~compare("eq", left, right).where(bool))
    if not isinstance(left, Affine) or not isinstance(right, Affine):
        return as_cases(apply(getattr(operator, relation), left, right))
    if relation == "eq":
        return _boolean(compare("le", left, right).where(bool) & compare("le", right, left).where(bool))
    difference = left - right  # <= 0, or <= -1 where the relation is strict
    terms, constant = dict(difference.terms), difference.constant + (relation == "lt")
    shifted = Affine(difference.terms, constant)
    if (shifted * -1).is_natural:
        return _boolean(EVERY)
    if (shifted - Affine(constant=1)).is_natural:
        return _boolean(NOWHERE)
    factor = terms.get("i", 0)
    if not factor or terms != {"i": factor, "j": -factor}:
        raise Unproven("it depends on a position other than by comparing query and key")
    if factor > 0:
        return _boolean(Diagonals(((-math.inf, -constant // factor),)))
    return _boolean(Diagonals(((-(-constant // -factor), math.inf),)))


def _boolean(true: Diagonals) -> Cases:
    return Cases(tuple((where, value) for where, value in ((true, True), (~true, False)) if where.bands))
