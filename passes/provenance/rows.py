"""Follow the rows of attention, one per sequence, head and token, back through the operations that keep each to itself.

    mul      = x * cos                  the row (b, h, n) of mul comes from the row (b, h, n) of x
    states   = x.view(B, N, H, D).transpose(1, 2)   ... from x[b, n, h * D : (h + 1) * D]

A `Place` says how rows lie in a tensor: for each dimension the atoms that it runs through, the slowest first. An atom is one
of the batch, the heads, the tokens, or features; the features of a row may be moved about, as rotary embeddings do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ..attention_call import constant, fake
from ..ir.ops import arguments, operation_name

BATCH, HEAD, TOKEN, FEATURE = "bhn*"


class Atom(NamedTuple):
    """A part of a dimension: what it counts, and how many of it there are."""

    kind: str
    size: Any  # an exact number or a symbol: comparing those, unlike SymInts, makes no guard


Place = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The operands in which an operation's rows may lie, each with the place there, None where it is not known.

    `joined`: each operand is a part of every row, as in `cat`. `sides`: smaller operands, that are broadcast to the rows.
    """

    operands: tuple[tuple[fx.Node, Place | None], ...]
    joined: bool = False
    sides: tuple[fx.Node, ...] = ()


def sizes(tensor: torch.Tensor) -> list[Any]:
    """A shape as exact numbers and symbols."""
    return [sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size) for size in tensor.shape]


def place_in(tensor: torch.Tensor) -> Place:
    """The rows of a tensor `[B, H, N, D]`."""
    return tuple((Atom(kind, size),) for kind, size in zip((BATCH, HEAD, TOKEN, FEATURE), sizes(tensor), strict=True))


def kinds(place: Place, dim: int) -> set[str]:
    """What a dimension counts."""
    return {atom.kind for atom in place[dim]}


def step_back(node: fx.Node, place: Place | None) -> Step | None:
    """One operation back; None where it does more than move rows, or mixes them."""
    name = operation_name(node)
    if name in _POINTWISE:
        return _pointwise(node, place)
    if name in ("cat", "stack"):
        return _parts(node, place, stacked=name == "stack")
    if name == "getitem" and isinstance(node.args[0], fx.Node) and fake(node.args[0]) is None:
        return _chunk(node, node.args[0], place)
    source = _source(node)
    if source is None:
        return None
    before: Place | None
    if name in _REARRANGED and place is not None:
        before = _REARRANGED[name](node, sizes(_tensor(source)), place)
    elif name in _REARRANGED or name in _NOT_FOLLOWED:
        before = None
    else:
        return None
    return Step(((source, before),))


def given(node: fx.Node, *names: str) -> dict[str, Any]:
    """A node's arguments by name, by these names in order where no schema has others."""
    found = arguments(node)
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs) if found is None else found


def origin(node: fx.Node, place: Place) -> Place:
    """Where rows lie in what they come from, as far back as each operation says so: what a projection gave, say.

    There may be more features than theirs, as where one tensor holds queries, keys and values.
    """
    while True:
        cut = node.args[0] if operation_name(node) == "getitem" else None
        if isinstance(cut, fx.Node) and operation_name(cut) == "unbind" and (source := _source_of_many(cut)) is not None:
            dim, before = constant(given(cut, "input", "dim").get("dim", 0)), sizes(_tensor(source))
            if not isinstance(dim, int):
                return place
            dim %= len(before)
            node, place = source, (*place[:dim], (Atom(FEATURE, before[dim]),), *place[dim:])
            continue
        step = step_back(node, place)
        if step is None or step.operands[0][1] is None:
            return place
        node, place = step.operands[0][0], step.operands[0][1]


