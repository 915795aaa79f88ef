"""The calls of compiled blocks, watched from outside their graphs: whether the attention of each really ran rewritten.

PyTorch may stop compiling a block without an error, and another `torch.compile` around the model would take its blocks into
graphs of its own. Neither is seen from inside a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lighthouse_fx.kernels.torch_private import compile_stance, dynamo_config, graph_break, skip_code
from lighthouse_fx.report.report import AttentionRecord, NotRewritten
from lighthouse_fx.runtime import journal, stage

from .blocks import looks_like_attention

_NO_CALL = (
    "no graph with an attention call ran. Either they call no scaled_dot_product_attention (in transformers: "
    "attn_implementation='sdpa'), or they are modules of torch itself, which Dynamo skips (wrap each in a module of your own)"
)
_OUTSIDE = "blocks that lighthouse_fx.compile has compiled are no part of another graph: leave out fullgraph=True around them"


class BlockCall:
    """A block's compiled call. Everything else about it is that of the call that `torch.compile` made.

    Args:
        name: the block's name in the model.
        watch: where its attention is noted; None for a block that stays dense.
    """

    def __init__(self, block: nn.Module, name: str, watch: Watch | None) -> None:
        self.compiled = block._compiled_call_impl
        self.block, self.name, self.watch = block, name, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.compiled is not None
        if torch.compiler.is_dynamo_compiling():  # another compilation, around this one
            graph_break(msg=_OUTSIDE)
        watched = self.watch is not None and self.block.training and torch.is_grad_enabled()
        if not watched or stage.current.kind == "dense":
            return self.compiled(*args, **kwargs)
        with journal.watch() as calls:
            out = self.compiled(*args, **kwargs)
        if _trains(out):
            assert self.watch is not None
            self.watch.note(self.name, calls)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)


# A frame of this function is no graph's: called from a compiled model, the block runs as it was compiled itself.
skip_code(BlockCall.__call__.__code__)


def keep_out_of_graphs(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing.

    Dynamo goes straight to the forward of a module without hooks, and so would never meet the compiled call.
    """


class Watch:
    """Whether the Lighthouse blocks of one list ran rewritten attention, step by step.

    Args:
        blocks: the list's Lighthouse blocks by name, in the order in which they run.
        others: the watches of the model's other lists: as long as one of them rewrites, this list may be dense.
    """

    def __init__(self, blocks: dict[str, nn.Module], others: list[Watch], *, strict: bool) -> None:
        self.blocks = blocks
        self.last = next(reversed(blocks))
        self.others = others
        self.strict = strict
        self.first = True
        self.waiting = ""  # why none was rewritten in the first step, until another list has run
        self.rewrote: set[str] = set()  # names of blocks that did once
        self.warned = False
        self.seen: set[str] = set()
        self.missed: dict[str, tuple[str, ...]] = {}  # name -> reasons; none where no call ran
        self.limits = len(journal.recompile_limits())

    def note(self, name: str, calls: Iterable[AttentionRecord]) -> None:
        """A block ran, with these attention calls. When all have, the step is judged."""
        if name in self.seen:
            self._judge()  # the last block was left out
        self.seen.add(name)
        calls = list(calls)
        if any(call.rewritten for call in calls):
            self.rewrote.add(name)
        else:
            self.missed[name] = tuple(dict.fromkeys(call.reason for call in calls))
        if name == self.last:
            self._judge()

    def _judge(self) -> None:
        missed, self.missed = self.missed, {}
        ran, self.seen = self.seen, set()
        first, self.first = self.first, False
        causes = find_causes(journal.recompile_limits()[self.limits :])
        if self.waiting:
            raise NotRewritten(self.waiting)  # a second step began, and no other list has rewritten anything
        for other in self.others:
            if other.waiting and other is not self:
                self._settle(other, rewrote=len(missed) < len(ran))
        if not missed:
            return
        if first and self.strict and len(missed) == len(ran):
            text = _strict_text(missed, causes)
            if all(other.first for other in self.others if other is not self) and len(self.others) > 1:
                self.waiting = text
                return
            if not any(other.rewrote for other in self.others):
                raise NotRewritten(text)
        failed = {name: why for name, why in missed.items() if self._failed(name, why, causes)}
        if first and self.strict and (unrun := {name: why for name, why in failed.items() if not why and causes}):
            raise NotRewritten(_strict_text(unrun, causes))
        if failed and any(watch.rewrote for watch in self.others):
            self._warn(failed, causes)

    def _settle(self, other: Watch, *, rewrote: bool) -> None:
        """Another list rewrote nothing in its first step: is that made good by this one?"""
        text, other.waiting = other.waiting, ""
        if not rewrote:
            raise NotRewritten(text)
        other.warned = True
        warnings.warn(f"{text.removeprefix('strict=True: ')}. Other lists did", RuntimeWarning, stacklevel=2)

    def _failed(self, name: str, reasons: Sequence[str], causes: Sequence[str]) -> bool:
        """Whether a block that ran no rewritten attention should have, as others of the model did."""
        if name in self.rewrote:
            return True
        if not reasons:  # no attention call: a hybrid's other layers have none
            return bool(causes) and looks_like_attention(self.blocks[name])
        return not _is_local(self.blocks[name]) and not all(reason.startswith(_BY_DESIGN) for reason in reasons)

    def _warn(self, missed: Mapping[str, Sequence[str]], causes: Sequence[str]) -> None:
        if self.warned:
            return
        self.warned = True
        warnings.warn(
            f"in a training step {len(missed)} Lighthouse blocks ran no rewritten attention, while others did or they did "
            f"before. {_why(missed, causes)}. If that is right, name them in dense_layers. This is said once",
            RuntimeWarning,
            stacklevel=2,
        )


