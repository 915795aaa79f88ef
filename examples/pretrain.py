"""The main job: pre-train a byte-level Llama on real text with Lighthouse, then densely; beside it a dense run.

    make pretrain                                   minutes on two CPU cores
    python examples/pretrain.py --help              the same on a GPU, as large as it holds

Stage 1 trains under Lighthouse attention, stage 2 goes on with the same weights and optimiser under dense attention.
The dense run has the same seed, tokens and schedule. Losses of the two are compared under dense attention only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from checks import check_inference, check_unchanged, eager_logits
from figures import save_losses
from rich.console import Console
from rich.table import Table
from text import read_text
from training import WARM_UP_STEPS, Plan, Run, train
from transformers import LlamaConfig, LlamaForCausalLM

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, RunLog
from lighthouse_fx.passes.pyramid import pyramid_over
from lighthouse_fx.training import run_page
from lighthouse_fx.training.loss_monitor import read_reference
from lighthouse_fx.training.run_file import read_run

# A file or a pipe has no width of its own.
console = Console(width=None if sys.stdout.isatty() else 180)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq-len", type=int, default=2048, help="tokens (bytes) of a sequence")
    add("--batch", type=int, default=1, help="sequences of a step")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4, help="query heads")
    add("--kv-heads", type=int, default=2, help="key/value heads")
    add("--mlp", type=int, help="width of the MLP; by default 1.5 times --width, as in the paper")
    add("--levels", type=int, default=2, help="pyramid levels")
    add("--pooling", type=int, default=4, help="pooling factor between levels")
    add("--topk", type=int, help="windows expanded per level; by default for half of the tokens")
    add("--scorer", default="norm", help="what ranks windows: norm, dilated or gla")
    add("--dense-layers", type=int, nargs="*", default=[0, -1], help="layers that stay dense; -1 is the last")
    add("--steps", type=int, default=640, help="steps of both stages together")
    add("--lighthouse-steps", type=int, help="steps of stage 1; by default half of all")
    add("--lr", type=float, default=3e-3, help="highest learning rate")
    add("--warmup", type=int, default=40, help="steps in which the learning rate rises")
    add("--validate-every", type=int, help="steps between validations; by default an eighth of all")
    add("--validation-windows", type=int, default=8, help="held-out sequences")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("fp32", "bf16"), help="of the model; by default bf16 on a GPU (with fp32 master weights)")
    add("--checkpoint", action="store_true", help="activation checkpointing, block by block, non-reentrant")
    add("--no-dense", action="store_true", help="leave out the dense run")
    add("--text", default="", help="folder of Python source to learn from; by default the standard library")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out"), help="folder for pictures and result.json")
    args = parser.parse_args()
    if args.lighthouse_steps is None:
        args.lighthouse_steps = max(1, args.steps // 2)
    if not 1 <= args.lighthouse_steps <= args.steps:
        parser.error(f"--lighthouse-steps {args.lighthouse_steps}: give 1 to --steps, which is {args.steps}")
    args.mlp = args.mlp or args.width * 3 // 2
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    args.validate_every = args.validate_every or max(1, args.steps // 8)
    args.validation_windows = -(-args.validation_windows // args.batch) * args.batch  # whole batches
    return args


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """The same weights for the same seed."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.width,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seq_len,
        attn_implementation="sdpa",
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(args.device, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    if args.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def new_log(path: Path, model: torch.nn.Module, args: argparse.Namespace) -> RunLog:
    """The log of a run, and not of an earlier one in the same folder."""
    path.unlink(missing_ok=True)
    return RunLog(path, model=model, seed=args.seed, sequence_length=args.seq_len, batch=args.batch)


def main() -> int:
    args = flags()
    started = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text(args.text, length=args.seq_len)
    validation = text.validation_windows(args.validation_windows, length=args.seq_len).to(args.device)
    plan = Plan(
        steps=args.steps,
        lighthouse_steps=args.lighthouse_steps,
        length=args.seq_len,
        batch=args.batch,
        lr=args.lr,
        warmup=args.warmup,
        seed=args.seed,
        validate_every=args.validate_every,
    )
    pyramid = LighthouseConfig(levels=args.levels, pooling=args.pooling, topk=args.topk, scorer=args.scorer)

    # Lighthouse: compile the repeated blocks in place, then look at what becomes of them.
    model = build(args)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Llama, {parameters:,} parameters, {args.dtype} on {device_name(args.device)}; "
        f"{len(text.train):,} bytes of {text.files} files to learn from, {len(text.validation):,} held out ({text.source})"
    )
    ids = validation[: args.batch, :-1]
    before = eager_logits(model, ids)
    lighthouse_fx.compile(model, pyramid, dense_layers=tuple(args.dense_layers))
    checks = [check_unchanged(before, eager_logits(model, ids))]
    report = lighthouse_fx.explain(model.train(), ids)
    report.print(console)
    for suffix in ("svg", "html", "json"):
        report.save(args.out / f"graph.{suffix}")

    log = new_log(args.out / "run.jsonl", model, args)
    runs = [train("Lighthouse", model, text, plan, validation, lighthouse=True, log=log)]
    checks += check_inference(model, build(args), ids)

    if not args.no_dense:
        twin = build(args)
        for block in twin.model.layers:
            block.compile(backend="inductor")
        log = new_log(args.out / "dense.jsonl", twin, args)
        runs.append(train("dense", twin, text, plan, validation, lighthouse=False, log=log))

    console.print(table(runs, plan))
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[red]FAILED[/]"
        console.print(f"{verdict}: {check.what}: largest difference {check.difference:.2g} (at most {check.tolerance:.2g})")
    closing = verdicts(runs, plan)
    console.print(*closing, sep="\n")
    wall = time.perf_counter() - started
    topk = pyramid_over(plan.length, pyramid).topk
    size = f"{parameters / 1e6:.1f}M-parameter byte Llama, {plan.length:,} tokens, top-k {topk}"
    title = f"{size}: pre-training on Python source, one seed, {device_name(args.device)}"
    save_losses(runs, plan, title, args.out / "loss.png")
    reference = None if args.no_dense else read_reference(args.out / "dense.jsonl")
    run_page.save_page(read_run(args.out / "run.jsonl"), args.out / "run.html", reference=reference)
    result = {
        "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "device": device_name(args.device),
        "versions": versions(),
        "parameters": parameters,
        "text": {"source": text.source, "files": text.files, "train_bytes": len(text.train), "sha256": text.sha256},
        "attention_calls": [
            {"module": c.module, "rewritten": c.rewritten, "N": c.length, "S": c.gathered, "reason": c.reason}
            for c in report.calls
        ],
        "runs": [as_data(run, plan) for run in runs],
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "verdicts": closing,
        "wall_seconds": wall,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    console.print(f"{wall:.0f} s in all; see {args.out}/run.html, loss.png, graph.svg, graph.html, graph.json, result.json")
    return 0 if all(check.passed for check in checks) else 1


def table(runs: list[Run], plan: Plan) -> Table:
    shown = Table(
        title="Losses in nats per byte, after each stage",
        caption="* Lighthouse attention: not a language-model likelihood, so not to be compared with the others\n"
        "tokens/s: at the median step, compilation left out",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("run", "stage", "steps"):
        shown.add_column(column)
    for column in ("tokens/s", "training loss", "validation loss, dense attention"):
        shown.add_column(column, justify="right")
    for run in runs:
        for number, stage in enumerate(run.stages, start=1):
            last = stage.losses[-10:]
            shown.add_row(
                run.name if number == 1 else "",
                f"{number} {stage.attention}",
                str(stage.steps),
                f"{plan.batch * plan.length / stage.step_seconds:,.0f}",
                f"{statistics.fmean(last):.3f}{'*' if stage.attention == 'lighthouse' else ' '}",
                f"{run.loss_at(stage.first + stage.steps):.3f}",
                end_section=number == len(run.stages),
            )
    return shown


def verdicts(runs: list[Run], plan: Plan) -> list[str]:
    """Which run is better in loss and which in time, from the figures."""
    if len(runs) < 2:
        return ["No dense run to compare with (--no-dense)."]
    ours, dense = runs
    gaps = [a - b for a, b in zip(ours.validation[plan.steps], dense.validation[plan.steps], strict=True)]
    gap = statistics.fmean(gaps)
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("inf")
    lower = ours.name if gap < 0 else dense.name
    doubt = "" if abs(gap) > 2 * error else "; that is within twice the standard error, so no clear difference"
    faster, ratio = (ours.name, dense.seconds / ours.seconds)
    if ratio < 1:
        faster, ratio = (dense.name, 1 / ratio)
    return [
        f"Loss: the {lower} run ended lower, {min(ours.loss_at(plan.steps), dense.loss_at(plan.steps)):.3f} against "
        f"{max(ours.loss_at(plan.steps), dense.loss_at(plan.steps)):.3f} nats per byte under dense attention "
        f"(difference {abs(gap):.3f}, standard error {error:.3f} over {len(gaps)} held-out windows, one seed){doubt}.",
        f"Time: the {faster} run was {ratio:.2f} times faster for the same tokens, {min(ours.seconds, dense.seconds):.1f} s "
        f"against {max(ours.seconds, dense.seconds):.1f} s of training, compilation left out.",
    ]


def as_data(run: Run, plan: Plan) -> dict[str, Any]:
    return {
        "name": run.name,
        "seconds": run.seconds,
        "peak_bytes": run.peak_bytes,
        "validation_loss": {step: run.loss_at(step) for step in run.validation},
        "validation_windows": run.validation,
        "stages": [
            {
                "attention": stage.attention,
                "first_step": stage.first,
                "steps": stage.steps,
                "step_seconds": stage.step_seconds,
                "tokens_per_second": plan.batch * plan.length / stage.step_seconds,
                "speed_leaves_out_steps": WARM_UP_STEPS,
                "compile_seconds": stage.compile_seconds,
                "validation_loss": run.loss_at(stage.first + stage.steps),
                "training_loss": stage.losses,
                "training_loss_is_likelihood": stage.attention == "dense",
                "seconds_of_each_step": stage.seconds,
            }
            for stage in run.stages
        ],
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lighthouse_fx": lighthouse_fx.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
