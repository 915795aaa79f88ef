"""`BudgetControl`: gives each layer as many windows as its scores are undecided, in a few fixed buckets. Off unless it is used.

    every so many steps: a forward without gradients  ->  entropy of each layer's scores  ->  a bucket of `topk` for each layer

High entropy says that many windows score alike, so that a small budget drops some as good as those it keeps. The gathered
length S is a static shape and the same for all heads of an attention call, so heads of one layer cannot have budgets of their
own: a layer's entropy is the mean over its key/value heads, and the log shows every head's. What is compiled together shares
one budget: each block of `lighthouse_fx.compile`, or the whole model of `torch.compile(model)`, whose layers would otherwise
need a graph for every combination of buckets.

A block runs in its own stage, the present one with another `topk`. So graphs are guarded as for `pretraining(topk=...)`, equal
blocks share one for each bucket, and there are never more than buckets. The graphs themselves know nothing of the control.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lighthouse_fx.arguments import is_integer
from lighthouse_fx.frontend.existing_compilation import lighthouse_parts, setting_of
from lighthouse_fx.kernels.torch_private import OptimizedModule
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.pyramid import pyramid_over
from lighthouse_fx.runtime import stage

from .budget_plan import BudgetPlan
from .run_file import number
from .run_log import RunLog
from .score_entropy import CallEntropy, EntropyProbe

_log = logging.getLogger("lighthouse_fx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetEvent:
    """One measurement.

    Attributes:
        step: before which it was taken; message: the same as a sentence; seconds: what it took.
        entropy: of each part of the model that is compiled by itself, by its path ("" is the whole model): the mean over its
            calls and heads, on which the bucket rests. heads: of each attention call, by its module's path.
        topk: what each part has from here on; changed: the parts whose bucket is another than before.
    """

    step: int
    message: str
    seconds: float
    entropy: Mapping[str, float]
    heads: Mapping[str, tuple[float, ...]]
    topk: Mapping[str, int]
    changed: tuple[str, ...]


class BudgetControl:
    """Adapts `topk` of each layer in the Lighthouse stage to how decided its scores are.

        budget = lighthouse_fx.BudgetControl(model, topk=(768, 1536, 3072), every=200, log=log)
        for step in schedule:
            with schedule.stage(), budget.step(step, tokens):     # the model's arguments, to measure on
                model(tokens).loss.backward()
            optimizer.step(); optimizer.zero_grad()
            schedule.finish()

    The normalised entropy is defined in `lighthouse_fx.score_entropy`. It is measured before the steps `every`, `2 * every` and
    so on, on the first micro-batch of each; and once before the first step of the session, which changes nothing and shows
    early what is wrong. Measuring runs the model with all layers in the bucket that they start in, so what is measured does not
    depend on what was decided before. In the dense stage nothing is measured and nothing changes.

    A part moves to the next bucket up where its entropy is above the threshold between the two by more than `margin`, and down
    where it is below by more than `margin`; in between it stays (hysteresis). Where scores are not finite it stays, too.
    Nothing here is random: a run that goes on from `state_dict()` goes on as it would have. Under autocast, enter `step`
    inside it.

    Entropies differ from batch to batch. Measured always on the same rows, `budget.step(step, held_out)`, budgets move with
    training alone, and all ranks decide alike; measured on its own batch, each process decides for itself.

    Args:
        model: compiled with this backend, whole or block by block, by `lighthouse_fx.compile` for one.
        topk: the buckets, rising, 2 to 5. Parts start in the middle one (of an even number, the upper).
        every: steps between measurements.
        thresholds: between the buckets, rising, in (0, 1). Fitting values depend on the model and the length, as the
            entropies in the log show; the default, for three buckets, is from a small model: see "Budget control" in
            docs/choosing_a_pyramid.md.
        margin: see above.
        log: takes down every measurement as an event "budget". The logger `lighthouse_fx` is told, too, and `events` has them.

    Raises:
        TypeError, ValueError: a bad argument, naming it, its value and the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        topk: Sequence[int],
        every: int = 200,
        thresholds: Sequence[float] | None = None,
        margin: float = 0.0002,
        log: RunLog | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r} is a {type(model).__name__}: give the Module that you compiled")
        self.plan = BudgetPlan.checked(topk=topk, every=every, thresholds=thresholds, margin=margin)
        self._model, self._log = model, log
        self._parts, self._own = _parts_of(model, self.plan.topk)
        self._buckets = dict.fromkeys(self._parts, self.plan.start)
        self._measured: int | None = None  # the last step that was due
        self._tried = False
        self.events: list[BudgetEvent] = []  # the measurements of this session
        self._probes: dict[LighthouseConfig, EntropyProbe] = {}

    @property
    def budgets(self) -> dict[str, int]:
        """The present `topk` of each part, by its path in the model; "" is the whole model."""
        return {path: self.plan.topk[bucket] for path, bucket in self._buckets.items()}

    def __repr__(self) -> str:
        return f"BudgetControl({self.plan}): {self.budgets}"

    # --- a step -------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, step: int, *args: Any, **kwargs: Any) -> Iterator[None]:
        """The forward and backward of a step, or of one of its micro-batches, under the budgets: inside `schedule.stage()`.

        Args:
            step: the number of the optimiser step in the whole run; args, kwargs: what the model is called with to measure it,
                the step's own batch or any other. Inside `documents(...)` it has to be one of their shape.

        Raises:
            RuntimeError: gradients are off, or an attention call has to run again in a checkpoint under another budget.
            ValueError: no attention is rewritten, or the largest bucket gathers so much that a call would stay dense.
        """
        if not is_integer(step) or step < 0:
            raise ValueError(f"step={step!r} is no number of a step: give that of the optimiser step, from 0")
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "budget.step() is for training steps, and gradients are off here (no_grad or inference_mode): evaluate without "
                "it, attention is dense then"
            )
        if stage.current.kind == "dense":
            yield
            return
        due = step > 0 and step % self.plan.every == 0 and step != self._measured
        if due or not self._tried:
            self._measure(step, args, kwargs, decides=due)
        with ExitStack() as on:
            for path, module in self._parts.items():
                topk = self.plan.topk[self._buckets[path]]
                on.enter_context(_called_with(module, topk) if path else stage.with_topk(topk))
            yield

    def _measure(self, step: int, args: Any, kwargs: Any, *, decides: bool) -> None:
        started = time.perf_counter()
        probe = self._probe()
        calls = probe(*args, **kwargs)
        self._check(calls, probe)
        of_part = {path: [h for c in calls if _within(c.module, path) for h in c.heads] for path in self._parts}
        entropy = {path: fmean(heads) for path, heads in of_part.items() if heads}
        before = self.budgets
        if decides:
            self._buckets |= {path: self.plan.moved(self._buckets[path], value) for path, value in entropy.items()}
            self._measured = step
        self._tried = True
        changed = tuple(path for path, topk in self.budgets.items() if topk != before[path])
        moves = (f"{_named(path)} {before[path]} -> {self.budgets[path]} ({entropy[path]:.4f})" for path in changed)
        said = ("topk of " + ", ".join(moves)) if changed else "no budget changes" if decides else "measured, to change nothing"
        heads: dict[str, tuple[float, ...]] = {}
        for call in calls:
            heads[call.module] = heads.get(call.module, ()) + call.heads
        self._tell(
            BudgetEvent(
                step=step,
                message=f"step {step}: {said}; entropies {min(entropy.values()):.4f} to {max(entropy.values()):.4f}",
                seconds=time.perf_counter() - started,
                entropy=entropy,
                heads=heads,
                topk=self.budgets,
                changed=changed,
            )
        )

    def _probe(self) -> EntropyProbe:
        """What measures under the stage that is on."""
        config = stage.current.resolve(self._own)
        assert config is not None, "the stage is not dense"
        for topk in self.plan.topk:
            replace(config, topk=topk)  # raises for a quota that does not divide it
        dense = tuple(dict.fromkeys((*config.dense_layers, *setting_of(self._model).dense)))
        config = replace(config, topk=self.plan.topk[self.plan.start], dense_layers=dense)
        if config not in self._probes:
            self._probes[config] = EntropyProbe(self._model, config)
        return self._probes[config]

    def _check(self, calls: Sequence[CallEntropy], probe: EntropyProbe) -> None:
        """Every bucket has to be Lighthouse attention."""
        lengths = {call.length for call in calls for path in self._parts if _within(call.module, path)}
        if not lengths:
            reasons = dict.fromkeys(f"{call.module or 'a call'}: {call.reason}" for call in probe.records if call.reason)
            why = "; ".join(reasons) or "it calls no attention"
            raise ValueError(
                f"model={type(self._model).__name__} has no rewritten attention to give topk={self.plan.topk} to ({why}): "
                "remove the cause, see lighthouse_fx.explain(model, ...)"
            )
        config = replace(probe.config, topk=self.plan.topk[-1])
        for length in sorted(lengths):
            gathered = pyramid_over(length, config).gathered
            if config.keeps_too_much(gathered, length):
                raise ValueError(
                    f"topk={self.plan.topk}: its largest gathers {gathered} of {length} tokens, more than "
                    f"max_kept={config.max_kept}, so attention would stay dense: give smaller buckets, or raise max_kept"
                )

    def _tell(self, event: BudgetEvent) -> None:
        self.events.append(event)
        _log.info("%s", event.message)
        if self._log is not None:
            self._log.event(
                "budget",
                step=event.step,
                text=event.message,
                seconds=event.seconds,
                entropy={path: number(value) for path, value in event.entropy.items()},
                heads={module: [number(value) for value in heads] for module, heads in event.heads.items()},
                topk=dict(event.topk),
                changed=list(event.changed),
            )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the plan and each part's bucket. Numbers, strings, lists and dicts only."""
        return self.plan.as_data() | {"measured": self._measured, "buckets": dict(self._buckets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of another plan or of another model.
        """
        if missing := {*self.plan.as_data(), "measured", "buckets"} - state.keys():
            raise ValueError(f"state={state!r} has no {sorted(missing)}: give what state_dict() returned")
        plan = self.plan.as_data()
        if others := {name: state[name] for name in plan if state[name] != plan[name]}:
            mine = {name: plan[name] for name in others}
            raise ValueError(f"state has {others}, and this control {mine}: make BudgetControl as the run was begun")
        if state["buckets"].keys() != self._buckets.keys():
            raise ValueError(
                f"state has budgets of {list(map(_named, state['buckets']))}, and this model is compiled in the parts "
                f"{list(map(_named, self._buckets))}: compile it as the run was begun"
            )
        for path, bucket in state["buckets"].items():
            if not is_integer(bucket) or not 0 <= bucket < len(self.plan.topk):
                raise ValueError(
                    f"state['buckets'][{path!r}]={bucket!r} is damaged: it has to be the place of one of topk={self.plan.topk}"
                )
        if state["measured"] is not None and not is_integer(state["measured"]):
            raise ValueError(f"state['measured']={state['measured']!r} is damaged: it has to be a step or None")
        self._buckets = {path: state["buckets"][path] for path in self._buckets}
        self._measured = state["measured"]


class _BudgetedCall:
    """A block's compiled call in the stage of its budget. Everything else about it is that of the compiled call."""

    def __init__(self, compiled: Callable[..., Any], topk: int) -> None:
        self.compiled, self.topk = compiled, topk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with stage.with_topk(self.topk):
            return self.compiled(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


@contextmanager
def _called_with(block: nn.Module, topk: int) -> Iterator[None]:
    """A block that is compiled in place has this budget, wherever it is called from, as by a checkpoint in the backward."""
    compiled = block._compiled_call_impl
    assert compiled is not None, "it is compiled in place"
    block._compiled_call_impl = _BudgetedCall(compiled, topk)
    try:
        yield
    finally:
        block._compiled_call_impl = compiled


def _within(module: str, path: str) -> bool:
    return not path or f"{module}.".startswith(f"{path}.")


def _named(path: str) -> str:
    return path or "the whole model"


# --- the model ------------------------------------------------------------------------------------------------------


def _parts_of(model: nn.Module, topk: Sequence[int]) -> tuple[dict[str, nn.Module], LighthouseConfig]:
    """The parts that have budgets, and the options that they are all compiled with."""
    found = lighthouse_parts(model)
    if not found:
        raise ValueError(
            f"model={type(model).__name__} is not compiled with backend='lighthouse', nor is any of its modules: call "
            "lighthouse_fx.compile(model) first"
        )
    for path, (part, _) in found.items():
        if path and isinstance(part, OptimizedModule):
            raise ValueError(
                f"model={type(model).__name__} has {path} replaced by torch.compile({path}): compile it in place, "
                f"{path}.compile(backend='lighthouse'), or with lighthouse_fx.compile(model)"
            )
    configs = list(dict.fromkeys(config for _, config in found.values()))
    if len(configs) > 1:
        raise ValueError(
            f"model={type(model).__name__} has parts that are compiled with {len(configs)} different sets of options: compile "
            "all with the same, entropies of other pyramids cannot be compared"
        )
    for k in topk:
        replace(configs[0], topk=k)  # raises for a quota that does not divide it
    return {path: part for path, (part, _) in found.items()}, configs[0]
