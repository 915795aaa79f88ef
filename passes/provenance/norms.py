"""Recognise what gives rows a fixed length: RMSNorm, LayerNorm and L2 normalisation, as one call or written out.

    rms_norm(x, (D,), weight);  normalize(x, dim=-1);  x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..attention_call import constant, fake
from ..ir.ops import operation_name
from .rows import CASTS, FEATURE, HEAD, Place, given, kinds, same_shape, sizes


def normalised(node: fx.Node, place: Place | None) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """What a node normalises along features, and the nodes from there to it, if it does.

    Args:
        place: of the rows in the node, None where it is not known.
    """
    found = _in_one_call(node) or _written_out(node)
    if found is None:
        return None
    source, through, dims = found
    if not same_shape(source, node) or (place is not None and not _along_features(place, dims)):
        return None
    casts: list[fx.Node] = []
    return without_casts(source, casts), (*through, *casts)


def without_casts(node: fx.Node, passed: list[fx.Node] | None = None) -> fx.Node:
    """What a node was converted from; the conversions are added to `passed`."""
    while operation_name(node) in CASTS and node.args and isinstance(node.args[0], fx.Node) and fake(node.args[0]) is not None:
        if passed is not None:
            passed.append(node)
        node = node.args[0]
    return node


def _along_features(place: Place, dims: Iterable[int]) -> bool:
    """The length of a row is fixed by a norm of its features, and almost by one that takes in the heads of a token."""
    found = set[str]().union(*(kinds(place, dim) for dim in dims))
    return FEATURE in found and found <= {FEATURE, HEAD}


_Found = tuple[fx.Node, tuple[fx.Node, ...], tuple[int, ...]]  # what is normalised, the nodes on the way, the dimensions


def _in_one_call(node: fx.Node) -> _Found | None:
    name = operation_name(node)
    if name in ("rms_norm", "layer_norm"):
        arguments = given(node, "input", "normalized_shape")
        source, shape = arguments.get("input"), arguments.get("normalized_shape")
        if isinstance(source, fx.Node) and isinstance(shape, list | tuple):
            return source, (node,), tuple(range(-len(shape), 0))
    if name == "normalize":
        arguments = given(node, "input", "p", "dim")
        source, dim = arguments.get("input"), arguments.get("dim", 1)
        if isinstance(source, fx.Node) and isinstance(dim, int) and arguments.get("p", 2) == 2:
            return source, (node,), (dim,)
    return None


def _written_out(node: fx.Node) -> _Found | None:
    """`x * rsqrt(...)` or `x / sqrt(...)`, where the factor comes from the length of x along its last dimension."""
    name = operation_name(node)
    if name not in ("mul", "div") or len(node.args) != 2:
        return None
    pairs = [node.args] if name == "div" else [node.args, node.args[::-1]]
    for x, factor in pairs:
        if not isinstance(x, fx.Node) or not isinstance(factor, fx.Node) or not same_shape(x, node):
            continue
        tensor, scale = fake(x), fake(factor)
        if tensor is None or scale is None or sizes(scale) != [*sizes(tensor)[:-1], 1]:
            continue
        measured = _measured(factor)
        if measured is None or measured[2] != (-1 if name == "mul" else 1):
            continue
        length_of, through, _ = measured
        if without_casts(_centred_from(x)) is without_casts(_centred_from(length_of)):
            centring = [] if _centred_from(x) is x else [without_casts(x)]
            return _centred_from(x), (node, *through, *centring), (-1,)
    return None


def _centred_from(x: fx.Node) -> fx.Node:
    """The tensor whose mean over the last dimension was taken away, as layer norms do, or x itself."""
    centred = without_casts(x)
    if operation_name(centred) == "sub" and len(centred.args) == 2 and all(isinstance(a, fx.Node) for a in centred.args):
        source, mean = centred.args
        if isinstance(source, fx.Node) and isinstance(mean, fx.Node) and operation_name(mean) == "mean":
            of = mean.args[0] if mean.args else None
            last = isinstance(of, fx.Node) and _over_last(mean)
            if last and isinstance(of, fx.Node) and without_casts(of) is without_casts(source):
                return source
    return x


def _measured(factor: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...], float] | None:
    """The tensor whose length along its last dimension a factor comes from, the nodes between, and the power of the length."""
    through: list[fx.Node] = []
    node, power = factor, 1.0
    while True:
        through.append(node)
        name = _name(node)
        if name in _REDUCTIONS:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or not _over_last(node):
                return None
            if name not in ("mean", "sum"):
                return source, tuple(through), power * (2 if name == "var" else 1)
            squared = _squared(source)
            return None if squared is None else (squared, (*through, source), power * 2)
        step = _operand(node, name)
        if step is None:
            return None
        node, power = step[0], power * step[1]


def _operand(node: fx.Node, name: str) -> tuple[fx.Node, float] | None:
    """The tensor that an operation on one length per row works on, and the power to which it raises it."""
    first = node.args[0] if node.args else None
    if name in ("unsqueeze", "getitem"):
        inner, outer = fake(first), fake(node)
        grown = inner is not None and outer is not None and [*sizes(inner), 1] == sizes(outer)
        kept = isinstance(first, fx.Node) and (name == "unsqueeze" or _only_adds_dimensions(node.args[1]))
        return (first, 1.0) if isinstance(first, fx.Node) and grown and kept else None
    source = next((x for x in node.args if isinstance(x, fx.Node) and same_shape(x, node)), None)
    if source is None:
        return None
    if name in CASTS:
        return source, 1.0
    others = [fake(x) for x in node.args if isinstance(x, fx.Node) and x is not source]
    if any(other is not None and other.numel() != 1 for other in others):
        return None  # something else than a constant takes part
    if name == "pow":
        exponent = node.args[1] if source is first and len(node.args) == 2 else None
        return (source, float(exponent)) if isinstance(exponent, int | float) else None
    if name == "div" and source is not first:
        return source, -1.0
    return (source, _POWERS[name]) if name in _POWERS else None


def _name(node: fx.Node) -> str:
    return operation_name(node) or str(getattr(node.target, "__name__", ""))


def _only_adds_dimensions(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)


def _squared(node: fx.Node) -> fx.Node | None:
    name, first = operation_name(node), node.args[0] if node.args else None
    squares = (
        name == "square"
        or (name == "pow" and len(node.args) == 2 and node.args[1] == 2)
        or (name == "mul" and len(node.args) == 2 and node.args[1] is first)
    )
    return first if squares and isinstance(first, fx.Node) else None


def _over_last(node: fx.Node) -> bool:
    """Whether a reduction runs over the last dimension alone, by the Euclidean norm if it is a norm."""
    name = _name(node)
    arguments = given(node, "input", "dim") if _REDUCTIONS[name] == 1 else given(node, "input", "order", "dim")
    dim = constant(arguments.get("dim"))
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    order = next((arguments[name] for name in ("order", "p", "ord") if name in arguments), None)
    source = fake(node.args[0])
    if order not in (None, 2, "fro") or not isinstance(source, torch.Tensor):
        return False
    return isinstance(dim, int) and (dim == -1 or dim == source.dim() - 1)


# Reductions, and the position of the dimension among their arguments.
_REDUCTIONS = {"mean": 1, "sum": 1, "var": 1, "std": 1, "norm": 2, "linalg_vector_norm": 2, "linalg_norm": 2}
# The power to which an operation raises a length, as far as it depends on the length at all.
_POWERS = {
    **dict.fromkeys(("add", "mul", "div", "clamp", "clamp_min", "maximum"), 1.0),
    "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0,
}  # fmt: skip
