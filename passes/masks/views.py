"""Operations that move or repeat elements of tensors and change none: views, indexing, joining.

    mask.transpose(0, 1)     its element (a, b) is the element (b, a) of mask

Each is a handler for `rules.py`, or says for `view` which element of the input is the one wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..attention_call import constant, fake
from .diagonals import Affine, Element, Unproven, as_affine
from .evaluate import ORIGIN, Coordinates, Handler, Operation, Wanted, integer, is_one, overload


def tensor_of(node: Any) -> torch.Tensor:
    """The fake tensor at a node, which must be one."""
    tensor = fake(node)
    if tensor is None:
        raise Unproven(f"it depends on {node}")
    return tensor


def view(source: Callable[[Wanted], Coordinates]) -> Handler:
    """An operation that only moves elements: `source` says which element of its input is the one wanted."""

    def handler(wanted: Wanted) -> Element:
        if tensor_of(wanted.arguments["input"]).dtype != tensor_of(wanted.node).dtype:
            raise Unproven(f"its bits are read as {tensor_of(wanted.node).dtype}")
        return wanted.input_at(source(wanted))

    return handler


def expanded(wanted: Wanted) -> Element:
    """Views that repeat dimensions of size one."""
    return wanted.operand(wanted.arguments["input"])


def repeated(wanted: Wanted) -> Element:
    """`repeat` of dimensions of size one."""
    sizes, after = tensor_of(wanted.arguments["input"]).shape, tensor_of(wanted.node).shape
    kept = after[len(after) - len(sizes) :]
    if any(not is_one(size) and size != now for size, now in zip(sizes, kept, strict=True)):
        raise Unproven("it is built by repeat of more than one element")
    return expanded(wanted)


def reshaped(wanted: Wanted) -> Coordinates:
    """Views that only add or drop dimensions of size one."""
    before, after = tensor_of(wanted.arguments["input"]).shape, tensor_of(wanted.node).shape
    kept = [(size, c) for size, c in zip(after, wanted.coordinates, strict=True) if not is_one(size)]
    if [size for size, _ in kept] != [size for size in before if not is_one(size)]:
        raise Unproven(f"it is reshaped from {list(before)} to {list(after)}")
    rest = iter(kept)
    return tuple(ORIGIN if is_one(size) else next(rest)[1] for size in before)


def unsqueezed_in_place(wanted: Wanted) -> Coordinates:
    """`x.unsqueeze_(dim)`, after which x itself has the shape of the result."""
    dim = wanted.dimension("dim", 0)
    return (*wanted.coordinates[:dim], *wanted.coordinates[dim + 1 :])


def unflattened(wanted: Wanted) -> Coordinates:
    """Several dimensions in the place of one."""
    before, after = tensor_of(wanted.arguments["input"]).shape, tensor_of(wanted.node).shape
    first = wanted.number("dim", 0) % len(before)
    end = first + len(after) - len(before) + 1
    place = wanted.coordinates[first]
    for size, coordinate in zip(after[first + 1 : end], wanted.coordinates[first + 1 : end], strict=True):
        place = place * integer(size) + coordinate
    return (*wanted.coordinates[:first], place, *wanted.coordinates[end:])


def transposed(first: str, second: str) -> Operation:
    """Two dimensions exchanged; the arguments that name them have these names."""

    def source(wanted: Wanted) -> Coordinates:
        a, b = wanted.dimension(first, 0), wanted.dimension(second, 0)
        swapped = list(wanted.coordinates)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return tuple(swapped)

    return view(source), ("input", first, second)


def matrix_transposed(wanted: Wanted) -> Coordinates:
    """The transpose of a matrix, `x.t()` and `x.T`."""
    if len(wanted.coordinates) != 2:
        raise Unproven(f"it is built by {wanted.node.name} of no matrix")
    return wanted.coordinates[::-1]


def last_two_swapped(wanted: Wanted) -> Coordinates:
    """`x.mT`"""
    *lead, row, column = wanted.coordinates
    return (*lead, column, row)


def permuted(wanted: Wanted) -> Coordinates:
    """Dimensions in another order, given as a list or one by one."""
    given = wanted.arguments["dims"]
    rest = wanted.node.args[1:]
    order = [integer(constant(d)) for d in (given if isinstance(given, (tuple, list)) else rest)]
    source = [ORIGIN] * len(order)
    for place, dim in enumerate(order):
        source[dim % len(order)] = wanted.coordinates[place]
    return tuple(source)


def narrowed(wanted: Wanted) -> Coordinates:
    """A range of positions along a dimension."""
    dim, start = wanted.dimension("dim", 0), wanted.number("start", 0)
    start = start if start >= 0 else integer(tensor_of(wanted.arguments["input"]).shape[dim]) + start
    moved = wanted.coordinates[dim] + Affine(constant=start)
    return (*wanted.coordinates[:dim], moved, *wanted.coordinates[dim + 1 :])


def selected(wanted: Wanted) -> Coordinates:
    """One position of a dimension, which is gone."""
    sizes = tensor_of(wanted.arguments["input"]).shape
    dim, place = wanted.number("dim", 0) % len(sizes), wanted.number("index", 0)
    place = place if place >= 0 else integer(sizes[dim]) + place
    return (*wanted.coordinates[:dim], Affine(constant=place), *wanted.coordinates[dim:])


def index_selected(wanted: Wanted) -> Element:
    """Positions along a dimension, by an index tensor."""
    dim = wanted.dimension("dim", 0)
    place = as_affine(wanted.input_at((wanted.coordinates[dim],), "index"))
    if not place.is_natural or tensor_of(wanted.arguments["index"]).dim() != 1:
        raise Unproven("an index in it is not a plain range of positions")
    return wanted.input_at((*wanted.coordinates[:dim], place, *wanted.coordinates[dim + 1 :]))


def joined(default: int) -> Handler:
    """Tensors one after another, of which only one has elements: a mask after the empty part of a cache."""

    def handler(wanted: Wanted) -> Element:
        dim = wanted.dimension("dim", default)
        parts = [part for part in wanted.arguments["tensors"] if not _is_empty(tensor_of(part), dim)]
        if len(parts) != 1 or tensor_of(parts[0]).dtype != tensor_of(wanted.node).dtype:
            raise Unproven(f"it is built by {wanted.node.name} of several parts")
        return wanted.elements.at(parts[0], wanted.region, wanted.coordinates, wanted.node)

    return handler


def _is_empty(tensor: torch.Tensor, dim: int) -> bool:
    size = tensor.shape[dim] if tensor.dim() > dim else 0
    return isinstance(size, int) and size == 0


def item(wanted: Wanted) -> Element:
    """An element of a tensor, or one of the grids that `meshgrid` returns."""
    source = wanted.arguments["input"]
    if fake(source) is not None:
        return view(_indexed)(wanted)
    if not isinstance(source, fx.Node) or overload(source) != "meshgrid":
        raise Unproven(f"it depends on {source}")
    given = source.args[0] if isinstance(source.args[0], (tuple, list)) else source.args
    number, indexing = integer(wanted.arguments["index"]), source.kwargs.get("indexing", "ij")
    along = 1 - number if indexing == "xy" and number < 2 else number
    axis = given[number]
    return wanted.elements.at(axis, wanted.region, wanted.coordinates[along : along + 1], source)


def _indexed(wanted: Wanted) -> Coordinates:
    index = wanted.arguments["index"]
    items = list(index) if isinstance(index, tuple) else [index]
    sizes = tensor_of(wanted.arguments["input"]).shape
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
    if len(items) != len(tensor_of(wanted.arguments["input"]).shape) or any(fake(item) is None for item in items):
        raise Unproven("it is indexed by tensors and slices together")
    source = [as_affine(wanted.operand(item)) for item in items]
    # bool and uint8 tensors are masks, and a negative index counts from the end.
    indices = all(tensor_of(item).dtype in (torch.int32, torch.int64) for item in items)
    if not indices or not all(place.is_natural for place in source):
        raise Unproven("an index in it is not a plain range of positions")
    return tuple(source)
