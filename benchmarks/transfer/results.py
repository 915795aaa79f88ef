"""What came of the runs: read from their records, compared window by window, and what a recipe's speed would be.

PYTHONPATH=... python -m transfer.results RESULTS_FOLDER        prints the tables
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighthouse_fx.measure.cost import H100, predict, predict_dense
from lighthouse_fx.measure.layer import LayerShape
from lighthouse_fx.passes.config import LighthouseConfig

_LEARNT = 0.2  # nats that a repeat is predicted better than the same bytes where they stand first
_WINDOW_MS = (
    3.7  # torch's FlashAttention 2, width 512, 98,304 tokens, 8 heads of 128, forward + backward, H100, measured
)
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 5: 2.015, 7: 1.895}  # one-sided, by degrees of freedom


@dataclass(frozen=True)
class Result:
    """The records of a run that came to its end."""

    name: str
    run: dict[str, Any]
    steps: list[dict[str, Any]]
    leak: dict[str, Any] | None
    final: dict[str, Any]

    def at(self, step: int) -> dict[str, Any] | None:
        """What was recorded at a step, if anything."""
        return next((record for record in self.steps if record["step"] == step), None)

    @property
    def switch(self) -> int:
        """The first dense step; 0: dense throughout."""
        return round(self.run["share"] * self.run["steps"]) if self.run["forms"] else 0

    @property
    def learnt_to_copy(self) -> int:
        """The first look at which far repeats are predicted much better than originals, under the attention of the time."""
        for record in self.steps:
            seen = record.get("own", record["dense"])
            if seen["first"] - seen["far"] > _LEARNT:
                return int(record["step"])
        return 0


def read(folder: Path) -> dict[str, Result]:
    """All runs of a folder that have a final record."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if records[-1]["record"] != "final" or "windows" not in records[-1]:
            continue
        steps = [record for record in records if record["record"] == "step"]
        leak = next((record for record in records if record["record"] == "leak"), None)
        found[path.stem] = Result(path.stem, records[0]["run"], steps, leak, records[-1])
    return found


def paired(a: Result, b: Result, part: str = "windows") -> tuple[float, float]:
    """Mean over held-out windows of `a` less `b`, and its standard error: of the evaluation alone, not of training."""
    differences = [x - y for x, y in zip(a.final[part], b.final[part], strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def least(deviation: float, pairs: int) -> float:
    """How far below 0 a mean of so many paired differences must lie for its one-sided 95% bound to be 0."""
    return float(_T95[pairs - 1] * deviation / pairs**0.5)


def table(results: dict[str, Result]) -> list[str]:
    """A row for each run."""
    lines = [
        "| run | final loss | plain text | mixed text | far repeats | learnt to copy by step | dense loss at the switch "
        "(own) | 50 / 100 dense steps later | leak | seconds of the stages, trial code |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        dense = result.final["dense"]
        cells = [f"{dense[part]:.3f}" for part in ("loss", "plain", "mixed", "far")] + [f"{result.learnt_to_copy:,}"]
        if result.switch:
            before = result.at(result.switch)
            later = [result.at(result.switch + after) for after in (50, 100)]
            assert result.leak is not None and before is not None
            cells += [
                f"{before['dense']['loss']:.3f} ({before['own']['loss']:.3f})",
                " / ".join(f"{record['dense']['loss']:.3f}" if record else "-" for record in later),
                f"{result.leak['leak']:.4f} ± {result.leak['error']:.4f}",
            ]
        else:
            cells += ["", "", ""]
        cells.append(f"{result.final['seconds1']:.0f} + {result.final['seconds2']:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


@dataclass(frozen=True)
class Whole:
    """A model of which a step's time is put together: its layers' attention and all else, milliseconds."""

    name: str
    layers: int
    heads: int
    dense_layers: int
    rest_of_token: float  # milliseconds of all that is not attention, a token
    passes: float = 1.0  # of a layer's forward and backward: 4.5 / 3.5 where the forward is computed twice

    def step(self, length: int, share: float | None, local: int, dense_layers: int | None = None) -> float:
        """A step of one row: `share` of the tokens gathered (None: no pyramid), beside a local branch."""
        edge = self.dense_layers if dense_layers is None else dense_layers
        shape = LayerShape(length=length, heads=self.heads, groups=self.heads, dim=128, dtype="bfloat16")
        layer = _WINDOW_MS * length / 98_304 * self.heads / 8 if local else 0.0
        if share is not None:
            topk = round((share - 1 / 16) * length / 8)
            layer += predict(shape, LighthouseConfig(levels=3, pooling=4, topk=topk), H100).milliseconds
        attention = edge * predict_dense(shape, H100) + (self.layers - edge) * layer
        return attention * self.passes + self.rest_of_token * length

    def dense(self, length: int) -> float:
        """A dense step."""
        return self.step(length, None, 0, self.layers)


TRIAL = Whole("trial model (8 layers, 4 heads)", 8, 4, 2, (44.7 - 2 * 8 * 1.905) / 32_768)
PAPER = Whole("paper's model (30 layers, 8 heads, recomputation)", 30, 8, 4, 530 / 98_304, 4.5 / 3.5)


def speeds() -> list[str]:
    """Computed speeds of whole runs over dense ones."""
    lines = [
        "| model | tokens | stage 1 | step over dense, r | whole run, f = 0.6 | f = 0.85 | dense steps in its time, f = 0.6 |",
        "|---|---|---|---|---|---|---|",
    ]
    recipes = (
        ("window 512", None, 512, None), ("pyramid S/N 0.25 + local 512", 0.25, 512, None),
        ("pyramid S/N 0.25, no local", 0.25, 0, None), ("window 512, no dense layer", None, 512, 0),
        ("pyramid S/N 0.25 + local 512, no dense layer", 0.25, 512, 0),
    )  # fmt: skip
    for model in (TRIAL, PAPER):
        for length in (65_536, 98_304):
            for name, share, local, edge in recipes:
                r = model.dense(length) / model.step(length, share, local, edge)
                whole = [1 / (1 - f + f / r) for f in (0.6, 0.85)]
                lines.append(
                    f"| {model.name} | {length:,} | {name} | {r:.2f} "
                    f"| {whole[0]:.2f}x | {whole[1]:.2f}x | {4000 / whole[0]:,.0f} |"
                )
    return lines


def main() -> None:
    """Print all tables."""
    results = read(Path(sys.argv[1]))
    print("\n".join(table(results)), "\n")
    names = sorted(results)
    print("| a | b | a - b, all windows | a - b, far repeats |\n|---|---|---|---|")
    for i, a in enumerate(names):
        for b in names[:i]:
            cells = [paired(results[a], results[b], part) for part in ("windows", "far_windows")]
            print(f"| {a} | {b} | " + " | ".join(f"{mean:+.4f} ± {error:.4f}" for mean, error in cells) + " |")
    print()
    for result in results.values():
        print(result.name, "far repeats by distance", result.final["far_by_distance"])
    print()
    print("\n".join(speeds()))


if __name__ == "__main__":
    main()
