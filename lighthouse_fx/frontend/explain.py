"""`explain(model, ...)`: what the backend would do with a model, without training or even computing anything."""

from __future__ import annotations

import inspect
import mmap
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lighthouse_fx.backend import rewrite
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import GraphReport, Report

from .existing_compilation import Setting, setting_of
from .preserve_modules import as_written, untouched

_NO_LIMIT = 1 << 30
_SMALL = 1 << 20  # bytes: what is not worth a mapping of its own
_NO_GRAPH = (
    "Dynamo traced no graph at all, so nothing is known of this model: either it skips the model's code, or (before torch "
    "2.12) this process has traced that code as often as torch._dynamo.config.recompile_limit allows; then call "
    "torch._dynamo.reset() first"
)


def explain(model: Callable[..., Any], *args: Any, config: LighthouseConfig | None = None, **kwargs: Any) -> Report:
    """Trace a model as `torch.compile(model, backend="lighthouse")` would, and report on every attention call.

    No graph is run: what it would return is replaced by zeros. The model's Python code does run, once, and where it breaks
    the graph (`.item()`, a disabled function) it runs on those zeros. Afterwards the attributes of the model's modules are
    what they were; what the code does elsewhere (globals, printing, tensors written between graphs) is not undone, and
    Dynamo keeps, as after any compilation, what it traced of a model that breaks its graph; before torch 2.12 that counts
    towards its recompile limit.
    Train or eval mode, gradient mode and the stage are taken as they are now.

    Args:
        model: a module or a function, compiled or not; args, kwargs: as for calling it.
        config: the backend's options. By default those that the model was compiled with, by `torch.compile`, block by
            block or by `lighthouse_fx.compile`, otherwise `LighthouseConfig()`. What is compiled with another backend is
            shown as this one would treat it, or as dense if other parts of the model are compiled with this one.

    Returns:
        The report: `print(report)`, `report.calls`, `report.graphs`, `report.save("graph.html")`. `report.notes` says
        what it could not find out.
    """
    if not callable(model):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a Module or a function")
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    setting = setting_of(model)
    if config is not None:
        setting = Setting(config=config, dynamic=setting.dynamic)
    graphs: list[GraphReport] = []

    def record_only(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outputs = _outputs(gm)
        report, *_ = rewrite(gm, example_inputs, setting.config)
        graphs.append(_restated(report, setting))
        return lambda *_: tuple(map(_stand_in, outputs))

    with untouched((model, *args, *kwargs.values())), as_written(model):
        compile_anew(model, record_only, dynamic=bool(setting.dynamic))(*args, **kwargs)
    return Report(graphs=tuple(graphs), title=_title(model), notes=setting.notes if graphs else (*setting.notes, _NO_GRAPH))


def compile_anew(
    model: Callable[..., Any], backend: str | Callable[..., Any], *, dynamic: bool = False, **arguments: Any
) -> Callable[..., Any]:
    """A function that calls the model, compiled, with a code object of its own; what the model is compiled with is gone.

    Dynamo keeps compiled graphs by code object: neither does this trace find an earlier one, nor a later call this one. Each
    call is a first one: without `dynamic=False`, a second at another length would be traced with dynamic shapes.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    fresh = types.FunctionType(call.__code__.replace(), call.__globals__, "explain", None, call.__closure__)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # where a model breaks its graph, traces add up
        arguments["recompile_limit"] = _NO_LIMIT
    return torch.compile(fresh, backend=backend, dynamic=dynamic, **arguments)


def _title(model: Callable[..., Any]) -> str:
    model = getattr(model, "_orig_mod", model)
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "function")


def _restated(report: GraphReport, setting: Setting) -> GraphReport:
    """Parts of the model that are not this backend's were traced as layers to exclude; here is why they are."""
    calls = (
        replace(call, reason=why, remedy="")
        if not call.rewritten and (why := setting.reason(call.module))
        else call
        for call in report.calls
    )
    return replace(report, calls=tuple(calls))


# --- stand-ins for what a graph returns -------------------------------------------------------------------------------


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What Dynamo saw at each output of the graph."""
    (output,) = gm.graph.find_nodes(op="output")
    values: tuple[Any, ...] = output.args[0]
    return tuple(v.meta.get("example_value") if isinstance(v, fx.Node) else v for v in values)


def _stand_in(value: Any) -> Any:
    """Zeros like an output, so that tracing can go on: like a computed tensor they are no leaf, so may be written to."""
    if not isinstance(value, torch.Tensor):
        return _known(value)
    if not value.requires_grad:
        return _zeros(value)
    with torch.enable_grad():
        anchor = torch.zeros((), device=value.device, requires_grad=True)
        return _Computed.apply(anchor, value)  # type: ignore[no-untyped-call]


class _Computed(torch.autograd.Function):
    """Zeros with a gradient function. Made inside, because an argument that is returned would become a view."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _zeros(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


def _zeros(value: torch.Tensor) -> torch.Tensor:
    """Zeros of a value's shape, strides and dtype. On the CPU they take no memory before somebody writes to them."""
    size = [_known(n) for n in value.shape]
    try:
        stride = [_known(n) for n in value.stride()]
        reach = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
        flat = _flat_zeros(reach * value.element_size(), value.device)
    except (RuntimeError, OSError):  # no strides (nested, sparse), or no memory: one element for all, not to be written to
        stride, flat = [0] * len(size), torch.zeros(value.element_size(), dtype=torch.uint8, device=value.device)
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(flat.untyped_storage(), 0, size, stride)


def _flat_zeros(count: int, device: torch.device) -> torch.Tensor:
    """Bytes that are zero. The outputs of a graph may be larger than this machine's memory, as nothing is computed."""
    if device.type != "cpu" or count < _SMALL or sys.platform != "linux":
        return torch.zeros(count, dtype=torch.uint8, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has no name for it
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _known(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
