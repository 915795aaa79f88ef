"""Draw an FX graph before and after the rewrite: one self-contained SVG, or one HTML page of several.

Colour carries the message: amber is dense attention, blue is Lighthouse attention, grey is everything else. What is
drawn where is decided in `picture_layout`; here rows become coordinates. Both graphs share rows and, within a row,
slots, so what stood in the left column stands at the same height in the right one, and a blue band leads from an
attention call to what replaced it. No scripts, fonts or links: the file can be mailed, committed or printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from . import picture_layout as layout
from .picture_layout import Graph, Part, Row, Slot, block_label, counted, escape, fit, spans, width_of
from .picture_style import PAGE, STYLE

MARGIN, LABEL, BRACKET = 28, 156, 34  # the lane to the left of the drawing: names of blocks, then their brackets
LEFT, GUTTER, PAD = 340, 84, 28  # the before column, the space between columns, a band's inner margin
SELECT, SPACE = 118, 18  # the select box stands to the left of the three gathers
BOX, STEM, GAP, ROW_GAP = 50, 26, 32, 40
INNER, BUS = 34, 46  # between the boxes of a rewritten call; below select there is room for its index lines
CORE_PAD = 24
CORE_HEIGHT = 2 * CORE_PAD + 4 * BOX + BUS + 2 * INNER
HEAD = 196
SDPA = "scaled_dot_product_attention"
LEGEND = (("ours", "Lighthouse: select, gather, scatter"), ("kept", "the same attention, on the gathered sequence"),
          ("dense", "dense attention"), ("other", "all other ops, folded"))  # fmt: skip
NO_CALLS = "no attention call in this graph"


@dataclass(slots=True)
class _Side:
    """One column: its graph, where its boxes stand, and where the last drawn value leaves."""

    graph: Graph
    x: float
    width: float
    dense: bool  # the before column: every attention call in it is dense
    calls: frozenset[int]  # rewritten ones
    leaving: float = 0.0  # y of the last box's lower edge
    last: Part | None = None

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


class _Drawing:
    """Collects SVG elements top to bottom; `back` lies behind everything else."""

    def __init__(self, before: Graph, after: Graph) -> None:
        self.back: list[str] = []
        self.front: list[str] = []
        self.rows = layout.rows(before, after)
        self.rewritten = layout.rewritten(after)
        shapes = [str(d.get("shape", "")) for _, d in after.nodes(data=True) if d.get("kind") == "lighthouse"]
        self.gather = min(200.0, max([128.0, *(width_of(shape, 12) + 22 for shape in shapes)]))
        x = MARGIN + LABEL + BRACKET + PAD
        right = SELECT + SPACE + 3 * self.gather + 2 * SPACE + 2 * CORE_PAD
        self.left = _Side(before, x, LEFT, True, frozenset())
        self.right = _Side(after, x + LEFT + GUTTER, right, False, self.rewritten)
        self.width = self.right.x + right + PAD + MARGIN
        self.y = float(HEAD)

    def text(self, x: float, y: float, content: str, style: str, anchor: str = "start") -> None:
        self.front.append(f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>')

    def line(self, points: Sequence[tuple[float, float]], style: str = "flow", *, arrow: bool = True) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        head = f' marker-end="url(#{"blue" if "blue" in style else "grey"}-@ID@)"' if arrow else ""
        self.front.append(f'<path d="{path}" class="{style}"{head}/>')

    def box(
        self, x: float, y: float, size: tuple[float, float], lines: Sequence[str], style: str,
        *, hover: Sequence[str] = (), data: str = "",
    ) -> None:  # fmt: skip
        width, height = size
        title = f"<title>{escape(chr(10).join(hover))}</title>" if hover else ""
        self.front.append(f'<g class="{style}"{data}>{title}')
        self.front.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>')
        top = y + height / 2 + 4.5 - 9.0 * (len(lines) - 1)
        for number, content in enumerate(lines):
            shown = fit(content, 12 if number else 13, width - 16)
            self.text(x + width / 2, top + 18 * number, shown, "small" if number else "name", "middle")
        self.front.append("</g>")

    def run(self, side: _Side, part: Part, number: int, y: float) -> None:
        nodes = part.slots[number].nodes
        lines, data = layout.run_lines(side.graph, part, number, side.width - 28), f' data-ops="{len(nodes)}"'
        self.box(side.x, y, (side.width, BOX), lines, "other", hover=layout.hover(side.graph, nodes), data=data)

    def core(self, side: _Side, row: Row, part: Part, number: int, y: float, height: float, top: float) -> None:
        """One attention call. `top` is where the values that it reads come from."""
        slot = part.slots[number]
        data = f' data-calls="{spans(row.calls(number))}"'
        if slot.call not in side.calls:
            shown = next(
                (n for n in slot.nodes if "attention" in str(side.graph.nodes[n].get("target"))), slot.nodes[-1]
            )
            lines = [str(side.graph.nodes[shown].get("target", shown)), str(side.graph.nodes[shown].get("shape", ""))]
            box_y = y + (height - BOX) / 2
            size, hover = (side.width, float(BOX)), layout.hover(side.graph, slot.nodes)
            self.box(side.x, box_y, size, [text for text in lines if text], "dense", hover=hover, data=data)
            if top:
                self.line([(side.middle, top), (side.middle, box_y - 2)])
            return
        self.front.append(f'<g class="rewrite"{data}>')
        area = f'x="{side.x:g}" y="{y:g}" width="{side.width:g}" height="{height:g}"'
        self.back.append(f'<rect {area} rx="12" class="cluster"/>')
        self.rewrite(side, slot, y + CORE_PAD, top)
        self.front.append("</g>")

    def rewrite(self, side: _Side, slot: Slot, y: float, top: float) -> None:
        """select at the left, the gathers in a row, then attention over what they gathered, then scatter."""
        graph, core = side.graph, layout.skeleton(side.graph, slot)
        by_role: dict[str, list[str]] = {"select": [], "gather": [], SDPA: [], "scatter": []}
        for node in layout.ordered(core):
            by_role[str(graph.nodes[node]["target"]).rpartition(".")[2]].append(node)
        gathers = by_role["gather"]
        left, first = side.x + CORE_PAD, side.x + CORE_PAD + SELECT + SPACE
        wide = 3 * self.gather + 2 * SPACE
        each = (wide - SPACE * (len(gathers) - 1)) / max(1, len(gathers))
        middles = [first + each / 2 + i * (each + SPACE) for i in range(len(gathers))]
        y_gather, y_attention = y + BOX + BUS, y + 2 * BOX + BUS + INNER
        y_scatter = y_attention + BOX + INNER
        # Three gathers are those of query, key and value, in the order in which the pass makes them.
        letters = ["q", "k", "v"] if len(gathers) == 3 else [""] * len(gathers)
        bus = y + BOX + 20
        for node, middle, letter in zip(gathers, middles, letters, strict=True):
            if top and any(pred not in slot.nodes for pred in graph.predecessors(node)):
                self.line([(middle, top), (middle, y_gather - 2)])
                self.text(middle + 9, y + BOX / 2 + 4, letter, "muted")
            if any(core.has_edge(select, node) for select in by_role["select"]):
                self.line([(left + SELECT / 2, bus), (middle - 20, bus), (middle - 20, y_gather - 2)], "flow blue dash")
            if any(core.has_edge(node, call) for call in by_role[SDPA]):
                self.line([(middle, y_gather + BOX), (middle, y_attention - 2)], "flow blue")
            lines = [f"gather {letter}".strip(), str(graph.nodes[node].get("shape", ""))]
            self.box(middle - each / 2, y_gather, (each, BOX), lines, "ours", hover=layout.hover(side.graph, [node]))
        for node in by_role["select"]:
            centre = left + SELECT / 2
            if top:
                self.line([(centre, top), (centre, y - 2)])
            if any(core.has_edge(node, scatter) for scatter in by_role["scatter"]):
                turn = y_scatter + BOX / 2
                self.line([(centre, y + BOX), (centre, turn), (first - 3, turn)], "flow blue dash")
            self.box(
                left, y, (SELECT, BOX), ["select", "which windows"], "ours", hover=layout.hover(side.graph, [node])
            )
        for role, y_box, style in ((SDPA, y_attention, "kept"), ("scatter", y_scatter, "ours")):
            for node in by_role[role]:
                lines = [role, str(graph.nodes[node].get("shape", ""))]
                self.box(first, y_box, (wide, BOX), lines, style, hover=layout.hover(graph, [node]))
                if any(core.has_edge(node, scatter) for scatter in by_role["scatter"]):
                    self.line([(first + wide / 2, y_box + BOX), (first + wide / 2, y_scatter - 2)], "flow blue")

    def height_of(self, row: Row, number: int) -> float:
        """A slot is as high as its higher side, so that both columns keep step."""
        high = 0.0
        for side, part in zip((self.left, self.right), row.members[0], strict=True):
            if part is not None and number < len(part.slots) and part.slots[number].nodes:
                high = max(high, CORE_HEIGHT if part.slots[number].call in side.calls else BOX)
        return high

    def row(self, row: Row) -> None:
        slots = max(len(part.slots) for part in row.members[0] if part is not None)
        heights = [BOX] if row.same_as is not None else [self.height_of(row, number) for number in range(slots)]
        start, y = self.y, self.y + (STEM if row.block else 0)
        tops = []
        for height in heights:
            tops.append(y)
            y += height + (GAP if height else 0)
        end = y - GAP + (STEM if row.block else 0)
        for side, part, final in zip((self.left, self.right), row.members[0], row.members[-1], strict=True):
            if part is None:
                continue
            stem = self.arrival(side, part, tops)
            if row.same_as is None:
                self.slots(side, row, part, tops, heights, stem)
            else:
                self.again(side, row, part, tops[0], stem)
            side.last = final
        if row.block:
            self.lane(row, start, end)
        if row.same_as is None:
            self.ribbons(row, tops, heights)
        self.y = end + ROW_GAP

    def arrival(self, side: _Side, part: Part, tops: Sequence[float]) -> float:
        """Where the value from above comes from: the last box's lower edge, or 0 if nothing leads here."""
        if side.last is None:
            fed = any(
                side.graph.nodes[p].get("kind") == "input" for n in part.nodes for p in side.graph.predecessors(n)
            )
        else:
            fed = layout.flows(side.graph, side.last.nodes, part.nodes)
        return side.leaving if fed and side.leaving else 0.0

    def slots(
        self, side: _Side, row: Row, part: Part, tops: Sequence[float], heights: Sequence[float], stem: float
    ) -> None:
        source = stem
        above: int | None = None
        bottoms: dict[int, float] = {-1: tops[0] - STEM / 2}
        for number, slot in enumerate(part.slots):
            if not slot.nodes:
                continue
            if above is not None:
                source = bottoms[above] if layout.flows(side.graph, part.slots[above].nodes, slot.nodes) else 0.0
            if slot.call >= 0:
                self.core(side, row, part, number, tops[number], heights[number], source)
                inset = CORE_PAD if slot.call in side.calls else (heights[number] - BOX) / 2
            else:
                if source:
                    x = self.exit_x(side, part, above)
                    self.line([(x, source), (x, tops[number] - 2)])
                self.run(side, part, number, tops[number])
                inset = (heights[number] - BOX) / 2 if heights[number] > BOX else 0.0
            above = number
            bottoms[number] = tops[number] + (heights[number] - inset if slot.call >= 0 else BOX)
        if above is not None:
            side.leaving = bottoms[above]
        for lane, (first, last) in enumerate(layout.skips(side.graph, part, side.last)[:2]):
            outward, edge = (-1, side.x) if side.dense else (1, side.x + side.width)
            x = edge + outward * (14 + 6 * lane)
            begin = (side.middle if stem else x, bottoms[-1]) if first < 0 else (edge, bottoms[first] - BOX / 2)
            goal = (edge + 2 * outward, tops[last] + BOX / 2)
            self.line([begin, (x, begin[1]), (x, goal[1]), goal])

    def exit_x(self, side: _Side, part: Part, above: int | None) -> float:
        """A rewritten call hands on its value below `scatter`, right of the column's middle."""
        if above is None or part.slots[above].call not in side.calls:
            return side.middle
        return side.x + CORE_PAD + SELECT + SPACE + (3 * self.gather + 2 * SPACE) / 2

    def again(self, side: _Side, row: Row, part: Part, y: float, stem: float) -> None:
        """One box for a block that equals one drawn further up."""
        assert row.same_as is not None
        calls = row.all_calls
        ours = any(call in side.calls for call in part.calls)
        style = "ours" if ours else "dense" if calls else "other"
        what = "Lighthouse attention" if ours else "dense attention"
        lines = [what, f"as in {block_label(self.rows[row.same_as].names)[1]}, drawn above"]
        hover, data = layout.hover(side.graph, part.nodes), f' data-calls="{spans(calls)}" data-ops="0"'
        if stem:
            self.line([(side.middle, stem), (side.middle, y - 2)])
        self.box(side.x, y, (side.width, BOX), lines, style, hover=hover, data=data)
        side.leaving = y + BOX

    def lane(self, row: Row, start: float, end: float) -> None:
        """The band behind a block; at its left the block's name, the bracket, and what became of its calls."""
        x = MARGIN + LABEL + BRACKET
        area = f'x="{x}" y="{start:g}" width="{self.width - MARGIN - x:g}" height="{end - start:g}"'
        self.back.insert(0, f'<rect {area} rx="14" class="band"/>')
        calls = row.all_calls
        parent, label = block_label(row.names)
        ours = len(self.rewritten.intersection(calls))
        pills = [(f"{ours} rewritten", "pill ours")] if ours else []
        if len(calls) > ours:
            pills.append((f"{len(calls) - ours} left dense", "pill dense"))
        many = len(row.members) > 1
        right = MARGIN + LABEL
        high = (62 if many else 40) + 30 * len(pills)
        y = (start + end) / 2 - high / 2 + 10
        self.text(right, y, fit(parent, 12, LABEL - 4), "muted", "end")
        self.text(right, y + 24, fit(label, 17, LABEL - 4), "block", "end")
        self.text(right, y + 46, f"× {len(row.members)}" if many else "", "times", "end")
        y += 58 if many else 36
        for content, style in pills:
            wide = width_of(content, 12) + 24
            area = f'x="{right - wide:g}" y="{y:g}" width="{wide:g}" height="24"'
            self.front.append(f'<g class="{style}"><rect {area} rx="12"/>')
            self.text(right - wide / 2, y + 16.5, content, "small", "middle")
            self.front.append("</g>")
            y += 30
        x0, x1 = right + 12, right + 20
        style = "bracket strong" if many else "bracket"
        self.line([(x1 + 4, start + 4), (x0, start + 4), (x0, end - 4), (x1 + 4, end - 4)], style, arrow=False)

    def ribbons(self, row: Row, tops: Sequence[float], heights: Sequence[float]) -> None:
        """From each attention call that was rewritten to what it became."""
        before, after = row.members[0]
        for number, slot in enumerate(before.slots if before and after else ()):
            if slot.call not in self.rewritten:
                continue
            x0, x1 = self.left.x + self.left.width, self.right.x
            y0 = tops[number] + (heights[number] - BOX) / 2
            y1, y2, mid = tops[number] + 12, tops[number] + heights[number] - 12, (x0 + x1) / 2
            self.back.append(
                f'<path class="ribbon" d="M{x0:g} {y0:g}C{mid:g} {y0:g} {mid:g} {y1:g} {x1:g} {y1:g}V{y2:g}'
                f'C{mid:g} {y2:g} {mid:g} {y0 + BOX:g} {x0:g} {y0 + BOX:g}Z"/>'
            )
            self.text(mid, y0 + BOX / 2 + 4, "rewritten", "ribbon-text", "middle")

    def ends(self, *, output: bool) -> None:
        first = [part for row in self.rows[:1] for part in row.members[0] if part and not part.slots[0].nodes]
        for side in (self.left, self.right):
            data = [(node, side.graph.nodes[node]) for node in layout.ordered(side.graph)]
            nodes = [node for node, d in data if (d.get("op") == "output" if output else d.get("kind") == "input")]
            if not nodes:
                continue
            label = "output" if output else "1 input" if len(nodes) == 1 else f"{len(nodes):,} inputs & parameters"
            # A call fed by the inputs themselves draws its q, k and v from all along the inputs' box.
            wide = side.width if first and not output else max(120.0, width_of(label, 13) + 48)
            if output and side.last is not None and layout.flows(side.graph, side.last.nodes, nodes):
                self.line([(side.middle, side.leaving), (side.middle, self.y - 2)])
            self.box(side.middle - wide / 2, self.y, (wide, 34), [label], "end", hover=layout.hover(side.graph, nodes))
            side.leaving = self.y + 34

    def head(self, title: str, subtitle: str) -> None:
        calls = layout.all_calls(self.left.graph) | layout.all_calls(self.right.graph)
        room = self.width - 2 * MARGIN
        self.text(MARGIN, 48, fit(title, 22, room), "title")
        said = f"{len(self.rewritten)} of {counted(len(calls), 'attention call')} rewritten" if calls else NO_CALLS
        self.text(MARGIN, 74, fit(" · ".join(text for text in (said, subtitle) if text), 14, room), "subtitle")
        x = float(MARGIN)
        for style, label in LEGEND:
            self.front.append(f'<g class="{style}"><rect x="{x:g}" y="95" width="18" height="18" rx="5"/></g>')
            self.text(x + 26, 108.5, label, "small muted")
            x += width_of(label, 12) + 26 + 26
        for side, name in ((self.left, "Before"), (self.right, "After")):
            self.text(side.middle, 158, name, "column", "middle")
            self.text(side.middle, 178, counted(side.graph.number_of_nodes(), "node"), "small muted", "middle")

    def draw(self, title: str, subtitle: str) -> str:
        self.head(title, subtitle)
        self.ends(output=False)
        self.y += 34 + ROW_GAP
        for row in self.rows:
            self.row(row)
        self.ends(output=True)
        height = self.y + 98
        note = "Arrows lead between neighbouring boxes and around attention; arrows of weights and across blocks are left out."
        self.text(MARGIN, height - 24, note, "small muted")
        size = 'refX="7" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"'
        tip = '<marker id="{0}-@ID@" {1}><path d="M0 0L8 4L0 8Z" class="head-{0}"/></marker>'
        markers = "".join(tip.format(name, size) for name in ("grey", "blue"))
        body = "\n".join([f"<defs>{markers}</defs>", *self.back, *self.front])
        # Several drawings may share one page, so their markers are named after their content.
        body = body.replace("@ID@", sha256(body.encode()).hexdigest()[:8])
        w, h = round(self.width), round(height)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="lfx" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
            f'role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
            f'<rect width="{w}" height="{h}" class="paper"/>\n{body}\n</svg>\n'
        )


def draw(before: Graph, after: Graph, *, title: str, subtitle: str = "") -> str:
    """An SVG of one graph: before the rewrite on the left, after it on the right."""
    return _Drawing(before, after).draw(title, subtitle)


def html(reports: Sequence[tuple[str, Graph, Graph]], table_html: str, *, title: str) -> str:
    """A page with `table_html` (markup, taken as it is) on top and one drawing for each (title, before, after)."""
    drawings = [draw(before, after, title=name) for name, before, after in reports]
    figures = "\n".join(f'<figure tabindex="0">\n{drawing}</figure>' for drawing in drawings)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(title)}</title>\n<style>{PAGE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<div class="table">\n{table_html}\n</div>\n{figures}\n</main>\n</body>\n</html>\n'
    )
