"""`profile(step)`: where the time of a training step goes, under dense attention and under Lighthouse.

The step is run in both stages. PyTorch's profiler tells what ran, `kernel_names.py` which part of the step that is. Operations
and bytes of a part are those of SPEC.md, "Cost", for the attention calls that the backend reported: the least that had to be
done, so that its rates are lower bounds of what the device did.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from lighthouse_fx.arguments import is_integer
from lighthouse_fx.report.report import AttentionRecord, NotRewritten
from lighthouse_fx.runtime import stage
from lighthouse_fx.runtime.journal import watch

from .cost import Card, measure_card
from .kernel_names import PARTS, Attributed, Event, attribute_kernels, attribute_ops
from .layer import fastest_attention

_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # what Kineto calls work on a GPU
_WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a step. `calls` may be broken where steps differ.

    Attributes:
        operations: floating-point ones of a step; moved: bytes; None where they are not known or not what limits the part.
    """

    name: str
    milliseconds: float
    calls: float = 0.0
    operations: float | None = None
    moved: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A step in one stage: milliseconds in all, and of each part that took any."""

    name: str
    milliseconds: float
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The answer of `profile`: `print(found)`, `found.save_picture("profile.png")`."""

    card: Card
    dense: Run
    lighthouse: Run

    def save_picture(self, path: Any) -> Any:
        """Draw the two steps as stacked bars; needs matplotlib, the extra `plot`. Returns the path."""
        from .profile_figures import save_picture

        return save_picture(self, path)

    def __str__(self) -> str:
        from .profile_figures import text

        return text(self)


def profile(
    step: Callable[[], object],
    *,
    device: torch.device | str | None = None,
    card: Card | None = None,
    dtype: str = "bfloat16",
    steps: int = 3,
    progress: Callable[[str], object] = lambda _: None,
) -> Profile:
    """Profile a training step, dense and with Lighthouse.

    Args:
        step: forward and backward, and what else belongs to a step, of a model that is compiled with this backend and
            scored by norms (attention inside another scorer would pass for the model's).
        device: where it runs; by default the GPU, or the CPU where there is none.
        card: peak rates to compare with; by default they are measured, in `dtype`.
        steps: how many are recorded, after two that compile and warm up.
        progress: is told what is done next.

    Raises:
        TypeError, ValueError: a bad argument. RuntimeError: no attention of the step was rewritten, or the profiler saw
            nothing.
    """
    if not callable(step):
        raise TypeError(f"step={step!r} is a {type(step).__name__}: give a function that makes one training step")
    if not is_integer(steps) or steps < 1:
        raise ValueError(f"steps={steps!r}: give how many steps to record, at least 1")
    if card is not None and not isinstance(card, Card):
        raise TypeError(f"card={card!r} is a {type(card).__name__}: give a Card, such as lighthouse_fx.measure.cost.H100")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if card is None:
        progress("the rates of this machine")
        card = measure_card(device, dtype)
    recordings = []
    with watch() as calls:
        for name, wanted in (("dense", stage.dense()), ("Lighthouse", stage.pretraining())):
            progress(f"a {name} step, after it is compiled")
            with wanted, fastest_attention(device):
                recordings.append(_record(step, device, steps))
    if not any(a.part == "selection" for a in recordings[1].attributed):
        raise NotRewritten(
            "the step runs no Lighthouse attention: compile the model with lighthouse_fx.compile(model) and train it "
            "(model.train(), gradients on, enough tokens); lighthouse_fx.explain(model, ...) gives the reason"
        )
    layer = _layer(calls)
    dense, lighthouse = (
        Run(name=name, milliseconds=found.milliseconds, parts=tuple(_parts(found, layer, steps)), notes=_notes(found, layer))
        for name, found in zip(("dense", "Lighthouse"), recordings, strict=True)
    )
    return Profile(card=card, dense=dense, lighthouse=lighthouse)


