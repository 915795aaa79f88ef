"""`verify(model, ...)`: the rewritten model beside one that calls `lighthouse_attention`, on the user's own batch.

    copy of the model -> Dynamo -> passes -> the rewritten graphs             \
                                                                               } run op by op: outputs, gradients, loss
    copy of the model -> Dynamo -> each call that was rewritten is functional /

The two share the ops but not the rewrite (`functional_calls.py` says what they do share, and how that is held to the model).
The selection that the rewritten graph made is compared with that of the functional side. The ops themselves are compared with
their plain twins in `kernels/reference`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse_fx.backend import rewrite
from lighthouse_fx.frontend.existing_compilation import setting_of
from lighthouse_fx.frontend.explain import compile_anew
from lighthouse_fx.kernels import reference
from lighthouse_fx.kernels.packed.attention import attention_in_documents, segments_of
from lighthouse_fx.kernels.reference import local as plain
from lighthouse_fx.kernels.torch_private import pytree, run_backward
from lighthouse_fx.passes import CALLS
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.ir.subgraphs import regions
from lighthouse_fx.passes.pyramid import pyramid_over
from lighthouse_fx.passes.rewrite.lighthouse import REWRITTEN_FROM, lay_out
from lighthouse_fx.report.report import AttentionRecord, GraphReport, Report
from lighthouse_fx.runtime import stage
from lighthouse_fx.runtime.document_inputs import bind_documents, warn_of_unaware_calls

from .functional_calls import FunctionalGraphs, unpaired
from .observed_calls import ObservedCall, Observer
from .plain_attention import without_flash_attn
from .verification_result import Check, Quantity, Verification, difference

# Where an op that gives entries' output to tokens takes the selection.
_SELECTION_OF: dict[Any, slice] = {
    torch.ops.lighthouse_fx.scatter.default: slice(1, 3),
    torch.ops.lighthouse_fx.merge.default: slice(4, 6),
}


@dataclass(frozen=True, slots=True)
class _Run:
    graphs: Sequence[GraphReport]
    calls: Sequence[ObservedCall]
    loss: Tensor
    gradients: dict[str, Tensor]


def verify(model: nn.Module, *args: Any, config: LighthouseConfig | None = None, **kwargs: Any) -> Verification:
    """Compare what the backend makes of a model with the functional form, in float32 and float64.

    The model and the batch are copied, so they stay as they are; this takes the memory of a few copies and four training
    steps without an optimiser. The loss is the output's `loss` where it has one, otherwise the mean square of the outputs. The
    rewritten graph runs op by op: what Inductor makes of it afterwards is not looked at. Inside `pretraining(...)` and
    `documents(...)` it verifies what they ask for.

    Args:
        model: a module in train mode, compiled or not; args, kwargs: as for calling it, at the length that you train on.
        config: the backend's options. By default those that the model was compiled with, as for `explain`.

    Returns:
        `print(verification)` shows a table, `verification.passed` the verdict, `verification.notes` what was not compared.

    Raises:
        TypeError: the model is no module, or the config no LighthouseConfig; ValueError: no attention call is rewritten, the
        dense stage is on, gradients are off, or `documents` are on and the model on a GPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a torch.nn.Module, such as a class around it")
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    config = stage.current.resolve(setting_of(model).config if config is None else config)
    if config is None:
        raise ValueError(
            "the dense stage is on, so no attention call is rewritten and there is nothing to verify: leave "
            "lighthouse_fx.dense(), or call verify in lighthouse_fx.pretraining()"
        )
    plain = getattr(model, "_orig_mod", model)
    if stage.documents is not None and any(p.device.type == "cuda" for p in plain.parameters()):
        raise ValueError(  # float64 is what verify judges by
            f"model={type(plain).__name__} is on a GPU, where attention inside documents has no float64: verify a copy of the "
            "model on the CPU, with the batch there"
        )
    checks: list[Check] = []
    records: list[AttentionRecord] = []
    notes: dict[str, None] = {}
    selected: list[list[Tensor]] = []
    for dtype in (torch.float64, torch.float32):  # the exact one first: where it fails, float32 says nothing new
        batch = _in_dtype((args, kwargs), dtype)
        # On a CPU, PyTorch's fused attention of float64 queries reads a float32 mask wrongly; the unfused form converts it.
        with sdpa_kernel(SDPBackend.MATH) if dtype == torch.float64 else nullcontext():
            rewritten = _rewritten(_copy(plain, dtype), batch, config)
            functional = _functional(_copy(plain, dtype), batch, config, rewritten)
        found, slots = _compare(rewritten, functional, config, str(dtype).removeprefix("torch."))
        checks += found
        selected.append(slots)
        records = [attention.record for attention in rewritten.calls]
        notes |= dict.fromkeys(_not_compared(call) for call in functional.calls if call.unknown)
    moved = sum(_moved(a, b) for a, b in zip(*selected, strict=True))
    total = sum(int((slots >= 0).sum()) for slots in selected[0])
    return Verification(
        title=type(plain).__name__,
        checks=tuple(checks),
        calls=tuple(records),
        moved=moved,
        entries=total,
        notes=tuple(notes),
    )


