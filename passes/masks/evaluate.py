"""The elements of a tensor that a graph builds from constants: `Elements(OPERATIONS, sizes).at(node, region, coordinates)`.

Works backwards from the element wanted: a view remaps its coordinates, an element-wise operation asks its arguments,
`arange` answers with the coordinate itself. Only what `rules.py` lists is understood; any other operation or argument
is `Unproven`, as is every element that its node's dtype does not hold exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import is_traceable_wrapper_subclass

from ..attention_call import constant, fake
from ..ir.ops import arguments, operation_name, works_in_place
from ..ir.subgraphs import Region
from .diagonals import Affine, Element, Unproven, element, in_dtype

Coordinates = tuple[Affine, ...]
Held = Callable[[Any, fx.Node], Any]  # a tensor and who reads it -> the node that made what the tensor holds there
ORIGIN = Affine()
REST = "*"  # further positional arguments, such as sizes, which show in the result's shape and dtype
_SHOWN_IN_THE_RESULT = frozenset({"size", "shape", "dim", "dtype", "device", "layout"})
# What is surely False before these is False after them, whatever else is not known.
_KEEPING_FALSE = frozenset(
    {"bitwise_and", "to", "bool", "contiguous", "clone", "expand", "expand_as", "unsqueeze", "view"}
)
_MOVED_IN_PLACE = frozenset({"unsqueeze", "squeeze", "t", "transpose"})
_READING_THEIR_SHAPE = frozenset(
    {"unsqueeze", "squeeze", "view", "reshape", "view_as", "reshape_as", "unflatten", "repeat", "getitem"}
)
_CHOOSING = frozenset({"scatter", "scatter_add", "index_put", "masked_scatter", "gather", "topk"})
_WITHOUT_EFFECT = frozenset({"requires_grad", "pin_memory", "memory_format", "non_blocking", "copy"})


class Elements:
    """Evaluates elements, and remembers in `visited` every node that it went through."""

    def __init__(
        self,
        operations: Mapping[str, Operation],
        sizes: Mapping[str, int],
        held: Held,
        given: Mapping[fx.Node, Element] | None = None,
    ) -> None:
        self._operations = operations
        self._held = held
        self._sizes = sizes  # of the coordinates
        self._given = given or {}  # inputs whose elements are known, such as the positions that a mask_mod is called with
        self._known: dict[tuple[fx.Node, Coordinates], Element | Unproven] = {}
        self.visited: dict[fx.Node, Region] = {}

    def at(self, node: Any, region: Region, coordinates: Coordinates, reader: fx.Node) -> Element:
        """One element of a node's value, as `reader` reads it. A Python number is its own element."""
        tensor, node = fake(node), self._held(node, reader)
        if tensor is None:
            return element(constant(node))
        if is_traceable_wrapper_subclass(tensor):  # has memory of its own that its views do not seem to share
            raise Unproven(f"{node.name} is a {type(tensor).__name__}")
        self.visited[node] = region
        if (node, coordinates) not in self._known:
            found: Element | Unproven
            try:
                found = self.in_dtype(self._evaluated(node, region, coordinates), tensor.dtype)
            except Unproven as why:
                kept = node.op == "placeholder" or overload(node) in _KEEPING_FALSE or why.node is node
                found = why if kept else Unproven(str(why))
            self._known[node, coordinates] = found
        if isinstance(known := self._known[node, coordinates], Unproven):
            raise known
        return known

    def constant_quotient(self, value: Affine, divisor: int) -> int | None:
        """`value // divisor` where that is the same for all coordinates."""
        ends = [(0, factor * (self._sizes[name] - 1)) for name, factor in value.terms]
        low, high = (value.constant + sum(one(end) for end in ends) for one in (min, max))
        return low // divisor if low // divisor == high // divisor else None

    def in_dtype(self, value: Element, dtype: torch.dtype) -> Element:
        """An element converted to a dtype, where that is exact."""
        return in_dtype(value, dtype, self._sizes)

    def _evaluated(self, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        if node in self._given:
            return self._given[node]
        if node.op == "placeholder":
            return self._operand(node, region, coordinates)
        if (name := overload(node)) not in self._operations:
            what = node.format_node() if node.op == "get_attr" else name or node.name
            chosen = ", as a mask of chosen keys (sparse attention) does" if name in _CHOOSING else ""
            raise Unproven(f"it depends on {what}{chosen}")
        if name in _READING_THEIR_SHAPE and len(coordinates) != len(_shape(node)):
            raise Unproven(f"{node.name} has another shape by the end of the graph")
        handler, parameters = self._operations[name]
        return handler(Wanted(self, node, region, coordinates, _bound(node, parameters)))

    def _operand(self, node: fx.Node, region: Region, coordinates: Coordinates) -> Element:
        found = [
            self.at(operand, outer, coordinates, caller.node)
            for caller, (outer, operand) in zip(region.callers, region.operands(node), strict=True)
        ]
        if not found:
            raise Unproven(f"it depends on the input {node.name}")
        if any(other != found[0] for other in found):
            raise Unproven("it differs between the places that share this subgraph")
        return found[0]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One element of one operation's result, and the operation's arguments by name."""

    elements: Elements
    node: fx.Node
    region: Region
    coordinates: Coordinates
    arguments: Mapping[str, Any]

    def input_at(self, coordinates: Coordinates, name: str = "input") -> Element:
        """An element of an argument."""
        return self.elements.at(self.arguments[name], self.region, coordinates, self.node)

    def operand(self, value: Any) -> Element:
        """The element of a value that broadcasts against the result."""
        tensor = fake(value)
        sizes = tensor.shape if tensor is not None else ()
        aligned = self.coordinates[len(self.coordinates) - len(sizes) :]
        places = tuple(ORIGIN if is_one(size) else c for c, size in zip(aligned, sizes, strict=True))
        return self.elements.at(value, self.region, places, self.node)

    def number(self, name: str, default: int) -> int:
        """An argument that must be a known integer."""
        return integer(constant(self.arguments.get(name, default)))

    def dimension(self, name: str, default: int) -> int:
        """An argument that names a dimension, counted from the front."""
        return self.number(name, default) % len(self.coordinates)


Handler = Callable[[Wanted], Element]
Operation = tuple[Handler, tuple[str, ...]]  # and the names of its positional arguments


def overload(node: fx.Node) -> str:
    """The operation's name; in-place operations that move elements about have one of their own."""
    return f"{operation_name(node)}_" if moves_in_place(node) else operation_name(node)


def moves_in_place(node: fx.Node) -> bool:
    """Whether an operation changes the shape of its argument, and no element."""
    return operation_name(node) in _MOVED_IN_PLACE and works_in_place(node)


def _bound(node: fx.Node, parameters: Sequence[str]) -> dict[str, Any]:
    """A node's arguments by name. Those that this module does not know of are refused."""
    names = [name for name in parameters if name != REST]
    given = arguments(node)
    if given is None:
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        many = len(node.args) > len(names) and REST not in parameters
    else:
        many = False
    asked = node.kwargs if REST in parameters else given
    if many or (unknown := asked.keys() - {*names, *_SHOWN_IN_THE_RESULT, *_WITHOUT_EFFECT}):
        raise Unproven(f"it is built by {node.name} with {'more arguments' if many else ', '.join(sorted(unknown))}")
    return given


def _shape(node: fx.Node) -> Sequence[Any]:
    tensor = fake(node)
    return () if tensor is None else tensor.shape


def is_one(size: Any) -> bool:
    """Whether a size is surely one: a symbolic size is not asked, as that would become a guard."""
    return isinstance(size, int) and size == 1


def integer(value: Any) -> int:
    """A value that must be a known integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise Unproven("it is built with a number that is not known here")
    return value
