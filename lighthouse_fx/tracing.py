"""`explain(model, ...)`: what the backend would do with a model, without training or even computing anything."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from .backend import rewrite
from .blocks import config_of
from .config import LighthouseConfig
from .report import GraphReport, Report


def explain(model: Callable[..., Any], *args: Any, config: LighthouseConfig | None = None, **kwargs: Any) -> Report:
    """Trace a model as `torch.compile(model, backend="lighthouse")` would, and report on every attention call.

    Nothing is computed on the model's tensors beyond what Python code between graphs asks for, and nothing is changed.
    Train or eval mode, gradient mode and the stage are taken as they are now.

    Args:
        model: a module or a function; args, kwargs: as for calling it.
        config: the backend's options; by default those of `lighthouse_fx.compile(model)` where that was called, its dense
            layers included, otherwise `LighthouseConfig()`.

    Returns:
        The report: `print(report)`, `report.calls`, `report.graphs`, `report.save("graph.html")`.
    """
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    own = config or config_of(model) or LighthouseConfig()
    graphs: list[GraphReport] = []

    def record_only(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outputs = _outputs(gm)
        report, _ = rewrite(gm, example_inputs, own)
        graphs.append(report)
        return lambda *_: tuple(map(_placeholder, outputs))

    torch.compile(_fresh(model), backend=record_only)(*args, **kwargs)
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "function")
    return Report(graphs=tuple(graphs), title=name)


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls the model, with a code object of its own.

    Dynamo keeps compiled graphs by code object: neither does this trace find an earlier one, nor a later call this one.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "explain", None, call.__closure__)


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    """What Dynamo saw at each output of the graph."""
    (output,) = gm.graph.find_nodes(op="output")
    values: tuple[Any, ...] = output.args[0]
    return tuple(v.meta.get("example_value") if isinstance(v, fx.Node) else v for v in values)


def _placeholder(value: Any) -> Any:
    """Zeros in place of an output, of its shape and dtype but without its memory, so that tracing can go on."""
    if isinstance(value, torch.Tensor):
        zero = torch.zeros((), dtype=value.dtype, device=value.device, requires_grad=value.requires_grad)
        return zero.expand([_known(size) for size in value.shape])
    return _known(value)


def _known(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size
