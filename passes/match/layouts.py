"""What passes need that find attention in other layouts: views of its arguments, and the only output of an operation.

    q [B, N, H, D]    ->    transpose = q.transpose(1, 2)    # [B, H, N, D], erased again if the call stays dense
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import fx

from ..attention_call import Steps, fake


def shown(node: fx.Node, steps: Steps, before: fx.Node, views: list[fx.Node]) -> fx.Node:
    """A node that shows what methods make of an argument: the argument itself, if there are none. Adds to `views`."""
    for method, arguments in steps:
        value = getattr(fake(node), method)(*arguments)
        with before.graph.inserting_before(before):
            node = before.graph.call_method(method, (node, *arguments))
        node.meta = {**place_of(before), "example_value": value}
        views.append(node)
    return node


def place_of(node: fx.Node) -> dict[str, Any]:
    """Where a node stands in the user's modules and source, for the metadata of another put beside it."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def unused_outputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """What takes one of several outputs and is used by nobody: a checkpointed part may keep that."""
    return tuple(user for user in node.users if user.target is operator.getitem and not user.users)


def only_output(node: fx.Node, unused: Collection[fx.Node] = ()) -> fx.Node | None:
    """The node that takes the first of several outputs, if it comes next and nothing but `unused` takes another."""
    users = [user for user in node.users if user not in unused]
    if len(users) != 1 or users[0] is not node.next or users[0].target is not operator.getitem:
        return None
    return users[0] if users[0].args[1] == 0 else None
