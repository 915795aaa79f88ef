"""What `tune` found as a table, as JSON and as a picture: time against the share of the sequence that is kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lighthouse_fx.extras import new_figure, save_figure
from lighthouse_fx.report.text import as_text

from .candidates import Candidate
from .tune import Tuning

_WIDTH = 110
_SHOWN = 2.0  # times the limit


def table(tuning: Tuning) -> Group:
    """One row per candidate that was measured or may be fast enough, the recommended one marked; then the reason."""
    shape = tuning.shape
    result = Table(
        title=f"{shape.length:,} tokens, {shape.heads}/{shape.groups} heads of {shape.dim}, {shape.dtype}, {tuning.card.name}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    result.add_column("pyramid")
    for column in ("S", "kept", "predicted", "measured", "of dense", "memory"):
        result.add_column(column, justify="right")
    result.add_column("change of the start")
    shown = [c for c in tuning.candidates if c.measured or c.failure or c.milliseconds <= _SHOWN * tuning.share * tuning.dense]
    for candidate in shown or tuning.candidates:
        recommended = candidate is tuning.recommended
        result.add_row(
            candidate.label,
            f"{candidate.gathered:,}",
            f"{candidate.kept:.1%}",
            _time(candidate.predicted.milliseconds),
            _time(candidate.measured.milliseconds) if candidate.measured else "-",
            f"{candidate.milliseconds / tuning.dense:.1%}",
            f"{candidate.memory / 1e6:,.0f} MB",
            "recommended" if recommended else candidate.failure or candidate.change,
            style="bold" if recommended else "" if candidate.measured or tuning.correction == 1 else "dim",
        )
    source = "measured" if tuning.dense_measured else "predicted"
    lines = [f"Dense attention, {source}: {_time(tuning.dense)}. Times are forward plus backward of one layer."]
    if shown and len(shown) < len(tuning.candidates):
        lines.append(f"{len(tuning.candidates) - len(shown)} more, which keep more and take longer, are not shown.")
    if tuning.correction != 1:
        lines.append(
            f"What was not measured is predicted: {tuning.correction:.3g} times the cost model's, as those measured took."
        )
    if tuning.stopped:
        lines.append(f"{tuning.stopped}.")
    if tuning.recommended:
        lines.append(f"{tuning.recommended.config_text}: {tuning.reason}.")
    else:
        lines.append(f"Stay dense: {tuning.reason}. {tuning.remedy[:1].upper()}{tuning.remedy[1:]}.")
    return Group(result, *(Text(line) for line in lines))


def text(tuning: Tuning) -> str:
    """The table as plain text."""
    return as_text(table(tuning), width=_WIDTH)


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:,.1f} s" if milliseconds >= 10_000 else f"{milliseconds:.2f} ms"


def save_json(tuning: Tuning, path: str | Path) -> Path:
    """Write all figures. A file that is there is replaced by a whole one, so that an interruption leaves no half of one."""
    path = Path(path)
    best = tuning.recommended

    def row(candidate: Candidate) -> dict[str, Any]:
        config = candidate.config
        return {
            "levels": config.levels,
            "pooling": config.pooling,
            "topk": config.topk,
            "change": candidate.change,
            "gathered": candidate.gathered,
            "kept": candidate.kept,
            "predicted": asdict(candidate.predicted),
            "measured": asdict(candidate.measured) if candidate.measured else None,
            "failure": candidate.failure,
        }

    found = {
        "shape": asdict(tuning.shape),
        "card": asdict(tuning.card),
        "dense": tuning.dense,
        "dense_measured": tuning.dense_measured,
        "share": tuning.share,
        "memory": tuning.memory,
        "correction": tuning.correction,
        "recommended": row(best) if best else None,
        "reason": tuning.reason,
        "remedy": tuning.remedy,
        "stopped": tuning.stopped,
        "candidates": [row(candidate) for candidate in tuning.candidates],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def save_picture(tuning: Tuning, path: str | Path) -> Path:
    """Draw the candidates, dense attention and the limit as lines; needs matplotlib, the extra `plot`."""
    figure = new_figure(10, 6)
    axis = figure.subplots()
    axis.axhline(tuning.dense, color="#888888", label="dense attention")
    axis.axhline(tuning.share * tuning.dense, color="#888888", linestyle=":", label=f"{tuning.share:.0%} of it, the limit")
    for colour, name, some in (
        ("#adb5bd", "predicted", [c for c in tuning.candidates if not c.measured]),
        ("#1971c2", "measured", [c for c in tuning.candidates if c.measured]),
    ):
        if some:
            axis.plot([100 * c.kept for c in some], [c.milliseconds for c in some], "o", color=colour, label=name, zorder=3)
    if best := tuning.recommended:
        axis.plot(
            100 * best.kept, best.milliseconds, "o", color="#d9480f", markersize=13, fillstyle="none", markeredgewidth=2,
            label="recommended", zorder=4,
        )  # fmt: skip
    for place, candidate in enumerate(_named(tuning)):
        left = place % 2 == 0  # the points rise to the right: above them to the left and below to the right is room
        axis.annotate(
            candidate.label, (100 * candidate.kept, candidate.milliseconds), xytext=(-9, 4) if left else (9, -10),
            textcoords="offset points", ha="right" if left else "left", fontsize=8,
            weight="bold" if candidate is best else "normal",
        )  # fmt: skip
    axis.set(yscale="log", xlabel="kept, S/N, %", ylabel="forward plus backward of one layer, ms")
    shape = tuning.shape
    heads = f"{shape.heads}/{shape.groups} heads of {shape.dim}"
    axis.set_title(f"{shape.length:,} tokens, {heads}, {tuning.card.name}", loc="left")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12, y=0.08)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


def _named(tuning: Tuning) -> list[Candidate]:
    """The candidates that the picture names: the recommended one, those measured, and others where there is room."""
    first = [c for c in tuning.candidates if c is tuning.recommended]
    measured = [c for c in tuning.candidates if c.measured]
    named: list[Candidate] = []
    for candidate in (*first, *measured, *tuning.candidates):
        if all(abs(candidate.kept - other.kept) > 0.02 for other in named):
            named.append(candidate)
    return sorted(named, key=lambda c: c.kept)
