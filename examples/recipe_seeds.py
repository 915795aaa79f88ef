"""The default recipe beside dense training, one panel for each length and number of steps, one line for each run.

    python examples/recipe_seeds.py                 benchmarks/results/recipes_wsd.json -> recipe_seeds.png beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "recipes_wsd.json"
PANELS = {
    "rows": "16,384 tokens, 1,600 steps",
    "at_32768_tokens": "32,768 tokens, 1,600 steps",
    "at_65536_tokens_1600_steps": "65,536 tokens, 1,600 steps",
    "at_65536_tokens": "65,536 tokens, 800 steps",
}
SHOWN = {"dense": ("dense", "0.25"), "recommended": ("two stages", "tab:orange")}
SAME = {"k2048-2-levels-half": "recommended"}  # at 16,384 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS)
    path = parser.parse_args().results
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(17, 4.6), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for run in found[key]:
            name = SAME.get(run["name"], run["name"])
            if name not in SHOWN:
                continue
            what, colour = SHOWN[name]
            steps = [int(step) for step in run["validation"]]
            dashes = ("-", "--", ":")[run["seed"]]
            label = f"{what}, seed {run['seed']}: {run['final']:.3f}"
            axis.plot(steps, list(run["validation"].values()), dashes, color=colour, label=label)
        axis.axvline(steps[-1] / 2, color="0.8", linewidth=1)
        axis.set(title=title, xlabel="step")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("dense validation loss, nats per byte")
    figure.suptitle("Half of the steps under Lighthouse attention, then dense (grey: the switch), beside dense throughout")
    figure.savefig(path.with_name("recipe_seeds.png"), dpi=120)


if __name__ == "__main__":
    main()
