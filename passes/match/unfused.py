"""Find attention that is written out, softmax between two matrix products. Changes nothing that the graph computes.

    weights = softmax(q @ k.transpose(-2, -1) * scale + mask, -1)
    out     = dropout(weights, p) @ v               ->  an AttentionCall, as of scaled_dot_product_attention(q, k, v, mask, ...)

Every step between the products must be understood, and nothing else may use what lies between them. Otherwise the call is
listed, and refused with what stands in the way, and so is any other softmax over tokens by tokens. The user's nodes stay where
they are until the call is rewritten; what is added are views, where q, k or v are laid out otherwise, and only those of
rewritten calls remain.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..attention_call import AttentionCall, ScoreMask, add_calls, constant, context_of, fake
from ..ir.aliasing import Writers, memories, written
from ..ir.internal_error import internal_error
from ..ir.ops import arguments, operands, operation_name, works_in_place
from ..ir.subgraphs import regions
from .layouts import shown
from .products import Output, Scores, Unclear, View, factors, is_number, is_product, output, row_maximum, scores
from .sdpa import module_path, source_line

_CASTS = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"})
_RESHAPES = frozenset({"view", "reshape"})
# Besides the operations above, what may stand between attention's two products without it being something else.
_SEEN_THROUGH = _CASTS | _RESHAPES | frozenset(
    {
        "mul", "div", "add", "masked_fill", "where", "dropout", "sub", "rsub", "tanh", "clamp", "clone", "detach", "transpose",
        "permute", "getitem", "nan_to_num", "pow", "neg", "squeeze", "unsqueeze", "tril", "triu",
    }
)  # fmt: skip
# The same, with other columns than before: a sink's, say, added before the softmax and dropped behind it.
_COLUMNS = frozenset({"cat", "pad", "getitem", "narrow"})
_FEWEST = 3  # dimensions of scores
_FARTHEST = 12  # operations between a product and the softmax
_OWN_COLUMNS = (
    "its softmax has columns of its own beside the keys (attention sinks)",
    "it stays as it is; documents and the stage do not reach it",
)
_KEEP = "write it as scaled_dot_product_attention(q, k, v, is_causal=True)"


def find_by_hand(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Add an `AttentionCall` for every attention that is written out, in graph order."""
    writers = functools.cache(lambda: written(gm))
    found, order = [], []
    for region in regions(gm):
        nodes = list(region.gm.graph.nodes)
        between = {node: found_between for node in nodes if is_product(node) and (found_between := _between(node))}
        known = {softmax for _, softmax in between.values()}
        for node in nodes:
            if node not in between and (node in known or not _is_like_attention(node)):
                continue
            call = AttentionCall(node=node, region=region, module=module_path(node), source=source_line(node))
            if node in between:
                call = _understood(call, *between[node], writers, gradients=context_of(gm).no_gradients is None)
            else:
                call = call.refuse("a softmax over tokens by tokens, in an attention that is not understood", _KEEP)
            found.append(call)
        order += nodes
    add_calls(gm, found, order)
    return gm


# --- what looks like attention ----------------------------------------------------------------------------------------


