"""What PyTorch's operations do to the elements of tensors, as far as masks are built from them.

    positions >= 3           its element is positions' own, compared with 3

`OPERATIONS` has a handler for each, and the names of its positional arguments.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..attention_call import constant, fake
from ..ir.ops import works_in_place
from .diagonals import (
    NOWHERE,
    Affine,
    Cases,
    Diagonals,
    Element,
    Quotient,
    Unproven,
    apply,
    as_affine,
    compare,
    coordinate,
    element,
)
from .evaluate import ORIGIN, REST, Handler, Operation, Wanted, is_one, overload
from .views import (
    expanded,
    index_selected,
    item,
    joined,
    last_two_swapped,
    matrix_transposed,
    narrowed,
    permuted,
    repeated,
    reshaped,
    selected,
    tensor_of,
    transposed,
    unflattened,
    unsqueezed_in_place,
    view,
)


def is_interpreted(node: fx.Node) -> bool:
    """Whether this module knows the operation, hence also all that it does to its arguments."""
    return overload(node) in OPERATIONS


def is_fresh(node: fx.Node) -> bool:
    """Whether a node makes a new tensor, whose memory nothing that came before shares."""
    return overload(node) in _ALLOCATING and not works_in_place(node)


# --- tensors made from constants --------------------------------------------------------------------------------------


def _arange(wanted: Wanted) -> Element:
    start = as_affine(element(constant(wanted.arguments.get("start", 0))))
    return start + wanted.coordinates[0] * wanted.number("step", 1)


def _filled(name: str) -> Handler:
    return lambda wanted: wanted.operand(wanted.arguments[name])


def _unwritten(wanted: Wanted) -> Element:
    raise Unproven("it depends on memory that nothing was written to")


def _overwritten(value: Handler) -> Handler:
    """A tensor filled anew, whatever it held before."""

    def handler(wanted: Wanted) -> Element:
        base = wanted.arguments["input"]
        if isinstance(base, fx.Node) and is_fresh(base):
            wanted.elements.visited[base] = wanted.region
        return value(wanted)

    return handler


def _same_everywhere(value: int) -> Handler:
    return lambda wanted: element(value)


# --- element by element -----------------------------------------------------------------------------------------------


def _same(wanted: Wanted) -> Element:
    return wanted.input_at(wanted.coordinates)


def _pointwise(function: Callable[..., Element], *names: str) -> Operation:
    """A function of one or two tensors or numbers, computed in the dtype to which PyTorch promotes them."""

    def handler(wanted: Wanted) -> Element:
        given = [wanted.arguments[name] for name in names]
        values = [wanted.operand(x) for x in given]
        promoted: list[Any] = [constant(x) if fake(x) is None else fake(x) for x in given]
        dtype = torch.result_type(promoted[0], promoted[-1])
        return function(*(wanted.elements.in_dtype(value, dtype) for value in values))

    return handler, names


def _add(a: Element, b: Element) -> Element:
    return a + b if isinstance(a, Affine) and isinstance(b, Affine) else apply(operator.add, a, b)


def _sub(a: Element, b: Element) -> Element:
    return a - b if isinstance(a, Affine) and isinstance(b, Affine) else apply(operator.sub, a, b)


def _mul(a: Element, b: Element) -> Element:
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Affine) and isinstance(y, Affine) and not y.terms:
            return x * y.constant
    return apply(operator.mul, a, b)


def _unary(function: Callable[[Element], Element]) -> Operation:
    return _pointwise(function, "input")


def _binary(function: Callable[[Element, Element], Element]) -> Operation:
    return _pointwise(function, "input", "other")


def _each(function: Callable[[Any, Any], Any]) -> Operation:
    return _binary(lambda a, b: apply(function, a, b))


def _and(wanted: Wanted) -> Element:
    """Both. Where one is False the other does not matter, so a sliding window is none less for a padding mask beside it."""
    handler, names = _each(operator.and_)
    false, doubts = NOWHERE, []
    for name in names:
        try:
            value = wanted.operand(wanted.arguments[name])
        except Unproven as doubt:
            doubts.append(doubt)
            false = false | doubt.false
        else:
            false = false | (value.where(lambda x: x is False) if isinstance(value, Cases) else NOWHERE)
    if doubts:
        raise Unproven(str(doubts[0]), false, doubts[0].node)
    return handler(wanted)


def _relation(name: str) -> Operation:
    return _binary(lambda a, b: compare(name, a, b))


def _equal(wanted: Wanted) -> Element:
    """Equality; of chunks it is surely False c positions apart, and nearer it is not told by the distance alone."""
    handler, names = _relation("eq")
    left, right = (wanted.operand(wanted.arguments[name]) for name in names)
    if isinstance(left, Quotient) and isinstance(right, Quotient) and left.divisor == right.divisor:
        far = left.divisor
        if (left.numerator - right.numerator) in (_AHEAD, _AHEAD * -1):
            false = Diagonals(((-math.inf, -far), (far, math.inf)))
            raise Unproven(f"it keeps attention inside chunks of {far} positions", false, wanted.node)
    return handler(wanted)


def _floor_divided(wanted: Wanted) -> Element:
    """The number of a chunk of positions, by a constant."""
    value, divisor = (wanted.operand(wanted.arguments[name]) for name in ("input", "other"))
    if not isinstance(value, Affine) or not isinstance(divisor, Affine) or divisor.terms or divisor.constant <= 0:
        raise Unproven("it divides by something other than a constant number of positions")
    if divisor.constant == 1:
        return value
    quotient = wanted.elements.constant_quotient(value, divisor.constant)
    return Quotient(value, divisor.constant) if quotient is None else element(quotient)


def _where(condition: str, yes: str, no: str) -> Handler:
    """One or the other argument, in the dtype of the result. The condition's own dtype takes no part in that."""

    def handler(wanted: Wanted) -> Element:
        chosen, *values = (wanted.operand(wanted.arguments[name]) for name in (condition, yes, no))
        values = [wanted.elements.in_dtype(value, tensor_of(wanted.node).dtype) for value in values]
        return _choice(chosen, *values)

    return handler


