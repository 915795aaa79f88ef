"""The backend: `torch.compile(model, backend="lighthouse")`.

    Dynamo's graph -> passes -> Inductor

Registered by the entry point in pyproject.toml, so no import is needed. It decides whether this graph trains under
Lighthouse at all, makes the graph valid only while that stays so, and otherwise hands the graph to Inductor as it came.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from . import dynamo, journal, stage
from .config import LighthouseConfig, config_field_names
from .passes import CALLS, DENSE, LAYERS, TRAINING, Refusal, run_passes
from .report import GraphReport, as_networkx, mark_calls, record

_log = logging.getLogger("lighthouse_fx")

_DENSE_STAGE = Refusal(reason="the dense stage is on", remedy="leave lighthouse_fx.dense()")

Compiled = Callable[..., Any]


def lighthouse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Rewrite a graph's attention, where it trains, and compile it with Inductor.

    Args:
        options: fields of `LighthouseConfig`, and options of Inductor (`torch._inductor.list_options()`).
        mode: as for `torch.compile`, such as "max-autotune"; not together with options.

    Raises:
        TypeError, ValueError: an unknown or bad option, naming it and the valid ones.
    """
    config, patches = split_options(options or {})
    if mode is not None:
        patches |= dynamo.list_mode_options(mode)
    report, rewritten = rewrite(gm, example_inputs, config)
    compiled = cast(Compiled, dynamo.compile_fx(rewritten, example_inputs, config_patches=patches))
    journal.add(report)  # not before: Dynamo may abandon a compilation and start it again
    return _running(compiled, report)


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], own: LighthouseConfig
) -> tuple[GraphReport, fx.GraphModule]:
    """Guard the graph, run the passes and record what they did.

    Args:
        own: the backend's own options, which the stage may override.
    """
    _artifact("before", gm)
    config = stage.current.resolve(own)
    modules = dynamo.ModuleSources(gm)
    refusal = _without_gradients()
    if refusal is None:  # Dynamo guards on the gradient mode; the stage matters only where gradients are on
        dynamo.guard_on_stage()
        refusal = _DENSE_STAGE if config is None else None
    if refusal is not None:
        gm.meta[DENSE] = refusal
    gm.meta[LAYERS] = modules.layer_counts()
    gm.meta[TRAINING] = modules.training
    before = as_networkx(gm)
    gm = run_passes(gm, example_inputs, config=config or own)
    calls = gm.meta[CALLS]
    before = mark_calls(before, calls)
    report = GraphReport(calls=tuple(map(record, calls)), before=before, after=as_networkx(gm, calls))
    _log.info("%s", report.summary())
    _artifact("after", gm)
    return report, gm


def split_options(options: Mapping[str, Any]) -> tuple[LighthouseConfig, dict[str, Any]]:
    """Tell our options from Inductor's.

    Raises:
        TypeError: an option that neither knows.
    """
    ours = {name: value for name, value in options.items() if name in config_field_names()}
    rest = {name: value for name, value in options.items() if name not in ours}
    known = set(dynamo.list_options())
    for name, value in rest.items():
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, [*config_field_names(), *known], n=3)
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            raise TypeError(
                f"options has {name}={value!r}, which is unknown{hint}: use one of {', '.join(config_field_names())}, "
                f"or one of Inductor's {len(known)} options, torch._inductor.list_options()"
            )
    return LighthouseConfig(**ours), rest


def _without_gradients() -> Refusal | None:
    if torch.is_inference_mode_enabled():
        return Refusal(reason="inference mode")
    if not torch.is_grad_enabled():
        return Refusal(reason="gradients are off (no_grad)")
    return None


def _running(compiled: Compiled, report: GraphReport) -> Compiled:
    """The compiled graph, counted when it runs; without gradients, refused inside a reentrant checkpoint.

    Reentrant checkpointing runs the forward without gradients, so dense, and the recomputation with them, so rewritten:
    the gradients would belong to another function than the loss. Only the run can see it.
    """
    if report.rewritten:

        def run(*args: Any) -> Any:
            journal.runs.rewritten += 1
            return compiled(*args)

        return run
    if report.calls and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():

        def checked(*args: Any) -> Any:
            if stage.current.kind != "dense" and dynamo.in_reentrant_checkpoint():
                raise RuntimeError(
                    "reentrant activation checkpointing around a model compiled with backend='lighthouse' would compute a "
                    "dense forward and a Lighthouse recomputation: call torch.utils.checkpoint.checkpoint(..., "
                    "use_reentrant=False); in transformers, gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return compiled(*args)

        return checked
    return compiled


def _artifact(when: str, gm: fx.GraphModule) -> None:
    """The graph in TORCH_TRACE, for tlparse."""
    dynamo.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"lighthouse_{when}_passes", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=False, include_device=False),
    )
