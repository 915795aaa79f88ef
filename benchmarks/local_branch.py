"""The layer with a local branch, beside what it is made of: attention on the S entries and stock windowed attention.

    python benchmarks/local_branch.py --out local_branch.json

Forward plus backward in bfloat16, each the median of `--repeats`, and the memory that each adds. Also what the parts
take: the window and the attention with their log-sum-exps, and the merge.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION, attend, gather, select
from lighthouse_fx.kernels.ops.local_branch import attention_and_lse, local_attention, merge
from lighthouse_fx.kernels.sdpa import attention
from lighthouse_fx.kernels.torch_private import flash_attention_backward, flash_attention_forward
from lighthouse_fx.passes.pyramid import pyramid_over


def measure(call: Callable[..., Any], tensors: list[Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of forward plus backward, and the megabytes that it adds at most."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    grads = [torch.randn_like(x) for x in _outputs(call, tensors)]

    def step() -> None:
        torch.autograd.grad(_outputs(call, tensors), tensors, grads, allow_unused=True)

    return measure_step(step, repeats)


def measure_step(step: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The same of a function without arguments."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    added = (torch.cuda.max_memory_allocated() - before) / 1e6
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": round(statistics.median(times), 3), "added_mb": round(added, 1)}


def stock_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Callable[[], Any]:
    """PyTorch's windowed FlashAttention 2, forward and backward, and nothing else."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, D]
    grad, length = torch.randn_like(q), q.shape[1]
    fields: dict[str, Any] = dict(scale=q.shape[-1] ** -0.5, window_size_left=window - 1, window_size_right=0)

    def step() -> Any:
        out, lse, state, unused, *_ = flash_attention_forward(
            q, k, v, None, None, length, length, 0.0, True, False, **fields
        )
        return flash_attention_backward(
            grad, q, k, v, out, lse, None, None, length, length, 0.0, True, state, unused, **fields
        )

    return step


def _outputs(call: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    out = call(*tensors)
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=98_304)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--pooling", type=int, default=4)
    parser.add_argument("--topk", type=int, default=1536)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dense", action="store_true", help="time dense attention, too")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    config = LighthouseConfig(levels=args.levels, pooling=args.pooling, topk=args.topk, local_window=args.window)
    window, pyramid = args.window, pyramid_over(args.length, config)

    # As a model has them: [B, N, H, D] seen as [B, H, N, D].
    shape = (1, args.length, args.heads, args.dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    layout = args.levels, args.pooling
    entries, slots = select(
        q, k, v, *layout, args.topk, pyramid.quota or 0, True, True, "norm", 64, True, None, REVISION
    )
    on_s = [gather(x, entries, slots, *layout, REVISION) for x in (q, k, v)]
    out, lse = attention_and_lse(*on_s, 0.0, True, None, False, "auto")
    local_out, local_lse = local_attention(q, k, v, window, 0.0, True, None, False)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, is_causal=True, config=config)

    cases: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "layer": (layer, [q, k, v]),
        "layer, compiled": (torch.compile(layer, fullgraph=True), [q, k, v]),
        "layer without a local branch": (lambda *x: attend(*x, pyramid, is_causal=True), [q, k, v]),
        "attention on S": (lambda *x: attention(*x, 0.0, True, None, False, "auto"), on_s),
        "attention on S with log-sum-exp": (lambda *x: attention_and_lse(*x, 0.0, True, None, False, "auto"), on_s),
        "window with log-sum-exp": (lambda *x: local_attention(*x, window, 0.0, True, None, False), [q, k, v]),
        "merge": (
            lambda *x: merge(*x, entries, slots, *layout, True, REVISION)[0],
            [out.detach(), lse.detach(), local_out.detach(), local_lse.detach()],
        ),
    }
    if args.dense:
        cases["dense"] = (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), [q, k, v])
    found: dict[str, Any] = {"window": measure_step(stock_window(q, k, v, window), args.repeats)}
    print(f"{'window':35} {found['window']['ms']:8.3f} ms  {found['window']['added_mb']:8.1f} MB", flush=True)
    for name, (call, tensors) in cases.items():
        found[name] = measure(call, tensors, args.repeats)
        print(f"{name:35} {found[name]['ms']:8.3f} ms  {found[name]['added_mb']:8.1f} MB", flush=True)
    alone = found["attention on S"]["ms"] + found["window"]["ms"]
    for name in ("layer", "layer, compiled"):
        found[name]["over_both_alone"] = round(found[name]["ms"] / alone, 3)
        print(f"{name}: {found[name]['over_both_alone']:.2f}x of attention on S and the window, each alone")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    record = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "gathered": int(pyramid.gathered),
        "settings": settings, "results": found,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