def _choice(condition: Element, yes: Element, no: Element) -> Element:
    return apply(lambda c, a, b: a if c else b, condition, yes, no)


def _assigned(wanted: Wanted) -> Element:
    """`x[condition] = value` with a boolean of x's shape. What else is assigned to is not followed."""
    tensor, index, value = (fake(wanted.arguments[name]) for name in ("input", "index", "value"))
    by_mask = tensor is not None and index is not None and index.dtype == torch.bool and index.dim() == tensor.dim()
    if tensor is None or not by_mask or (value is not None and value.dim()):
        raise Unproven(f"it may be changed in place, by {wanted.node.name}")
    condition, given = (wanted.operand(wanted.arguments[name]) for name in ("index", "value"))
    return _choice(condition, wanted.elements.in_dtype(given, tensor.dtype), _same(wanted))


def _logarithm(x: float) -> float:
    if x not in (0, 1):
        raise Unproven("it is built by a logarithm")
    return 0.0 if x == 1 else -math.inf


# --- along a dimension ------------------------------------------------------------------------------------------------


def _triangle(relation: str) -> Handler:
    def handler(wanted: Wanted) -> Element:
        row, column = wanted.coordinates[-2:]
        kept = compare(relation, column - row, Affine(constant=wanted.number("diagonal", 0)))
        return _choice(kept, wanted.input_at(wanted.coordinates), element(0))

    return handler


def _cumsum(wanted: Wanted) -> Element:
    """Sums of one constant: `c, 2c, 3c, ...`"""
    dim = wanted.dimension("dim", 0)
    value = as_affine(wanted.input_at(wanted.coordinates))
    if value.terms:
        raise Unproven("it is built by cumsum of more than one constant")
    return (wanted.coordinates[dim] + Affine(constant=1)) * value.constant


def _diff(wanted: Wanted) -> Element:
    """Differences of neighbours, where all are the same, the one to `prepend` too."""
    if wanted.number("n", 1) != 1 or wanted.arguments.get("append") is not None:
        raise Unproven("it is built by diff with n or append")
    dim = wanted.dimension("dim", -1)
    here, one = wanted.coordinates[dim], Affine(constant=1)

    def along(name: str, place: Affine) -> Affine:
        coordinates = (*wanted.coordinates[:dim], place, *wanted.coordinates[dim + 1 :])
        return as_affine(wanted.elements.in_dtype(wanted.input_at(coordinates, name), tensor_of(wanted.node).dtype))

    prepend = wanted.arguments.get("prepend")
    if prepend is None:
        return along("input", here + one) - along("input", here)
    if not is_one(tensor_of(prepend).shape[dim]):
        raise Unproven("it is built by diff with more than one element prepended")
    later = along("input", here) - along("input", here - one)
    first = along("input", ORIGIN) - along("prepend", ORIGIN)
    if later != first:
        raise Unproven("the positions in it do not count up by one from the start")
    return later


_AHEAD = coordinate("i") - coordinate("j")

