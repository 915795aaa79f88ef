"""Whether the forms of attention compute on this machine what they compute in plain PyTorch, with all gradients.

PYTHONPATH=... python -m transfer.check
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import forms, stock

_FORMS: tuple[dict[str, Any], ...] = (
    {"kind": "window", "width": 128},
    {"kind": "short", "length": 256},
    {"kind": "pyramid", "topk": 32, "local": 64},
    {"kind": "pyramid", "topk": 32, "local": 0},
    {"kind": "own", "topk": 32, "tiles": 4, "local": 256},
)
_LENGTH, _DIM = 1024, 128


def run(device: torch.device) -> Iterator[str]:
    """A line for each form: the relative error of the output and the three gradients against float32 on the CPU."""
    for name, function in (
        ("window and lse", lambda q, k, v: stock.attend(q, k, v, window=128)),
        ("causal and lse", stock.attend),
        ("all keys and lse", lambda q, k, v: stock.attend(q, k[:, :, :512], v[:, :, :512], causal=False)),
    ):
        yield _compared(name, function, device)
    for form in _FORMS:
        attend = forms.build(form)
        yield _compared(str(form), lambda q, k, v, attend=attend: (attend(q, k, v),), device)


def _compared(name: str, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> str:
    began = time.time()
    try:
        generator = torch.Generator().manual_seed(0)
        low = torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = (torch.randn(1, _LENGTH, 2, _DIM, generator=generator).to(low).transpose(1, 2) for _ in range(3))
        weights: list[Tensor] = []
        found = _results(function, (q, k, v), device, low, weights, generator)
        expected = _results(function, (q, k, v), torch.device("cpu"), torch.float32, weights, generator)
        errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]
        verdict = "ok" if max(errors) < 0.02 else "WRONG"
        return f"check {name}: {verdict} {' '.join(f'{x:.1e}' for x in errors)} ({time.time() - began:.1f} s)"
    except Exception as error:
        return f"check {name}: FAILED {error!r:.600}"


def _results(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    device: torch.device,
    dtype: torch.dtype,
    weights: list[Tensor],
    generator: torch.Generator,
) -> list[Tensor]:
    tensors = [x.detach().to(device=device, dtype=dtype).requires_grad_() for x in inputs]
    outputs = function(*tensors)
    if not weights:
        weights += [torch.randn(x.shape, generator=generator).to(torch.bfloat16).float() for x in outputs]
    total = torch.stack([(x.float() * w.to(device)).sum() for x, w in zip(outputs, weights, strict=True)]).sum()
    grads = torch.autograd.grad(total, tensors)
    return [x.detach().float().cpu() for x in (*outputs, *grads)]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, repeat=True)
    if torch.cuda.is_available():
        forms.use_cudnn()
    for line in run(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        print(line, flush=True)
    faulthandler.cancel_dump_traceback_later()