# --- the two runs -----------------------------------------------------------------------------------------------------


def _rewritten(model: nn.Module, batch: Any, config: LighthouseConfig) -> _Run:
    observer = Observer()
    graphs: list[GraphReport] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, gm, _ = rewrite(gm, example_inputs, config)
        graphs.append(report)
        without_flash_attn(gm)
        _observe(gm, report.calls, observer)
        return warn_of_unaware_calls(bind_documents(gm, gm, config), report.calls)

    run = _train(compile_anew(model, backend), model, batch, observer, graphs)
    if not any(attention.rewritten for attention in run.calls):
        raise ValueError(
            f"model={type(model).__name__} has no attention call that is rewritten, so there is nothing to verify. "
            f"Remove the cause that the report gives:\n{Report(graphs=tuple(graphs), title=type(model).__name__)}"
        )
    return run


def _observe(gm: fx.GraphModule, records: Sequence[AttentionRecord], observer: Observer) -> None:
    """Call the observer after the last node of each attention call; the graph computes what it did."""
    for region in regions(gm):
        graph = region.gm.graph
        parts: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            if REWRITTEN_FROM in node.meta:
                parts.setdefault(node.meta[REWRITTEN_FROM], []).append(node)
        for index, nodes in parts.items():
            call, record = gm.meta[CALLS][index], records[index]
            if region.opaque:
                continue
            if not record.rewritten:
                with graph.inserting_after(nodes[-1]):
                    graph.call_function(_noting_dense(observer, record))
                continue
            gives = next((x for x in nodes if x.target in _SELECTION_OF), None)
            selection = gives.args[_SELECTION_OF[gives.target]] if gives is not None else (None, None)
            tensors = [_alone(x, nodes) for x in (call.query, call.key, call.value)]
            with graph.inserting_after(nodes[-1]):
                graph.call_function(
                    _noting(observer, record), (*tensors, nodes[-1], *selection, call.score_query, call.score_key)
                )
        region.gm.recompile()


def _alone(tensor: fx.Node, nodes: Sequence[fx.Node]) -> fx.Node:
    """A view of a tensor that only these nodes use, so that its gradient is what they send back."""
    users = [node for node in nodes if tensor in node.all_input_nodes]
    if not users:
        return tensor
    with tensor.graph.inserting_before(users[0]):
        alone = tensor.graph.call_method("view_as", (tensor, tensor))
    for node in users:
        node.replace_input_with(tensor, alone)
    return alone


def _noting(observer: Observer, record: AttentionRecord) -> Callable[..., None]:
    def note(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor,
        entries: Tensor | None, slots: Tensor | None, *raw: Tensor | None,
    ) -> None:  # fmt: skip
        # Copied, as the functional run reads them after this one.
        scored = tuple(None if x is None else x.detach().clone() for x in raw)
        tensors = (query, key, value)
        observer.note(ObservedCall(True, record, tensors, out, entries, slots, (scored[0], scored[1])))

    return note


def _noting_dense(observer: Observer, record: AttentionRecord) -> Callable[[], None]:
    return lambda: observer.note(ObservedCall(False, record))


def _functional(model: nn.Module, batch: Any, config: LighthouseConfig, rewritten: _Run) -> _Run:
    observer = Observer()
    records = [graph.calls for graph in rewritten.graphs]
    backend = FunctionalGraphs(config, records, rewritten.calls, observer)
    run = _train(compile_anew(model, backend), model, batch, observer, rewritten.graphs)
    if len(run.calls) != len(rewritten.calls):
        raise unpaired(len(run.calls), len(rewritten.calls))
    return run


def _train(
    call: Callable[..., Any], model: nn.Module, batch: Any, observer: Observer, graphs: Sequence[GraphReport]
) -> _Run:
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
    return _Run(graphs, observer.calls, loss.detach(), gradients)


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
    made = copy.deepcopy(model)
    buffers = {name: x.detach().clone() for name, x in made.named_buffers(remove_duplicate=False) if x.is_floating_point()}
    made.to(dtype).zero_grad(set_to_none=True)
    for name, x in made.named_buffers(remove_duplicate=False):
        if name in buffers:
            x.data = _converted(buffers[name], dtype)
    return made


