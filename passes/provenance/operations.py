"""One operation back for the rows of attention: in which of its arguments they lie, and where (`axes.py`).

    mul = q * scale            the rows of mul lie in q, and in scale if that has a value for each token
    q   = linear(x, weight)    the rows of q lie in x, its features all in those of x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from lighthouse_fx.kernels.torch_private import OpOverloadPacket

from ..attention_call import constant, fake
from ..ir.ops import operation_name
from .axes import TOKEN, VIEWS, Rows, aligned, at, of_features, same_rows, sliced, tensor_of
from .rows import CASTS, given, sizes


@dataclass(frozen=True, slots=True)
class Step:
    """The operands that hold an operation's rows. `mixes`: only the shapes say so."""

    operands: Sequence[tuple[fx.Node, Rows]]
    projects: bool = False
    mixes: bool = False


def step_back(node: fx.Node, rows: Rows, varies: Callable[[Any], bool], written: Sequence[fx.Node] = ()) -> Step | None:
    """One operation back; None where the rows cannot be followed.

    Args:
        varies: whether a value depends on data, unlike parameters and tables.
        written: operations that write to the memory of the node.
    """
    name = _name(node)
    step = _step(node, name, rows, varies)
    if not written:
        return step
    if any(not _as_in(write.args[0], node) for write in written):
        return None
    values = [x for write in written for x in write.all_input_nodes if x is not write.args[0]]
    found = [(x, place) for x in values if varies(x) if (place := aligned(x, node, rows)) is not None]
    if len(found) != sum(map(varies, values)):
        return None  # some of what was written lies otherwise
    return Step((*(step.operands if step else ()), *found), projects=step is not None and step.projects, mixes=True)


def _as_in(target: Any, node: fx.Node) -> bool:
    """Whether what is written to is a node, or a part of it, with the dimensions where they are."""
    while target is not node:
        plain = isinstance(target, fx.Node) and (_name(target) == "getitem" or target.target == "copy_")
        if not plain or len(sizes(tensor_of(target))) != len(sizes(tensor_of(node))):
            return False
        target = target.args[0]
    return True


def _step(node: fx.Node, name: str, rows: Rows, varies: Callable[[Any], bool]) -> Step | None:
    if name in _MOVES or not node.op.startswith("call_"):
        return None
    if name == "getitem" and fake(node.args[0]) is None:
        return _chosen(node, rows, varies)
    tensors = [x for x in node.all_input_nodes if fake(x) is not None]
    source = tensors[0] if tensors else None
    if source is None:
        return None
    if name in VIEWS:
        place = VIEWS[name](node, source, rows)
        return None if place is None else Step(((source, place),))
    if name in _PRODUCTS:
        return _product(node, name, rows, [x for x in tensors if varies(x)])
    if name in ("cat", "hstack", "stack"):
        return _parts(node, name, rows)
    if name == "embedding":
        return Step(((source, Rows(rows.dims[:-1])),), projects=True) if of_features(rows.dims[-1]) else None
    if _is_pointwise(name):
        found = [(x, place) for x in tensors if (place := aligned(x, node, rows)) is not None]
        return Step(found) if found else None
    # Whatever else gives a tensor of the same rows: a norm, a convolution, somebody's own operation.
    found = [(x, place) for x in tensors if (place := same_rows(x, node, rows)) is not None]
    return Step(found, mixes=name not in _ROW_BY_ROW) if found else None


def _name(node: fx.Node) -> str:
    if node.target is getattr:
        return f".{node.args[1]}"
    return operation_name(node) or str(getattr(node.target, "__name__", node.target))


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if name in CASTS or name == "dropout":
        return True
    if not isinstance(packet, OpOverloadPacket):
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())


# --- operations -------------------------------------------------------------------------------------------------------


def _product(node: fx.Node, name: str, rows: Rows, data: Sequence[fx.Node]) -> Step | None:
    """A product with a matrix that is not data. The dimension that it sums over may hold no tokens."""
    if len(data) != 1:
        return None
    (x,) = data
    rank = len(sizes(tensor_of(x)))
    if name == "einsum":
        return _einsum(node, x, rows)
    first = name in ("linear", "addmm", "baddbmm", "addbmm") or (bool(node.args) and x is node.args[0])
    free = rows.dims[-1 if first else -2]
    if any(digit.kind == TOKEN for digit in free) or rank > len(rows.dims):
        return None
    dims = list(rows.dims[len(rows.dims) - rank :])
    dims[-1 if first else -2] = ()
    return Step(((x, Rows(tuple(dims))),), projects=True)


