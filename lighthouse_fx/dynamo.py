"""Everything that the backend needs of Dynamo's internals, in one place: guards, module sources, mode options.

These names are private to PyTorch; a release that moves one of them fails here, by name. Tried on torch 2.11 and 2.13.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

try:
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource, ImportSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import Guard, Source, TracingContext
    from torch._inductor import list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx
    from torch._logging._internal import trace_structured
except ImportError as error:  # pragma: no cover - depends on the torch release
    raise ImportError(
        f"lighthouse-fx does not know torch {torch.__version__}: {error}. Use torch 2.11 to 2.13, or a newer lighthouse-fx"
    ) from error

__all__ = [
    "ModuleSources",
    "compile_fx",
    "guard_on_stage",
    "in_reentrant_checkpoint",
    "list_mode_options",
    "list_options",
    "trace_structured",
]


def guard_on_stage() -> None:
    """Make the graph that is being compiled valid only for the stage that is on now."""
    _guard(AttrSource(AttrSource(ImportSource("lighthouse_fx"), "stage"), "key"))


def _guard(source: Source) -> None:
    context = TracingContext.try_get()
    if context is not None:  # None where a user calls the backend by hand: nothing is cached then
        context.guards_context.dynamo_guards.add(Guard(source, GuardBuilder.EQUALS_MATCH))


class ModuleSources:
    """The user's modules behind a graph, found by the sources of its parameters and buffers."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._modules = dict(_modules_behind(gm))

    def training(self, node: fx.Node) -> bool:
        """Whether the innermost known module around a node trains; the graph will be valid only while that stays so.

        A node outside any module counts as training: there is no `eval()` to heed.
        """
        stack = node.meta.get("nn_module_stack") or {}
        for path, *_ in reversed(stack.values()):
            found = self._modules.get(_dotted(path))
            if found is not None:
                source, module = found
                _guard(AttrSource(source, "training"))
                return module.training
        return True

    def layer_counts(self) -> Mapping[str, int]:
        """The length of every module list, by its path below the outermost module."""
        lists = {
            path: module
            for path, (_, module) in self._modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential)
        }
        return {path.partition(".")[2]: len(module) for path, module in lists.items()}


def _modules_behind(gm: fx.GraphModule) -> Iterator[tuple[str, tuple[Source, nn.Module]]]:
    scope = _scope()
    seen: set[str] = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        while source is not None:
            name = _name(source)
            if name not in seen:  # a module's source comes wrapped in another of the same name
                seen.add(name)
                value = _value(name, scope)
                if isinstance(value, nn.Module):
                    yield _dotted(name), (source, value)
            source = getattr(source, "base", None)


def _name(source: Source) -> str:
    name = source.name
    return name() if callable(name) else name  # a method before torch 2.13


def _scope() -> dict[str, Any]:
    """What `L[...]` and `G[...]` in the names of sources stand for."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return {}
    return {"L": root.f_locals, "G": root.f_globals, "__builtins__": {}}


def _value(name: str, scope: dict[str, Any]) -> Any:
    try:
        return eval(name, dict(scope))  # the same expression that Dynamo's own guards evaluate
    except Exception:
        return None  # a source that is no plain expression is no module either


def _dotted(name: str) -> str:
    """`L['self']._modules['layers']._modules['0']` and `L['self'].layers.0` both become `L:self.layers.0`."""
    name = re.sub(r"\._modules\['([^']+)'\]", r".\1", name)
    name = re.sub(r"getattr\((.+?), '(\w+)'\)", r"\1.\2", name)
    name = re.sub(r"\[['\"]?([\w.]+)['\"]?\]", r".\1", name)
    return re.sub(r"^([LG])\.", r"\1:", name)


def in_reentrant_checkpoint() -> bool:
    """Whether this call comes from the forward of a reentrant activation checkpoint."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_qualname == "CheckpointFunction.forward":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
