"""Which two-stage recipe reaches dense quality in less time: several recipes on the same tokens, validated densely.

    python examples/recipes.py dense k1024 k1024-rescaled --folder /usr/lib/python3         on a GPU
    python examples/recipes.py --list

Every recipe starts from the same weights and sees the same tokens and learning rates in the same order; they differ in one
thing each. `--schedule wsd` holds the learning rate until the last fifth of the steps, for all of them. Validation is always
under dense attention. A run writes a checkpoint and goes on from it when started again. Results: a JSON file per recipe in
--out, then a table, a picture and `recipes.json` of all that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from pretrain import build, device_name, versions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from text import Text, read_text
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from training import Optimizer, mean_loss, validate

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, Passkey, lighthouse_attention
from lighthouse_fx.evaluation.passkey import find_passkeys

console = Console(width=None if sys.stdout.isatty() else 140)
Phase = tuple[float, LighthouseConfig | None]  # share of all steps; None: dense attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one run spends its steps.

    Attributes:
        phases: shares of the steps, in order, and the attention of each.
        dense_layers: layers that are dense throughout.
        rescale: at the switch to dense attention, multiply each output projection by what Lighthouse attention gave more.
        restart: at the switch the learning rate starts anew, warm-up and cosine over what is left.
    """

    phases: tuple[Phase, ...]
    dense_layers: tuple[int, ...] = (0, -1)
    rescale: bool = False
    restart: bool = False
    about: str = ""


def two_stages(share: float, **fields: Any) -> tuple[Phase, ...]:
    return (share, LighthouseConfig.paper(max_kept=1.0, **fields)), (1 - share, None)


_K1024 = Recipe(phases=two_stages(0.625, topk=1024), about="5/8 of the steps under Lighthouse, k=1,024")


def wide(share: float, *, topk: int = 2048, pooling: int = 4) -> tuple[Phase, ...]:
    """Two levels: more of the tokens are entries of their own than with three."""
    return two_stages(share, levels=2, topk=topk, pooling=pooling)


