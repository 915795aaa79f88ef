"""The two matrix products of attention that is written out: q k^T, and the weights times v.

    matmul(q, k.transpose(-2, -1))    einsum("bnhd,bmhd->bhnm", q, k)    baddbmm(mask, q, k.mT, alpha=scale)
    matmul(weights, v)                einsum("bhnm,bmhd->bnhd", weights, v)                  bmm(weights, v)

Each is brought to tensors of `scaled_dot_product_attention`'s layout `[B, H, N, D]`, as views that are not made yet. Without a
dimension of heads, `[B, N, D]`, every batch entry counts as one head: selection is made per batch entry and head, so that
is the same attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..attention_call import Steps, constant, fake
from ..ir.ops import arguments, operands, operation_name, works_in_place

_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
_FEWEST, _MOST = 3, 4  # dimensions


class Unclear(Exception):
    """What looks like attention is not provably attention; the arguments are the reason and the remedy."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True, slots=True)
class View:
    """A node whose dimensions are permuted."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def steps(self) -> Steps:
        """The methods that turn the node into `[B, H, N, D]`."""
        permuted: Steps = (("permute", self.order),) if self.order != tuple(range(len(self.order))) else ()
        return (*permuted, ("unsqueeze", (1,))) if len(self.order) == _FEWEST else permuted


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """`scale * query key^T + added`, and the nodes that only turned the key around."""

    query: View
    key: View
    scale: float = 1.0
    added: Any = None
    turned: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """`weights value`, and the steps from `[B, H, N, D]` to what the node gives."""

    weights: fx.Node
    value: View
    steps: Steps


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two batches of matrices."""
    return operation_name(node) in _PRODUCTS and all(len(_sizes(x)) >= _FEWEST for x in factors(node))


def factors(node: fx.Node) -> Sequence[Any]:
    """The two tensors that a product multiplies."""
    name = operation_name(node)
    given = operands(node)
    if name in ("einsum", "baddbmm"):
        given = given[1:]
    return given[0] if given and isinstance(given[0], (list, tuple)) else given[:2]


def scores(node: fx.Node) -> Scores:
    """Query and key of a product of theirs."""
    left, right = _two(node)
    name = operation_name(node)
    if name == "einsum":
        first, second, out = _letters(node)
        batch, row, column = out[:-2], out[-2], out[-1]
        if row in second:
            left, right, first, second = right, left, second, first
        (shared,) = set(first) - set(out) or {""}
        if set(first) != {*batch, row, shared} or set(second) != {*batch, column, shared} or not shared:
            raise Unclear(f"its scores are computed by {node.name} in a way that is not understood")
        return Scores(
            query=View(left, _order(first, (*batch, row, shared))),
            key=View(right, _order(second, (*batch, column, shared))),
        )
    scale, added = _baddbmm(node) if name == "baddbmm" else (1.0, None)
    rank = len(_sizes(left))
    turned: list[fx.Node] = []
    key = _without_turning(View(right, (*range(rank - 2), rank - 1, rank - 2)), turned)
    return Scores(query=View(left, tuple(range(rank))), key=key, scale=scale, added=added, turned=tuple(turned))