def holds_data(operand: fx.Node, place: Place | None) -> bool:
    """Whether an operand gives the rows, which lie in the result at a place, something of its own.

    Tables of positions do not: they are the same for every sequence or every head. Nor do weights: the same for every token.
    """
    tensor = fake(operand)
    if tensor is None:
        return False
    if place is None or len(place) < tensor.dim():
        return tensor.requires_grad and sum(size != 1 for size in sizes(tensor)) > 1
    aligned = place[len(place) - tensor.dim() :]
    varies = {atom.kind for size, atoms in zip(sizes(tensor), aligned, strict=True) if size != 1 for atom in atoms}
    return {BATCH, HEAD} <= varies or (TOKEN in varies and tensor.requires_grad)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two nodes surely have the same shape."""
    first, second = fake(a), fake(b)
    return first is not None and second is not None and sizes(first) == sizes(second)


def _source(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) and fake(source) is not None and fake(node) is not None else None


def _tensor(node: fx.Node) -> torch.Tensor:
    tensor = fake(node)
    assert tensor is not None, "checked before"
    return tensor


# --- element by element, and along the features -----------------------------------------------------------------------


def _pointwise(node: fx.Node, place: Place | None) -> Step | None:
    """Rows lie in the operands of the full shape; what is broadcast, such as weights, holds none."""
    name = operation_name(node)
    values = list(node.all_input_nodes)
    rows = [value for value in values if same_shape(value, node) and (name not in _BY_FIRST or value is node.args[0])]
    sides = [] if name in CASTS else [value for value in values if value not in rows]
    return Step(tuple((value, place) for value in rows), sides=tuple(sides)) if rows else None


def _parts(node: fx.Node, place: Place | None, *, stacked: bool) -> Step | None:
    arguments = given(node, "tensors", "dim")
    parts, dim = arguments.get("tensors"), arguments.get("dim", 0)
    if not isinstance(parts, list | tuple) or not all(fake(part) is not None for part in parts):
        return None
    known = place if place is not None and isinstance(dim, int) and _of_features(place, dim) else None
    if known is None:
        return Step(tuple((part, None) for part in parts), joined=True)
    dim %= len(known)
    if stacked:
        return Step(tuple((part, (*known[:dim], *known[dim + 1 :])) for part in parts), joined=True)
    return Step(tuple((part, _resized(known, dim, sizes(_tensor(part)))) for part in parts), joined=True)


def _chunk(node: fx.Node, cut: fx.Node, place: Place | None) -> Step | None:
    """`x.chunk(2, -1)[i]`, `x.split(sizes, -1)[i]` and `x.unbind(-1)[i]`"""
    name, source = operation_name(cut), _source_of_many(cut)
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split", "unbind") or source is None:
        return None
    names = ("input", "dim") if name == "unbind" else ("input", "sections", "dim")
    dim, before = constant(given(cut, *names).get("dim", 0)), sizes(_tensor(source))
    if place is None or not isinstance(dim, int):
        return Step(((source, None),))
    dim %= len(before)
    if name == "unbind":
        place = (*place[:dim], (Atom(FEATURE, before[dim]),), *place[dim:])
    return Step(((source, _resized(place, dim, before) if _of_features(place, dim) else None),))


def _source_of_many(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    return source if isinstance(source, fx.Node) and fake(source) is not None else None


def _of_features(place: Place, dim: int) -> bool:
    """Whether a dimension and all that lie behind it hold features alone: what is chosen there belongs to each row."""
    return all(atom.kind == FEATURE for atoms in place[dim % len(place) :] for atom in atoms)


def _resized(place: Place, dim: int, before: Sequence[Any]) -> Place:
    return (*place[:dim], (Atom(FEATURE, before[dim]),), *place[dim + 1 :])


# --- views ------------------------------------------------------------------------------------------------------------


def _reshaped(node: fx.Node, before: Sequence[Any], place: Place) -> Place | None:
    """Both shapes run through the same atoms in the same order; features may be divided, the rest may not."""
    if _tensor(node).dtype != _tensor(node.args[0]).dtype:  # type: ignore[arg-type]
        return None  # `view` reads the bits as another dtype
    left = [atom for atoms in place for atom in atoms]
    found: list[list[Atom]] = []
    for size in before:
        taken: list[Atom] = []
        missing = size
        while missing != 1 or (size == 1 and left and left[0].size == 1 and not taken):
            if not left:
                return None
            atom = left.pop(0)
            if (missing / atom.size).is_integer:
                missing /= atom.size
            elif atom.kind == FEATURE and (atom.size / missing).is_integer:
                left.insert(0, Atom(FEATURE, atom.size / missing))
                atom, missing = Atom(FEATURE, missing), sympy.Integer(1)
            else:
                return None
            taken.append(atom)
        found.append(taken)
    if any(atom.size != 1 for atom in left) or not found:
        return None
    found[-1] += left
    return tuple(map(_merged, found))


def _merged(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    """Features that follow each other as one, so that two ways to the same place are spelled the same."""
    merged: list[Atom] = []
    for atom in atoms:
        if merged and atom.kind == merged[-1].kind == FEATURE:
            merged[-1] = Atom(FEATURE, merged[-1].size * atom.size)
        else:
            merged.append(atom)
    return tuple(merged)


def _transposed(node: fx.Node, before: Sequence[Any], place: Place) -> Place | None:
    dims: list[Any] = [given(node, "input", "dim0", "dim1").get(name) for name in ("dim0", "dim1")]
    if len(dims) != 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    moved = list(place)
    a, b = dims
    moved[a], moved[b] = moved[b], moved[a]
    return tuple(moved)


def _permuted(node: fx.Node, before: Sequence[Any], place: Place) -> Place | None:
    dims: Any = given(node, "input", "dims").get("dims", ())
    if len(dims) != len(place) or not all(isinstance(dim, int) for dim in dims):
        return None
    moved = list(place)
    for to, source in enumerate(dims):
        moved[source] = place[to]
    return tuple(moved)


def _indexed(node: fx.Node, before: Sequence[Any], place: Place) -> Place | None:
    """`x[:, None]`, `x[..., : D // 2]`, `x[..., 0::2]`, `x[..., 0]`: all of the rows, some of the features."""
    index = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (item is None or item is Ellipsis or isinstance(item, int | slice)) for item in items):
        return None
    whole = slice(None)
    used = sum(item is not None and item is not Ellipsis for item in items)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [whole] * (len(before) - used)
    outer, found, partial = iter(place), list[tuple[Atom, ...]](), list[int]()
    for item in items:
        here = len(found)
        if item is None:
            if any(atom.kind != FEATURE and atom.size != 1 for atom in next(outer)):
                return None
        elif item == whole:
            found.append(next(outer))
        else:
            if isinstance(item, slice):
                next(outer)
            partial.append(here)
            found.append((Atom(FEATURE, before[here]),))
    kept = {atom.kind for atoms in found for atom in atoms}
    # A slice of a dimension that rows run through leaves them without an atom.
    return tuple(found) if {BATCH, HEAD, TOKEN} <= kept and all(_of_features(tuple(found), n) for n in partial) else None


def _as_complex(node: fx.Node, before: Sequence[Any], place: Place) -> Place:
    return (*place, (Atom(FEATURE, sympy.Integer(2)),))


def _as_real(node: fx.Node, before: Sequence[Any], place: Place) -> Place | None:
    return place[:-1] if kinds(place, -1) == {FEATURE} else None


_REARRANGED: Mapping[str, Callable[[fx.Node, Sequence[Any], Place], Place | None]] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _reshaped),
    "transpose": _transposed,
    "permute": _permuted,
    "getitem": _indexed,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
}
# Rows are lost here, but a norm behind it still makes lengths equal.
_NOT_FOLLOWED = frozenset({"expand", "expand_as", "repeat_interleave", "repeat", "narrow", "index_select", "movedim"})
CASTS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach", "alias"}
)
_BY_FIRST = CASTS | {"div"}  # what is divided by, or converted to, holds no rows
_POINTWISE = CASTS | {"add", "sub", "rsub", "mul", "div", "neg", "addcmul"}