def _between(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The attention weights that a product multiplies, and the softmax behind them, which has a product behind it."""
    for weights in factors(node):
        softmax = _behind(weights, lambda x: operation_name(x) == "softmax")
        if softmax is not None and _behind(_first(softmax), is_product) is not None:
            return weights, softmax
    return None


def _is_like_attention(node: fx.Node) -> bool:
    """Whether it is a softmax over a square of tokens, between two products of matrices, whatever else is between them."""
    sizes = _shape(node)
    if operation_name(node) not in ("softmax", "log_softmax") or len(sizes) < _FEWEST or sizes[-1] != sizes[-2]:
        return False

    def reaches(following: Callable[[fx.Node], Any]) -> bool:
        near = seen = {node}
        for _ in range(_FARTHEST + 1):
            near = {x for found in near for x in following(found)} - seen
            if any(is_product(x) for x in near):
                return True
            near = {x for x in near if _matrix(x) == _matrix(node)}
            seen = seen | near
        return False

    return reaches(lambda x: x.all_input_nodes) and reaches(lambda x: x.users)


def _behind(node: Any, wanted: Callable[[fx.Node], bool], distance: int = _FARTHEST) -> fx.Node | None:
    """The nearest wanted node behind a node, as far as operations keep the matrices that it is made of."""
    if not isinstance(node, fx.Node) or fake(node) is None:
        return None
    if wanted(node):
        return node
    name, sizes = _name(node), _matrix(node)
    if not distance or name not in _SEEN_THROUGH | _COLUMNS:
        return None
    columns = name in _COLUMNS
    sources = (
        x for x in node.all_input_nodes
        if sorted(_matrix(x)) == sorted(sizes) or (columns and _shape(x)[:-1] == _shape(node)[:-1])
    )  # fmt: skip
    return next((x for source in sources if (x := _behind(source, wanted, distance - 1)) is not None), None)


def _name(node: fx.Node) -> str:
    """The operation's name; `F.pad` is traced as a function that has no other home."""
    return operation_name(node) or ("pad" if getattr(node.target, "__name__", "") == "pad" else "")


def _matrix(node: Any) -> tuple[str, ...]:
    """The last two sizes, as text: comparing symbolic sizes would make guards."""
    return _shape(node)[-2:]


def _shape(node: Any) -> tuple[str, ...]:
    tensor = fake(node)
    return () if tensor is None else tuple(map(str, tensor.shape))


# --- what is attention ------------------------------------------------------------------------------------------------


@dataclass
class _Path:
    """What was learned on the way from the output back to the scores."""

    nodes: list[fx.Node] = field(default_factory=list)  # from the one before the output back to the scores
    scale: float = 1.0
    symbol: fx.Node | None = None  # a number that is known when the graph runs, which also scales
    over: bool = False  # it divides
    dropout_p: float = 0.0
    mask: Any = None
    form: ScoreMask | None = None
    aside: list[fx.Node] = field(default_factory=list)  # nodes beside that way, which the softmax cancels


def _understood(
    call: AttentionCall, weights: fx.Node, softmax: fx.Node, writers: Callable[[], Writers], *, gradients: bool
) -> AttentionCall:
    path = _Path()
    try:
        out = output(call.node, weights)
        _follow_weights(weights, softmax, path)
        asked = _follow_scores(softmax, path)
        _used_alone(call.node, path.nodes, path.aside)
        _check_arguments(asked, out, path, call.node, gradients=gradients)
        views: list[fx.Node] = []
        query, key, value = (
            shown(view.node, view.steps, call.node, views) for view in (asked.query, asked.key, out.value)
        )
    except Unclear as why:
        return call.refuse(f"attention written out by hand: {why.reason}", why.remedy or _KEEP)
    except Exception as error:
        return replace(call, refusal=internal_error(error, "reading attention written out by hand"))
    scale = path.scale if path.symbol is None else _scale(path, path.symbol, call.node, views)
    call = replace(
        call,
        query=query,
        key=key,
        value=value,
        mask=path.mask,
        score_mask=path.form,
        dropout_p=path.dropout_p,
        scale=scale,
        enable_gqa=_one_head(asked.key) and _one_head(out.value) and not _one_head(asked.query),
        own_nodes=tuple((node, call.region) for node in (*path.nodes, *path.aside, *asked.turned)),
        views=tuple(views),
        steps=out.steps,
    )
    # Query, key and value will be read where the output is, later than where the scores are computed.
    try:
        changed = any(writers().get(memory) for memory in memories([query, key, value]))
    except Exception as error:
        return replace(call, refusal=internal_error(error, "the search for writes to tensors"))
    if changed:
        return call.refuse("attention written out by hand, of tensors that may be changed in place", "work on copies")
    return call


def _follow_weights(weights: fx.Node, softmax: fx.Node, path: _Path) -> None:
    """From the output's argument back to the softmax."""
    node = weights
    while node is not softmax:
        name = _name(node)
        source = _first(node)
        if name == "dropout":
            path.dropout_p = _dropout(node, path.dropout_p)
        elif name in _COLUMNS:
            raise Unclear(*_OWN_COLUMNS)
        elif not _is_plain(node, source):
            raise Unclear(f"its weights are changed by {node.name}")
        path.nodes.append(node)
        node = source
    path.nodes.append(softmax)


def _follow_scores(softmax: fx.Node, path: _Path) -> Scores:
    """From the softmax back to the product of query and key."""
    _check_softmax(softmax)
    node = _first(softmax)
    scaled = False
    while not is_product(node):
        name = _name(node)
        if name in _COLUMNS:
            raise Unclear(*_OWN_COLUMNS)
        source = _source(node)
        if name == "sub" and (largest := row_maximum(node, source)):
            path.aside += largest
        elif name in ("mul", "div"):
            factor = _factor(node, source)
            if isinstance(factor, fx.Node):
                if path.symbol is not None:
                    raise Unclear("its scale is made of several numbers that are computed in the graph", "multiply them first")
                path.symbol, path.over = factor, name == "div"
            else:
                path.scale *= 1 / factor if name == "div" else factor
            scaled = True
        elif name in ("add", "masked_fill", "where"):
            _take_mask(node, source, path, scaled=scaled)
        elif not _is_plain(node, source):
            if name == "tanh":
                raise Unclear("soft-capping", "without it (in transformers, attn_logit_softcapping=None) it is rewritten")
            raise Unclear(f"its scores are changed by {name or node.name}")
        path.nodes.append(node)
        node = source
    path.nodes.append(node)
    found = scores(node)
    path.scale *= found.scale
    if found.added is not None:
        _mask(node, path, found.added, None, hides=True, scaled=scaled)
    if not 0 < path.scale < math.inf:
        raise Unclear(f"its scale is {path.scale}", "scale scores by a positive number")
    return found


def _source(node: fx.Node) -> fx.Node:
    """The scores that an operation changes: the input with the product of query and key behind it."""
    found = [x for x in node.all_input_nodes if _shape_or_reshaped(node, x) and _behind(x, is_product) is not None]
    if works_in_place(node) and found and found[0] is not node.args[0]:
        raise Unclear(f"{node.name} writes its scores into another tensor")
    if len(found) != 1:
        raise Unclear(f"its scores are changed by {node.name}" if not found else f"{node.name} adds scores to scores")
    return found[0]


def _shape_or_reshaped(node: fx.Node, source: fx.Node) -> bool:
    return _shape(node) == _shape(source) or (operation_name(node) in _RESHAPES and _matrix(node) == _matrix(source))


def _first(node: fx.Node) -> Any:
    given = operands(node)
    return given[0] if given else None


def _is_plain(node: fx.Node, source: Any) -> bool:
    """Whether an operation only converts floating-point numbers, or only renumbers what comes before rows and columns."""
    before, after = fake(source), fake(node)
    if before is None or after is None or not (before.is_floating_point() and after.is_floating_point()):
        return False
    if operation_name(node) in _CASTS:
        return _shape(node) == _shape(source) and before.device == after.device
    return operation_name(node) in _RESHAPES and _matrix(node) == _matrix(source)


def _check_softmax(node: fx.Node) -> None:
    tensor = fake(node)
    if tensor is None or (arguments(node) or {}).get("dim") not in (-1, tensor.dim() - 1):
        raise Unclear("its softmax does not go over the keys")


def _dropout(node: fx.Node, before: float) -> float:
    given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | dict(node.kwargs)
    p, training = constant(given.get("p", 0.5)), given.get("training", given.get("train", True))
    if not is_number(p) or not isinstance(training, bool):
        raise Unclear("its dropout is computed in the graph", "give Python values")
    if training and p and before:
        raise Unclear("its weights are dropped twice")
    return float(p) if training and p else before


def _factor(node: fx.Node, source: fx.Node) -> float | fx.Node:
    values, over = operands(node), operation_name(node) == "div"
    others = [x for x in values if x is not source]
    if len(values) != 2 or len(others) != 1:
        raise Unclear(f"its scale, {node.name}, is not understood", "multiply by a Python number")
    factor, symbol = constant(others[0]), others[0]
    symbolic = isinstance(symbol, fx.Node) and isinstance(factor, torch.SymFloat | torch.SymInt)
    if symbolic and (not over or values[0] is source):
        assert isinstance(symbol, fx.Node)
        return symbol
    if fake(others[0]) is not None or not is_number(factor):
        raise Unclear(f"its scale {others[0]} is computed in the graph", "give a Python number, such as head_dim ** -0.5")
    if over and (values[0] is not source or factor == 0):
        raise Unclear(f"{node.name} divides by the scores")
    return float(factor)


def _scale(path: _Path, symbol: fx.Node, before: fx.Node, views: list[fx.Node]) -> fx.Node:
    """A node of the whole scale, put into the graph."""
    function, value = operator.truediv if path.over else operator.mul, symbol.meta["example_value"]
    with before.graph.inserting_before(before):
        node = before.graph.call_function(function, (path.scale, symbol))
    node.meta["example_value"] = function(path.scale, value)
    views.append(node)
    return node


# --- its mask ---------------------------------------------------------------------------------------------------------


def _take_mask(node: fx.Node, source: fx.Node, path: _Path, *, scaled: bool) -> None:
    """Whatever hides keys in one operation on the scores."""
    name, given = operation_name(node), operands(node)
    if name == "masked_fill":
        if len(given) != 3 or given[0] is not source:
            raise Unclear(f"its mask, {node.name}, is not understood")
        return _mask(node, path, given[1], given[2], hides=True, scaled=scaled)
    if name == "where":
        by_name = arguments(node) or {}
        condition, yes, no = (by_name.get(x) for x in ("condition", "input", "other"))
        hides = no is source
        return _mask(node, path, condition, yes if hides else no, hides=hides, scaled=scaled)
    others = [x for x in given if x is not source]
    if len(given) != 2 or len(others) != 1 or fake(others[0]) is None:
        raise Unclear(f"{node.name} adds something other than a mask to its scores")
    return _mask(node, path, others[0], None, hides=True, scaled=scaled)


def _mask(node: fx.Node, path: _Path, mask: Any, fill: Any, *, hides: bool, scaled: bool) -> None:
    tensor = fake(node)
    if path.mask is not None:
        raise Unclear("it has more than one mask", "combine masks into one; with a bias such as ALiBi it stays dense")
    if scaled and (fill != -math.inf or path.symbol is not None):  # a positive constant leaves -inf as it is
        raise Unclear("its scores are scaled after they are masked", "scale before masking, or mask with -inf")
    if tensor is None or fake(mask) is None:
        raise Unclear(f"its mask, {node.name}, is not understood")
    if fill is not None and (filling := fake(fill)) is not None and filling.dim():
        raise Unclear(f"{node.name} fills its scores from another tensor")
    path.mask = mask
    path.form = ScoreMask(node=node, shape=tuple(tensor.shape), dtype=tensor.dtype, fill=fill, hides=hides)


# --- its arguments ----------------------------------------------------------------------------------------------------


def _used_alone(out: fx.Node, nodes: Sequence[fx.Node], aside: Sequence[fx.Node]) -> None:
    """Nothing but the next one may use what is computed on the way, which also rules out that it is changed in place."""
    for node in aside:
        if any(user not in (*nodes, *aside) for user in node.users):
            raise Unclear(f"the largest of its scores ({node.name}) is also used elsewhere")
    for node, user in zip(nodes, (out, *nodes), strict=False):
        for other in node.users:
            if other.op == "output":
                raise Unclear(f"its attention weights or scores ({node.name}) are returned", "ask for no attention maps")
            if other is not user and other not in aside:
                raise Unclear(f"its attention weights or scores ({node.name}) are also used by {other.name}")


def _check_arguments(asked: Scores, out: Output, path: _Path, node: fx.Node, *, gradients: bool) -> None:
    arguments = [view.node for view in (asked.query, asked.key, out.value)]
    if any(x in path.nodes for x in arguments):
        raise Unclear("its values are made of its weights")
    if len({len(view.order) for view in (asked.query, asked.key, out.value)}) > 1:
        raise Unclear("query, key and value differ in their number of dimensions", "give all as [B, H, N, D]")
    tensors = [tensor for x in (*arguments, node) if (tensor := fake(x)) is not None]
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        raise Unclear("query, key, value and output differ in dtype", "convert query, key and value to one dtype first")
    needs = any(tensor.requires_grad for tensor in tensors[:2])
    if gradients and any((x := fake(step)) is None or x.requires_grad != needs for step in path.nodes):
        raise Unclear("gradients stop between its two products", "leave out detach() and no_grad() there")


def _one_head(view: View) -> bool:
    """Whether its heads, if it has any, are broadcast."""
    tensor = fake(view.node)
    size = tensor.shape[view.order[1]] if tensor is not None and len(view.order) == 4 else None
    return isinstance(size, int) and size == 1
