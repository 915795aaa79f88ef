"""What became of each attention call, as data: records, graphs, a table, pictures and JSON."""

from __future__ import annotations

import html as markup
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import fx

from lighthouse_fx.kernels.ops.dispatch import serving
from lighthouse_fx.passes import AttentionCall
from lighthouse_fx.passes.attention_call import fake
from lighthouse_fx.passes.ir.subgraphs import Region, regions
from lighthouse_fx.passes.match.sdpa import is_attention, module_path
from lighthouse_fx.passes.rewrite.lighthouse import REWRITTEN_FROM

from . import picture
from .text import as_text, or_dash

Shape = tuple[int | str, ...]

_COLUMNS = ("module", "source", "query", "kv heads", "causal", "N", "S", "dense FLOPs", "ops", "scores", "rewritten")
_NOTHING_TRACED = "nothing was traced: no tensor operation ran where torch.compile could see it"
_NO_ATTENTION = (
    "no attention call was found: the model has to call torch.nn.functional.scaled_dot_product_attention "
    "(in transformers, attn_implementation='sdpa'), or to write softmax(q k^T) v out in a way that is recognised"
)


class NotRewritten(RuntimeError):
    """Attention that was to run rewritten did not; its words say why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRecord:
    """One attention call of a traced model.

    Attributes:
        module: path of the module that calls it, "" outside any; source: `file:line` in the user's code.
        query, key, value: shapes `[B, H, N, D]`, symbolic sizes as text; dtype: of the query.
        is_causal: as computed, so true where a mask was proved to be causal, or is assumed to be.
        length: N; gathered: S, None where the call was refused before S was known.
        flops_share: the gathered attention's floating-point operations over the dense one's, `(S/N)^2`, and those of the local
            branch; local_window: its tokens, 0 where there is none.
        ops: what serves the ops of a rewritten call on its device, "Triton" or "plain PyTorch"; "" where it is dense.
        scorer: what ranks the windows of a rewritten call, "" where it is dense; scored: what it reads, or why it is not the
            configuration's, "" where it reads query and key as they are.
        assumed: whether it is rewritten because its mask is assumed to be causal (`assume_causal`), and checked in every step.
        inside_documents: whether it stays inside documents: those of `documents(...)`, rewritten or dense, or the model's own.
        rewritten: whether it runs as Lighthouse attention; reason: why it does not; remedy: what would change that.
    """

    module: str
    source: str
    query: Shape
    key: Shape
    value: Shape
    dtype: str
    is_causal: bool
    length: int | str | None
    gathered: int | str | None
    flops_share: float | None
    rewritten: bool
    reason: str
    remedy: str
    ops: str = ""
    scorer: str = ""
    scored: str = ""
    assumed: bool = False
    inside_documents: bool = False
    local_window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GraphReport:
    """One compiled graph: its attention calls, and the graph before and after the passes."""

    calls: tuple[AttentionRecord, ...]
    before: nx.DiGraph
    after: nx.DiGraph

    @property
    def rewritten(self) -> int:
        """How many calls were rewritten."""
        return sum(call.rewritten for call in self.calls)

    def summary(self) -> str:
        """One line for a log."""
        reasons = dict.fromkeys(
            f"{call.module or 'a call'}: {call.reason}" for call in self.calls if not call.rewritten
        )
        left = f"; left dense: {'; '.join(reasons)}" if reasons else ""
        assumed = sum(call.assumed for call in self.calls)
        checked = f" ({assumed} with an attn_mask assumed to be causal, checked in every step)" if assumed else ""
        return f"{self.rewritten} of {len(self.calls)} attention calls rewritten{checked}{left}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """All graphs of a model. `print(report)` shows the table; `notes` say what a reader of it has to know besides."""

    graphs: tuple[GraphReport, ...]
    title: str = "lighthouse"
    notes: tuple[str, ...] = ()

    @property
    def calls(self) -> tuple[AttentionRecord, ...]:
        """The attention calls of all graphs, in order."""
        return tuple(call for graph in self.graphs for call in graph.calls)

    @property
    def rewritten(self) -> int:
        """How many calls were rewritten."""
        return sum(graph.rewritten for graph in self.graphs)

    def table(self) -> Table:
        """The calls as a rich table."""
        title = f"{self.title}: {self.rewritten} of {len(self.calls)} attention calls rewritten"
        # Text, because brackets in a plain string are markup to rich: the shape [s77, 4, 64] would be lost.
        table = Table(title=Text(title), title_justify="left", caption_justify="left")
        table.caption = Text("\n".join(f"note: {note}" for note in self.notes)) if self.notes else None
        columns, rows = self._cells()
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row), style=None if row[-1] == "yes" else "yellow")
        return table

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Columns and rows of the table. Ops and scores are told where there are any; a table without calls says so."""
        if not self.calls:
            reason = _NO_ATTENTION if self.graphs else _NOTHING_TRACED
            return ("module", "rewritten"), [("-", f"no: {reason}")]
        told = {"ops": self.rewritten, "scores": any(call.scored for call in self.calls)}
        shown = [n for n, column in enumerate(_COLUMNS) if told.get(column, True)]
        return [_COLUMNS[n] for n in shown], [[row[n] for n in shown] for row in map(_row, self.calls)]

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        (console or Console()).print(self.table())

    def __str__(self) -> str:
        return as_text(self.table(), width=180)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: calls and graphs (networkx node-link form)."""
        return {
            "title": self.title,
            "notes": list(self.notes),
            "rewritten": self.rewritten,
            "calls": [asdict(call) for call in self.calls],
            "graphs": [
                {
                    name: nx.node_link_data(graph, edges="edges")
                    for name, graph in (("before", g.before), ("after", g.after))
                }
                for g in self.graphs
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Save a picture of the graphs before and after, or the data.

        Args:
            path: `.svg`: the graph with the most rewritten calls; `.html`: the table and all graphs; `.json`: `to_dict()`.
                Each is one file that needs no other. Missing folders are made.

        Raises:
            ValueError: for another suffix, or where nothing was traced.
        """
        path = Path(path)
        writers: dict[str, Callable[[], str]] = {
            ".svg": self._svg,
            ".html": self._html,
            ".json": lambda: json.dumps(self.to_dict(), indent=1),
        }
        if path.suffix not in writers:
            raise ValueError(f"path={str(path)!r} ends in {path.suffix!r}: use one of {', '.join(writers)}")
        if not self.graphs:
            raise ValueError("this report has no graph: nothing was traced, so there is nothing to save")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(writers[path.suffix](), encoding="utf-8")
        return path

    def _titles(self) -> Sequence[str]:
        count = len(self.graphs)
        return [self.title if count == 1 else f"{self.title}, graph {n} of {count}" for n in range(1, count + 1)]

    def _svg(self) -> str:
        title, best = max(
            zip(self._titles(), self.graphs, strict=True), key=lambda pair: (pair[1].rewritten, len(pair[1].calls))
        )
        # The picture counts; what precedes a colon is the kind of reason, and the details are the table's.
        reasons = dict.fromkeys(call.reason.partition(":")[0] for call in best.calls if not call.rewritten)
        subtitle = f"left dense: {'; '.join(reasons)}" if reasons else ""
        return picture.draw(best.before, best.after, title=title, subtitle=subtitle)

    def _html(self) -> str:
        pages = [(title, g.before, g.after) for title, g in zip(self._titles(), self.graphs, strict=True)]
        columns, rows = self._cells()
        head = "".join(f"<th>{markup.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        notes = "".join(f"<p>Note: {markup.escape(note)}</p>" for note in self.notes)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"
        return picture.html(pages, table, title=self.title)


def _row(call: AttentionRecord) -> tuple[str, ...]:
    """One call's cells, in the order of `_COLUMNS`."""
    kept = ", kept inside documents" if call.inside_documents else ""
    local = f", local window of {call.local_window:,}" if call.local_window else ""
    outcome = f"yes{local}" if call.rewritten else f"no{kept}: {call.reason}" + (f" ({call.remedy})" if call.remedy else "")
    return (
        call.module or "-",
        _short_source(call.source),
        f"{_show(call.query)} {call.dtype}".rstrip(),
        str(call.key[1]) if len(call.key) == 4 else "-",
        "assumed" if call.assumed else "yes" if call.is_causal else "no",
        or_dash(call.length),
        or_dash(call.gathered),
        "-" if call.flops_share is None or not call.rewritten else f"{call.flops_share:.1%}",
        call.ops or "-",
        ": ".join(filter(None, (call.scorer, call.scored))) or "-",
        outcome,
    )


# --- from a graph -----------------------------------------------------------------------------------------------------


def record(call: AttentionCall) -> AttentionRecord:
    """What a user may know of a call after the passes."""
    query, key, value = (fake(x) for x in (call.query, call.key, call.value))
    length = query.shape[2] if query is not None and query.dim() == 4 else None
    gathered = call.gathered
    share = None
    if isinstance(gathered, int) and isinstance(length, int) and length:
        share = (gathered / length) ** 2 + (1 - (1 - min(call.local_window, length) / length) ** 2)
    ranks = call.refusal is None and not (isinstance(gathered, int) and gathered == 0)
    return AttentionRecord(
        module=call.module,
        source=call.source,
        query=_shape(query),
        key=_shape(key),
        value=_shape(value),
        dtype=str(query.dtype).removeprefix("torch.") if query is not None else "",
        is_causal=call.is_causal is True and (call.replaced or call.unproved is None),
        length=_size(length),
        gathered=_size(gathered),
        flops_share=share,
        rewritten=call.refusal is None,
        reason=call.refusal.reason if call.refusal else "",
        remedy=call.refusal.remedy if call.refusal else "",
        scorer=call.scorer if ranks else "",
        scored=call.scored if ranks else "",
        local_window=call.local_window if call.refusal is None else 0,
        ops=serving(query.device) if query is not None and call.refusal is None else "",
        assumed=call.replaced and call.unproved is not None,
        inside_documents=call.documents is not None or call.own_documents,
    )


def as_networkx(gm: fx.GraphModule, calls: Sequence[AttentionCall] = ()) -> nx.DiGraph:
    """A graph and its subgraphs as one networkx graph; edges are data flow.

    Nodes have `op`, `target`, `module`, `shape`, `kind` ("input", "attention", "lighthouse" or "other"), `order` and
    `call`, the index of the attention call that a node belongs to, or -1.
    """
    graph = nx.DiGraph()
    index = {call.node: position for position, call in enumerate(calls)}
    for region in regions(gm):
        prefix = _prefix(region)
        for node in region.gm.graph.nodes:
            if node.op in ("output", "get_attr"):
                continue
            call = index.get(node, node.meta.get(REWRITTEN_FROM, -1))
            tensor = fake(node)
            graph.add_node(
                prefix + node.name,
                op=node.op,
                target=_target(node),
                module=module_path(node),
                shape="" if tensor is None else f"[{', '.join(map(str, tensor.shape))}]",
                kind=_kind(node, call, dense=node in index),
                order=graph.number_of_nodes(),
                call=call,
            )
            for source in node.all_input_nodes:
                if prefix + source.name in graph:
                    graph.add_edge(prefix + source.name, prefix + node.name)
            if node.op == "placeholder":
                for outer, operand in region.operands(node):
                    name = _prefix(outer) + getattr(operand, "name", "")
                    if name in graph:
                        graph.add_edge(name, prefix + node.name)
    return graph


def mark_calls(graph: nx.DiGraph, calls: Sequence[AttentionCall]) -> nx.DiGraph:
    """Write into a graph made before the passes which node is which attention call: only they number the calls."""
    for index, call in enumerate(calls):
        graph.nodes[_prefix(call.region) + call.node.name].update(call=index, kind="attention")
    return graph


def _prefix(region: Region) -> str:
    return f"{region.name}/" if region.name else ""


def _kind(node: fx.Node, call: int, *, dense: bool) -> str:
    if node.op == "placeholder":
        return "input"
    if (dense or is_attention(node)) and not _gathers(node):
        return "attention"
    return "lighthouse" if call >= 0 else "other"


def _gathers(node: fx.Node) -> bool:
    return any("lighthouse_fx" in str(source.target) for source in node.all_input_nodes)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
    return f"lighthouse_fx.{name}" if "lighthouse_fx" in str(node.target) else name


def _shape(tensor: Any) -> Shape:
    return () if tensor is None else tuple(_size(size) for size in tensor.shape)  # type: ignore[misc]


def _size(size: Any) -> int | str | None:
    return size if size is None or isinstance(size, int) else str(size)


def _show(shape: Shape) -> str:
    return "-" if not shape else f"[{', '.join(map(str, shape))}]"


def _short_source(source: str) -> str:
    path, _, line = source.rpartition(":")
    return f"{Path(path).name}:{line}" if path else "-"