def _in_dtype(batch: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda x: _converted(x, dtype).requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x,
        batch,
    )


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another dtype. The lowest number stays the lowest: in a mask it hides a key."""
    x = x.detach()
    return x.to(dtype).masked_fill(x == torch.finfo(x.dtype).min, torch.finfo(dtype).min)


def _clone(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


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
    for a, b in zip(rewritten.calls, functional.calls, strict=True):
        if not a.rewritten:
            continue
        where = _where(a.record)
        if b.dense is not None:
            add(where, "the attention it replaces", b.dense)
        assert a.out is not None and b.out is not None, "it is rewritten"
        assert b.entries is not None and b.slots is not None, "by the functional form, too"
        selections.append(b.slots)
        apart = _apart(a, b.entries, b.slots)
        add(where, "selection", apart)
        same = same and not apart
        if not same:  # what follows another selection is another computation
            continue
        add(where, "output", difference([a.out], [b.out]))
        if names := sorted(a.gradients.keys() | b.gradients.keys()):
            add(where, "gradients of q, k, v", difference(*(_named(x.gradients, names, a.out) for x in (a, b))))
        if dtype == "float64" and not b.dropout_p:
            add(where, "ops and their plain twins", difference([b.out], [_twin(b, b.entries, b.slots, config)]))
    if same:
        names = sorted(rewritten.gradients.keys() | functional.gradients.keys())
        add("whole model", "loss", difference([rewritten.loss], [functional.loss]))
        pair = (_named(run.gradients, names, run.loss) for run in (rewritten, functional))
        add("whole model", "gradients of parameters", difference(*pair))
    return checks, selections


def _where(record: AttentionRecord) -> str:
    return record.module or record.source or "-"


def _not_compared(call: ObservedCall) -> str:
    return f"{_where(call.record)}: {call.unknown}"


def _moved(slots: Tensor, others: Tensor) -> int:
    """How many windows are entries by the one selection and not by the other: [B, G, P], -1 for a window that is none."""
    return int(((slots >= 0) & (others < 0)).sum())


def _apart(call: ObservedCall, entries: Tensor, slots: Tensor) -> int:
    """How many windows a call's own selection has otherwise than this one; where none, how many slots."""
    if call.entries is None or call.slots is None or call.slots.shape != slots.shape:
        return slots.numel()
    moved = max(_moved(call.slots, slots), _moved(slots, call.slots))
    return moved or int((call.slots != slots).sum()) or int((call.entries != entries).sum())


def _named(gradients: dict[str, Tensor], names: Sequence[str], like: Tensor) -> list[Tensor]:
    """Gradients in the order of names; one that is missing is zero."""
    return [gradients.get(name, like.new_zeros(())) for name in names]


def _twin(b: ObservedCall, entries: Tensor, slots: Tensor, config: LighthouseConfig) -> Tensor:
    """The same attention by the plain twins of the ops, on the CPU, laid out as the call's own output."""
    tensors = [x.detach().cpu() for x in b.tensors]
    entries, slots, starts = entries.cpu(), slots.cpu(), None if b.starts is None else b.starts.cpu()
    pyramid = pyramid_over(tensors[0].shape[2], config)
    local = None
    if config.local_window:
        scale = tensors[0].shape[-1] ** -0.5 if b.scale is None else b.scale
        query, key, value = tensors
        local = plain.local_attention(query, key, value, config.local_window, is_causal=b.is_causal, scale=scale, starts=starts)
    if config.levels == 0 and local is not None:
        return _laid_out_as(b, local[0])
    q, k, v = (reference.gather(x, entries, pyramid) for x in tensors)  # [B, H or G, S, D]
    if local is not None:
        segments = None if starts is None else segments_of(entries, starts, pyramid)
        out, lse = plain.attention_and_lse(q, k, v, is_causal=b.is_causal, scale=scale, segments=segments)
        merged, _ = reference.merge(out, lse, *local, slots, pyramid, is_causal=b.is_causal, starts=starts)
        return _laid_out_as(b, merged)
    if starts is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=b.is_causal, scale=b.scale, enable_gqa=True)
    else:
        out = attention_in_documents(
            q, k, v, entries, starts, config.levels, config.pooling, pyramid.topk, pyramid.quota or 0, 0.0, b.scale, True,
            config.max_documents, config.kernel,
        )  # fmt: skip
    out = reference.scatter(out, slots, pyramid, is_causal=b.is_causal, starts=starts)
    return _laid_out_as(b, out)


def _laid_out_as(b: ObservedCall, out: Tensor) -> Tensor:
    out = lay_out(out, b.steps, [x if x is None else x.detach().cpu() for x in b.projection])
    return out.to(b.tensors[0].device)
