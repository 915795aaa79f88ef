"""`compile(model)`: compile a model's repeated blocks in place, the documented default.

Block by block is how large models are compiled (one graph for all equal blocks, and what FSDP2 needs). A block's graph
does not know its number, so layers stay dense by being compiled with a backend that rewrites nothing, and only keeps their
attention inside documents where these are on. Each Lighthouse block notes at every
training step whether its attention really was rewritten, because PyTorch may stop compiling without an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lighthouse_fx.backend import lighthouse_excluded, split_options
from lighthouse_fx.kernels.torch_private import dynamo_config, list_mode_options
from lighthouse_fx.passes.config import LighthouseConfig, config_field_names

from .block_calls import BlockCall, Watch, keep_out_of_graphs
from .blocks import choose_dense, find_blocks

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    config: LighthouseConfig | None = None,
    *,
    dense_layers: Sequence[int | str] | None = None,
    strict: bool = True,
    **compile_arguments: Any,
) -> Model:
    """Compile the model's repeated blocks in place with `backend="lighthouse"`, some of them dense.

    Args:
        config: the backend's options, `LighthouseConfig()` by default.
        dense_layers: the blocks that stay dense: numbers, negative ones counting from the end, or patterns of their names,
            such as "model.layers.3". By default those of `config`, and if it names none, the first and last two (fewer in a
            list of four blocks or less). In a model with several lists of blocks numbers mean blocks of each list.
        strict: raise if the blocks run no rewritten attention in the first training step outside `dense()`. Blocks without
            attention, or with sliding windows, are no failure while others are rewritten. Where Lighthouse blocks are dense
            otherwise, or in a later step, a RuntimeWarning says so once, strict or not.
        compile_arguments: passed on to `torch.compile`: `fullgraph`, `dynamic`, `mode`; `options` for Inductor.

    Returns:
        The model itself. Its eager code and parameters are untouched. A copy of it (deepcopy, pickle) is not compiled.
        Compiled once more as a whole, by a trainer say, its blocks stay as they are here, outside of that graph.

    Raises:
        TypeError, ValueError: a bad argument or option, no repeated blocks, an entry of `dense_layers` that matches none, or
            no block left for Lighthouse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r} is a {type(model).__name__}: give a Module, or use torch.compile on a function"
        )
    config = LighthouseConfig() if config is None else config
    if not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    if "backend" in compile_arguments:
        raise TypeError(f"backend={compile_arguments['backend']!r} is not for here: the backend is 'lighthouse'")
    lists = find_blocks(model)
    config = _entries(config, dense_layers)
    dense = set() if dense_layers is not None and not config.dense_layers else choose_dense(lists, config)
    arguments, inductor = _arguments(compile_arguments, sum(blocks.count for blocks in lists))
    ours = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "dense_layers"}
    of_documents = {name: ours[name] for name in ("kernel", "max_documents", "assume_causal")}
    watches: list[Watch] = []
    for blocks in lists:
        lighthouse = {name: block for block, name in blocks.names.items() if name not in dense}
        watch = Watch(lighthouse, watches, strict=strict) if lighthouse else None
        watches += [watch] if watch else []
        for block, name in blocks.names.items():
            if name in dense:
                block.compile(backend=lighthouse_excluded, options={**of_documents, **inductor}, **arguments)
            else:
                block.compile(backend="lighthouse", options={**ours, **inductor}, **arguments)
            block._compiled_call_impl = BlockCall(block, name, None if name in dense else watch)
            if keep_out_of_graphs not in block._forward_pre_hooks.values():
                block.register_forward_pre_hook(keep_out_of_graphs)
    return model


# --- arguments --------------------------------------------------------------------------------------------------------


def _entries(config: LighthouseConfig, dense_layers: Any) -> LighthouseConfig:
    """The configuration with the entries of `dense_layers`, wherever they were given."""
    if dense_layers is None:
        return config
    if config.dense_layers:
        raise ValueError(
            f"dense_layers={dense_layers!r}, and config has dense_layers={config.dense_layers!r}: give one of them"
        )
    return replace(config, dense_layers=dense_layers)


def _arguments(given: dict[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `torch.compile`, and options of Inductor."""
    arguments = dict(given)
    mode = arguments.pop("mode", None) or "default"  # torch takes mode or options, and options carry the config
    if mode not in (modes := list_mode_options()):
        raise ValueError(f"mode={mode!r} is unknown: use one of {', '.join(map(repr, modes))}")
    options = dict(arguments.pop("options", None) or {})
    for name in config_field_names():
        if name in options:
            raise TypeError(f"options has {name}={options[name]!r}, a field of LighthouseConfig: give it in config")
    split_options(options)  # raises for a name that Inductor does not know
    inductor = list_mode_options(mode) | options
    # Blocks that differ, in a layer's number say, need a graph each, and all count towards one limit.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not before torch 2.12
        arguments.setdefault("recompile_limit", dynamo_config.recompile_limit * count)
    return arguments, inductor
