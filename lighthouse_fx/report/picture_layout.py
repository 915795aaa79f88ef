"""What a picture of an FX graph shows: nodes folded into slots, slots into blocks, equal blocks into rows.

A model graph has hundreds of nodes and one thing to say: which attention calls were rewritten. So each graph is cut
into *parts*: one part per repeated block of the model (found from the module paths of the attention calls) and one
part for whatever lies between blocks. A block alternates *runs* of ordinary nodes with *cores*, the nodes of one
attention call. The parts of both graphs are then paired, and consecutive pairs of equal structure become one row.

Nodes are placed by data flow, never by their position in the listing: a mask computed late but fed by nothing earlier
belongs before the first block, wherever tracing happened to put it. At the end: what labels say, and how wide they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape as _escape
from typing import Any, TypeAlias

import networkx as nx

Graph: TypeAlias = "nx.DiGraph[str]"

CORE_KINDS = frozenset({"attention", "lighthouse"})
# Two calls may share a block: a decoder layer has self- and cross-attention.
CALLS_PER_BLOCK = 2
MOST_HOVER_LINES = 10


@dataclass(frozen=True, slots=True)
class Slot:
    """A run of ordinary nodes (`call` is -1, and it may be empty) or the core of one attention call."""

    nodes: tuple[str, ...]
    call: int = -1


@dataclass(frozen=True, slots=True)
class Part:
    """One block of one graph, or (`block` false) what lies between two blocks."""

    name: str
    block: bool
    slots: tuple[Slot, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(node for slot in self.slots for node in slot.nodes)

    @property
    def calls(self) -> tuple[int, ...]:
        return tuple(slot.call for slot in self.slots if slot.call >= 0)


Pair = tuple[Part | None, Part | None]


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive (before, after) pairs of equal structure, drawn once; `same_as` is an earlier row that equals it."""

    members: tuple[Pair, ...]
    same_as: int | None = None

    @property
    def block(self) -> bool:
        return any(part is not None and part.block for part in self.members[0])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(next(part.name for part in pair if part is not None) for pair in self.members)

    def calls(self, slot: int) -> tuple[int, ...]:
        """The attention calls that slot number `slot` of this row stands for."""
        found = {part.slots[slot].call for pair in self.members for part in pair if part and slot < len(part.slots)}
        return tuple(sorted(found - {-1}))

    @property
    def all_calls(self) -> tuple[int, ...]:
        return tuple(sorted({call for pair in self.members for part in pair if part for call in part.calls}))


def ordered(graph: Graph) -> list[str]:
    """Topological order; among nodes that are ready, the graph's own order decides."""
    data = graph.nodes
    return list(nx.lexicographical_topological_sort(graph, key=lambda node: (data[node].get("order", 0), node)))


def call_of(data: Mapping[str, Any]) -> int:
    """The attention call whose core the node is part of, or -1."""
    return int(data.get("call", -1)) if data.get("kind") in CORE_KINDS else -1


def edge_node(data: Mapping[str, Any]) -> bool:
    """Inputs and the output: drawn at the ends of the picture, outside of every part."""
    return data.get("kind") == "input" or data.get("op") == "output"


def rewritten(graph: Graph) -> frozenset[int]:
    """Indices of the calls that have a Lighthouse node."""
    return frozenset(call_of(data) for _, data in graph.nodes(data=True) if data.get("kind") == "lighthouse") - {-1}


def all_calls(graph: Graph) -> frozenset[int]:
    """Indices of all attention calls."""
    return frozenset(call_of(data) for _, data in graph.nodes(data=True)) - {-1}


def _prefixes(module: str) -> list[str]:
    pieces = module.split(".") if module else []
    return [".".join(pieces[: i + 1]) for i in range(len(pieces))]