_WIDE = Recipe(phases=wide(0.625), about="two levels, k=2,048: half of the tokens")
RECIPES = {
    "dense": Recipe(phases=((1.0, None),), about="dense attention throughout"),
    "recommended": Recipe(phases=((0.5, LighthouseConfig()), (0.5, None)), about="the defaults: half of tokens and steps"),
    "k1024": _K1024,
    "k256": replace(_K1024, phases=two_stages(0.625, topk=256), about="the same with k=256"),
    "k1024-rescaled": replace(_K1024, rescale=True, about="k1024, output projections rescaled at the switch"),
    "k256-rescaled": replace(
        _K1024, phases=two_stages(0.625, topk=256), rescale=True, about="k256, output projections rescaled at the switch"
    ),
    "k1024-half": replace(_K1024, phases=two_stages(0.5, topk=1024), about="k1024 for half of the steps"),
    "k1024-quarter": replace(_K1024, phases=two_stages(0.25, topk=1024), about="k1024 for a quarter of the steps"),
    "k1024-4-dense": replace(_K1024, dense_layers=(0, 1, -2, -1), about="k1024, four layers dense instead of two"),
    "k1024-restart": replace(_K1024, restart=True, about="k1024, the learning rate starts anew at the switch"),
    "k1024-4-dense-restart": replace(
        _K1024, dense_layers=(0, 1, -2, -1), restart=True, about="four layers dense, the learning rate starts anew"
    ),
    "k1024-half-restart": replace(
        _K1024, phases=two_stages(0.5, topk=1024), restart=True, about="half of the steps, the learning rate starts anew"
    ),
    "k1024-2-levels": replace(_K1024, phases=two_stages(0.625, topk=1024, levels=2), about="two levels, k=1,024"),
    "k1536-p2": replace(_K1024, phases=two_stages(0.625, topk=1536, pooling=2), about="pooling 2, k=1,536"),
    "k2048-2-levels": _WIDE,
    "k2048-2-levels-half": replace(_WIDE, phases=wide(0.5), about="the same for half of the steps"),
    "k2048-2-levels-quarter": replace(_WIDE, phases=wide(0.25), about="the same for a quarter of the steps"),
    "k1024-p8": replace(_WIDE, phases=wide(0.625, topk=1024, pooling=8), about="two levels, pooling 8: half of the tokens"),
    "k512-p16": replace(_WIDE, phases=wide(0.625, topk=512, pooling=16), about="two levels, pooling 16: half of the tokens"),
    "k512-p16-half": replace(_WIDE, phases=wide(0.5, topk=512, pooling=16), about="the same for half of the steps"),
    "k512-p16-quarter": replace(_WIDE, phases=wide(0.25, topk=512, pooling=16), about="the same for a quarter of the steps"),
    "k2048-p8-half": replace(_WIDE, phases=wide(0.5, topk=2048, pooling=8), about="pooling 8, k=2,048, half of the steps"),
    "k4096-p8-half": replace(_WIDE, phases=wide(0.5, topk=4096, pooling=8), about="pooling 8, k=4,096, half of the steps"),
    "k256-p32": replace(_WIDE, phases=wide(0.625, topk=256, pooling=32), about="two levels, pooling 32: half of the tokens"),
    "k768-p16": replace(
        _WIDE, phases=wide(0.625, topk=768, pooling=16), about="two levels, pooling 16: three quarters of the tokens"
    ),
    "k1024-alternate": replace(_K1024, dense_layers=(0, 2, 5, 7), about="k1024, every second layer dense"),
    "k1024-dense-first": replace(
        _K1024,
        phases=((0.2, None), (0.425, LighthouseConfig.paper(topk=1024, max_kept=1.0)), (0.375, None)),
        about="a fifth of the steps dense, then as k1024",
    ),
    "growing-k": replace(
        _K1024,
        phases=(
            (0.25, LighthouseConfig.paper(topk=256)),
            (0.375, LighthouseConfig.paper(topk=1024, max_kept=1.0)),
            (0.375, None),
        ),
        about="k=256 for a quarter of the steps, then 1,024",
    ),
}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipes", nargs="*", help="names, see --list; without any, only the table and the picture")
    add("--list", action="store_true", help="the recipes there are")
    add("--folder", default="", help="folder of Python source to learn from; by default the standard library")
    add("--seq-len", type=int, default=16_384)
    add("--batch", type=int, default=2)
    add("--steps", type=int, default=1600)
    add("--layers", type=int, default=8)
    add("--width", type=int, default=512)
    add("--heads", type=int, default=4)
    add("--mlp", type=int, default=1536)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=100)
    add("--schedule", choices=("cosine", "wsd"), default="cosine", help="of the learning rate, to a tenth (wsd: to none)")
    add("--validate-every", type=int, default=200)
    add("--validation-windows", type=int, default=16)
    add("--save-every", type=int, default=400, help="steps between checkpoints")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("out/recipes"))
    args = parser.parse_args()
    args.dtype, args.checkpoint, args.kv_heads = "fp32" if args.device == "cpu" else "bf16", False, args.heads
    unknown = [name for name in args.recipes if name not in RECIPES]
    if unknown:
        parser.error(f"unknown recipes {', '.join(unknown)}: use some of {', '.join(RECIPES)}")
    return args


def boundaries(recipe: Recipe, args: argparse.Namespace) -> list[tuple[int, LighthouseConfig | None]]:
    """The last step, exclusive, of each phase, and its attention."""
    ends, done = [], 0.0
    for share, config in recipe.phases:
        done += share
        ends.append((round(done * args.steps), config))
    return ends


