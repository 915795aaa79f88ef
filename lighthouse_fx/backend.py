"""The backend: `torch.compile(model, backend="lighthouse")`.

    Dynamo's graph -> passes -> Inductor

Registered by the entry point in pyproject.toml, so no import is needed. It decides whether this graph trains under
Lighthouse at all, makes the graph valid only while that stays so, and otherwise hands the graph to Inductor as it came.
"""

from __future__ import annotations

import difflib
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, cast
from weakref import ref

import torch
from torch import fx

from .kernels.torch_private import (
    TorchCompileWrapper,
    cache_entries,
    compile_fx,
    dynamo_config,
    list_mode_options,
    list_options,
    trace_structured,
)
from .passes import CALLS, CONTEXT, AttentionCall, PassContext, Refusal, run_passes
from .passes.config import LighthouseConfig, config_field_names
from .passes.decide.policy import unmatched
from .passes.rewrite.shared_subgraphs import separate_callers, share_again
from .report.report import GraphReport, as_networkx, mark_calls, record
from .runtime import document_inputs, guards, journal, stage, wrappers
from .runtime.modules import Modules
from .runtime.wrappers import Compiled

_log = logging.getLogger("lighthouse_fx")

_DENSE_STAGE = Refusal(reason="the dense stage is on", remedy="leave lighthouse_fx.dense()")
EXCLUDED_BY_COMPILE = "layer excluded: lighthouse_fx.compile keeps its block dense (dense_layers)"
# While Dynamo compiles, inference mode looks like no_grad: it switches the one off and leaves the other on.
_WITHOUT_GRADIENTS = Refusal(reason="gradients are off (no_grad or inference_mode)")


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
    config, patches = split_options(_keep_options(options or {}))
    if mode is not None:
        patches |= list_mode_options(mode)
    return _compiled(gm, example_inputs, config, patches)


def lighthouse_excluded(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend of layers that stay dense in every stage: Inductor alone, but that attention is kept inside documents."""
    config, patches = split_options(_keep_options(options or {}))
    return _compiled(gm, example_inputs, config, patches, excluded=Refusal(reason=EXCLUDED_BY_COMPILE))


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: LighthouseConfig,
    patches: dict[str, Any],
    excluded: Refusal | None = None,
) -> Compiled:
    report, rewritten, conditions = rewrite(gm, example_inputs, config, excluded)
    calls: Sequence[AttentionCall] = rewritten.meta[CALLS]
    share_again(rewritten)
    example_inputs = [*example_inputs, *document_inputs.example_documents(rewritten)]
    compiled = cast(Compiled, compile_fx(rewritten, example_inputs, config_patches=patches))
    compiled = document_inputs.bind_documents(compiled, rewritten, conditions.state.stage.resolve(config) or config)
    compiled = document_inputs.warn_of_unaware_calls(compiled, report.calls)
    journal.add(report)  # not before: Dynamo may abandon a compilation and start it again
    _report_recompile_limit(conditions.code, report.rewritten > 0)
    if not any(call.exact or call.rewritable for call in calls):
        return wrappers.record_runs(compiled, report.calls) if calls else compiled
    rewritable = any(call.rewritable for call in calls)
    if torch.is_grad_enabled() or not rewritable:
        compiled = wrappers.check_checkpoints(compiled, report.calls, config if rewritable else None, conditions.around)
    else:
        would = any(call.refusal is _WITHOUT_GRADIENTS for call in calls)
        compiled = wrappers.check_reentrant(compiled, report.calls, conditions.around, rewritten=would)
    return wrappers.check_conditions(compiled, conditions)


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], own: LighthouseConfig, excluded: Refusal | None = None
) -> tuple[GraphReport, fx.GraphModule, guards.Conditions]:
    """Guard the graph, run the passes and record what they did.

    Args:
        own: the backend's own options, which the stage may override.
        excluded: why the whole graph stays dense, whatever the stage says.

    Returns:
        The record, the rewritten graph, and what that graph is valid for.
    """
    _artifact("before", gm)
    state = stage.now()
    config = state.stage.resolve(own)
    gradients = torch.is_grad_enabled()
    modules = Modules(gm)
    separate_callers(gm)
    modules.name_nodes(gm)
    # Before anything is noted in its meta: DDP copies the graph that it gave, meta and all.
    gm = document_inputs.allow_document_input(gm)
    gm.meta[CONTEXT] = PassContext(
        no_gradients=None if gradients else _WITHOUT_GRADIENTS,
        dense=_DENSE_STAGE if config is None else None,
        excluded=excluded,
        packed=document_inputs.shape_of_documents(),
        layer=modules.layer,
        training=modules.training,
    )
    before = as_networkx(gm)
    gm = run_passes(gm, example_inputs, config=config or own)
    del gm.meta[CONTEXT]  # it holds the user's modules
    calls = gm.meta[CALLS]
    document_inputs.drop_unused_inputs(gm)
    exact, rewritable = any(call.exact for call in calls), any(call.rewritable for call in calls)
    on_stage = (gradients and rewritable) or (exact and state.packed)  # Dynamo guards on the gradient mode
    if exact or rewritable:
        guards.guard_on_documents()
    if on_stage:
        guards.guard_on_stage()
    conditions = guards.Conditions(
        state=state,
        stage=on_stage,
        documents=exact or rewritable,
        modes=modules.modes,
        around=tuple(ref(module) for call in calls if call.rewritable for _, module in modules.around(call.node)),
    )
    if gradients and rewritable and config is not None:
        _report_unmatched(config, modules, calls)
        _report_unnumbered(calls)
    modules.name_nodes(gm)  # the new ones
    before = mark_calls(before, calls)
    report = GraphReport(calls=tuple(map(record, calls)), before=before, after=as_networkx(gm, calls))
    _log.info("%s", report.summary())
    _artifact("after", gm)
    return report, gm, conditions


def _keep_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Make later compilations of the same `torch.compile` call see the options of this one.

    It holds the caller's own dict, which may be changed since, for another model.
    """
    held_by = sys._getframe(2).f_locals.get("self")
    if isinstance(held_by, TorchCompileWrapper) and held_by.kwargs.get("options") is options:
        held_by.kwargs["options"] = dict(options)
    return options


def split_options(options: Mapping[str, Any]) -> tuple[LighthouseConfig, dict[str, Any]]:
    """Tell our options from Inductor's.

    Raises:
        TypeError: an option that neither knows.
    """
    ours = {name: value for name, value in options.items() if name in config_field_names()}
    rest = {name: value for name, value in options.items() if name not in ours}
    known = set(list_options())
    for name, value in rest.items():
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, [*config_field_names(), *known], n=3)
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            raise TypeError(
                f"options has {name}={value!r}, which is unknown{hint}: use one of {', '.join(config_field_names())}, "
                f"or one of Inductor's {len(known)} options, torch._inductor.list_options()"
            )
    return LighthouseConfig(**ours), rest