def row_maximum(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The nodes of `x.max(-1, keepdim=True).values` in `x - ...`, which a softmax over the same dimension cancels."""
    first, largest = operands(node)[:2]
    nodes: list[fx.Node] = []
    while first is source and isinstance(largest, fx.Node):
        nodes.append(largest)
        name, given = operation_name(largest), arguments(largest) or {}
        if name in ("max", "amax"):
            dim = given.get("dim")
            dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
            along = dim in (-1, len(_sizes(source)) - 1) and given.get("keepdim") is True
            return nodes if along and largest.all_input_nodes == [source] else []
        if not (name == "detach" or (name == "getitem" and largest.args[1] == 0) or name == ".values"):
            return []
        largest = largest.args[0]
    return []


def output(node: fx.Node, weights: fx.Node) -> Output:
    """The value of a product with the attention weights."""
    left, right = _two(node)
    squeezed: Steps = (("squeeze", (1,)),) if len(_sizes(right)) == _FEWEST else ()
    if operation_name(node) != "einsum":
        if left is not weights or right is weights or operation_name(node) == "baddbmm":
            raise Unclear(f"{node.name} multiplies its weights in a way that is not understood")
        return Output(weights=weights, value=View(right, tuple(range(len(_sizes(right))))), steps=squeezed)
    first, second, out = _letters(node)
    if left is not weights:
        left, right, first, second = right, left, second, first
    batch, row, column = first[:-2], first[-2], first[-1]
    (size,) = set(second) - set(first) or {""}
    if left is not weights or right is weights or not size:
        raise Unclear(f"{node.name} multiplies its weights in a way that is not understood")
    if set(second) != {*batch, column, size} or set(out) != {*batch, row, size}:
        raise Unclear(f"{node.name} multiplies its weights in a way that is not understood")
    order = _order((*batch, row, size), out)
    turned: Steps = (("permute", order), ("contiguous", ())) if order != tuple(range(len(order))) else ()
    return Output(weights=weights, value=View(right, _order(second, (*batch, column, size))), steps=(*squeezed, *turned))


def _two(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    found = factors(node)
    sizes = [len(_sizes(x)) for x in found]
    if len(found) != 2 or not all(isinstance(x, fx.Node) for x in found):
        raise Unclear(f"it is computed by {node.name} with arguments that are not understood")
    if sizes[0] != sizes[1] or not _FEWEST <= sizes[0] <= _MOST:
        raise Unclear(
            f"{node.name} multiplies tensors of {sizes[0]} and {sizes[1]} dimensions",
            "give queries, keys and values as [batch, heads, tokens, head dimension]",
        )
    return found[0], found[1]


def _letters(node: fx.Node) -> tuple[str, str, str]:
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    parts = [*inputs.split(","), out]
    ranks = [len(_sizes(x)) for x in (*factors(node), node)]
    plain = arrow and len(parts) == 3 and "." not in equation and all(len(set(part)) == len(part) for part in parts)
    if not plain or [len(part) for part in parts] != ranks:
        raise Unclear(f"einsum {equation!r} is not understood")
    return parts[0], parts[1], parts[2]


def _order(letters: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    return tuple(list(letters).index(letter) for letter in wanted)


def _baddbmm(node: fx.Node) -> tuple[float, Any]:
    """`beta * added + alpha * query key^T`"""
    beta, alpha = (constant(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if not is_number(alpha):
        raise Unclear("its scale is computed in the graph", "give a Python number")
    if not is_number(beta) or beta not in (0, 1):
        raise Unclear(f"baddbmm adds its first argument {beta} times", "give beta=0 or beta=1")
    return float(alpha), node.args[0] if beta else None


def is_number(value: Any) -> bool:
    """Whether a value is a Python number, known while compiling."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without_turning(view: View, turned: list[fx.Node]) -> View:
    """The same view, of what the node itself is a permutation of."""
    while (order := _permutation(view.node)) is not None:
        turned.append(view.node)
        view = View(view.node.all_input_nodes[0], tuple(order[place] for place in view.order))
    return view


def _permutation(node: fx.Node) -> tuple[int, ...] | None:
    rank, name = len(_sizes(node)), operation_name(node)
    order = list(range(rank))
    if name == ".mT":
        name, dims = "transpose", [-2, -1]
    elif name in ("transpose", "permute") and not works_in_place(node):
        _, *rest = operands(node)
        dims = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    else:
        return None
    if not all(isinstance(dim, int) for dim in dims):
        return None
    dims = [dim % rank for dim in dims]
    if name == "permute":
        return tuple(dims) if len(dims) == rank else None
    order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return tuple(order)


def _sizes(node: Any) -> Sequence[Any]:
    tensor = fake(node)
    return () if tensor is None else tensor.shape
