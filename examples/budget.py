"""Budget control beside fixed budgets: the same small model, tokens and schedule, with `topk` adapted or as it is.

    python examples/budget.py                                   minutes on two CPU cores
    python examples/budget.py --device cuda --seq-len 16384 --layers 8 --width 512 --batch 2 --lr 1e-3

Losses are compared under dense attention. The control starts in the middle bucket, with which it is compared first; as it may
gather more or less than that, the fixed budgets below and above show what that alone is worth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from pretrain import build, device_name, new_log, versions
from rich.console import Console
from rich.table import Table
from text import Text, read_text
from training import Plan, Run, train

import lighthouse_fx
from lighthouse_fx import BudgetControl, LighthouseConfig
from lighthouse_fx.kernels import Pyramid

matplotlib.use("Agg")
import matplotlib.pyplot as plt

console = Console(width=None if sys.stdout.isatty() else 160)
FIXED = ("low", "middle", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished run. `kept` and `work` are S/N and (S/N)^2, the mean over Lighthouse layers and steps of stage 1."""

    name: str
    seed: int
    topk: str
    kept: float
    work: float
    tokens_per_second: float
    measuring_seconds: float
    at_switch: float
    final: float
    graphs: int
    events: list[dict[str, Any]]
    thresholds: tuple[float, ...]


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", nargs="+", choices=(*FIXED, "control"), default=["middle", "control"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--seq-len", type=int, default=2048, help="tokens (bytes) of a sequence")
    add("--batch", type=int, default=1, help="sequences of a step")
    add("--layers", type=int, default=6, help="of which the first and the last stay dense")
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4, help="query heads")
    add("--kv-heads", type=int, default=2, help="key/value heads")
    add("--topk", type=int, nargs=3, help="the buckets; by default a 64th, a 32nd and a 16th of --seq-len")
    add("--thresholds", type=float, nargs=2, help="between the buckets; by default those of BudgetControl")
    add("--every", type=int, default=25, help="steps between measurements")
    add("--measure-rows", type=int, default=4, help="measure on the same so many sequences; 0: on each step's own batch")
    add("--steps", type=int, default=400, help="steps of both stages together, 5/8 of them with Lighthouse")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--warmup", type=int, default=40, help="steps in which the learning rate rises")
    add("--validation-windows", type=int, default=16, help="held-out sequences")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--text", default="", help="folder of Python source to learn from; by default the standard library")
    add("--out", type=Path, default=Path("out/budget"), help="folder for logs, the picture and budget.json")
    args = parser.parse_args()
    args.topk = tuple(args.topk or (max(1, args.seq_len // part) for part in (64, 32, 16)))
    args.mlp, args.checkpoint = args.width * 3 // 2, False
    args.dtype = "fp32" if args.device == "cpu" else "bf16"
    args.validation_windows = -(-args.validation_windows // args.batch) * args.batch  # whole batches
    return args


def run(name: str, seed: int, args: argparse.Namespace, text: Text, validation: torch.Tensor) -> Result:
    args.seed = seed
    torch.compiler.reset()  # each run compiles its own graphs, so that they can be counted
    model = build(args)
    fixed = args.topk[FIXED.index(name) if name in FIXED else 1]
    before = len(lighthouse_fx.reports())
    lighthouse_fx.compile(model, LighthouseConfig.paper(topk=fixed), dense_layers=(0, -1))
    plan = Plan(
        steps=args.steps,
        lighthouse_steps=max(1, args.steps * 5 // 8),
        length=args.seq_len,
        batch=args.batch,
        lr=args.lr,
        warmup=args.warmup,
        seed=seed,
        validate_every=max(1, args.steps // 8),
    )
    log = new_log(args.out / f"{name}-{seed}.jsonl", model, args)
    budget, rows = None, None
    if name == "control":
        if args.measure_rows:
            rows = text.batch(0, batch=args.measure_rows, length=args.seq_len, seed=seed)[:, :-1].to(args.device)
        budget = BudgetControl(model, topk=args.topk, every=args.every, thresholds=args.thresholds, log=log)
    done = train(
        f"{name}, seed {seed}", model, text, plan, validation, lighthouse=True, log=log, budget=budget, measured_on=rows
    )
    kept = [share for topk in budgets_by_step(budget, fixed, plan, args.layers - 2) for share in shares(topk, plan.length)]
    return Result(
        name=name,
        seed=seed,
        topk="adapted" if budget else str(fixed),
        kept=statistics.fmean(kept),
        work=statistics.fmean(share**2 for share in kept),
        tokens_per_second=plan.batch * plan.length / mean_step_seconds(done),
        measuring_seconds=sum(event.seconds for event in budget.events[1:]) if budget else 0.0,
        at_switch=done.loss_at(plan.lighthouse_steps),
        final=done.loss_at(plan.steps),
        graphs=len(lighthouse_fx.reports()) - before,
        events=[asdict(event) for event in budget.events] if budget else [],
        thresholds=budget.plan.thresholds if budget else (),
    )


def budgets_by_step(budget: BudgetControl | None, fixed: int, plan: Plan, layers: int) -> list[list[int]]:
    """The budget of each Lighthouse layer, in each step of stage 1."""
    by_step = [[fixed] * layers] * plan.lighthouse_steps
    for event in budget.events if budget else ():
        by_step[event.step :] = [list(event.topk.values())] * (plan.lighthouse_steps - event.step)
    return by_step


def shares(topk: list[int], length: int) -> list[float]:
    """S/N of each layer."""
    return [Pyramid(length=length, levels=3, pooling=4, topk=k).gathered / length for k in topk]


def mean_step_seconds(done: Run) -> float:
    """Of stage 1, without the slowest tenth, which is where graphs are compiled and budgets measured."""
    seconds = sorted(done.stages[0].seconds)
    return statistics.fmean(seconds[: max(1, len(seconds) * 9 // 10)])


def main() -> None:
    args = flags()
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text(args.text, length=args.seq_len)
    validation = text.validation_windows(args.validation_windows, length=args.seq_len).to(args.device)
    results: list[Result] = []
    for seed in args.seeds:
        for name in args.runs:
            results.append(run(name, seed, args, text, validation))
            save(results, args, time.perf_counter() - started)

    table = Table(
        title=f"{args.layers - 2} Lighthouse layers, {args.seq_len:,} tokens, topk {args.topk}, {device_name(args.device)}",
        caption="losses: nats per byte under dense attention; kept and work: of stage 1, (S/N and its square, mean over layers "
        "and steps)\ntokens/s: of stage 1 without its slowest tenth of steps (compilation, measurements)",
        title_justify="left",
        caption_justify="left",
    )
    columns = ("run", "seed", "topk", "kept", "work", "tokens/s", "measuring", "graphs", "loss at the switch", "final loss")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for r in results:
        cells = (r.name, r.seed, r.topk, f"{r.kept:.1%}", f"{r.work:.1%}", f"{r.tokens_per_second:,.0f}")
        rest = (f"{r.measuring_seconds:.1f} s", r.graphs, f"{r.at_switch:.3f}", f"{r.final:.3f}")
        table.add_row(*map(str, (*cells, *rest)))
    console.print(table)
    for r in results:
        for event in r.events:
            console.print(f"seed {r.seed}, {event['message']}")
    shown = [r for r in results if r.events]
    if shown:
        save_picture(shown[0], args, args.out / "budget.png")
    wall = time.perf_counter() - started
    console.print(f"{wall:.0f} s in all; see {args.out}/budget.json, budget.png and the logs beside them")


def save(results: list[Result], args: argparse.Namespace, seconds: float) -> None:
    """All that is known so far, as JSON."""
    data = {
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "device": device_name(args.device),
        "versions": versions(),
        "results": [asdict(r) for r in results],
        "wall_seconds": seconds,
    }
    (args.out / "budget.json").write_text(json.dumps(data, indent=1) + "\n")


def save_picture(result: Result, args: argparse.Namespace, path: Path) -> None:
    """Above each layer's entropy, below its budget, by step."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    steps = [event["step"] for event in result.events]
    end = max(1, args.steps * 5 // 8)
    for place, part in enumerate(result.events[0]["entropy"]):
        above.plot(steps, [event["entropy"][part] for event in result.events], marker="o", markersize=3, label=part)
        budgets = [event["topk"][part] * 1.02**place for event in result.events]  # side by side where they are equal
        below.step([*steps, end], [*budgets, budgets[-1]], where="post")
    for threshold in result.thresholds:
        above.axhline(threshold, color="0.5", linestyle="--", linewidth=1)
    above.set(ylabel="normalised entropy of the scores", title="Each layer's entropy (thresholds dashed) and its budget")
    below.set(xlabel="step of stage 1", ylabel="topk", yscale="log", yticks=args.topk)
    below.set_yticklabels(list(map(str, args.topk)))
    below.minorticks_off()
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