_CREATORS: dict[str, Operation] = {
    "arange": (_arange, ("start", "end", "step")),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), (_same_everywhere(1), ("input", REST))),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), (_same_everywhere(0), ("input", REST))),
    **dict.fromkeys(("full", "full_like"), (_filled("fill_value"), ("size", "input", "fill_value"))),
    "new_full": (_filled("fill_value"), ("input", "size", "fill_value")),
    "tensor": (_filled("data"), ("data",)), "new_tensor": (_filled("data"), ("input", "data")),
    "scalar_tensor": (_filled("s"), ("s",)),
    **dict.fromkeys(("empty", "new_empty", "empty_like"), (_unwritten, ("input", REST))),
}  # fmt: skip

# These, too, always return memory of their own. `to` and its like do not, where there is nothing to convert.
_ALLOCATING = _CREATORS.keys() | {
    "add", "sub", "mul", "rsub", "neg", "floor_divide", "lt", "le", "gt", "ge", "eq", "ne",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and", "logical_or", "logical_xor", "logical_not",
    "where", "masked_fill", "clone", "tril", "triu", "cumsum", "repeat", "log", "isinf",
}  # fmt: skip

OPERATIONS: dict[str, Operation] = _CREATORS | {
    "add": _binary(_add), "sub": _binary(_sub), "mul": _binary(_mul),
    "rsub": _binary(lambda a, b: _sub(b, a)),
    "neg": _unary(lambda a: _mul(a, Affine(constant=-1))),
    **{name: _relation(name) for name in ("lt", "le", "gt", "ge", "ne")}, "eq": (_equal, ("input", "other")),
    "floor_divide": (_floor_divided, ("input", "other")),
    "bitwise_and": (_and, ("input", "other")), "bitwise_or": _each(operator.or_), "bitwise_xor": _each(operator.xor),
    "log": _unary(lambda a: apply(_logarithm, a)), "isinf": _unary(lambda a: apply(math.isinf, a)),
    "logical_and": _each(lambda a, b: bool(a) and bool(b)),
    "logical_or": _each(lambda a, b: bool(a) or bool(b)),
    "logical_xor": _each(lambda a, b: bool(a) != bool(b)),
    "logical_not": _unary(lambda a: apply(operator.not_, a)),
    "bitwise_not": _unary(lambda a: apply(lambda x: not x if isinstance(x, bool) else ~x, a)),
    "where": (_where("condition", "input", "other"), ("condition", "input", "other")),
    "masked_fill": (_where("mask", "value", "input"), ("input", "mask", "value")),
    **dict.fromkeys(
        ("to", "type", "type_as", "bool", "byte", "int", "long", "float", "double", "half", "bfloat16", "contiguous", "clone",
         "detach", "alias"),
        (_same, ("input", REST)),
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), (expanded, ("input", REST))),
    **dict.fromkeys(
        ("unsqueeze", "squeeze", "view", "reshape", "view_as", "reshape_as"), (view(reshaped), ("input", REST))
    ),
    "unflatten": (view(unflattened), ("input", "dim", "sizes", REST)),
    "repeat": (repeated, ("input", REST)),
    **dict.fromkeys(("t", ".T"), (view(matrix_transposed), ("input", REST))),
    ".mT": (view(last_two_swapped), ("input", REST)),
    "permute": (view(permuted), ("input", "dims", REST)),
    "narrow": (view(narrowed), ("input", "dim", "start", REST)),
    "select": (view(selected), ("input", "dim", "index")),
    "index_select": (index_selected, ("input", "dim", "index")),
    "cat": (joined(0), ("tensors", "dim")), "hstack": (joined(1), ("tensors",)), "vstack": (joined(0), ("tensors",)),
    "transpose": transposed("dim0", "dim1"), "transpose_": transposed("dim0", "dim1"),
    "t_": (view(matrix_transposed), ("input",)),
    "unsqueeze_": (view(unsqueezed_in_place), ("input", "dim")),
    "getitem": (item, ("input", "index")),
    "setitem": (_assigned, ("input", "index", "value")),
    "fill": (_overwritten(_filled("value")), ("input", "value")),
    "zero": (_overwritten(_same_everywhere(0)), ("input",)),
    "copy": (_overwritten(_filled("src")), ("input", "src", REST)),
    "tril": (_triangle("le"), ("input", "diagonal")), "triu": (_triangle("ge"), ("input", "diagonal")),
    "cumsum": (_cumsum, ("input", "dim", REST)),
    "diff": (_diff, ("input", "n", "dim", "prepend", "append")),
}  # fmt: skip
