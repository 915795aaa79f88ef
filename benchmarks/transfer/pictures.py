"""Pictures of the runs: curves with the switch, far repeats by distance, loss by position beside dense.

PYTHONPATH=... python -m transfer.pictures RESULTS_FOLDER PICTURES_FOLDER
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from .results import Result, read

_COLOURS = {"dense": "#444444", "window": "#d1640f", "pyramid": "#1f6fb4"}
_NAMES = {
    "dense": "dense throughout",
    "window": "sliding window 512, then dense",
    "pyramid": "causal pyramid + local 512, then dense",
}
_DASHES = {"s0": "-", "s1": "--", "again": ":"}
_SEEDS = {"s0": "seed 0", "s1": "seed 1", "again": "seed 0 again"}


def main() -> None:
    """Draw all of them."""
    results = {name: result for name, result in read(Path(sys.argv[1])).items() if name.split("_")[0] in _COLOURS}
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    )
    _save(curves(results), out / "curves.png")
    _save(far_repeats(results), out / "far_repeats.png")
    _save(positions(results), out / "positions.png")


def curves(results: dict[str, Result]) -> Any:
    """Held-out loss by step: under the stage's own attention, and as a dense model."""
    figure, (left, right) = plt.subplots(2, 1, figsize=(8, 8.6))
    for name, result in results.items():
        colour, dash = _look(name)
        x = [record["step"] for record in result.steps]
        dense = [record["dense"]["loss"] for record in result.steps]
        own = [record.get("own", record["dense"])["loss"] for record in result.steps]
        left.plot(x, own, dash, color=colour, lw=1.6)
        if result.switch:
            stage = [i for i, step in enumerate(x) if step <= result.switch + 50]
            left.plot([x[i] for i in stage], [dense[i] for i in stage], dash, color=colour, lw=1.0, alpha=0.55)
        right.plot(x, own, dash, color=colour, lw=1.6)
    left.axvline(2400, color="#999999", lw=1)
    left.text(2420, 3.65, "switch", color="#666666", fontsize=11)
    left.text(830, 2.45, "stage 1 with the window,\nread as a dense model", color=_COLOURS["window"], fontsize=11)
    left.set(ylim=(0.45, 3.8), xlim=(0, 4000), ylabel="held-out loss, nats a byte")
    right.set(ylim=(0.52, 0.95), xlim=(0, 4000), xlabel="step", ylabel="held-out loss, nats a byte")
    right.axvline(2400, color="#999999", lw=1)
    left.set_title("bold: under the attention that is trained with; pale: as a dense model", fontsize=12)
    right.set_title("the lower end of it", fontsize=12)
    _legend(figure, results)
    return figure


def far_repeats(results: dict[str, Result]) -> Any:
    """Final loss on repeated bytes, by the distance of what they repeat."""
    figure, axes = plt.subplots(figsize=(8, 5.2))
    for name, result in results.items():
        colour, dash = _look(name)
        borders = result.final["distances"]
        labels = [f"{low // 1024}–{high // 1024}K" for low, high in pairwise(borders)]
        axes.plot(labels, result.final["far_by_distance"], dash, marker="o", color=colour, lw=1.6)
    first = max(result.final["dense"]["first"] for result in results.values())
    least = min(result.final["dense"]["first"] for result in results.values())
    axes.set(ylim=(0, None), xlabel="distance of the repeat, bytes", ylabel="final loss on repeats (nats a byte)")
    axes.set_title(f"the same bytes where they stand first: {least:.2f} to {first:.2f}", fontsize=12)
    _legend(figure, results)
    return figure


def positions(results: dict[str, Result]) -> Any:
    """Final loss by position in a row of plain text, less that of dense with the same seed."""
    figure, axes = plt.subplots(figsize=(8, 5.2))
    for name, result in results.items():
        if name in ("dense_s0", "dense_s1"):
            continue
        colour, dash = _look(name)
        base = results["dense_s1" if name.endswith("_s1") else "dense_s0"].final["position_plain"]
        difference = [a - b for a, b in zip(result.final["position_plain"], base, strict=True)]
        axes.plot([i + 0.5 for i in range(len(base))], difference, dash, marker="o", ms=4, color=colour, lw=1.6)
    axes.axhline(0, color="#444444", lw=1)
    axes.set(xlim=(0, 16), xlabel="position in the row, 1,024 bytes", ylabel="final loss less dense, same seed")
    _legend(figure, {name: result for name, result in results.items() if name not in ("dense_s0", "dense_s1")})
    return figure


def _look(name: str) -> tuple[str, str]:
    kind, seed = name.split("_", 1)
    return _COLOURS[kind], _DASHES["again" if "again" in seed else seed]


def _legend(figure: Any, results: dict[str, Result]) -> None:
    """Colours for recipes, dashes for seeds, above the picture."""
    kinds = sorted({name.split("_")[0] for name in results}, key=list(_COLOURS).index)
    seeds = ["again" if "again" in name else name.split("_")[1] for name in results]
    handles = [Line2D([], [], color=_COLOURS[kind], lw=3, label=_NAMES[kind]) for kind in kinds]
    handles += [
        Line2D([], [], color="#444444", ls=dash, label=_SEEDS[seed])
        for seed, dash in _DASHES.items() if seed in seeds
    ]  # fmt: skip
    figure.legend(handles=handles, loc="upper center", ncols=2, frameon=False, fontsize=11)
    height = figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.85 / height))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
