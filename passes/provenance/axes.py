"""How the rows of attention lie in a tensor, and where they lie in what an operation was given.

    states = x.view(B, N, H, D).transpose(1, 2)         # [B, H, N, D]: token n is at dimension 2
                                                        in x [B, N, H * D]: at dimension 1

A row is one batch entry and token, with all its features; the heads count as features. `Rows` says for each dimension of a
tensor by which digits of the batch entry and of the token it counts, the slowest first: a dimension of both, `[B * N, C]`, has
one digit of each. A dimension of features has none, unless only a part of it was taken: whether those are the features of one
token or two sequences beside each other shows where a projection made them. Sizes are exact numbers and symbols, whose
comparison makes no guards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ..attention_call import constant, fake
from ..ir.ops import operation_name
from .rows import given, sizes

_BATCH, TOKEN, _FEATURE = "bn*"


class Digit(NamedTuple):
    """A digit of a batch entry or token, or a part of the features.

    It has `size` values, of which one counts for `worth`. `taken`: the ranges that were taken of it, the latest first, each its
    start, step and length.
    """

    kind: str
    size: Any
    worth: Any = sympy.Integer(1)
    taken: tuple[tuple[Any, ...], ...] = ()


class Rows(NamedTuple):
    """The digits of each dimension; none where it is one of features as a whole."""

    dims: tuple[tuple[Digit, ...], ...]

    @property
    def tokens(self) -> tuple[tuple[Digit, ...], ...]:
        """The same without the features."""
        return tuple(tuple(digit for digit in digits if digit.kind != _FEATURE) for digits in self.dims)


def rows_of(tensor: torch.Tensor | None) -> Rows:
    """The rows of a tensor `[B, H, N, D]`."""
    assert tensor is not None, "checked before"
    of = sizes(tensor)
    return Rows(tuple(_joined([Digit(kind, size)]) for kind, size in zip("b*n*", of, strict=True)))


# --- digits -----------------------------------------------------------------------------------------------------------


def _joined(digits: Sequence[Digit]) -> tuple[Digit, ...]:
    """Digits that follow each other as one, so that two ways to the same place are spelled the same."""
    found: list[Digit] = []
    for digit in digits:
        if digit.size == 1:
            continue
        last = found[-1] if found else None
        follows = last is not None and last.kind == digit.kind and not last.taken and not digit.taken
        if last and follows and (digit.kind == _FEATURE or last.worth == digit.size * digit.worth):
            found[-1] = Digit(digit.kind, last.size * digit.size, digit.worth)
        else:
            found.append(digit)
    return () if all(digit.kind == _FEATURE and not digit.taken for digit in found) else tuple(found)


def _in_full(rows: Rows, node: fx.Node) -> list[list[Digit]]:
    """The digits of each dimension with those of features alone."""
    return [
        list(digits) or [Digit(_FEATURE, size)] for digits, size in zip(rows.dims, sizes(tensor_of(node)), strict=True)
    ]


def tensor_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor at a node, which must be one."""
    tensor = fake(node)
    assert tensor is not None, "checked before"
    return tensor


def aligned(operand: fx.Node, node: fx.Node, rows: Rows) -> Rows | None:
    """The rows in an operand that is broadcast; None where it is the same for all tokens, or no operand of that kind."""
    of, here = sizes(tensor_of(operand)), sizes(tensor_of(node))
    if len(of) > len(here):
        return None
    dims = []
    for size, whole, digits in zip(of, here[len(here) - len(of) :], rows.dims[len(here) - len(of) :], strict=True):
        if size == whole:
            dims.append(digits)
        elif of_features(digits) or (size == 1 and not any(digit.kind == TOKEN for digit in digits)):
            dims.append(())
        else:
            return None
    tokens = any(digit.kind == TOKEN for digits in dims for digit in digits)
    return Rows(tuple(dims)) if tokens else None


def same_rows(operand: fx.Node, node: fx.Node, rows: Rows) -> Rows | None:
    """The rows in an operand of as many dimensions and as many rows."""
    of, here = sizes(tensor_of(operand)), fake(node)
    if len(of) != len(rows.dims) or here is None:
        return None
    same = [a == b for a, b in zip(of, sizes(here), strict=True)]
    if not all(same[dim] for dim, digits in enumerate(rows.dims) if not of_features(digits)):
        return None
    return Rows(tuple(digits if kept else () for digits, kept in zip(rows.dims, same, strict=True)))


def of_features(digits: Sequence[Digit]) -> bool:
    """Whether a dimension counts neither batch entries nor tokens."""
    return all(digit.kind == _FEATURE for digit in digits)


def sliced(rows: Rows, dim: int, start: Any, step: Any, before: Any, after: Any) -> Rows | None:
    """Rows before a range was taken of one dimension."""
    digits = rows.dims[dim] or (Digit(_FEATURE, after),)
    if start == 0 and step == 1 and before == after:
        return rows
    if len(digits) != 1:
        return None
    (digit,) = digits
    whole = Digit(digit.kind, before, digit.worth, ((start, step, after), *digit.taken))
    return Rows((*rows.dims[:dim], (whole,), *rows.dims[dim + 1 :]))