def find_causes(limits: Sequence[str] = ()) -> list[str]:
    """What keeps Dynamo from compiling, as far as it can be seen from outside.

    Args:
        limits: functions that have as many graphs as Dynamo keeps.
    """
    causes = []
    if dynamo_config.disable:
        causes.append("torch.compile is switched off: unset TORCH_COMPILE_DISABLE, or torch._dynamo.config.disable")
    if (stance := compile_stance()) == "force_eager":
        causes.append(f"torch.compiler.set_stance({stance!r}) is on: leave it for training")
    if dynamo_config.suppress_errors:
        causes.append(
            "torch._dynamo.config.suppress_errors is on, so code whose compilation fails runs as it is written: switch it off "
            "to see the error"
        )
    if limits:
        causes.append(
            f"Dynamo's recompile limit was hit ({', '.join(dict.fromkeys(limits))}), after which code runs as it is written, "
            "dense: give transformers models use_cache=False, which otherwise need a graph per layer; raise "
            "torch._dynamo.config.recompile_limit before lighthouse_fx.compile; fullgraph=True makes the limit an error"
        )
    return causes


# How reasons begin that are a layer's own nature rather than a failure.
_BY_DESIGN = ("sliding window", "attn_mask hides earlier tokens", "cross-attention", "lengths differ")
_LOCAL = ("sliding", "chunked", "local")


def _is_local(block: nn.Module) -> bool:
    """Whether a block's attention says of itself that it is a sliding window or chunked: transformers' names for that."""
    for module in block.modules():
        kind = str(getattr(module, "attention_type", "") or getattr(module, "layer_type", ""))
        if kind.startswith(_LOCAL) or getattr(module, "is_sliding", False) or getattr(module, "sliding_window", None):
            return True
    return False


def _why(missed: Mapping[str, Sequence[str]], causes: Sequence[str]) -> str:
    """The blocks by what became of them."""
    said = {name: "; ".join(reasons) or "; ".join(causes) or _NO_CALL for name, reasons in missed.items()}
    return ". ".join(
        f"{', '.join(name for name in said if said[name] == why)}: {why}" for why in dict.fromkeys(said.values())
    )


def _strict_text(missed: Mapping[str, Sequence[str]], causes: Sequence[str]) -> str:
    return (
        f"strict=True: in the first training step {len(missed)} Lighthouse blocks ran no rewritten attention. "
        f"{_why(missed, causes)}. See lighthouse_fx.reports(), name blocks that are to stay dense in dense_layers, or pass "
        "strict=False"
    )


def _trains(out: Any) -> bool:
    """Whether something trains through a block's output: not where frozen layers only pass data on."""
    tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
    return not tensors or any(x.requires_grad for x in tensors)
