"""Let the `norm` scorer read queries and keys as they were before a norm made them all equally long (QK-norm).

Before:
    raw = q_proj(x).view(B, N, H, D);  q = rotary(rms_norm(raw).transpose(1, 2))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)

After:
    permute = raw.permute(0, 2, 1, 3)                       # only `select` will read it: its AttentionCall's score_query

Where the norm is seen but what it normalises cannot be read, the call's scorer is `dilated`, which depends on no lengths.
Where no norm is seen, `norm` scores queries and keys as they are. Selection has no gradient, and all that changes is which
windows are selected (SPEC.md, "Scorers").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from lighthouse_fx.kernels.shapes import tensor_problem

from ..attention_call import MODULE, AttentionCall, fake, for_each_call
from ..config import LighthouseConfig
from ..ir.aliasing import Writers, memories, written
from ..ir.internal_error import internal_error
from ..ir.subgraphs import Region
from ..provenance.norms import normalised
from ..provenance.rows import BATCH, FEATURE, HEAD, TOKEN, Place, holds_data, place_in, sizes, step_back

_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", MODULE)


@dataclass(frozen=True, slots=True)
class _Raw:
    """What a norm normalises, how rows lie in it, and the norm."""

    node: fx.Node
    place: Place
    norm: fx.Node = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Unusable:
    """There is a norm, but what it normalises cannot be scored."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Input:
    """No norm is seen, because the graph begins here."""


_Found = _Raw | _Unusable | _Input | None  # None: no norm is seen


