"""What the passes know of one attention call, and how they hand it on.

Passes change nothing but the graph; what they learn travels in `gm.meta[CALLS]`, a tuple with one frozen `AttentionCall`
per attention found, in graph order. What the backend knows beyond the graph is a `PassContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .ir.subgraphs import Region

# In gm.meta:
CALLS = "lighthouse_calls"
CONTEXT = "lighthouse_context"  # a PassContext, from the backend
DOCUMENTS = "lighthouse_documents"  # a placeholder of int32 [B, N]: where each token's document begins, for every call
KNOWN = "lighthouse_documents_known"  # likewise, int64 [B, 4] on the CPU: what it knows of them (`plan.py`)
# In node.meta:
MODULE = "lighthouse_module"  # the path of the innermost module, below the outermost one


Steps = tuple[tuple[str, tuple[Any, ...]], ...]  # methods of a tensor and their arguments, the first one first


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a call stays dense, and what the user can do about it."""

    reason: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMask:
    """How a graph that writes attention out applies its mask to the scores, at a node of this shape and dtype.

    `fill` is None where the mask is added. Otherwise scores become `fill` where the mask is `hides`.
    """

    node: fx.Node
    shape: tuple[Any, ...]
    dtype: torch.dtype
    fill: Any = None
    hides: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A place in a list of layers: the list's path in the model, the number in it, and how many there are."""

    path: str
    number: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContext:
    """What the backend knows beyond the graph. Without it the passes take every call for one that trains, in no known layer.

    `no_gradients`: why the whole graph is traced without gradients; `dense`: that the stage is dense; `excluded`: that the
    whole graph is a layer that stays dense, in every stage. `packed`: documents of this shape `[B, N]` are on, and the graph
    may have an input for them. `layer` gives a node's layer, and `training` whether the module around it trains, or None where
    that is not known.
    """

    no_gradients: Refusal | None = None
    dense: Refusal | None = None
    excluded: Refusal | None = None
    packed: tuple[int, int] | None = None
    layer: Callable[[fx.Node], Layer | None] = lambda node: None
    training: Callable[[fx.Node], bool | None] = lambda node: True


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One attention call, its arguments as nodes or constants, and what became of it.

    `mask` is the `attn_mask` argument. Once it is proved to be causal it is None, `is_causal` is true, and `mask_nodes` are
    the nodes that built it, each with its region. Where it is neither proved nor disproved it is `unproved` instead, with
    the `doubt`: configured to `assume_causal`, the call counts as causal and the graph checks that mask, else it is refused.
    `repeat_nodes` are those that repeated the heads of key and value.
    `score_mask` says how the mask is applied, where it is no argument of `scaled_dot_product_attention`. Of a call that is
    none, `own_nodes` are those that it consists of besides `node`; `views` were put into the graph to show its arguments as
    `[B, H, N, D]`, and `steps` turn an output `[B, H, N, D]` into what `node` gives, of the `projection` by a linear layer,
    weight and bias, where there is one.
    `blocks`, of FlexAttention: how `check_blocks` begins for each set of lists of blocks that the graph has to check.
    `documents`, where attention stays inside documents: the placeholder `DOCUMENTS`, or a node of int `[B, N]`, the number of
    each token's document, which never falls along a row. `own_documents`: the model itself keeps the call inside documents, so
    that it needs no others, rewritten or not.
    `score_query` and `score_key` are what the scorer reads in place of query and key, None where it reads those; `scorer` is
    the call's own, and `scored` says what it reads or why it is another than the configuration's, "" where nothing is special.
    `exact`: attention over one sequence that the passes could compute otherwise; only policy keeps it as it is. Such a call,
    left dense, is `kept_inside` documents where these are on: the same attention, inside each document.
    `rewritable`: nothing but the stage, its configuration and missing gradients can keep the call dense.
    `gathered` is S and `local_window` that of the configuration, known once the call is checked;
    `refusal` is None where the call is, or will be, rewritten.
    """

    node: fx.Node
    region: Region
    module: str
    source: str
    query: Any = None
    key: Any = None
    value: Any = None
    mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    documents: Any = None
    own_documents: bool = False
    score_mask: ScoreMask | None = None
    blocks: tuple[tuple[Any, ...], ...] = ()
    own_nodes: tuple[tuple[fx.Node, Region], ...] = ()
    views: tuple[fx.Node, ...] = ()
    steps: Steps = ()
    projection: tuple[fx.Node | None, ...] = ()
    unproved: Any = None
    doubt: Refusal | None = None
    mask_nodes: tuple[tuple[fx.Node, Region], ...] = ()
    repeat_nodes: tuple[tuple[fx.Node, Region], ...] = ()
    score_query: fx.Node | None = None
    score_key: fx.Node | None = None
    scorer: str = ""
    scored: str = ""
    exact: bool = False
    rewritable: bool = False
    kept_inside: bool = False
    gathered: Any = None
    local_window: int = 0
    refusal: Refusal | None = None

    @property
    def replaced(self) -> bool:
        """Whether other nodes take its place in the graph."""
        return self.refusal is None or self.kept_inside

    def refuse(self, reason: str, remedy: str = "") -> AttentionCall:
        """This call, left dense."""
        return replace(self, refusal=Refusal(reason=reason, remedy=remedy))


def context_of(gm: fx.GraphModule) -> PassContext:
    """What the backend knows beyond a graph."""
    context: PassContext = gm.meta.get(CONTEXT, PassContext())
    return context


def for_each_call(gm: fx.GraphModule, step: Callable[[AttentionCall], AttentionCall]) -> None:
    """Replace each call that is not refused yet by `step(call)`."""
    gm.meta[CALLS] = tuple(call if call.refusal else step(call) for call in gm.meta[CALLS])


def add_calls(gm: fx.GraphModule, calls: Iterable[AttentionCall], order: Iterable[fx.Node]) -> None:
    """Add calls to those found before, all in the order of the graph's nodes."""
    place = {node: n for n, node in enumerate(order)}
    gm.meta[CALLS] = tuple(sorted((*gm.meta[CALLS], *calls), key=lambda call: place[call.node]))


def fake(node: Any) -> torch.Tensor | None:
    """The fake tensor that Dynamo saw at a node: shape, dtype, device, requires_grad."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def constant(value: Any) -> Any:
    """The Python value of an argument: a node that stands for a symbolic number gives that number."""
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value
