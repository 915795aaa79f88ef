"""`verify(model, ...)`: the rewritten model beside one that calls `lighthouse_attention`, on the user's own batch.

    copy of the model -> Dynamo -> passes -> the rewritten graph, run op by op  \
                                                                                 } outputs, gradients, loss: compared
    copy of the model, eager; each call that was rewritten is the functional one /

The two share the ops but not the rewrite. The ops themselves are compared with their plain twins in `kernels/reference.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .backend import rewrite
from .compiled import setting_of
from .config import LighthouseConfig
from .functional import lighthouse_attention
from .kernels import REVISION, reference, select
from .kernels.torch_private import pytree, run_backward
from .passes import CALLS
from .passes.check import pyramid_over
from .passes.regions import regions
from .passes.rewrite import REWRITTEN_FROM
from .report import AttentionRecord, GraphReport, Report
from .verified import Check, Quantity, Verification, difference


@dataclass(slots=True)
class _Attention:
    """One attention call as it ran. `gradients` are those of query, key and value, as far as they need one."""

    rewritten: bool
    tensors: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    record: AttentionRecord | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scale: float | None = None
    is_causal: bool = False
    dropout_p: float = 0.0

    def keep(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:  # None where a cut leaves nothing
            self.gradients[name] = gradient.detach().clone()


@dataclass(frozen=True, slots=True)
class _Run:
    attentions: Sequence[_Attention]
    loss: Tensor
    gradients: dict[str, Tensor]


class _Observer:
    """Notes attention calls during the forward. A checkpoint's second run, in the backward, is not noted again."""

    def __init__(self) -> None:
        self.attentions: list[_Attention] = []
        self.forward = True

    def note(self, attention: _Attention) -> None:
        if not self.forward:
            return
        self.attentions.append(attention)
        for name, x in zip(("query", "key", "value"), attention.tensors, strict=True):
            if x.requires_grad:
                x.register_hook(partial(attention.keep, name))