def _report_unmatched(config: LighthouseConfig, modules: Modules, calls: Sequence[AttentionCall]) -> None:
    """Warn of entries of `dense_layers` that mean nothing in the user's model."""
    layers = {layer.path: layer for call in calls if (layer := modules.layer(call.node))}
    names = set().union(*(modules.names(call.node) for call in calls if call.module))
    found = [f"{layer.count} layers in {layer.path!r}, 0 to {layer.count - 1}" for layer in layers.values()]
    if not found:
        found = [f"attention in {', '.join(map(repr, dict.fromkeys(call.module for call in calls)))}"]
    for wanted in unmatched(config, names, layers.values()):
        warnings.warn(f"dense_layers has {wanted!r}, which matches nothing: there are {'; '.join(found)}", stacklevel=2)


def _report_unnumbered(calls: Sequence[AttentionCall]) -> None:
    """Warn of calls that stay dense because the graph does not show their layer's number."""
    for call in calls:
        if call.refusal is not None and call.refusal.reason.startswith("dense_layers has"):
            warnings.warn(f"attention stays dense: {call.refusal.reason}: {call.refusal.remedy}", stacklevel=2)
            return


def _report_recompile_limit(code: CodeType | None, rewritten: bool) -> None:
    """Note, and where nobody watches what runs warn, that a function has as many graphs as Dynamo keeps."""
    if code is None or len(cache_entries(code)) + 1 < dynamo_config.recompile_limit:
        return
    function = f"{code.co_name} in {code.co_filename}:{code.co_firstlineno}"
    journal.note_recompile_limit(function)
    if rewritten and not journal.is_watched():
        warnings.warn(
            f"Lighthouse attention: {function} now has {dynamo_config.recompile_limit} graphs, Dynamo's recompile limit. For "
            "another length, stage or shape its code will run as it is written, dense: raise "
            "torch._dynamo.config.recompile_limit, compile with dynamic=True, or pass fullgraph=True, which makes the limit an "
            "error",
            RuntimeWarning,
            stacklevel=2,
        )


def _artifact(when: str, gm: fx.GraphModule) -> None:
    """The graph in TORCH_TRACE, for tlparse."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"lighthouse_{when}_passes", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False, include_stride=False, include_device=False),
    )