def score_raw(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Decide what each call that will be rewritten is scored by."""
    writers = functools.cache(lambda: written(gm))
    for_each_call(gm, lambda call: _decided(replace(call, scorer=config.scorer), writers))
    return gm


def _decided(call: AttentionCall, writers: Callable[[], Writers]) -> AttentionCall:
    if call.scorer != "norm":
        return call
    found: dict[str, _Found] = {
        "query": _before_its_norm(call.query, call.region, writers),
        "key": _before_its_norm(call.key, call.region, writers),
    }
    views: dict[str, Callable[[fx.Graph], fx.Node]] = {}
    for name, raw in found.items():
        like = fake(getattr(call, name))
        if isinstance(raw, _Raw) and like is not None:
            planned = _as_heads(raw, like, call.node)
            if isinstance(planned, _Unusable):
                found[name] = planned
            else:
                views[name] = planned
    unusable = {name: raw.reason for name, raw in found.items() if isinstance(raw, _Unusable)}
    if unusable:
        why = "; ".join(f"{name}: {reason}" for name, reason in unusable.items())
        return replace(call, scorer="dilated", scored=f"instead of norm, as a norm makes lengths equal ({why})")
    if not views:
        outside = all(isinstance(raw, _Input) for raw in found.values())
        return replace(call, scored="as they enter the graph: a norm before it is not seen") if outside else call
    nodes = {name: view(call.node.graph) for name, view in views.items()}
    scored = f"{' and '.join(nodes)} before {'their norms' if len(nodes) > 1 else 'its norm'}"
    return replace(call, score_query=nodes.get("query"), score_key=nodes.get("key"), scored=scored)


def _before_its_norm(node: Any, region: Region, writers: Callable[[], Writers]) -> _Found:
    tensor = fake(node)
    if tensor is None:
        return None
    try:
        search = _Search()
        found = search.back(node, region, place_in(tensor))
        if found is None:
            return _Input() if search.entered else None
        raw = set(memories([found.node])) if isinstance(found, _Raw) else set[int]()
        if _changed(search.visited, raw, writers()):
            return None  # what was written to may hold anything
        if isinstance(found, _Raw) and any(_later(write, found.norm) for at in raw for write in writers().get(at, ())):
            return _Unusable(f"{found.node.name}, which it normalises, is changed in place afterwards")
    except Exception as error:
        internal_error(error, "the search for a norm of queries and keys")
        return None
    return found


def _changed(visited: Iterable[fx.Node], raw: set[int], writers: Writers) -> bool:
    """Whether anything but the nodes themselves may write to their memory, that of the raw tensor left aside."""
    nodes = set(visited)
    read = {memory for node in nodes for memory in memories([node])} - raw
    return any(write not in nodes for memory in read for write in writers.get(memory, ()))


def _later(write: fx.Node, norm: fx.Node) -> bool:
    """Whether a node may write after a norm has read: scores are read later, where the attention is."""
    return write.graph is not norm.graph or not write < norm


class _Search:
    """Goes back from a query or key, and remembers in `visited` the nodes that it relies on."""

    def __init__(self) -> None:
        self.visited: dict[fx.Node, None] = {}
        self.entered = False  # whether the rows are an input of the graph
        self._known: dict[tuple[fx.Node, Place | None], _Found] = {}

    def back(self, node: fx.Node, region: Region, place: Place | None) -> _Found:
        """The tensor whose norm gives a node's rows their length."""
        if (node, place) not in self._known:
            self._known[node, place] = self._back(node, region, place)
        return self._known[node, place]

    def _back(self, node: fx.Node, region: Region, place: Place | None) -> _Found:
        if node.op == "placeholder":
            outside = [self.back(x, outer, place) for outer, x in region.operands(node) if isinstance(x, fx.Node)]
            tensor = fake(node)
            self.entered |= not region.callers and tensor is not None and tensor.requires_grad
            return _Unusable("its norm is outside this checkpointed part") if any(outside) else None
        if (norm := normalised(node, place)) is not None:
            source, through = norm
            before = self.back(source, region, place)  # a norm of a norm
            self.visited |= dict.fromkeys(through)
            if before is None:
                return _Unusable("its rows could not be followed") if place is None else _Raw(source, place, node)
            self.visited[source] = None
            return before
        step = step_back(node, place)
        if step is None:
            return None
        found = {x: self.back(x, region, where) for x, where in step.operands}
        normed = list(dict.fromkeys(raw for raw in found.values() if raw is not None))
        others = [x for x, raw in found.items() if raw is None]
        if not normed or (step.joined and others) or any(holds_data(x, place) for x in (*others, *step.sides)):
            return None
        self.visited[node] = None
        return normed[0] if len(normed) == 1 else _Unusable("it is made of several norms")


# --- rows as heads ----------------------------------------------------------------------------------------------------


def _as_heads(raw: _Raw, like: torch.Tensor, before: fx.Node) -> Callable[[fx.Graph], fx.Node] | _Unusable:
    """A way to put views `[B, H, N, *]` of a tensor's rows into the graph before a node."""
    steps: list[tuple[str, tuple[Any, ...]]] = []
    kinds: list[str] = []
    for atoms in raw.place:
        dim = len(kinds)
        if not atoms:
            steps.append(("squeeze", (dim,)))
        if len(atoms) > 1:
            known = [int(atom.size) if atom.size.is_Integer else -1 for atom in atoms]
            steps.append(("unflatten", (dim, tuple(known))))
        kinds += [atom.kind for atom in atoms]
    order = sorted(range(len(kinds)), key=lambda dim: (BATCH, HEAD, TOKEN, FEATURE).index(kinds[dim]))
    if order != list(range(len(kinds))):
        steps.append(("permute", tuple(order)))
    if len(kinds) > 4:
        steps.append(("flatten", (3,)))
    value = fake(raw.node)
    assert value is not None, "its place is known"
    with torch.no_grad():
        values = [value := getattr(value, name)(*args) for name, args in steps]
    if sizes(value)[:3] != sizes(like)[:3] or value.dim() != 4:
        return _Unusable(f"{raw.node.name}, which it normalises, has no row for each head and token")
    if problem := tensor_problem(raw.node.name, value):
        return _Unusable(problem)

    def view(graph: fx.Graph) -> fx.Node:
        node = raw.node
        with graph.inserting_before(before):
            for (name, args), seen in zip(steps, values, strict=True):
                node = graph.call_method(name, (node, *args))
                node.meta = {key: before.meta[key] for key in _KEPT_META if key in before.meta} | {"example_value": seen}
        return node

    return view
