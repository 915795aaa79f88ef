"""What PyTorch's operations do to the elements of tensors, as far as masks are built from them.

    mask.transpose(0, 1)     its element (a, b) is the element (b, a) of mask
    positions >= 3           its element is positions' own, compared with 3

`OPERATIONS` has a handler for each, and the names of its positional arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .call import constant, fake
from .elements import ORIGIN, REST, Coordinates, Handler, Operation, Wanted, integer, is_one, overload
from .symbolic import Affine, Element, Unproven, apply, as_affine, compare, element


def is_interpreted(node: fx.Node) -> bool:
    """Whether this module knows the operation, hence also all that it does to its arguments."""
    return overload(node) in OPERATIONS


def is_fresh(node: fx.Node) -> bool:
    """Whether a node makes a new tensor from constants, so that nothing else can share its memory."""
    return overload(node) in _CREATORS


def _tensor(node: Any) -> torch.Tensor:
    tensor = fake(node)
    if tensor is None:
        raise Unproven(f"it depends on {node}")
    return tensor


# --- tensors made from constants --------------------------------------------------------------------------------------


def _arange(wanted: Wanted) -> Element:
    start = as_affine(element(constant(wanted.arguments.get("start", 0))))
    return start + wanted.coordinates[0] * wanted.number("step", 1)


def _filled(name: str) -> Handler:
    return lambda wanted: wanted.operand(wanted.arguments[name])


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


def _relation(name: str) -> Operation:
    return _binary(lambda a, b: compare(name, a, b))


def _where(condition: str, yes: str, no: str) -> Handler:
    """One or the other argument, in the dtype of the result. The condition's own dtype takes no part in that."""

    def handler(wanted: Wanted) -> Element:
        chosen, *values = (wanted.operand(wanted.arguments[name]) for name in (condition, yes, no))
        values = [wanted.elements.in_dtype(value, _tensor(wanted.node).dtype) for value in values]
        return _choice(chosen, *values)

    return handler


def _choice(condition: Element, yes: Element, no: Element) -> Element:
    return apply(lambda c, a, b: a if c else b, condition, yes, no)


# --- views ------------------------------------------------------------------------------------------------------------


def _view(source: Callable[[Wanted], Coordinates]) -> Handler:
    """An operation that only moves elements: `source` says which element of its input is the one wanted."""

    def handler(wanted: Wanted) -> Element:
        if _tensor(wanted.arguments["input"]).dtype != _tensor(wanted.node).dtype:
            raise Unproven(f"its bits are read as {_tensor(wanted.node).dtype}")
        return wanted.input_at(source(wanted))

    return handler


def _expanded(wanted: Wanted) -> Element:
    return wanted.operand(wanted.arguments["input"])


def _reshaped(wanted: Wanted) -> Coordinates:
    """Views that only add or drop dimensions of size one."""
    before, after = _tensor(wanted.arguments["input"]).shape, _tensor(wanted.node).shape
    kept = [(size, c) for size, c in zip(after, wanted.coordinates, strict=True) if not is_one(size)]
    if [size for size, _ in kept] != [size for size in before if not is_one(size)]:
        raise Unproven(f"it is reshaped from {list(before)} to {list(after)}")
    rest = iter(kept)
    return tuple(ORIGIN if is_one(size) else next(rest)[1] for size in before)


def _transposed(first: str, second: str) -> Operation:
    def source(wanted: Wanted) -> Coordinates:
        a, b = wanted.dimension(first, 0), wanted.dimension(second, 0)
        swapped = list(wanted.coordinates)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)

    return _view(source), ("input", first, second)


def _indexed(wanted: Wanted) -> Coordinates:
    index = wanted.arguments["index"]
    items = list(index) if isinstance(index, tuple) else [index]
    sizes = _tensor(wanted.arguments["input"]).shape
    if any(fake(item) is not None for item in items):
        return _indexed_by_tensors(wanted, items)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        missing = len(sizes) - sum(item is not None and item is not Ellipsis for item in items)
        items[place : place + 1] = [slice(None)] * missing
    items += [slice(None)] * (len(sizes) - sum(item is not None for item in items))
    incoming, source = iter(wanted.coordinates), []
    remaining = iter(sizes)
    for item in items:
        if item is None:
            next(incoming)
        elif isinstance(item, slice):
            source.append(_sliced(next(incoming), item, next(remaining)))
        else:
            number, size = integer(constant(item)), next(remaining)
            source.append(Affine(constant=number if number >= 0 else integer(size) + number))
    return tuple(source)


