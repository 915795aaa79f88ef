"""What each pass changed, for `TORCH_LOGS="+lighthouse_fx"` and TORCH_TRACE.

    rewrite_attention: +3 lighthouse_fx.gather, +1 lighthouse_fx.scatter, ...; 2 attention calls, 1 to be rewritten

The graph before the first pass and after each pass that changed it follows: in the log at debug level, in TORCH_TRACE as an
artifact `lighthouse_pass_NN_name`, which tlparse shows beside Dynamo's graphs. With neither on, nothing is counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lighthouse_fx.kernels.torch_private import trace_log, trace_structured

from .attention_call import CALLS
from .config import LighthouseConfig
from .ir.subgraphs import regions

_log = logging.getLogger("lighthouse_fx")


class PassLog:
    """Runs passes over one graph and logs what they change."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.on = _log.isEnabledFor(logging.DEBUG) or bool(trace_log.handlers)
        self._number = 0
        if self.on:
            self._before = _count(gm)
            self._show("before", gm)

    def run(
        self, step: Callable[..., fx.GraphModule], gm: fx.GraphModule, inputs: Sequence[Any], *, config: LighthouseConfig
    ) -> fx.GraphModule:
        """Run a pass, and log it."""
        gm = step(gm, inputs, config=config)
        if self.on:
            self._number += 1
            after = _count(gm)
            calls = gm.meta.get(CALLS, ())
            _log.debug(
                "%s: %s; %d attention calls, %d not refused",
                step.__name__,
                _difference(self._before, after),
                len(calls),
                sum(call.refusal is None for call in calls),
            )
            if after != self._before:
                self._show(step.__name__, gm)
            self._before = after
        return gm

    def _show(self, name: str, gm: fx.GraphModule) -> None:
        graph = gm.print_readable(print_output=False, include_stride=False, include_device=False)
        _log.debug("graph %s:\n%s", name if name == "before" else f"after {name}", graph)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"lighthouse_pass_{self._number:02}_{name}", "encoding": "string"},
            payload_fn=lambda: graph,
        )


def _count(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation stands in a graph and its subgraphs."""
    return Counter(_name(node) for region in regions(gm) for node in region.gm.graph.nodes if node.op != "output")


def _name(node: fx.Node) -> str:
    if node.op == "call_function":
        return str(node.target if "." in str(node.target) else getattr(node.target, "__name__", node.target))
    return f".{node.target}" if node.op == "call_method" else node.op


def _difference(before: Counter[str], after: Counter[str]) -> str:
    changes = {name: after[name] - before[name] for name in sorted(before | after)}
    return ", ".join(f"{change:+} {name}" for name, change in changes.items() if change) or "no operation changed"
