"""The loss curves of the runs as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from training import Plan, Run

COLOURS = {"lighthouse": "#d95f02", "dense": "#1f5fa8"}


def trailing_mean(losses: list[float], width: int) -> list[float]:
    """Each loss averaged with those before it, so that the trend shows."""
    return [fmean(losses[max(0, end - width) : end]) for end in range(1, len(losses) + 1)]


def save_losses(runs: list[Run], plan: Plan, title: str, path: Path) -> None:
    """Left: losses by step. Right: validation loss by training time."""
    width = max(1, plan.steps // 32)
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    for run in runs:
        colour = COLOURS["lighthouse" if run.stages[0].attention == "lighthouse" else "dense"]
        for stage in run.stages:
            steps = range(stage.first + 1, stage.first + stage.steps + 1)
            approximate = stage.attention == "lighthouse"
            label = f"{run.name}: training loss" + (
                ", Lighthouse attention\n(not a language-model likelihood)" if approximate else ", dense attention"
            )
            again = run.stages[0].attention == stage.attention and stage is not run.stages[0]
            by_step.plot(
                steps, trailing_mean(stage.losses, width), color=colour, alpha=0.45, linewidth=1,
                linestyle=":" if approximate else "-", label=None if again else label,
            )  # fmt: skip
        points = sorted(run.validation)
        losses = [run.loss_at(step) for step in points]
        marker = {"color": colour, "marker": "o", "markersize": 5, "linewidth": 1.6}
        by_step.plot(points, losses, label=f"{run.name}: validation, dense attention", **marker)
        by_time.plot([run.seconds_until(step) for step in points], losses, label=run.name, **marker)
        highest = losses[-1] == max(other.loss_at(plan.steps) for other in runs)
        by_step.annotate(
            f"{losses[-1]:.3f}", (points[-1], losses[-1]), (6, 0), textcoords="offset points", color=colour,
            va="bottom" if highest else "top",
        )  # fmt: skip
    if plan.lighthouse_steps < plan.steps:
        by_step.axvline(plan.lighthouse_steps, color="0.4", linestyle="--", linewidth=1)
        by_step.annotate(
            "switch to dense", (plan.lighthouse_steps, 0.02), (4, 0), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="bottom", color="0.3",
        )  # fmt: skip
        for run in runs:
            if run.stages[0].attention == "lighthouse":
                by_time.axvline(run.seconds_until(plan.lighthouse_steps), color="0.4", linestyle="--", linewidth=1)
    by_step.set(xlabel="step", ylabel="loss (nats per byte)", title=f"by step; training loss: mean of the last {width} steps")
    by_time.set(xlabel="training time without compilation (s)", ylabel="validation loss, dense attention (nats per byte)")
    by_time.set_title("validation by training time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, loc="upper right")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
