"""A profile as a table, dense beside Lighthouse, and as a picture of two stacked bars."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lighthouse_fx.extras import new_figure, save_figure
from lighthouse_fx.report.text import as_text

from .kernel_names import PARTS
from .profile import Part, Profile, Run

_WIDTH = 130
_ROWS = (*PARTS, "no kernel")
# A backward has its forward's colour, lighter.
_COLOURS = {
    "selection": "#2b8a3e",
    "gather": "#1971c2",
    "gather backward": "#74b4e8",
    "attention on S": "#d9480f",
    "attention on S backward": "#f4a27c",
    "scatter": "#7048c8",
    "scatter backward": "#b7a0e8",
    "dense attention": "#e0a100",
    "dense attention backward": "#f6d778",
    "rest": "#868e96",
    "no kernel": "#dee2e6",
}


def table(profile: Profile) -> Group:
    """One row per part: milliseconds and share of the step before and after, calls, and rates against the card's peak."""
    result = Table(title=f"milliseconds of a step, {profile.card.name}", title_justify="left")
    result.add_column("part")
    for column in ("dense", "of step", "Lighthouse", "of step", "calls", "TFLOP/s", "of peak", "TB/s", "of a copy"):
        result.add_column(column, justify="right")
    before, after = ({part.name: part for part in run.parts} for run in (profile.dense, profile.lighthouse))
    for name in _ROWS:
        if name in before or name in after:
            part = after.get(name) or before[name]
            result.add_row(
                name,
                *_time(before.get(name), profile.dense),
                *_time(after.get(name), profile.lighthouse),
                f"{part.calls:g}" if part.calls and name != "rest" else "-",
                *_rate(part.operations, part.milliseconds, profile.card.matmul),
                *_rate(part.moved, part.milliseconds, profile.card.bandwidth),
            )
    result.add_section()
    dense, lighthouse = profile.dense.milliseconds, profile.lighthouse.milliseconds
    result.add_row("step", f"{dense:.3f}", "", f"{lighthouse:.3f}", "", *[""] * 5, style="bold")
    lines = [
        f"{dense / lighthouse:.2f} times the speed of the dense step. Calls and rates are those of the Lighthouse step; "
        "of a part that it lacks, the dense step's.",
        f"Peaks: {profile.card.matmul / 1e12:.3g} TFLOP/s, {profile.card.bandwidth / 1e12:.3g} TB/s. "
        "Operations and bytes are the least that had to be done.",
    ]
    lines += [f"{run.name}: {note}." for run in (profile.dense, profile.lighthouse) for note in run.notes]
    return Group(result, *(Text(line) for line in lines))


def text(profile: Profile) -> str:
    """The table as plain text."""
    return as_text(table(profile), width=_WIDTH)


def save_picture(profile: Profile, path: str | Path) -> Path:
    """Draw the steps as bars of their parts; needs matplotlib, the extra `plot`."""
    runs = (profile.lighthouse, profile.dense)  # the first is drawn at the bottom
    figure = new_figure(12, 3.8)
    axis = figure.subplots()
    left = [0.0] * len(runs)
    longest = max(run.milliseconds for run in runs)
    for name in _ROWS:
        widths = [sum(part.milliseconds for part in run.parts if part.name == name) for run in runs]
        if not any(widths):
            continue
        axis.barh([run.name for run in runs], widths, left=left, color=_COLOURS[name], label=name, height=0.55)
        for place, width in enumerate(widths):
            if width > 0.05 * longest:
                axis.text(left[place] + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=9)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, run in enumerate(runs):
        axis.text(left[place] + 0.01 * longest, place, f"{run.milliseconds:.3g} ms", va="center", weight="bold")
    axis.set_xlim(0, 1.12 * max(left))
    axis.set_xlabel("milliseconds of a step")
    axis.set_title(f"Where a step's time goes, {profile.card.name}", loc="left")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=6, fontsize=9)
    return save_figure(figure, path)


def _time(part: Part | None, run: Run) -> tuple[str, str]:
    if part is None:
        return "-", "-"
    return f"{part.milliseconds:.3f}", f"{part.milliseconds / run.milliseconds:.1%}"


def _rate(amount: float | None, milliseconds: float, peak: float) -> tuple[str, str]:
    """A rate in units of 10^12 a second, and its share of the peak."""
    if not amount:
        return "-", "-"
    rate = amount / (milliseconds / 1000)
    return f"{rate / 1e12:.3g}", f"{rate / peak:.0%}"
