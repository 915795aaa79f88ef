"""Draw `idea.svg`, the README's picture of the idea, from what the ops really select.

    python docs/idea.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch, Polygon, Rectangle

from lighthouse_fx.kernels import REVISION, Pyramid, select

PYRAMID = Pyramid(length=64, levels=3, pooling=4, topk=2)
COLOURS = ("#f2a541", "#5b8fd6", "#2f4b7c")  # by level, tokens first
ABSENT = "#e4e4e4"
HERE = Path(__file__).parent


def selection() -> list[tuple[int, int]]:
    """The entries `(level, index)` in order, for random queries and keys."""
    torch.manual_seed(19)
    q, k = torch.randn(2, 1, 1, PYRAMID.length, 8).unbind()
    entries, _ = select(q, k, k, 3, 4, 2, 0, True, True, "norm", 64, True, None, REVISION)  # causal selection
    found = []
    for number in entries.flatten().tolist():
        level = max(level for level in range(PYRAMID.levels) if number >= PYRAMID.offset(level))
        found.append((level, number - PYRAMID.offset(level)))
    return found


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A filled box with a hair of space beside it."""
    ax.add_patch(Rectangle((x + 0.06, y), width - 0.12, height, facecolor=colour, edgecolor="none"))


def say(ax: Axes, x: float, y: float, text: str, **style: object) -> None:
    """A label."""
    ax.text(x, y, text, va="center", fontsize=10.5, color="#222", **style)  # type: ignore[arg-type]


def sequence_panel(ax: Axes, entries: list[tuple[int, int]]) -> list[float]:
    """Tokens, pyramid, gathered entries and output, one below the other. Returns the middle of each entry."""
    n, p = PYRAMID.length, PYRAMID.pooling
    present = set(entries)
    rows = {2: 8.2, 1: 7.0, 0: 5.8}
    for level, y in rows.items():
        say(ax, -1, y + 0.4, f"means of {p**level}" if level else "tokens", ha="right")
        for i in range(PYRAMID.windows(level)):
            box(ax, i * p**level, y, p**level, 0.8, COLOURS[level] if (level, i) in present else ABSENT)
    say(ax, 0, 9.45, "1, 2   pool q, k and v; expand the highest-ranked windows (colour: an entry, grey: not gathered)")
    size = n / len(entries)
    middles = [(slot + 0.5) * size for slot in range(len(entries))]
    for (level, i), middle, slot in zip(entries, middles, range(len(entries)), strict=True):
        box(ax, slot * size, 3.2, size, 0.8, COLOURS[level])
        end = (i + 1) * p**level - 0.5
        ax.add_patch(ConnectionPatch((end, rows[level]), (middle, 4.0), "data", color=COLOURS[level], lw=0.8, alpha=0.6))
    say(ax, -1, 3.6, "entries", ha="right")
    say(ax, -1, 0.9, "output", ha="right")
    say(ax, 0, 2.65, f"3   gather the {len(entries)} entries in causal order and run causal attention on them")
    for token in range(n):
        box(ax, token, 0.5, 1, 0.8, "#9bbf85")
    for (level, i), middle in zip(entries, middles, strict=True):
        start = (i + 1) * p**level - 1
        stop = min(n, start + p**level)
        ax.add_patch(Polygon([(middle, 2.3), (start, 1.32), (stop, 1.32)], color=COLOURS[level], alpha=0.22, lw=0))
    say(ax, 0, -0.1, "4   add each entry's output to the tokens from its window's last token on")
    ax.set(xlim=(-9, n + 0.5), ylim=(-0.6, 9.9))
    ax.axis("off")
    return middles


def cost_panel(ax: Axes, gathered: int) -> None:
    """The dense triangle of attention weights, and the gathered one to the same scale."""
    n = PYRAMID.length
    ax.add_patch(Polygon([(0, n), (0, 0), (n, 0)], color=ABSENT))
    ax.add_patch(Polygon([(0, gathered), (0, 0), (gathered, 0)], color="#c0504d"))
    say(ax, 0, n + 9, "what attention computes", ha="left")
    say(ax, n * 0.42, n * 0.66, f"dense\n{n} x {n}", ha="left")
    say(ax, gathered * 1.1, gathered * 0.55, f"Lighthouse {gathered} x {gathered}", ha="left")
    ax.set(xlim=(-2, n + 2), ylim=(-5, n + 13), aspect="equal")
    ax.axis("off")


def main() -> Path:
    """Draw and save."""
    plt.rcParams |= {"svg.hashsalt": "idea", "svg.fonttype": "path"}
    entries = selection()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(3.2, 1))
    sequence_panel(left, entries)
    cost_panel(right, len(entries))
    figure.tight_layout()
    path = HERE / "idea.svg"
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    return path


if __name__ == "__main__":
    print(main())