def _parts(recording: _Recording, layer: AttentionRecord | None, steps: int) -> Iterator[Part]:
    """Per step, in the order of a step. What is not of attention is the rest, and on a GPU the time without any kernel."""
    left = recording.milliseconds
    for name in PARTS:
        found = [a for a in recording.attributed if a.part == name]
        milliseconds = sum(a.event.duration for a in found) / 1000 / steps
        if name == "rest" and not recording.on_gpu:
            milliseconds = max(left, 0.0)
        left -= milliseconds
        calls = sum(a.call for a in found) / steps
        if milliseconds > 0:
            operations, moved = _work(name, layer) if layer else (None, None)
            yield Part(
                name=name,
                milliseconds=milliseconds,
                calls=calls,
                operations=None if operations is None else operations * calls,
                moved=None if moved is None else moved * calls,
            )
    if recording.on_gpu and left > 0:
        yield Part(name="no kernel", milliseconds=left)


def _notes(recording: _Recording, layer: AttentionRecord | None) -> tuple[str, ...]:
    notes = []
    if not any("attention" in a.part for a in recording.attributed):
        notes.append(
            "no stock attention kernel was seen, so attention counts as rest"
            + (", and the gradients of gather and scatter as each other's forward" if recording.on_gpu else "")
        )
    if layer is None:
        notes.append("attention calls differ in shape or have dynamic ones, so rates are not known")
    return tuple(notes)


# --- how much work a call is ------------------------------------------------------------------------------------------


def _layer(calls: Sequence[AttentionRecord]) -> AttentionRecord | None:
    """The attention that was rewritten, if all of it is alike and causal and has sizes that are numbers, else None.

    Layers that stay dense are taken to be of the same shape.
    """
    rewritten = [call for call in calls if call.rewritten]
    shapes = {(call.query, call.key, call.value, call.dtype) for call in calls}
    if not rewritten or len(shapes) > 1 or len({call.gathered for call in rewritten}) > 1:
        return None
    layer = rewritten[0]
    sizes = (*layer.query, *layer.key, *layer.value, layer.gathered)
    known = all(isinstance(size, int) for size in sizes) and layer.value[3] == layer.query[3] and layer.is_causal
    return layer if known else None


def _work(part: str, layer: AttentionRecord) -> tuple[float | None, float | None]:
    """Floating-point operations, or else bytes, of one call; gather is called for q, k and v, so a call is a third of it."""
    batch, heads, length, dim = (int(size) for size in layer.query)
    groups, gathered = int(layer.key[1]), int(layer.gathered or 0)
    row = batch * dim * int(getattr(torch, layer.dtype.removeprefix("torch.")).itemsize)
    q, k = heads * row, groups * row
    if "attention" in part:
        attended = gathered if "on S" in part else length
        return 2.0 * attended**2 * dim * heads * batch * (2.5 if part.endswith("backward") else 1), None
    if part == "selection":
        return None, float(length * (q + k))
    if part in ("scatter", "scatter backward"):
        return None, float((length + gathered) * q)
    if part in ("gather", "gather backward"):
        return None, (length + gathered) * (q + 2 * k) / 3
    return None, None


# --- what ran ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    milliseconds: float
    attributed: tuple[Attributed, ...]
    on_gpu: bool


def _record(step: Callable[[], object], device: torch.device, steps: int) -> _Recording:
    on_gpu = device.type == "cuda"
    for _ in range(_WARM_UP):
        step()
    alone = median(_timed(step, device) for _ in range(steps))
    events, recorded = _recorded(step, device, steps)
    if on_gpu and not events:
        raise RuntimeError(
            "the profiler saw no kernel on the GPU: another profiler may hold it, or the driver forbids it "
            "(NVreg_RestrictProfilingToAdminUsers=0 allows it)"
        )
    attributed = attribute_kernels(events) if on_gpu else attribute_ops(events)
    # A profiler slows a CPU's ops, not a GPU's kernels: a CPU's parts add up to the profiled time, a GPU's to the time alone.
    return _Recording(milliseconds=alone if on_gpu else recorded, attributed=tuple(attributed), on_gpu=on_gpu)


def _timed(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def _recorded(step: Callable[[], object], device: torch.device, steps: int) -> tuple[list[Event], float]:
    """What ran in so many steps, and the milliseconds of one."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        milliseconds = sum(_timed(step, device) for _ in range(steps)) / steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
    wanted = _ON_GPU if on_gpu else {"cpu_op"}
    return [
        Event(name=entry["name"], start=float(entry["ts"]), duration=float(entry["dur"]))
        for entry in trace["traceEvents"]
        if entry.get("cat") in wanted and "dur" in entry
    ], milliseconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
