"""One run: a first stage under some form of attention, then dense, and everything that is recorded of it.

Records are dicts, given to `record` as they come into being:
    start   the run as asked for, and the machine
    step    dense loss and loss under the stage's own attention on some held-out windows, training loss, seconds
    leak    at the switch: how much worse a byte is predicted when all that follows is replaced (SPEC.md)
    final   dense loss of every held-out window, by position, of repeats by distance; all training losses
    cut     in place of `final`, where the time ran out
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import evaluation, forms
from .model import Attention, Model, Size
from .text import Batches, Held

_UNTIMED = 20  # steps after the start and after a change of attention, which may compile
DENSE: dict[str, Any] = {"kind": "dense"}


@dataclass(frozen=True)
class Run:
    """A run of the programme.

    Args:
        forms: of attention in stage 1, one after the other in equal shares (several: a schedule); none: dense throughout.
        share: of the steps that are stage 1, `f`.
        edge: layers that stay dense at either end.
        seed: of the weights and the order of the text; with the same seed runs differ by what is trained alone.
        kernel: of dense attention, a name of torch's SDPBackend; "": the programme's usual one.
        deterministic: PyTorch's deterministic algorithms, uncompiled; for looking at noise.
        need: seconds that it is expected to take; it is not begun with less.
        final: whether to evaluate at the end.
    """

    name: str
    forms: tuple[dict[str, Any], ...] = ()
    share: float = 0.6
    edge: int = 1
    seed: int = 0
    steps: int = 4000
    rate: float = 6e-4
    warm: int = 200
    every: int = 250
    kernel: str = ""
    deterministic: bool = False
    need: float = 0.0
    final: bool = True

    @property
    def switch(self) -> int:
        """The first dense step."""
        return round(self.share * self.steps) if self.forms else 0

    def form(self, step: int) -> dict[str, Any]:
        """The form of attention at a step."""
        if step >= self.switch:
            return DENSE
        return self.forms[step * len(self.forms) // self.switch]

    def rate_at(self, step: int) -> float:
        """Warm-up, level, and down to nothing in the last fifth."""
        return self.rate * min(1.0, (step + 1) / self.warm, (self.steps - step) / (0.2 * self.steps))


@dataclass
class _Clock:
    """Seconds of each stage, without evaluation, and without the steps after a change of attention."""

    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    steps: list[int] = field(default_factory=lambda: [0, 0])
    since: float = 0.0
    first: int = 0

    def begin(self, step: int) -> None:
        """From here on time counts; the device has nothing to do."""
        self.since, self.first = time.perf_counter(), step

    def end(self, step: int, stage: int) -> None:
        """Until here; the device has nothing to do."""
        self.seconds[stage] += time.perf_counter() - self.since
        self.steps[stage] += step - self.first

    def of_stages(self, run: Run) -> dict[str, float]:
        """Milliseconds a step, and seconds of all steps of a stage at that."""
        of_step = [1000 * s / n if n else 0.0 for s, n in zip(self.seconds, self.steps, strict=True)]
        counts = (run.switch, run.steps - run.switch)
        whole = [round(ms * n / 1000, 2) for ms, n in zip(of_step, counts, strict=True)]
        return {
            "ms1": round(of_step[0], 2), "ms2": round(of_step[1], 2), "seconds1": whole[0], "seconds2": whole[1],
        }  # fmt: skip


def attention_of(form: dict[str, Any], edge: int, size: Size) -> list[Attention]:
    """The attention of every layer."""
    attend = forms.build(form)
    everywhere = form["kind"] == "short"  # a short context is short in all layers
    return [attend if everywhere or edge <= i < size.layers - edge else forms.dense for i in range(size.layers)]


def train(
    run: Run,
    size: Size,
    device: torch.device,
    batches: Batches,
    held: Held,
    record: Callable[[dict[str, Any]], None],
    deadline: float = math.inf,
) -> None:
    """Train and evaluate one run; stops where `time.time()` passes the deadline, with a record of what there is."""
    torch.use_deterministic_algorithms(run.deterministic)
    eager = run.deterministic and device.type == "cuda"
    stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
    kernels = sdpa_kernel(getattr(SDPBackend, run.kernel)) if run.kernel else nullcontext()
    with stance, kernels:
        _train(run, size, device, batches, held, record, deadline)
    torch.use_deterministic_algorithms(False)


def _train(
    run: Run,
    size: Size,
    device: torch.device,
    batches: Batches,
    held: Held,
    record: Callable[[dict[str, Any]], None],
    deadline: float,
) -> None:
    began = time.time()
    torch.manual_seed(run.seed)
    model = Model(size, device)
    record({"record": "start", "run": asdict(run), "size": asdict(size), "torch": torch.__version__, "time": began})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )
    losses = torch.zeros(run.steps, device=device)
    looked_at = {run.steps, *range(run.every, run.steps + 1, run.every)}
    if run.forms:
        looked_at |= {run.switch, run.switch + 50, run.switch + 100}
    form: dict[str, Any] = {}
    clock, untimed_until, last = _Clock(), _UNTIMED, 0
    dense = attention_of(DENSE, 0, size)
    for step in range(run.steps):
        if run.form(step) != form:
            form = run.form(step)
            attention, untimed_until = attention_of(form, run.edge, size), step + _UNTIMED
        if step == untimed_until:
            _wait(device)
            clock.begin(step)
        for group in optimizer.param_groups:
            group["lr"] = run.rate_at(step)
        losses[step] = _step(model, optimizer, attention, batches, device)
        done, stage = step + 1, 0 if step < run.switch else 1
        if done not in looked_at and (done >= run.steps or run.form(done) == form):
            continue
        _wait(device)
        if done > untimed_until:
            clock.end(done, stage)
        if run.final and done in looked_at:
            found: dict[str, Any] = {"dense": evaluation.means(model, dense, held.first(32), device)}
            if stage == 0:
                found["own"] = evaluation.means(model, attention, held.first(32), device)
            train_loss = round(losses[last:done].mean().item(), 5)
            record({"record": "step", "step": done, "train": train_loss, **found, **clock.of_stages(run)})
            last = done
            if done == run.switch:
                record({"record": "leak", "step": done, **evaluation.leak(model, attention, held, device)})
        if time.time() > deadline and done < run.steps:
            record({"record": "cut", "step": done, "losses": _rounded(losses[:done])})
            return
        untimed_until = max(untimed_until, done)
        clock.begin(done)
    curve = losses.tolist() if run.deterministic or run.steps <= 200 else _rounded(losses)
    result: dict[str, Any] = {"record": "final", "step": run.steps, **clock.of_stages(run), "losses": curve}
    if run.final:
        result |= evaluation.whole(model, dense, held, device)
    result["first_losses"] = [x.hex() for x in losses[:150].tolist()]  # to the bit
    result["wall"] = round(time.time() - began, 1)
    record(result)


def _step(
    model: Model, optimizer: torch.optim.Optimizer, attention: list[Attention], batches: Batches, device: torch.device
) -> Tensor:
    tokens = batches.next()
    if device.type == "cuda":
        tokens = tokens.pin_memory().to(device, non_blocking=True)
    tokens = tokens.long()
    loss: Tensor = model(tokens[:, :-1], tokens[:, 1:], attention).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _rounded(losses: Tensor) -> list[float]:
    return [round(x, 4) for x in losses.tolist()]
