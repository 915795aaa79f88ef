"""The elements of a tensor that a graph builds from constants: `Elements().at(node, region, coordinates)`.

Works backwards from the element wanted: a view remaps its coordinates, an element-wise operation asks its arguments,
`arange` answers with the coordinate itself. Only operations listed here are understood; anything else is `Unproven`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .call import constant, fake
from .regions import Region
from .symbolic import Affine, Element, Unproven, apply, as_affine, as_cases, compare, element

Coordinates = tuple[Affine, ...]
_ORIGIN = Affine()
_EXACT_FOR_POSITIONS = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})


class Elements:
    """Evaluates elements, and remembers in `visited` every node that it went through."""

    def __init__(self) -> None:
        self.visited: dict[fx.Node, Region] = {}

    def at(self, node: Any, region: Region, coordinates: Coordinates) -> Element:
        """One element of a node's value. A Python number is its own element."""
        if not isinstance(node, fx.Node):
            return element(node)
        if not isinstance(node.meta.get("example_value"), torch.Tensor):
            return element(constant(node))
        self.visited[node] = region
        if node.op == "placeholder":
            return self._operand(node, region, coordinates)
        handler = _HANDLERS.get(_name(node))
        if handler is None:
            raise Unproven(f"it depends on {node.format_node() if node.op == 'get_attr' else _name(node) or node.name}")
        return handler(self, node, region, coordinates)

    def argument(self, of: fx.Node, value: Any, region: Region, coordinates: Coordinates) -> Element:
        """The element of an argument that broadcasts against its node's value."""
        tensor = fake(value)
        if tensor is None:
            return element(constant(value))
        aligned = coordinates[len(coordinates) - tensor.dim() :] if tensor.dim() else ()
        out = fake(of)
        assert out is not None
        sizes = zip(aligned, tensor.shape, strict=True)
        return self.at(value, region, tuple(_ORIGIN if _is_one(size) else c for c, size in sizes))

    def _operand(self, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        found = [self.at(operand, outer, coordinates) for outer, operand in region.operands(node)]
        if not found:
            raise Unproven(f"it depends on the input {node.name}")
        if any(other != found[0] for other in found):
            raise Unproven("it differs between the places that share this subgraph")
        return found[0]


Handler = Callable[[Elements, fx.Node, Region, Coordinates], Element]


def is_fresh(node: fx.Node) -> bool:
    """Whether a node makes a new tensor from constants, so that nothing else can share its memory."""
    return _name(node) in _CREATORS


def _name(node: fx.Node) -> str:
    """The operation's name, where it is PyTorch's own."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    homes = (operator, torch, F, torch.Tensor)
    return name if any(getattr(home, name, None) is node.target for home in homes) else ""


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _sizes(node: Any) -> tuple[Any, ...]:
    tensor = fake(node)
    assert tensor is not None
    return tuple(tensor.shape)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    return constant(value) if fake(value) is None else value


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise Unproven("it is built with a number that is not known here")
    return value


# --- tensors made from constants --------------------------------------------------------------------------------------


def _arange(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    bounds = [constant(x) for x in node.args] or [constant(node.kwargs.get("end"))]
    start, step = (
        (bounds[0], bounds[2] if len(bounds) > 2 else 1) if len(bounds) > 1 else (node.kwargs.get("start", 0), 1)
    )
    step = node.kwargs.get("step", step)
    return as_affine(element(start)) + coordinates[0] * _integer(step)


def _filled(position: int, name: str) -> Handler:
    def handler(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        value = _argument(node, position, name)
        return _convert(at.at(value, region, ()) if fake(value) is not None else element(value), node)

    return handler


def _ones(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    return _convert(element(1), node)


def _zeros(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    return _convert(element(0), node)


# --- element by element -----------------------------------------------------------------------------------------------


def _convert(value: Element, node: fx.Node) -> Element:
    """An element in its node's dtype."""
    tensor = fake(node)
    assert tensor is not None
    if isinstance(value, Affine) and value.terms:
        if tensor.dtype not in _EXACT_FOR_POSITIONS:
            raise Unproven(f"positions in it are converted to {tensor.dtype}")
        return value
    if tensor.dtype == torch.bool:
        return apply(bool, value)
    if tensor.is_floating_point():
        return apply(float, value)
    return value if isinstance(value, Affine) else as_affine_where_constant(apply(int, value))


def as_affine_where_constant(value: Element) -> Element:
    """Integers that are one constant everywhere take part in index arithmetic."""
    cases = as_cases(value)
    return as_affine(cases) if len(cases.parts) == 1 else cases


def _same(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    return _convert(at.at(node.args[0], region, coordinates), node)


def _pointwise(function: Callable[..., Any]) -> Handler:
    def handler(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        if node.kwargs:
            raise Unproven(f"it is built by {_name(node)} with {', '.join(node.kwargs)}")
        values = [at.argument(node, x, region, coordinates) for x in node.args]
        return _convert(function(*values), node)

    return handler


def _add(a: Element, b: Element) -> Element:
    return a + b if isinstance(a, Affine) and isinstance(b, Affine) else apply(operator.add, a, b)


def _sub(a: Element, b: Element) -> Element:
    return a - b if isinstance(a, Affine) and isinstance(b, Affine) else apply(operator.sub, a, b)


def _mul(a: Element, b: Element) -> Element:
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Affine) and x.terms and isinstance(y, Affine) and not y.terms:
            return x * _integer(y.constant)
    return apply(lambda x, y: 0.0 if 0 in (x, y) and float("inf") not in (abs(x), abs(y)) else x * y, a, b)


def _each(function: Callable[..., Any]) -> Handler:
    return _pointwise(lambda *values: apply(function, *values))


def _relation(name: str) -> Handler:
    return _pointwise(lambda a, b: compare(name, a, b))


def _where(condition: Element, yes: Element, no: Element) -> Element:
    return apply(lambda c, a, b: a if c else b, condition, yes, no)


# --- views ------------------------------------------------------------------------------------------------------------


def _expand(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    return at.argument(node, node.args[0], region, coordinates)


def _reshape(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    """Views that only add or drop dimensions of size one."""
    before, after = _sizes(node.args[0]), _sizes(node)
    kept = [(size, c) for size, c in zip(after, coordinates, strict=True) if not _is_one(size)]
    if [size for size, _ in kept] != [size for size in before if not _is_one(size)]:
        raise Unproven(f"it is reshaped from {list(before)} to {list(after)}")
    rest = iter(kept)
    return at.at(node.args[0], region, tuple(_ORIGIN if _is_one(size) else next(rest)[1] for size in before))


def _transpose(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    rank = len(coordinates)
    first, second = (_integer(_argument(node, n, f"dim{n - 1}")) % rank for n in (1, 2))
    swapped = list(coordinates)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return at.at(node.args[0], region, tuple(swapped))


def _getitem(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    base, index = node.args
    if fake(base) is None:
        raise Unproven(f"it depends on {node.name}")
    items = list(index) if isinstance(index, tuple) else [index]
    sizes = _sizes(base)
    if any(fake(item) is not None for item in items):
        return _advanced(at, node, items, region, coordinates)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        missing = len(sizes) - sum(item is not None and item is not Ellipsis for item in items)
        items[place : place + 1] = [slice(None)] * missing
    items += [slice(None)] * (len(sizes) - sum(item is not None for item in items))
    incoming, source = iter(coordinates), []
    remaining = iter(sizes)
    for item in items:
        if item is None:
            next(incoming)
        elif isinstance(item, slice):
            source.append(_sliced(next(incoming), item, next(remaining)))
        else:
            number = _integer(constant(item))
            source.append(as_affine(element(number if number >= 0 else next(remaining) + number)))
            if number >= 0:
                next(remaining)
    return at.at(base, region, tuple(source))


def _sliced(c: Affine, item: slice, size: Any) -> Affine:
    start, step = (constant(x) for x in (item.start, item.step))
    start, step = _integer(0 if start is None else start), _integer(1 if step is None else step)
    if start < 0:
        start = max(0, _integer(size) + start)
    return c * step + Affine(constant=start)


def _advanced(at: Elements, node: fx.Node, items: list[Any], region: Region, coordinates: Coordinates) -> Element:
    """`x[a, b]` with an index tensor for every dimension of x."""
    base = node.args[0]
    if len(items) != len(_sizes(base)) or any(fake(item) is None for item in items):
        raise Unproven("it is indexed by tensors and slices together")
    source = []
    for item in items:
        tensor = fake(item)
        assert tensor is not None
        index = at.argument(node, item, region, coordinates)
        if tensor.dtype == torch.bool or not as_affine(index).is_natural:
            raise Unproven("an index in it is not a plain range of positions")
        source.append(as_affine(index))
    return at.at(base, region, tuple(source))


# --- along a dimension ------------------------------------------------------------------------------------------------


def _triangle(relation: str) -> Handler:
    def handler(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        diagonal = _integer(_argument(node, 1, "diagonal", 0))
        row, column = coordinates[-2:]
        kept = compare(relation, column - row, Affine(constant=diagonal))
        return _convert(_where(kept, at.at(node.args[0], region, coordinates), element(0)), node)

    return handler


def _cumsum(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    """Sums of one constant: `c, 2c, 3c, ...`"""
    dim = _integer(_argument(node, 1, "dim")) % len(coordinates)
    value = as_affine(as_affine_where_constant(at.at(node.args[0], region, coordinates)))
    return (coordinates[dim] + Affine(constant=1)) * _integer(value.constant)


def _diff(at: Elements, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
    """Differences of neighbours, where all are the same, the one to `prepend` too."""
    if _argument(node, 1, "n", 1) != 1 or _argument(node, 4, "append") is not None:
        raise Unproven("it is built by diff with n or append")
    dim = _integer(_argument(node, 2, "dim", -1)) % len(coordinates)
    prepend = _argument(node, 3, "prepend")

    def along(value: Any, place: Affine) -> Affine:
        return as_affine(at.at(value, region, (*coordinates[:dim], place, *coordinates[dim + 1 :])))

    here, one = coordinates[dim], Affine(constant=1)
    if prepend is None:
        return along(node.args[0], here + one) - along(node.args[0], here)
    if not _is_one(_sizes(prepend)[dim]):
        raise Unproven("it is built by diff with more than one element prepended")
    later = along(node.args[0], here) - along(node.args[0], here - one)
    first = along(node.args[0], _ORIGIN) - along(prepend, _ORIGIN)
    if later != first:
        raise Unproven("the positions in it do not count up by one from the start")
    return later


_CREATORS: dict[str, Handler] = {
    "arange": _arange,
    "ones": _ones, "new_ones": _ones, "ones_like": _ones,
    "zeros": _zeros, "new_zeros": _zeros, "zeros_like": _zeros,
    "full": _filled(1, "fill_value"), "new_full": _filled(2, "fill_value"), "full_like": _filled(1, "fill_value"),
    "tensor": _filled(0, "data"), "scalar_tensor": _filled(0, "s"), "new_tensor": _filled(1, "data"),
}  # fmt: skip

_HANDLERS: dict[str, Handler] = _CREATORS | {
    "add": _pointwise(_add), "sub": _pointwise(_sub), "mul": _pointwise(_mul),
    "rsub": _pointwise(lambda a, b: _sub(b, a)),
    "neg": _pointwise(lambda a: _mul(a, Affine(constant=-1))),
    **{name: _relation(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **dict.fromkeys(("and_", "bitwise_and", "logical_and", "__and__"), _each(operator.and_)),
    **dict.fromkeys(("or_", "bitwise_or", "logical_or", "__or__"), _each(operator.or_)),
    **dict.fromkeys(("xor", "bitwise_xor", "logical_xor"), _each(operator.xor)),
    "logical_not": _each(operator.not_),
    **dict.fromkeys(("invert", "bitwise_not", "inv"), _each(lambda x: not x if isinstance(x, bool) else ~x)),
    "where": _pointwise(_where),
    **dict.fromkeys(("masked_fill", "masked_fill_"), _pointwise(lambda x, mask, value: _where(mask, value, x))),
    **dict.fromkeys(
        ("to", "type", "type_as", "bool", "int", "long", "float", "double", "half", "bfloat16", "contiguous", "clone",
         "detach", "alias"),
        _same,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "reshape"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "getitem": _getitem,
    **dict.fromkeys(("tril", "tril_"), _triangle("le")),
    **dict.fromkeys(("triu", "triu_"), _triangle("ge")),
    "cumsum": _cumsum,
    "diff": _diff,
}  # fmt: skip
