"""Remove what only a mask, repeated heads or attention by hand needed that are gone.

Before:
    i = arange(N); mask = i[:, None] >= i               # nothing uses mask any more
After:
    nothing

Only nodes that a proof or the undoing went through are removed, since those are known to do nothing else. General dead-code
elimination would take in-place operations of the user's model with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..attention_call import CALLS
from ..ir.aliasing import writes_in_place
from ..ir.subgraphs import Region
from ..masks.in_place import root_of


def remove_leftovers(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: Any) -> fx.GraphModule:
    """Erase the unused nodes among those that built replaced calls, their masks and repeated heads, across subgraphs, too.

    Of calls that stay dense, what the passes themselves put into the graph: it is the user's own again.
    """
    candidates: dict[fx.Node, Region] = {}
    for call in gm.meta[CALLS]:
        if call.replaced:
            candidates |= dict(call.mask_nodes) | dict(call.repeat_nodes) | dict(call.own_nodes)
        candidates |= dict.fromkeys(call.views, call.region)
    touched = set()
    while dead := [node for node in candidates if not node.users and _removable(node, candidates)]:
        for node in dead:
            region = candidates.pop(node)
            touched |= {region.gm, *(caller.region.gm for caller in region.callers)}
            if node.op == "placeholder":
                _drop_operand(node, region)
            region.gm.graph.erase_node(node)
    for graph_module in touched:
        graph_module.graph.lint()
        graph_module.recompile()
    return gm


def _removable(node: fx.Node, candidates: dict[fx.Node, Region]) -> bool:
    if node.op == "placeholder":
        return bool(candidates[node].callers)
    return not writes_in_place(node) or _nobody_reads(root_of(node), candidates)


def _nobody_reads(tensor: fx.Node, candidates: dict[fx.Node, Region]) -> bool:
    """Whether all that is made of a tensor is to be removed, too. What is written to it is seen by whatever else reads it."""
    seen, to_see = {tensor}, [tensor]
    while to_see:
        users = to_see.pop().users.keys() - seen
        if not users <= candidates.keys():
            return False
        seen |= users
        to_see += users
    return True


def _drop_operand(placeholder: fx.Node, region: Region) -> None:
    index = list(region.gm.graph.find_nodes(op="placeholder")).index(placeholder)
    for caller in region.callers:
        at = caller.first_operand + index
        caller.node.args = (*caller.node.args[:at], *caller.node.args[at + 1 :])