def block_names(graphs: Iterable[Graph]) -> dict[int, str]:
    """The block that each attention call lives in, from its module path: the shallowest numbered module that holds at
    most two calls. Without numbered modules each call is a block of its own, and a lone call's block is the graph."""
    modules: dict[int, str] = {}
    for graph in graphs:
        for node in ordered(graph):
            call = call_of(graph.nodes[node])
            if call >= 0:
                modules.setdefault(call, str(graph.nodes[node].get("module", "")))
    numbered = {c: [p for p in _prefixes(m) if p.rpartition(".")[2].isdigit()] for c, m in modules.items()}
    held = Counter(prefix for prefixes in numbered.values() for prefix in prefixes)
    names: dict[int, str] = {}
    for call, prefixes in numbered.items():
        small = [prefix for prefix in prefixes if held[prefix] <= CALLS_PER_BLOCK]
        if prefixes:
            names[call] = small[0] if small else prefixes[-1]
        elif len(modules) == 1:
            names[call] = ""
        else:
            names[call] = modules[call] or f"attention {call}"
    return names


def parts(graph: Graph, names: Mapping[int, str]) -> tuple[Part, ...]:
    """Cut one graph into parts, in data-flow order."""
    nodes = [node for node in ordered(graph) if not edge_node(graph.nodes[node])]
    blocks: list[str] = []
    for node in nodes:
        call = call_of(graph.nodes[node])
        if call >= 0 and names[call] not in blocks:
            blocks.append(names[call])
    index = {name: i for i, name in enumerate(blocks)}
    # Models traced without module paths are cut at their attention calls instead.
    unnamed = bool(blocks) and all(name.startswith("attention ") or not name for name in blocks)
    inside: list[list[str]] = [[] for _ in blocks]
    between: list[list[str]] = [[] for _ in range(len(blocks) + 1)]
    home: dict[str, int] = {}  # node -> its block
    reach: dict[str, int] = {}  # node -> how many blocks its value has come through
    for node in nodes:
        data = graph.nodes[node]
        module = str(data.get("module", ""))
        before = [pred for pred in graph.predecessors(node) if pred in reach]
        depth = max((reach[pred] for pred in before), default=0)
        call = call_of(data)
        owners = [index[prefix] for prefix in _prefixes(module) if prefix in index]
        block: int | None = None
        if call >= 0:
            block = index[names[call]]
        elif blocks == [""]:
            block = 0
        elif unnamed:
            block = depth if depth < len(blocks) else None
        elif owners:
            block = owners[-1]
        elif depth and any(home.get(pred) == depth - 1 for pred in before):
            # Glue traced in the parent's own code, such as a residual add, joins the block it reads from.
            name = blocks[depth - 1]
            block = depth - 1 if not module or name.startswith(module + ".") else None
        if block is None:
            between[depth].append(node)
            reach[node] = depth
        else:
            inside[block].append(node)
            home[node] = block
            reach[node] = max(depth, block + (0 if unnamed and call < 0 else 1))
    rank = {node: i for i, node in enumerate(nodes)}
    for depth in range(1, len(between)):
        # A module shared by all blocks may be called from within one: what leads back into the block is part of it.
        own = set(inside[depth - 1])
        back: set[str] = set()
        for node in reversed(between[depth]):
            if any(succ in own or succ in back for succ in graph.successors(node)):
                back.add(node)
        inside[depth - 1] = sorted(own | back, key=rank.__getitem__)
        between[depth] = [node for node in between[depth] if node not in back]
    found: list[Part] = []
    for i, loose in enumerate(between):
        if loose:
            found.append(Part(f"after {blocks[i - 1]}" if i else "first", False, (Slot(tuple(loose)),)))
        if i < len(blocks):
            found.append(Part(blocks[i], True, _slots(graph, inside[i])))
    return tuple(found)


