"""`compile(model)`: compile a model's repeated blocks in place, the documented default.

Block by block is how large models are compiled (one graph for all equal blocks, and what FSDP2 needs). A block's graph
does not know its number, so layers stay dense by being compiled with Inductor alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import journal, stage
from .config import LighthouseConfig

Model = TypeVar("Model", bound=nn.Module)

_configs: WeakKeyDictionary[nn.Module, LighthouseConfig] = WeakKeyDictionary()


def compile(
    model: Model,
    config: LighthouseConfig | None = None,
    *,
    dense_layers: Sequence[int] = (0, 1, -2, -1),
    strict: bool = True,
    **compile_arguments: Any,
) -> Model:
    """Compile the model's repeated blocks in place with `backend="lighthouse"`, some with Inductor alone.

    Args:
        config: the backend's options, `LighthouseConfig()` by default.
        dense_layers: numbers of the blocks that stay dense; negative ones count from the end. Paper: the first and last two.
        strict: raise if the first training step outside `dense()` runs no rewritten attention at all.
        compile_arguments: passed on to `torch.compile`: `fullgraph`, `dynamic`; `options` for Inductor.

    Returns:
        The model itself. Its eager code and parameters are untouched.

    Raises:
        ValueError: no repeated blocks, a layer number out of range, or no block left for Lighthouse.
    """
    config = LighthouseConfig() if config is None else config
    if not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    blocks = repeated_blocks(model)
    count = len(blocks)
    for number in dense_layers:
        if not isinstance(number, int) or not -count <= number < count:
            raise ValueError(
                f"dense_layers has {number!r}, and the model has {count} blocks: use -{count} to {count - 1}"
            )
    dense = {number % count for number in dense_layers}
    if len(dense) == count:
        raise ValueError(
            f"dense_layers={tuple(dense_layers)} keeps all {count} blocks dense: leave some out, such as dense_layers=(0, -1)"
        )
    inductor = dict(compile_arguments.pop("options", None) or {})
    ours = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "dense_layers"}
    for number, block in enumerate(blocks):
        if number in dense:
            block.compile(backend="inductor", options=inductor or None, **compile_arguments)
        else:
            block.compile(backend="lighthouse", options={**ours, **inductor}, **compile_arguments)
    names = {id(module): name for name, module in model.named_modules()}
    _configs[model] = replace(config, dense_layers=tuple(names[id(blocks[number])] for number in sorted(dense)))
    if strict:
        _require_rewriting(model)
    return model


def config_of(model: object) -> LighthouseConfig | None:
    """What `compile` was told for a model, its dense blocks by name; None for a model that it never saw."""
    return _configs.get(model) if isinstance(model, nn.Module) else None


def repeated_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's layers: the module list with the most parameters.

    Raises:
        ValueError: where no module list holds blocks of one class.
    """
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0 and len({type(b) for b in m}) == 1
    ]
    if not lists:
        raise ValueError(
            f"model={type(model).__name__} has no ModuleList of equal blocks: "
            "use torch.compile(model, backend='lighthouse') on it as a whole"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def _require_rewriting(model: nn.Module) -> None:
    """At the first training step, compare how many rewritten graphs ran before and after."""
    before: list[int] = []

    def applies(module: nn.Module) -> bool:
        # A tracer (explain) runs nothing, so there is nothing to count.
        return (
            not torch.compiler.is_compiling()
            and module.training
            and torch.is_grad_enabled()
            and stage.current.kind != "dense"
        )

    def start(module: nn.Module, args: Any) -> None:
        before[:] = [journal.runs.rewritten] if applies(module) else []

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        if not before or not applies(module):
            return
        opening.remove()
        closing.remove()
        if journal.runs.rewritten == before[0]:
            reasons = dict.fromkeys(call.reason for graph in journal.reports() for call in graph.calls if call.reason)
            raise RuntimeError(
                "strict=True: no attention was rewritten in the first training step"
                + (f"; reasons: {'; '.join(reasons)}" if reasons else "; no attention call was found")
                + ". See lighthouse_fx.reports(), or pass strict=False"
            )

    opening = model.register_forward_pre_hook(start)
    closing = model.register_forward_hook(finish)