def _einsum(node: fx.Node, x: fx.Node, rows: Rows) -> Step | None:
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    operands = node.args[1] if isinstance(node.args[1], list | tuple) else node.args[1:]
    letters = inputs.split(",")[list(operands).index(x)]
    if not arrow or "." in inputs or len(out) != len(rows.dims):
        return None
    digits = dict(zip(out, rows.dims, strict=True))
    tokens = {letter for letter, of in digits.items() if any(digit.kind == TOKEN for digit in of)}
    if not tokens <= set(letters):
        return None
    return Step(((x, Rows(tuple(digits.get(letter, ()) for letter in letters))),), projects=True)


def _parts(node: fx.Node, name: str, rows: Rows) -> Step | None:
    """Parts of every row, one after the other; or tokens behind none, as in an empty cache."""
    arguments = given(node, "tensors", "dim")
    tensors, dim = arguments.get("tensors"), constant(arguments.get("dim", 1 if name == "hstack" else 0))
    if not isinstance(tensors, list | tuple) or not isinstance(dim, int) or any(fake(x) is None for x in tensors):
        return None
    dim %= len(rows.dims)
    digits, stacked = rows.dims[dim], name == "stack"
    full = [x for x in tensors if 0 not in sizes(tensor_of(x))]
    if not stacked and len(full) == 1:
        return Step(((full[0], rows),))
    if not of_features(digits):
        return None
    start = sympy.Integer(0)
    lengths = [sympy.Integer(1) if stacked else sizes(tensor_of(x))[dim] for x in full]
    if digits:  # a part of it was taken: one of those that were joined
        for x, length in zip(full, lengths, strict=True):
            if len(digits) == 1 and digits[0].taken == ((start, 1, length),):
                full = [x]
                break
            start += length
        else:
            return None
    dims = (*rows.dims[:dim], *(() if stacked else ((),)), *rows.dims[dim + 1 :])
    return Step(tuple((x, Rows(dims)) for x in full))


def _chosen(node: fx.Node, rows: Rows, varies: Callable[[Any], bool]) -> Step | None:
    """`x.chunk(2, -1)[i]` and the like, or one of several outputs of another operation."""
    cut, number = node.args
    if not isinstance(cut, fx.Node) or not isinstance(number, int):
        return None
    tensors = [x for x in cut.all_input_nodes if fake(x) is not None]
    name = _name(cut)
    if name in _MOVES or not tensors or fake(node) is None:
        return None
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk", "unsafe_split"):
        found = [(x, place) for x in tensors if varies(x) if (place := same_rows(x, node, rows)) is not None]
        return Step(found, mixes=True) if found else None
    names = ("input", "dim") if name == "unbind" else ("input", "sections", "dim")
    source, dim = tensors[0], constant(given(cut, *names).get("dim", 0))
    outputs = cut.meta.get("example_value")
    if not isinstance(dim, int) or not isinstance(outputs, list | tuple):
        return None
    dim %= len(sizes(tensor_of(source)))
    if name == "unbind":
        return Step(((source, at(rows, dim, number % len(outputs), sizes(tensor_of(source))[dim])),))
    start = sum((sizes(part)[dim] for part in outputs[: number % len(outputs)]), sympy.Integer(0))
    place = sliced(rows, dim, start, sympy.Integer(1), sizes(tensor_of(source))[dim], sizes(tensor_of(node))[dim])
    return None if place is None else Step(((source, place),))


_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum"})
# These take rows from elsewhere, or make each of many.
_MOVES = frozenset(
    {
        "roll", "flip", "fliplr", "flipud", "rot90", "gather", "take_along_dim", "take", "sort", "argsort", "topk", "scatter",
        "scatter_add", "index_add", "index_copy", "index_put", "masked_select", "unfold", "tile", "pad", "tril", "triu",
        "cross_attention", "scaled_dot_product_attention", "multi_head_attention_forward", "cumsum", "flex_attention",
    }
)  # fmt: skip
# These keep every row to itself where they work along the features; elsewhere they mix, and nothing else is asked of them.
_ROW_BY_ROW = frozenset(
    {
        "layer_norm", "rms_norm", "normalize", "softmax", "mean", "sum", "var", "std", "norm", "linalg_norm", "vector_norm",
        "linalg_vector_norm", "amax", "amin", "view_as_real", "view_as_complex",
    }
)  # fmt: skip