def _slots(graph: Graph, nodes: list[str]) -> tuple[Slot, ...]:
    """run, core, run, core, ..., run: a node goes into the earliest run that its inputs allow."""
    calls = list(dict.fromkeys(call for node in nodes if (call := call_of(graph.nodes[node])) >= 0))
    slots: list[list[str]] = [[] for _ in range(2 * len(calls) + 1)]
    level: dict[str, int] = {}
    for node in nodes:
        call = call_of(graph.nodes[node])
        if call >= 0:
            level[node] = 2 * calls.index(call) + 1
        else:
            came = max((level[pred] for pred in graph.predecessors(node) if pred in level), default=0)
            level[node] = came + came % 2  # out of a core (odd) into the run after it (even)
        slots[level[node]].append(node)
    return tuple(Slot(tuple(slot), calls[i // 2] if i % 2 else -1) for i, slot in enumerate(slots))


def relative(module: str, name: str) -> str:
    """The module path as seen from the block `name`."""
    return module[len(name) :].lstrip(".") if name and (module + ".").startswith(name + ".") else module


def signature(graph: Graph, part: Part | None) -> tuple[object, ...]:
    """Equal for two parts exactly when they are drawn alike: same nodes, shapes and inner edges, other names."""
    if part is None:
        return ()
    place = {node: i for i, node in enumerate(part.nodes)}
    signed: list[object] = []
    for number, slot in enumerate(part.slots):
        for node in slot.nodes:
            data = graph.nodes[node]
            inner = sorted(place[pred] for pred in graph.predecessors(node) if pred in place)
            outer = sum(pred not in place for pred in graph.predecessors(node))
            what = tuple(str(data.get(key, "")) for key in ("op", "target", "kind", "shape"))
            signed.append((number, what, relative(str(data.get("module", "")), part.name), tuple(inner), outer))
    return tuple(signed)


def rows(before: Graph, after: Graph) -> tuple[Row, ...]:
    """Pair the parts of both graphs and fold consecutive equal blocks."""
    names = block_names((before, after))
    left, right = parts(before, names), parts(after, names)
    matcher = SequenceMatcher(None, [p.name for p in left], [p.name for p in right], autojunk=False)
    pairs: list[Pair] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(left[i1:i2], right[j1:j2], strict=True)
        else:
            pairs += [(part, None) for part in left[i1:i2]]
            pairs += [(None, part) for part in right[j1:j2]]
    folded: list[tuple[object, list[Pair]]] = []
    for pair in pairs:
        alike = (signature(before, pair[0]), signature(after, pair[1]))
        block = any(part is not None and part.block for part in pair)
        if folded and block and folded[-1][0] == alike:
            folded[-1][1].append(pair)
        else:
            folded.append((alike if block else None, [pair]))
    seen: dict[object, int] = {}
    result: list[Row] = []
    for number, (alike_key, members) in enumerate(folded):
        earlier = None if alike_key is None else seen.setdefault(alike_key, number)
        result.append(Row(tuple(members), None if earlier == number else earlier))
    return tuple(result)


def flows(graph: Graph, source: Iterable[str], target: Iterable[str]) -> bool:
    """Whether any edge leads from `source` to `target`."""
    goal = set(target)
    return any(succ in goal for node in source for succ in graph.successors(node))


def skips(graph: Graph, part: Part, previous: Part | None) -> list[tuple[int, int]]:
    """Edges around an attention call as (from slot, to run): residuals. From -1 is the part drawn above."""
    found: list[tuple[int, int]] = []
    for target, slot in enumerate(part.slots):
        if slot.call >= 0 or not slot.nodes:
            continue
        if target and previous is not None and flows(graph, previous.nodes, slot.nodes):
            found.append((-1, target))
        for source in range(target - 1):
            if part.slots[source].call < 0 and flows(graph, part.slots[source].nodes, slot.nodes):
                found.append((source, target))
    return found


def skeleton(graph: Graph, slot: Slot) -> Graph:
    """The drawn nodes of a rewritten core. Plumbing such as the getitems of `select` is contracted into its source."""
    drawn = {"select", "gather", "scatter", "scaled_dot_product_attention"}
    core: Graph = nx.DiGraph(graph.subgraph(slot.nodes))
    for node in ordered(core):
        if str(core.nodes[node].get("target", "")).rpartition(".")[2] in drawn:
            continue
        core.add_edges_from([(p, s) for p in list(core.predecessors(node)) for s in list(core.successors(node))])
        core.remove_node(node)
    return core


def counted(number: int, what: str) -> str:
    """Three of "op" are "3 ops"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def spans(calls: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> '0-2 5'"""
    found: list[list[int]] = []
    for call in sorted(calls):
        if found and call == found[-1][1] + 1:
            found[-1][1] = call
        else:
            found.append([call, call])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def block_label(names: Sequence[str]) -> tuple[str, str]:
    """('model.layers.2', ..., 'model.layers.27') -> ('model.layers', 'layers 2–27')"""
    if names[0].startswith("attention ") and len(names) > 1:  # blocks without a name, see `block_names`
        return "", f"calls {names[0][10:]}–{names[-1][10:]}"
    parent, _, last = names[0].rpartition(".")
    numbers = [int(name.rpartition(".")[2]) for name in names if name.rpartition(".")[2].isdigit()]
    if len(numbers) == len(names) and all(name.rpartition(".")[0] == parent for name in names):
        noun = (parent.rpartition(".")[2] or "block").rstrip("s")
        noun = noun if len(noun) > 1 else "layer"
        if len(names) == 1:
            return parent, f"{noun} {last}"
        run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        shown = f"{numbers[0]}–{numbers[-1]}" if run else ", ".join(map(str, numbers))
        return parent, f"{noun}s {shown}"
    if len(names) == 1:
        return parent, last or "whole graph"
    return "", f"{names[0]} … {names[-1]}"


# Control characters have no place in XML, not even escaped.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def escape(text: str) -> str:
    """Text for an element or a quoted attribute."""
    return _escape(_CONTROL.sub("\ufffd", text), quote=True)


def width_of(text: str, size: float) -> float:
    """Width in pixels, estimated on the generous side: the reader's font is not known here."""
    units = sum(
        0.36 if c in "iljtfr.,:;|[]()'! ·" else 0.9 if c in "mwMW%@—…" or ord(c) > 0x2E80 else 0.62 for c in text
    )
    return units * size


def fit(text: str, size: float, width: float) -> str:
    """`text` if it fits, else its two ends: paths differ there."""
    if width_of(text, size) <= width:
        return text
    keep = len(text)
    while keep > 1:
        keep -= 1
        short = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
        if width_of(short, size) <= width:
            return short
    return "…"


def hover(graph: Graph, nodes: Sequence[str]) -> list[str]:
    """The lines shown over a box: its nodes, as many as one cares to read."""
    lines = []
    for node in nodes[:MOST_HOVER_LINES]:
        data = graph.nodes[node]
        words = (node, data.get("target", ""), data.get("shape", ""), data.get("module", ""))
        lines.append("  ".join(str(word) for word in words if word))
    return lines + [f"and {len(nodes) - MOST_HOVER_LINES} more"] * (len(nodes) > MOST_HOVER_LINES)


def run_lines(graph: Graph, part: Part, number: int, width: float) -> list[str]:
    """The two lines in the box of a run: which modules; how many ops, and the shapes that leave it."""
    nodes = part.slots[number].nodes
    depth = 1 if part.block and part.name else 2
    modules = [relative(str(graph.nodes[node].get("module", "")), part.name).split(".")[:depth] for node in nodes]
    named = list(dict.fromkeys(".".join(pieces) for pieces in modules if pieces != [""]))
    named = named or list(dict.fromkeys(str(graph.nodes[node].get("target", "")) for node in nodes))
    calls = {node for slot in part.slots[number + 1 :] if slot.call >= 0 for node in slot.nodes}
    leaving = [node for node in nodes if any(succ in calls for succ in graph.successors(node))]
    leaving = leaving or [node for node in nodes if any(succ not in nodes for succ in graph.successors(node))]
    shapes = dict.fromkeys(str(graph.nodes[node].get("shape", "")) for node in leaving)
    ops = [counted(len(nodes), "op"), *(shape for shape in shapes if shape)]
    return [_listed(named, ", ", 13, width), _listed(ops, " · ", 12, width)]


def _listed(words: Sequence[str], between: str, size: float, width: float) -> str:
    """As many words as fit, and how many more there are."""
    for kept in range(len(words), 0, -1):
        more = f" + {len(words) - kept} more" if kept < len(words) else ""
        if width_of(between.join(words[:kept]) + more, size) <= width:
            return between.join(words[:kept]) + more
    return words[0] if words else ""