def verify(model: nn.Module, *args: Any, config: LighthouseConfig | None = None, **kwargs: Any) -> Verification:
    """Compare what the backend makes of a model with the functional form, in float32 and float64.

    The model and the batch are copied, so they stay as they are; this takes the memory of a few copies and four training
    steps without an optimiser. The loss is the output's `loss` where it has one, otherwise the mean square of the outputs. The
    rewritten graph runs op by op: what Inductor makes of it afterwards is not looked at.

    Args:
        model: a module in train mode, compiled or not; args, kwargs: as for calling it, at the length that you train on.
        config: the backend's options. By default those that the model was compiled with, as for `explain`.

    Returns:
        `print(verification)` shows a table, `verification.passed` the verdict.

    Raises:
        TypeError: the model is no module, or the config no LighthouseConfig; ValueError: no attention call is rewritten, or
        gradients are off.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a torch.nn.Module, such as a class around it")
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    config = setting_of(model).config if config is None else config
    plain = getattr(model, "_orig_mod", model)
    checks: list[Check] = []
    records: list[AttentionRecord] = []
    selected: list[list[Tensor]] = []
    for dtype in (torch.float64, torch.float32):  # the exact one first: where it fails, float32 says nothing new
        batch = _in_dtype((args, kwargs), dtype)
        rewritten = _rewritten(_copy(plain, dtype), batch, config)
        functional = _functional(_copy(plain, dtype), batch, config, rewritten.attentions)
        found, slots = _compare(rewritten, functional, config, str(dtype).removeprefix("torch."))
        checks += found
        selected.append(slots)
        records = [attention.record for attention in rewritten.attentions if attention.record is not None]
    moved = sum(_moved(a, b) for a, b in zip(*selected, strict=True))
    total = sum(int((slots >= 0).sum()) for slots in selected[0])
    return Verification(title=type(plain).__name__, checks=tuple(checks), calls=tuple(records), moved=moved, entries=total)


# --- the two runs -----------------------------------------------------------------------------------------------------


def _rewritten(model: nn.Module, batch: Any, config: LighthouseConfig) -> _Run:
    observer = _Observer()
    graphs: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, gm = rewrite(gm, example_inputs, config)
        graphs.append(report)
        _observe(gm, report.calls, observer)
        return gm

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    run = _train(torch.compile(call, backend=backend, dynamic=False), model, batch, observer)
    if not any(attention.rewritten for attention in run.attentions):
        raise ValueError(
            f"model={type(model).__name__} has no attention call that is rewritten, so there is nothing to verify. "
            f"Remove the cause that the report gives:\n{Report(graphs=tuple(graphs), title=type(model).__name__)}"
        )
    return run


def _observe(gm: fx.GraphModule, records: Sequence[AttentionRecord], observer: _Observer) -> None:
    """Call the observer after the last node of each attention call; the graph computes what it did."""
    for region in regions(gm):
        last = {node.meta[REWRITTEN_FROM]: node for node in region.gm.graph.nodes if REWRITTEN_FROM in node.meta}
        for index, node in last.items():
            call, record = gm.meta[CALLS][index], records[index]
            if not all(isinstance(x, fx.Node) for x in (call.query, call.key, call.value)):
                continue
            with region.gm.graph.inserting_after(node):
                region.gm.graph.call_function(_noting(observer, record), (call.query, call.key, call.value, node))
        region.gm.recompile()


def _noting(observer: _Observer, record: AttentionRecord) -> Callable[..., None]:
    def note(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        observer.note(_Attention(record.rewritten, (query, key, value), out, record))

    return note


class _Functional(TorchFunctionMode):
    """Runs attention calls as `lighthouse_attention`, those that the rewritten run rewrote, and notes all of them."""

    def __init__(self, config: LighthouseConfig, expected: Sequence[_Attention], observer: _Observer) -> None:
        super().__init__()
        self.config, self.expected, self.observer = config, expected, observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        model = self._model(query) if self.observer.forward else self._again(query)
        if model is None or not model.rewritten:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            self.observer.note(_Attention(False, (query, key, value), out))
            return out
        groups = model.tensors[1].shape[1]
        key, value = (_unrepeated(x, groups) for x in (key, value))
        is_causal = is_causal if attn_mask is None else _is_causal(attn_mask, query.shape[2])
        out = lighthouse_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
            dropout_p=dropout_p,
            config=self.config,
        )
        attention = _Attention(True, (query, key, value), out, scale=scale, is_causal=is_causal, dropout_p=dropout_p)
        self.observer.note(attention)
        return out

    def _model(self, query: Tensor) -> _Attention | None:
        place = len(self.observer.attentions)
        return self.expected[place] if place < len(self.expected) else None

    def _again(self, query: Tensor) -> _Attention | None:
        """A checkpoint runs a call again with the same query."""
        return next((a for a in self.observer.attentions if torch.equal(a.tensors[0], query)), None)


def _functional(model: nn.Module, batch: Any, config: LighthouseConfig, expected: Sequence[_Attention]) -> _Run:
    observer = _Observer()
    with _Functional(config, expected, observer):
        run = _train(model, model, batch, observer)
    if len(run.attentions) != len(expected):
        raise RuntimeError(
            f"model={type(model).__name__} ran {len(run.attentions)} attention calls eagerly and {len(expected)} compiled, so "
            "they cannot be paired: verify a part of the model that runs the same calls each time"
        )
    return run


def _train(call: Callable[..., Any], model: nn.Module, batch: Any, observer: _Observer) -> _Run:
    """Forward and backward, with the same random numbers each time."""
    args, kwargs = pytree.tree_map(_clone, batch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = _loss(call(*args, **kwargs))
        observer.forward = False
        if loss.requires_grad:
            # loss.backward() is itself a call that a mode sees, and during it a checkpoint's second run would not be seen.
            run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _Run(observer.attentions, loss.detach(), gradients)


def _loss(out: Any) -> Tensor:
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    if not tensors:
        raise ValueError(f"model returned a {type(out).__name__} without floating-point tensors: return a loss or outputs")
    return torch.stack([x.square().mean() for x in tensors]).sum()


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that shares nothing with the model, is compiled nowhere and has no gradients yet."""
    made = copy.deepcopy(model).to(dtype)
    made.zero_grad(set_to_none=True)
    return made