def rate(args: argparse.Namespace, recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth, over all steps or those of each stage; or wsd, level until the last fifth."""
    if args.schedule == "wsd":
        left = (args.steps - step) / (0.2 * args.steps)
        return float(args.lr * min(1.0, (step + 1) / args.warmup, left))
    ends = [end for end, _ in boundaries(recipe, args)]
    first = ends[-2] if recipe.restart and step >= ends[-2] else 0
    done = max(0, step - first - args.warmup) / max(1, args.steps - first - args.warmup)
    return float(args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done))) * min(1.0, (step - first + 1) / args.warmup))


def attention(config: LighthouseConfig | None) -> AbstractContextManager[None]:
    return lighthouse_fx.dense() if config is None else lighthouse_fx.pretraining(config)


class Rescaled(TorchFunctionMode):
    """Dense attention whose outputs are scaled, layer by layer, to what Lighthouse attention gives for the same inputs.

    A token gets the sum of up to `levels` contributions from Lighthouse attention and one from dense attention. The factor is
    that of least squares.
    """

    def __init__(self, config: LighthouseConfig, layers: list[int]) -> None:
        super().__init__()
        self.config, self.layers, self.factors = config, layers, []
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        self.calls += 1
        if self.calls - 1 not in self.layers:
            return out
        lighthouse = lighthouse_attention(*args[:3], is_causal=True, config=self.config).float()
        factor = (lighthouse * out.float()).sum() / out.float().square().sum()
        self.factors.append(factor.item())
        return out * factor.to(out.dtype)


@torch.no_grad()
def rescale(
    model: nn.Module, optimizer: Optimizer, windows: Tensor, config: LighthouseConfig, dense: tuple[int, ...]
) -> list[float]:
    """Scale the output projections of the Lighthouse layers, so that the switch to dense attention changes less."""
    projections = [module for name, module in model.named_modules() if name.endswith("o_proj")]
    layers = [n for n in range(len(projections)) if n not in dense and n - len(projections) not in dense]
    with torch.compiler.set_stance("force_eager"), Rescaled(config, layers) as scaled:
        mean_loss(model, windows)
    masters = {id(weight): master for weight, master in zip(optimizer.weights, optimizer.masters, strict=True)}
    for layer, factor in zip(layers, scaled.factors, strict=True):
        weight = projections[layer].weight
        for tensor in {id(x): x for x in (weight, masters[id(weight)])}.values():
            tensor.mul_(factor)
    return scaled.factors


@torch.no_grad()
def loss_of_repeats(model: nn.Module, windows: Tensor, batch: int) -> float:
    """The dense loss where a window's second half repeats its first: what was read half a context ago, is it found again?"""
    half = windows.shape[1] // 2
    repeated = torch.cat([windows[:, :half], windows[:, :half]], 1)  # [W, N]
    losses = []
    for rows in repeated.split(batch):
        logits = model(rows[:, :-1]).logits[:, half:].float()  # [B, N / 2 - 1, 256]
        losses.append(F.cross_entropy(logits.flatten(0, 1), rows[:, half + 1 :].flatten()).item())
    return fmean(losses)


def train(name: str, args: argparse.Namespace, text: Text, validation: Tensor) -> dict[str, Any]:
    """Run one recipe, or what is left of it."""
    recipe = RECIPES[name]
    torch._dynamo.reset()
    model = build(args)
    lighthouse_fx.compile(model, LighthouseConfig(max_kept=1.0), dense_layers=recipe.dense_layers, strict=False)
    optimizer = Optimizer(model)
    result: dict[str, Any] = {"name": name, "about": recipe.about, "validation": {}, "seconds": [], "losses": [], "factors": []}
    saved = args.out / f"{name}.pt"
    if saved.exists():
        state = torch.load(saved, map_location=args.device)
        result = state["result"]
        with torch.no_grad():
            for kept, master in zip(state["masters"], optimizer.masters, strict=True):
                master.copy_(kept)
            for weight, master in zip(optimizer.weights, optimizer.masters, strict=True):
                weight.copy_(master)
        optimizer.adam.load_state_dict(state["adam"])
    ends = boundaries(recipe, args)
    for step in track(range(len(result["losses"]), args.steps), description=name, transient=True):
        config = next(config for end, config in ends if step < end)
        before = next((config for end, config in ends if end == step), None)
        windows = text.batch(step, batch=args.batch, length=args.seq_len, seed=args.seed).to(args.device)
        model.train()
        if recipe.rescale and before is not None and config is None:
            result["factors"] = rescale(model, optimizer, windows, before, recipe.dense_layers)
        started = time.perf_counter()
        with attention(config):
            loss = mean_loss(model, windows)
            loss.backward()
        optimizer.step(rate(args, recipe, step))
        result["losses"].append(loss.item())  # waits for the device
        result["seconds"].append(time.perf_counter() - started)
        ended = [end for end, _ in ends]
        if (step + 1) % args.validate_every == 0 or step + 1 in ended or step in ended:
            result["validation"][step + 1] = fmean(validate(model, validation, batch=args.batch))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            torch.save(
                {"result": result, "masters": optimizer.masters, "adam": optimizer.adam.state_dict()}, saved
            )
    task = Passkey(lengths=(args.seq_len // 4, args.seq_len // 2, args.seq_len), batch=args.batch)
    with torch.compiler.set_stance("force_eager"):  # dense, and no graph for each length
        retrieval = find_passkeys(model.eval(), task, device=validation.device)
        repeats = loss_of_repeats(model, validation[:8], args.batch)
    # The median of each phase, so that compilation is left out.
    typical, first = 0.0, 0
    for end, _ in ends:
        times = sorted(result["seconds"][first:end])
        typical += (end - first) * times[len(times) // 2] if times else 0.0
        first = end
    return result | {
        "train_seconds": typical,
        "wall_seconds": sum(result["seconds"]),
        "final": list(result["validation"].values())[-1],
        "retrieval": {"lengths": task.lengths, "depths": retrieval.depths, "found": retrieval.found},
        "passkeys": retrieval.accuracy,
        "repeats": repeats,
    }


def in_short(result: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping: the losses and times of single steps make way for a mean of each hundred."""
    losses = result["losses"]
    means = [round(fmean(losses[first : first + 100]), 4) for first in range(0, len(losses), 100)]
    kept = {name: value for name, value in result.items() if name not in ("losses", "seconds")}
    return kept | {"training_loss_every_100": means}


def table(results: list[dict[str, Any]]) -> Table:
    dense = next((r for r in results if r["name"] == "dense"), None)
    shown = Table(title="Dense validation loss, nats per byte", title_justify="left")
    for column in ("recipe", "what"):
        shown.add_column(column)
    for column in ("at the switch", "final", "over dense", "training s", "speed over dense", "repeats", "passkeys"):
        shown.add_column(column, justify="right")
    for r in results:
        switch = r.get("switch_loss")
        shown.add_row(
            r["name"],
            r["about"],
            f"{switch:.3f}" if switch is not None else "-",
            f"{r['final']:.3f}",
            f"{r['final'] - dense['final']:+.3f}" if dense else "-",
            f"{r['train_seconds']:.0f}",
            f"{dense['train_seconds'] / r['train_seconds']:.2f}x" if dense else "-",
            f"{r['repeats']:.3f}" if "repeats" in r else "-",
            f"{r['passkeys']:.0%}" if "passkeys" in r else "-",
        )
    return shown


def save_picture(results: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    lowest = min(r["final"] for r in results)
    for number, r in enumerate(results):
        steps = [int(step) for step in r["validation"]]
        losses = list(r["validation"].values())
        usual = 3 * r["train_seconds"] / len(r["losses"])  # a step that takes longer compiles
        times = [min(t, usual) for t in r["seconds"]]
        seconds = [r["train_seconds"] * sum(times[:step]) / sum(times) for step in steps]
        style = dict(color="black", linewidth=2) if r["name"] == "dense" else dict(color=f"C{number % 10}")
        axes[0].plot(steps, losses, label=f"{r['name']}: {r['final']:.3f}", **style)
        axes[1].plot(seconds, losses, **style)
    axes[0].set(xlabel="steps", ylabel="dense validation loss, nats per byte", ylim=(lowest - 0.03, lowest + 0.9))
    axes[1].set(xlabel="seconds of training, compilation left out")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    args = flags()
    if args.list:
        for name, recipe in RECIPES.items():
            console.print(f"{name:16} {recipe.about}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.recipes:
        text = read_text(args.folder, length=args.seq_len)
        validation = text.validation_windows(args.validation_windows, length=args.seq_len).to(args.device)
        about = {
            "device": device_name(args.device),
            "versions": versions(),
            "command": " ".join(sys.argv),
            "bytes": len(text.train),
            "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        }
        for name in args.recipes:
            result = train(name, args, text, validation)
            ends = boundaries(RECIPES[name], args)
            result["switch_loss"] = result["validation"].get(ends[-2][0]) if len(ends) > 1 else None
            (args.out / f"{name}.json").write_text(json.dumps(about | result), encoding="utf-8")
            console.print(f"{name}: final {result['final']:.4f}, {result['wall_seconds']:.0f} s")
    paths = [args.out / f"{name}.json" for name in RECIPES]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    if results:
        (args.out / "recipes.json").write_text(json.dumps([in_short(r) for r in results], indent=1) + "\n", encoding="utf-8")
        console.print(table(results))
        save_picture(results, args.out / "recipes.png", f"{results[0]['device']}: dense validation loss of each recipe")
    return 0


if __name__ == "__main__":
    sys.exit(main())
