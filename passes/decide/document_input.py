"""Give a graph inputs for documents, where they are on.

Before:
    out = scaled_dot_product_attention(q, k, v, is_causal=True)

After:
    lighthouse_documents                                    # two inputs more, the last: `gm.meta[DOCUMENTS]`
    lighthouse_documents_known                              # and `gm.meta[KNOWN]`
    out = scaled_dot_product_attention(q, k, v, is_causal=True)

The first has the batch and the length of a call's queries, symbolic where those are, so that documents need no graph per
length. The second lies on the CPU and says how many they are and how long, so that they need no graph per number either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from lighthouse_fx.kernels.packed.plan import FIELDS

from ..attention_call import CALLS, DOCUMENTS, KNOWN, AttentionCall, context_of, fake

Sizes = Callable[[Sequence[Any]], tuple[int, int]]


def add_document_input(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Add the inputs where a call could use them: of a shape that fits the documents that are on, if there is one."""
    packed = context_of(gm).packed
    if packed is None:
        return gm
    known = _behind_inputs(gm)
    queries = [query for call in gm.meta[CALLS] if (query := _causal_query(call)) is not None]
    queries = [query for query in queries if _symbols(query) <= known.keys()]
    query = next((x for x in queries if (_hint(x.shape[0]), _hint(x.shape[2])) == packed), next(iter(queries), None))
    if query is None:
        return gm
    with torch.no_grad():
        starts = query.new_empty((query.shape[0], query.shape[2]), dtype=torch.int32)
        on_cpu = query.new_empty((query.shape[0], FIELDS), dtype=torch.int64, device="cpu")
    for name, value in ((DOCUMENTS, starts), (KNOWN, on_cpu)):
        last = list(gm.graph.find_nodes(op="placeholder"))[-1:]
        with gm.graph.inserting_after(last[0]) if last else gm.graph.inserting_before():
            node = gm.graph.placeholder(name)
        node.meta["example_value"] = value
        node._dynamo_source = None  # no variable of the user's: AOTAutograd asks for the attribute
        gm.meta[name] = node
    return gm


def sizes_when_run(gm: fx.GraphModule) -> Sizes:
    """A function from the graph's inputs, when it runs, to the shape `[B, N]` that its documents must have."""
    known = _behind_inputs(gm)
    shape = [_exact(size) for size in gm.meta[DOCUMENTS].meta["example_value"].shape]

    def sizes(args: Sequence[Any]) -> tuple[int, int]:
        batch, tokens = (
            int(size if isinstance(size, int) else size.xreplace({x: known[x](args) for x in size.free_symbols}))
            for size in shape
        )
        return batch, tokens

    return sizes


def _causal_query(call: AttentionCall) -> torch.Tensor | None:
    query = fake(call.query)
    stays = call.refusal is not None or call.is_causal is not True or call.documents is not None
    return None if stays or query is None or query.dim() != 4 else query


def _behind_inputs(gm: fx.GraphModule) -> dict[Any, Callable[[Sequence[Any]], int]]:
    """How to read each symbol from the graph's inputs."""
    found: dict[Any, Callable[[Sequence[Any]], int]] = {}
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and isinstance(expression := _exact(value), sympy.Symbol):
            found[expression] = lambda args, place=place: args[place]  # type: ignore[misc]
        elif isinstance(value, torch.Tensor) and node is not gm.meta.get(DOCUMENTS) and not value.is_nested:
            for dim, size in enumerate(value.shape):
                if isinstance(expression := _exact(size), sympy.Symbol):
                    found.setdefault(expression, lambda args, place=place, dim=dim: args[place].shape[dim])  # type: ignore[misc]
    return found


def _exact(size: Any) -> Any:
    """An integer, or an expression of symbols; unlike a SymInt it makes no guards."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _symbols(query: torch.Tensor) -> set[Any]:
    return set[Any]().union(*(sympy.sympify(_exact(size)).free_symbols for size in (query.shape[0], query.shape[2])))


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size