def _in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda x: x.detach().to(dtype).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x,
        batch,
    )


def _clone(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def _unrepeated(x: Tensor, groups: int) -> Tensor:
    """Keys or values without repeated heads: `[B, H, N, D]` -> `[B, G, N, D]`."""
    few = x[:, :: x.shape[1] // groups]
    if not torch.equal(few.repeat_interleave(x.shape[1] // groups, 1), x):
        raise RuntimeError(f"the rewrite took {x.shape[1]} heads for {groups} repeated ones, and they are not: report this")
    return few


def _is_causal(mask: Tensor, length: int) -> bool:
    """Whether the mask that a call got is the causal one, as the rewrite has to have proved."""
    allowed = mask if mask.dtype == torch.bool else mask == 0
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if not bool((allowed == causal).all()):
        raise RuntimeError("the rewrite took an attention mask for the causal one, and it is not: report this")
    return True


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(
    rewritten: _Run, functional: _Run, config: LighthouseConfig, dtype: str
) -> tuple[list[Check], list[Tensor]]:
    """What is compared in one dtype, and the functional run's selections."""
    checks: list[Check] = []
    selections = []

    def add(where: str, what: Quantity, found: float) -> None:
        checks.append(Check(where=where, what=what, dtype=dtype, difference=found))

    same = True
    for a, b in zip(rewritten.attentions, functional.attentions, strict=True):
        if not a.rewritten or a.record is None:
            continue
        where = a.record.module or a.record.source or "-"
        (entries, slots), (_, others) = _selection(b, b, config), _selection(a, b, config)
        selections.append(slots)
        add(where, "selection", _moved(slots, others))
        same = same and torch.equal(slots, others)
        if not same:  # what follows another selection is another computation
            continue
        add(where, "output", difference([a.out], [b.out]))
        if names := sorted(a.gradients.keys() | b.gradients.keys()):
            add(where, "gradients of q, k, v", difference(*(_named(x.gradients, names, x.out) for x in (a, b))))
        if dtype == "float64" and not b.dropout_p:
            add(where, "ops and their plain twins", difference([b.out], [_twin(b, entries, slots, config)]))
    if same:
        names = sorted(rewritten.gradients.keys() | functional.gradients.keys())
        add("whole model", "loss", difference([rewritten.loss], [functional.loss]))
        pair = (_named(run.gradients, names, run.loss) for run in (rewritten, functional))
        add("whole model", "gradients of parameters", difference(*pair))
    return checks, selections


def _moved(slots: Tensor, others: Tensor) -> int:
    """How many windows are entries by the one selection and not by the other: [B, G, P], -1 for a window that is none."""
    return int(((slots >= 0) & (others < 0)).sum())


def _named(gradients: dict[str, Tensor], names: Sequence[str], like: Tensor) -> list[Tensor]:
    """Gradients in the order of names; one that is missing is zero."""
    return [gradients.get(name, like.new_zeros(())) for name in names]


def _selection(a: _Attention, like: _Attention, config: LighthouseConfig) -> tuple[Tensor, Tensor]:
    """The entries and slots that a call's tensors lead to."""
    q, k, v = (x.detach() for x in a.tensors)
    entries, slots = select(
        q, k, v, config.levels, config.pooling, config.topk, config.quota or 0, config.keep_first,
        config.scorer, config.dilation, like.is_causal, like.scale, REVISION,
    )  # fmt: skip
    return entries, slots


def _twin(b: _Attention, entries: Tensor, slots: Tensor, config: LighthouseConfig) -> Tensor:
    """The same attention by the plain twins of the ops, on the CPU: [B, H, N, Dv]."""
    tensors = [x.detach().cpu() for x in b.tensors]
    pyramid = pyramid_over(tensors[0].shape[2], config)
    q, k, v = (reference.gather(x, entries.cpu(), pyramid) for x in tensors)  # [B, H or G, S, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=b.is_causal, scale=b.scale, enable_gqa=True)
    return reference.scatter(out, slots.cpu(), pyramid, is_causal=b.is_causal).to(b.out.device)
