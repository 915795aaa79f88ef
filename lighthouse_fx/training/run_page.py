"""Shows a run's log: a table, a page of HTML with curves that needs no other file, scalars for TensorBoard."""

from __future__ import annotations

import html as markup
import io
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lighthouse_fx.extras import as_label, new_figure
from lighthouse_fx.report.text import or_dash, printable

from .loss_monitor import Reference
from .run_file import Event, RunData, StepLine

COLOURS = {"lighthouse": "#d95f02", "dense": "#1f5fa8"}
NOT_A_LIKELIHOOD = "a training loss under Lighthouse attention is no language-model likelihood: not to be compared with others"

_COLUMNS = ("stage", "steps", "N", "S", "tokens/s", "training loss", "dense validation loss", "attention FLOPs saved", "memory")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } td { border-bottom: 1px solid #ddd } svg { width: 100%; height: auto }
.warning td { color: #a33 } pre { background: #f5f5f5; padding: 1em; overflow-x: auto } .quiet { color: #666 }
"""


class Writer(Protocol):
    """What is needed of TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Note a number."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Note a text."""


def summary(run: RunData) -> RenderableType:
    """The run in a terminal: what it was, its stages, what happened."""
    table = Table(title=Text(_title(run)), title_justify="left", caption_justify="left")
    table.caption = Text("\n".join(_notes(run)))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in _rows(run):
        table.add_row(*map(Text, row))
    parts: list[RenderableType] = [table]
    if run.events:
        happened = Table(title="events", title_justify="left")
        for column in ("step", "event", "what"):
            happened.add_column(column)
        for event in run.events:
            happened.add_row(*map(Text, _cells(event)), style="yellow" if _is_alarming(event) else None)
        parts.append(happened)
    return Group(*parts)


def save_page(run: RunData, path: str | Path, *, reference: Reference | None = None) -> Path:
    """Write the run as one page of HTML; needs matplotlib, the extra `plot`.

    Args:
        reference: a dense run, whose losses are drawn beside this one's.

    Raises:
        ValueError: a path of another kind.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"path={str(path)!r}: a page is HTML, give a name that ends in .html")
    path.parent.mkdir(parents=True, exist_ok=True)
    events = [_cells(event) for event in run.events]
    marks = ["warning" if _is_alarming(event) else "" for event in run.events]
    sections = [
        f"<h1>{markup.escape(_title(run))}</h1>",
        _html_table(_COLUMNS, _rows(run)),
        *(f'<p class="quiet">{markup.escape(note)}</p>' for note in _notes(run)),
        curves(run, reference),
        "<h2>Events</h2>" + _html_table(("step", "event", "what"), events, marks) if events else "",
        "<h2>What was run</h2>",
        *(f"<pre>{markup.escape(json.dumps(header, indent=1))}</pre>" for header in run.headers),
    ]
    head = f"<meta charset='utf-8'><title>{markup.escape(_title(run))}</title><style>{_STYLE}</style>"
    path.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>", "utf-8")
    return path


def write_scalars(run: RunData, writer: Writer) -> None:
    """Give the run to TensorBoard: `torch.utils.tensorboard.SummaryWriter` (the extra `tensorboard`), or what is like it."""
    for step in run.steps:
        numbers = {
            f"loss/training_{step.stage}": step.loss,
            "speed/tokens_per_second": step.tokens_per_second,
            "attention/flops_saved": step.saved_flops,
            "attention/calls_rewritten": step.rewritten,
            "memory/peak_bytes": step.memory,
        }
        for tag, value in numbers.items():
            if value is not None:
                writer.add_scalar(tag, value, step.step)
    for at, loss in run.validation.items():
        writer.add_scalar("loss/validation_dense", loss, at)
    for event in run.events:
        _, name, text = _cells(event)
        writer.add_text(f"event/{name}", text, event.step or 0)


def curves(run: RunData, reference: Reference | None = None) -> str:
    """Losses by stage, speed and savings by step, as SVG."""
    figure = new_figure(11, 9)
    from matplotlib import rc_context

    loss, speed, saved = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    _draw_losses(loss, run, reference)
    for stage, steps in run.stages.items():
        known = [(s.step, s.tokens_per_second) for s in steps if s.tokens_per_second is not None]
        speed.plot(*_xy(known), ".", color=COLOURS[stage], markersize=3, alpha=0.35)
        values = _trailing([value for _, value in known], median)
        speed.plot([at for at, _ in known], values, color=COLOURS[stage], label=_attention(stage))
    # The steps that compile take many times as long: what is below them is what there is to see.
    if rates := [s.tokens_per_second for s in run.steps if s.tokens_per_second]:
        speed.set_ylim(0, 1.25 * max(_trailing(rates, median)))
    total = list(accumulate(step.saved_flops for step in run.steps))
    needed = list(accumulate(step.dense_flops for step in run.steps))
    unit, sign = _unit(max(needed, default=0))
    at = [step.step for step in run.steps]
    saved.plot(at, [n / unit for n in needed], color="0.6", linestyle="--", label="what dense attention needs")
    saved.fill_between(at, [n / unit for n in total], color=COLOURS["lighthouse"], alpha=0.3, linewidth=0)
    saved.plot(at, [n / unit for n in total], color=COLOURS["lighthouse"], label="of it saved")
    loss.set(ylabel="loss (nats per token)")
    speed.set(ylabel="tokens/s")
    saved.set(xlabel="step", ylabel=f"attention, {sign}FLOP so far")
    for axes in (loss, speed, saved):
        for event in run.named("switch"):
            if event.step is not None:
                axes.axvline(event.step, color="0.4", linestyle="--", linewidth=1)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    for event in run.named("warning"):
        if event.step is not None:
            loss.axvline(event.step, color="#a33", linewidth=1, alpha=0.5)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lighthouse"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    picture = text.getvalue()
    return picture[picture.index("<svg") :]


def _draw_losses(axes: Any, run: RunData, reference: Reference | None) -> None:
    for stage, steps in run.stages.items():
        known = [(s.step, s.loss) for s in steps if s.loss is not None]
        label = f"training, {_attention(stage)}" + (" (not a likelihood)" if stage == "lighthouse" else "")
        style = {"color": COLOURS[stage], "linestyle": ":" if stage == "lighthouse" else "-", "linewidth": 1}
        axes.plot([at for at, _ in known], _trailing([loss for _, loss in known], _mean), label=label, alpha=0.7, **style)
    if run.validation:
        axes.plot(*_xy(run.validation.items()), "o-", color="#222", markersize=4, label="validation, dense attention")
    if reference is not None:
        curve = reference.validation or reference.training
        label = f"dense reference {as_label(reference.name)}"
        axes.plot(*_xy(curve.items()), "s--", color="#2b8a3e", markersize=4, label=label)


# --- words and numbers ------------------------------------------------------------------------------------------------


def _title(run: RunData) -> str:
    header = run.headers[-1]
    size = f", {header['parameters']:,} parameters" if header.get("parameters") else ""
    return printable(f"{run.path.name}: {len(run.steps):,} steps{size}, {header.get('card') or 'unknown card'}")


def _cells(event: Event) -> tuple[str, str, str]:
    return or_dash(event.step), printable(event.name), printable(event.text)


def _is_alarming(event: Event) -> bool:
    return event.name in ("warning", "error")


def _rows(run: RunData) -> list[tuple[str, ...]]:
    """One row a stage, and their sum."""
    rows = [_row(name, steps, run) for name, steps in run.stages.items()]
    return rows if len(rows) < 2 else [*rows, _row("all", run.steps, run)]


def _row(name: str, steps: Sequence[StepLine], run: RunData) -> tuple[str, ...]:
    losses = [step.loss for step in steps if step.loss is not None]
    rates = [step.tokens_per_second for step in steps if step.tokens_per_second is not None]
    first, last = steps[0].step, steps[-1].step
    # A validation after n steps belongs to the stage of the step before it.
    held_out = [loss for at, loss in run.validation.items() if first < at <= last + 1]
    needed, spared = sum(step.dense_flops for step in steps), sum(step.saved_flops for step in steps)
    unit, sign = _unit(spared)
    whole = name == "all"
    memory = max((step.memory for step in steps if step.memory), default=None)
    return (
        name,
        f"{len(steps):,}",
        _largest(step.length for step in steps),
        _largest(step.gathered for step in steps),
        "-" if whole or not rates else f"{median(rates):,.0f}",
        "-" if whole or not losses else f"{_mean(losses[-10:]):.3f}" + ("*" if name == "lighthouse" else ""),
        f"{held_out[-1]:.3f}" if held_out else "-",
        f"{spared / unit:.3g} {sign}FLOP, {spared / needed:.1%}" if spared and needed else "-",
        "-" if memory is None else f"{memory / 1e9:.2f} GB",
    )


def _notes(run: RunData) -> list[str]:
    notes = ["tokens/s: median; training loss: mean of the last 10 steps; memory: peak so far"]
    if "lighthouse" in run.stages:
        notes.append(f"* {NOT_A_LIKELIHOOD}")
    if counted := run.headers[-1].get("flops_counted"):
        notes.append(f"FLOPs: {printable(counted)}")
    if uncounted := sum(step.uncounted for step in run.steps):
        notes.append(f"{uncounted:,} attention calls had dynamic shapes and are not counted in the FLOPs")
    if len(run.headers) > 1:
        notes.append(f"resumptions: {len(run.headers) - 1}; steps that were done again, and count once: {run.replaced:,}")
    if run.torn:
        notes.append(f"lines of the log that are not whole, as after a kill, and were left out: {run.torn}")
    return notes


def _attention(stage: str) -> str:
    return f"{'Lighthouse' if stage == 'lighthouse' else stage} attention"


def _trailing(values: Sequence[float], middle: Any) -> list[float]:
    """Each value among those before it, so that the trend shows."""
    width = max(1, len(values) // 32)
    return [middle(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def _mean(values: Sequence[float]) -> float:
    """NaN where infinities cancel, which `statistics.fmean` raises for."""
    return sum(values) / len(values)


def _xy(points: Iterable[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    points = list(points)
    return [x for x, _ in points], [y for _, y in points]


def _unit(largest: float) -> tuple[float, str]:
    return next(((10.0**n, sign) for n, sign in ((18, "E"), (15, "P"), (12, "T"), (9, "G")) if largest >= 10**n), (1e6, "M"))


def _largest(values: Iterable[int | None]) -> str:
    return or_dash(max((value for value in values if value is not None), default=None))


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{markup.escape(column)}</th>" for column in columns)
    body = "".join(
        f'<tr class="{marks[place] if marks else ""}">' + "".join(f"<td>{markup.escape(cell)}</td>" for cell in row) + "</tr>"
        for place, row in enumerate(rows)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
