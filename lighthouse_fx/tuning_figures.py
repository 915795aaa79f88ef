"""What `tune` found as a table and as a picture: time against the share of the sequence that is kept."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .tuning import Candidate, Tuning, label

_WIDTH = 110


def table(tuning: Tuning) -> Group:
    """One row per candidate that was tried (or, if none was, predicted), the recommended one marked; then the reason."""
    shape = tuning.shape
    result = Table(
        title=f"{shape.length:,} tokens, {shape.heads}/{shape.groups} heads of {shape.dim}, {shape.dtype}, {tuning.card.name}",
        title_justify="left",
    )
    for column in ("levels", "pooling", "k", "S", "kept", "ms predicted", "ms measured", "of dense", "memory", ""):
        result.add_column(column, justify="left" if not column else "right")
    tried = [c for c in tuning.candidates if c.measured or c.failure]
    for candidate in tried or tuning.candidates:
        recommended = candidate is tuning.recommended
        result.add_row(
            str(candidate.config.levels),
            str(candidate.config.pooling),
            f"{candidate.config.topk:,}",
            f"{candidate.gathered:,}",
            f"{candidate.kept:.1%}",
            f"{candidate.predicted.milliseconds:.3f}",
            f"{candidate.measured.layer[1]:.3f}" if candidate.measured else "-",
            f"{candidate.milliseconds / tuning.dense:.1%}",
            f"{candidate.memory / 1e6:,.0f} MB",
            "recommended" if recommended else candidate.failure,
            style="bold" if recommended else "",
        )
    source = "measured" if tuning.dense_measured else "predicted"
    lines = [f"Dense attention, {source}: {tuning.dense:.3f} ms. Times are forward plus backward of one layer."]
    if tuning.recommended:
        config = tuning.recommended.config
        named = f"LighthouseConfig(levels={config.levels}, pooling={config.pooling}, topk={config.topk})"
        lines.append(f"{named}: {tuning.reason}.")
    else:
        lines.append(f"Stay dense: {tuning.reason}. {tuning.remedy[:1].upper()}{tuning.remedy[1:]}.")
    return Group(result, *(Text(line) for line in lines))


def text(tuning: Tuning) -> str:
    """The table as plain text."""
    console = Console(width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table(tuning))
    return captured.get()


def save_picture(tuning: Tuning, path: str | Path) -> Path:
    """Draw the candidates, dense attention and the limit as lines; needs matplotlib, the extra `plot`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'lighthouse-fx[plot]'") from error

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(path)
    figure, axis = pyplot.subplots(figsize=(10, 6))
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
            label(candidate), (100 * candidate.kept, candidate.milliseconds), xytext=(-9, 4) if left else (9, -10),
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _named(tuning: Tuning) -> list[Candidate]:
    """The candidates that the picture names: the recommended one, those measured, and others where there is room."""
    first = [c for c in tuning.candidates if c is tuning.recommended]
    measured = [c for c in tuning.candidates if c.measured]
    named: list[Candidate] = []
    for candidate in (*first, *measured, *tuning.candidates):
        if all(abs(candidate.kept - other.kept) > 0.02 for other in named):
            named.append(candidate)
    return sorted(named, key=lambda c: c.kept)
