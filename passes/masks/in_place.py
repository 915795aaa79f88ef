"""Which in-place operations a proof may follow: those that write to a whole tensor, which the graph made of constants.

    mask = torch.full((N, N), -inf)
    mask.triu_(1)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)     the attention reads what triu_ made of mask

A proof reads every other node as if nothing wrote to its memory, so nothing may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from ..ir.aliasing import Writers, memories, writes_in_place
from ..ir.subgraphs import Region
from .diagonals import Unproven
from .evaluate import moves_in_place
from .rules import is_fresh


class History:
    """What tensors hold at different places of the graph."""

    def __init__(self, writers: Writers) -> None:
        self._writers = writers

    def held(self, node: Any, reader: fx.Node) -> Any:
        """The node that made what a tensor holds where `reader` reads it: the last to write to it before, or itself."""
        if not isinstance(node, fx.Node):
            return node
        for write in self._writes_to(root_of(node)):
            if node < write < reader:
                node = write
        return node

    def refuse_other_writes(self, visited: Mapping[fx.Node, Region]) -> None:
        """Raise where something writes to memory that a proof read, unless the proof went through all writes, in order."""
        for node in visited:
            read = list(memories([written_tensor(node)]))
            if len(read) != 1:
                raise Unproven(f"the memory of {node.name} is not known")
            writes = self._writers.get(read[0], [])
            followed = self._writes_to(root_of(writes[0])) if writes else []
            for write in writes:
                # A view is read later than it is made: nothing may write in between.
                late = node.graph is write.graph and any(node < write < user for user in node.users)
                same = node in followed or node is root_of(writes[0])
                if write not in followed or write not in visited or (late and not same):
                    raise Unproven(f"it may be changed in place, by {write.name}")

    def _writes_to(self, root: fx.Node) -> list[fx.Node]:
        """All that is written to a new tensor, in order; nothing if it is no new one, or also written to in parts."""
        if not is_fresh(root) or len(memory := list(memories([root]))) != 1:
            return []
        found: list[fx.Node] = []
        for write in self._writers.get(memory[0], []):
            base = write.args[0] if write.args and writes_in_place(write) else None
            if write.graph is not root.graph or not (base is root or base in found):
                return []
            if moves_in_place(write) and any(user < write and user not in found for x in (root, *found) for user in x.users):
                return []  # whoever read the tensor before saw a shape that its node does not show any more
            found.append(write)
        return found


def written_tensor(node: fx.Node) -> Any:
    """The node that shows shape, dtype and memory of a result: an assignment has none of its own."""
    return root_of(node) if node.meta.get("example_value") is None and writes_in_place(node) else node


def root_of(node: fx.Node) -> fx.Node:
    """The tensor that in-place operations return, and write to."""
    while writes_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