def _sliced(c: Affine, item: slice, size: Any) -> Affine:
    start, step = (constant(x) for x in (item.start, item.step))
    start, step = integer(0 if start is None else start), integer(1 if step is None else step)
    if start < 0:
        start = max(0, integer(size) + start)
    return c * step + Affine(constant=start)


def _indexed_by_tensors(wanted: Wanted, items: list[Any]) -> Coordinates:
    """`x[a, b]` with an index tensor for every dimension of x."""
    if len(items) != len(_tensor(wanted.arguments["input"]).shape) or any(fake(item) is None for item in items):
        raise Unproven("it is indexed by tensors and slices together")
    source = [as_affine(wanted.operand(item)) for item in items]
    # bool and uint8 tensors are masks, and a negative index counts from the end.
    indices = all(_tensor(item).dtype in (torch.int32, torch.int64) for item in items)
    if not indices or not all(place.is_natural for place in source):
        raise Unproven("an index in it is not a plain range of positions")
    return tuple(source)


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
        return as_affine(wanted.elements.in_dtype(wanted.input_at(coordinates, name), _tensor(wanted.node).dtype))

    prepend = wanted.arguments.get("prepend")
    if prepend is None:
        return along("input", here + one) - along("input", here)
    if not is_one(_tensor(prepend).shape[dim]):
        raise Unproven("it is built by diff with more than one element prepended")
    later = along("input", here) - along("input", here - one)
    first = along("input", ORIGIN) - along("prepend", ORIGIN)
    if later != first:
        raise Unproven("the positions in it do not count up by one from the start")
    return later


_CREATORS: dict[str, Operation] = {
    "arange(end)": (_arange, ("end",)), "arange": (_arange, ("start", "end", "step")),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), (_same_everywhere(1), ("input", REST))),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), (_same_everywhere(0), ("input", REST))),
    **dict.fromkeys(("full", "full_like"), (_filled("fill_value"), ("input", "fill_value"))),
    "new_full": (_filled("fill_value"), ("input", "size", "fill_value")),
    "tensor": (_filled("data"), ("data",)), "new_tensor": (_filled("data"), ("input", "data")),
    "scalar_tensor": (_filled("s"), ("s",)),
}  # fmt: skip

OPERATIONS: dict[str, Operation] = _CREATORS | {
    "add": _binary(_add), "sub": _binary(_sub), "mul": _binary(_mul),
    "rsub": _binary(lambda a, b: _sub(b, a)),
    "neg": _unary(lambda a: _mul(a, Affine(constant=-1))),
    **{name: _relation(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **dict.fromkeys(("and_", "bitwise_and", "__and__"), _each(operator.and_)),
    **dict.fromkeys(("or_", "bitwise_or", "__or__"), _each(operator.or_)),
    **dict.fromkeys(("xor", "bitwise_xor"), _each(operator.xor)),
    "logical_and": _each(lambda a, b: bool(a) and bool(b)),
    "logical_or": _each(lambda a, b: bool(a) or bool(b)),
    "logical_xor": _each(lambda a, b: bool(a) != bool(b)),
    "logical_not": _unary(lambda a: apply(operator.not_, a)),
    **dict.fromkeys(
        ("invert", "bitwise_not", "inv"),
        _unary(lambda a: apply(lambda x: not x if isinstance(x, bool) else ~x, a)),
    ),
    "where": (_where("condition", "input", "other"), ("condition", "input", "other")),
    "Tensor.where": (_where("condition", "input", "other"), ("input", "condition", "other")),
    **dict.fromkeys(("masked_fill", "masked_fill_"), (_where("mask", "value", "input"), ("input", "mask", "value"))),
    **dict.fromkeys(
        ("to", "type", "type_as", "bool", "int", "long", "float", "double", "half", "bfloat16", "contiguous", "clone",
         "detach", "alias"),
        (_same, ("input", REST)),
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), (_expanded, ("input", REST))),
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "reshape"), (_view(_reshaped), ("input", REST))),
    "transpose": _transposed("dim0", "dim1"), "swapdims": _transposed("dim0", "dim1"),
    "swapaxes": _transposed("axis0", "axis1"),
    "getitem": (_view(_indexed), ("input", "index")),
    **dict.fromkeys(("tril", "tril_"), (_triangle("le"), ("input", "diagonal"))),
    **dict.fromkeys(("triu", "triu_"), (_triangle("ge"), ("input", "diagonal"))),
    "cumsum": (_cumsum, ("input", "dim", REST)),
    "diff": (_diff, ("input", "n", "dim", "prepend", "append")),
}  # fmt: skip
