"""`compile(model)`: compile a model's repeated blocks in place, the documented default.

Block by block is how large models are compiled (one graph for all equal blocks, and what FSDP2 needs). A block's graph
does not know its number, so layers stay dense by being compiled with a backend that rewrites nothing, and only keeps their
attention inside documents where these are on. Each Lighthouse block notes at every
training step whether its attention really was rewritten, because PyTorch may stop compiling without an error.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lighthouse_fx.backend import lighthouse_excluded, split_options
from lighthouse_fx.kernels.torch_private import dynamo_config, list_mode_options
from lighthouse_fx.passes.attention_call import Layer
from lighthouse_fx.passes.config import LighthouseConfig, config_field_names
from lighthouse_fx.passes.decide.policy import excludes, unmatched
from lighthouse_fx.report.report import AttentionRecord, NotRewritten
from lighthouse_fx.runtime import journal, stage

Model = TypeVar("Model", bound=nn.Module)

DENSE_LAYERS = (0, 1, -2, -1)  # paper: the first and last two


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
            such as "model.layers.3". By default those of `config`, and if it names none, the first and last two.
        strict: raise if a Lighthouse block runs no rewritten attention in the first training step outside `dense()`. Where
            that happens in a later step, a RuntimeWarning says so once, strict or not.
        compile_arguments: passed on to `torch.compile`: `fullgraph`, `dynamic`, `mode`; `options` for Inductor.

    Returns:
        The model itself. Its eager code and parameters are untouched. A copy of it (deepcopy, pickle) is not compiled.

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
    names = _names_of_blocks(model)
    config = replace(config, dense_layers=_chosen(config, dense_layers))
    dense = _dense(config, list(names.values()))
    arguments, inductor = _arguments(compile_arguments, len(names))
    ours = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "dense_layers"}
    of_documents = {name: ours[name] for name in ("kernel", "max_documents", "assume_causal")}
    watch = _Watch([name for name in names.values() if name not in dense], strict=strict)
    for block, name in names.items():
        if name in dense:
            block.compile(backend=lighthouse_excluded, options={**of_documents, **inductor}, **arguments)
        else:
            block.compile(backend="lighthouse", options={**ours, **inductor}, **arguments)
            block._compiled_call_impl = _WatchedCall(block, name, watch)
    return model


def repeated_blocks(model: nn.Module) -> nn.ModuleList | nn.ModuleDict:
    """The model's layers: the module list with the most parameters, or the dict of numbered ones that torchtitan has.

    Raises:
        ValueError: where none holds blocks of one class.
    """
    lists = [
        m
        for m in model.modules()
        if (isinstance(m, nn.ModuleList) or (isinstance(m, nn.ModuleDict) and all(map(str.isdecimal, m))))
        and len({type(block) for block in m.children()}) == 1
    ]
    if not lists:
        raise ValueError(
            f"model={type(model).__name__} has no ModuleList of equal blocks: "
            "use torch.compile(model, backend='lighthouse') on it as a whole"
        )
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


# --- arguments --------------------------------------------------------------------------------------------------------


def _names_of_blocks(model: nn.Module) -> dict[nn.Module, str]:
    """The blocks in order, each with its name in the model; one that occurs twice is one."""
    names = {id(module): name for name, module in model.named_modules()}
    return {block: names[id(block)] for block in repeated_blocks(model).children()}


def _chosen(config: LighthouseConfig, dense_layers: Any) -> tuple[int | str, ...]:
    if dense_layers is None:
        return config.dense_layers or DENSE_LAYERS
    if config.dense_layers:
        raise ValueError(
            f"dense_layers={dense_layers!r}, and config has dense_layers={config.dense_layers!r}: give one of them"
        )
    return replace(config, dense_layers=dense_layers).dense_layers


def _dense(config: LighthouseConfig, names: Sequence[str]) -> set[str]:
    """The names of the blocks that stay dense."""
    places = [Layer(path="", number=number, count=len(names)) for number in range(len(names))]
    if missing := unmatched(config, names, places[:1]):
        raise ValueError(
            f"dense_layers has {missing[0]!r}, and the model has {len(names)} blocks, {names[0]} to {names[-1]}: use "
            f"-{len(names)} to {len(names) - 1}, or patterns of these names"
        )
    dense = {
        name
        for name, place in zip(names, places, strict=True)
        if any(excludes(wanted, module=name, layer=place) for wanted in config.dense_layers)
    }
    if len(dense) == len(names):
        raise ValueError(
            f"dense_layers={config.dense_layers} keeps all {len(names)} blocks dense: leave some out, such as "
            f"dense_layers={(0, -1) if len(names) > 2 else ()}"
        )
    return dense


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


# --- what really ran --------------------------------------------------------------------------------------------------

_CAUSES = (
    "no graph with an attention call ran. Either they call no scaled_dot_product_attention (in transformers: "
    "attn_implementation='sdpa'), or they are modules of torch itself, which Dynamo skips (wrap each in a module of your "
    "own), or Dynamo's recompile limit was hit, after which code runs as it is written, dense. Then give transformers "
    "models use_cache=False, which otherwise need a graph per layer; raise "
    "torch._dynamo.config.recompile_limit before lighthouse_fx.compile; fullgraph=True makes the limit an error"
)


class _Watch:
    """Whether each Lighthouse block of one model ran rewritten attention, step by step."""

    def __init__(self, names: Sequence[str], *, strict: bool) -> None:
        self.last = names[-1]
        self.strict = strict
        self.first = True
        self.rewrote = False
        self.warned = False
        self.seen: set[str] = set()
        self.missed: dict[str, str] = {}  # name -> why

    def note(self, name: str, calls: Iterable[AttentionRecord]) -> None:
        """A block ran, with these attention calls. When all have, the step is judged."""
        if name in self.seen:
            self._judge()  # the last block was left out
        self.seen.add(name)
        calls = list(calls)
        if any(call.rewritten for call in calls):
            self.rewrote = True
        else:
            self.missed[name] = "; ".join(dict.fromkeys(call.reason for call in calls)) or _CAUSES
        if name == self.last:
            self._judge()

    def _judge(self) -> None:
        missed, self.missed = self.missed, {}
        self.seen.clear()
        first, self.first = self.first, False
        if not missed:
            return
        reasons = dict.fromkeys(missed.values())
        why = ". ".join(f"{', '.join(n for n in missed if missed[n] == reason)}: {reason}" for reason in reasons)
        if first and self.strict:
            raise NotRewritten(
                f"strict=True: in the first training step {len(missed)} Lighthouse blocks ran no rewritten attention. {why}. "
                "See lighthouse_fx.reports(), or pass strict=False"
            )
        if self.rewrote and not self.warned:
            self.warned = True
            warnings.warn(
                f"in a training step {len(missed)} Lighthouse blocks ran no rewritten attention, while others did or they did "
                f"before. {why}. This is said once",
                RuntimeWarning,
                stacklevel=2,
            )


class _WatchedCall:
    """A block's compiled call, observed from outside the graph. Everything else about it is that of the compiled call."""

    def __init__(self, block: nn.Module, name: str, watch: _Watch) -> None:
        self.compiled = block._compiled_call_impl
        self.block, self.name, self.watch = block, name, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.compiled is not None
        if torch.compiler.is_dynamo_compiling():  # an outer graph takes the block in: nothing runs yet
            return self.block._call_impl(*args, **kwargs)
        if not (self.block.training and torch.is_grad_enabled() and stage.current.kind != "dense"):
            return self.compiled(*args, **kwargs)
        with journal.watch() as calls:
            out = self.compiled(*args, **kwargs)
        if _trains(out):
            self.watch.note(self.name, calls)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


def _trains(out: Any) -> bool:
    """Whether something trains through a block's output: not where frozen layers only pass data on."""
    tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
    return not tensors or any(x.requires_grad for x in tensors)