def at(rows: Rows, dim: int, index: Any, before: Any) -> Rows:
    """Rows before one entry was taken of a dimension that is gone."""
    taken = ((_exact(index), sympy.Integer(1), sympy.Integer(1)),)
    return Rows((*rows.dims[:dim], () if before == 1 else (Digit(_FEATURE, before, taken=taken),), *rows.dims[dim:]))


# --- views ------------------------------------------------------------------------------------------------------------


def _reshaped(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    """Both shapes run through the same digits in the same order."""
    if tensor_of(node).dtype != tensor_of(source).dtype:
        return None  # `view` reads the bits as another dtype
    left = [digit for digits in _in_full(rows, node) for digit in digits if digit.size != 1]
    found: list[tuple[Digit, ...]] = []
    for size in sizes(tensor_of(source)):
        taken: list[Digit] = []
        missing = size
        while missing != 1:
            if not left:
                return None
            digit = left.pop(0)
            if (missing / digit.size).is_integer:
                missing /= digit.size
            elif (digit.size / missing).is_integer:
                rest = digit.size / missing
                left.insert(0, digit._replace(size=rest))
                worth = digit.worth if digit.kind == _FEATURE else digit.worth * rest
                digit, missing = digit._replace(size=missing, worth=worth), sympy.Integer(1)
            else:
                return None
            taken.append(digit)
        found.append(_joined(taken))
    return None if left else Rows(tuple(found))


def _permuted(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    """Dimensions in another order: which, the operation itself tells of a tensor with a size of its own for each."""
    marked = torch.empty([sympy.prime(n + 3) for n in range(len(sizes(tensor_of(source))))], device="meta")
    name = operation_name(node)
    named = {key: constant(x) for key, x in given(node, "input").items() if key != "input"}
    turned = getattr(marked, name[1:]) if name.startswith(".") else getattr(marked, name)(**named)
    found: list[tuple[Digit, ...]] = [()] * len(rows.dims)
    for dim, size in enumerate(turned.shape):
        found[list(marked.shape).index(size)] = rows.dims[dim]
    return Rows(tuple(found))


def _indexed(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    """`x[:, None]`, `x[..., : D // 2]`, `x[:, 1:]`, `x[..., 0]`"""
    index, before = node.args[1], sizes(tensor_of(source))
    items: list[Any] = list(index) if isinstance(index, tuple | list) else [index]
    if any(not (x is None or x is Ellipsis or isinstance(x, int | slice)) or isinstance(x, bool) for x in items):
        return None
    used = sum(x is not None and x is not Ellipsis for x in items)
    gap = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[gap : gap + 1] = [slice(None)] * (len(before) - used)
    after = iter(sizes(tensor_of(node)))
    place, here = Rows(()), 0
    for item in items:
        dim = len(place.dims)
        if item is None:
            next(after)
            here += 1
        elif isinstance(item, int):
            place = at(place, dim, before[dim] + item if item < 0 else item, before[dim])
        else:
            start, step = _exact(constant(item.start) or 0), _exact(constant(item.step) or 1)
            start = before[dim] + start if start.is_negative else start
            whole = sliced(Rows((*place.dims, rows.dims[here])), dim, start, step, before[dim], next(after))
            if whole is None:
                return None
            place, here = whole, here + 1
    return place


def _exact(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)


def _narrowed(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    arguments = given(node, "input", "dim", "start", "length")
    dim, start = constant(arguments.get("dim")), constant(arguments.get("start"))
    if not isinstance(dim, int) or not isinstance(start, int | torch.SymInt):
        return None
    dim %= len(rows.dims)
    before, after = sizes(tensor_of(source))[dim], sizes(tensor_of(node))[dim]
    start = before + start if isinstance(start, int) and start < 0 else _exact(start)
    return sliced(rows, dim, start, sympy.Integer(1), before, after)


def _selected(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    arguments = given(node, "input", "dim", "index")
    dim, index = constant(arguments.get("dim")), constant(arguments.get("index"))
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= len(rows.dims) + 1
    before = sizes(tensor_of(source))[dim]
    return at(rows, dim, before + index if index < 0 else index, before)


def _repeated(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    """Heads or batch entries repeated, or chosen by an index; tokens are not."""
    before, after = sizes(tensor_of(source)), sizes(tensor_of(node))
    ahead = len(after) - len(before)
    if ahead < 0 or any(digit.kind == TOKEN for digits in rows.dims[:ahead] for digit in digits):
        return None
    found = []
    for size, now, digits in zip(before, after[ahead:], rows.dims[ahead:], strict=True):
        changed = size != now
        if changed and any(digit.kind == TOKEN for digit in digits):
            return None
        found.append(() if changed else digits)
    return Rows(tuple(found))


def _chosen_of_features(node: fx.Node, source: fx.Node, rows: Rows) -> Rows | None:
    dim = constant(given(node, "input", "dim", "index").get("dim"))
    return rows if isinstance(dim, int) and of_features(rows.dims[dim]) else None


VIEWS: Mapping[str, Callable[[fx.Node, fx.Node, Rows], Rows | None]] = {
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"), _reshaped
    ),
    **dict.fromkeys(
        ("transpose", "permute", "movedim", "t", ".T", ".mT", ".H", ".mH"),
        _permuted,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat_interleave", "repeat"), _repeated),
    "getitem": _indexed,
    "narrow": _narrowed,
    "select": _selected,
    "index_select": _chosen_of_features,
}
