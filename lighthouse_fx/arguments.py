"""Checks of arguments that several functions share. Each error names the argument, its value and the remedy."""

from __future__ import annotations

import math
from typing import Any


def is_integer(value: Any) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, NaN and infinity included; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(name: str, value: Any, *, least: int, example: int | None = None) -> None:
    """Check an integer argument.

    Args:
        least: the smallest value that is allowed.
        example: a usual value, shown in the error.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is below `least`.
    """
    remedy = f"give an integer of at least {least}" + ("" if example is None else f", such as {name}={example}")
    if not is_integer(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: {remedy}")
    if value < least:
        raise ValueError(f"{name}={value}: {remedy}")


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    example: float,
) -> None:
    """Check an argument that is a finite number.

    Args:
        least, above: lower bounds, the first of them allowed itself.
        most, below: upper bounds, the first of them allowed itself.
        example: a usual value, shown in the error.

    Raises:
        TypeError: the value is no number.
        ValueError: the value is not finite, or out of bounds.
    """
    limits = [
        f"{word} {limit:g}"
        for word, limit in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if math.isfinite(limit)
    ]
    remedy = f"give a finite number{' ' if limits else ''}{' and '.join(limits)}, such as {name}={example:g}"
    if not is_number(value):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: {remedy}")
    if not (math.isfinite(value) and least <= value <= most and above < value < below):
        raise ValueError(f"{name}={value}: {remedy}")
