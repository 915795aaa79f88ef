"""The model's own graphs, in which attention runs as `lighthouse_attention`: the side of `verify` that nothing rewrote.

    dense = scaled_dot_product_attention(q, k, v, mask)     # or any other spelling: the model's own nodes
    out   = functional(q, k, v, dense)                      # takes their place: lighthouse_attention(q, k, v, ...)

Which calls, the report of the rewritten side says. What they compute follows from the model's own nodes, the configuration
and the documents that are on. The two sides share the passes that find attention and prove masks, so here the arguments that
these found are held to the model: plain attention of them has to be what its own nodes compute. One thing can only come from
the rewritten side, the queries and keys from before a norm (QK-norm). They are taken only where the report says that it is
scored by them; everywhere else the scorer reads the call's own query and key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lighthouse_fx.functional import lighthouse_attention
from lighthouse_fx.kernels import REVISION, select
from lighthouse_fx.kernels.packed.attention import starts_of
from lighthouse_fx.kernels.torch_private import without_modes
from lighthouse_fx.passes import CALLS, CONTEXT, PIPELINE, AttentionCall, PassContext, Refusal
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.ir.subgraphs import regions
from lighthouse_fx.passes.masks.prove import prove_masks
from lighthouse_fx.passes.match.flash_attn import find_flash_functions
from lighthouse_fx.passes.pyramid import pyramid_over
from lighthouse_fx.passes.rewrite.replace import replace_node
from lighthouse_fx.passes.rewrite.shared_subgraphs import separate_callers
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.runtime import stage

from .observed_calls import ObservedCall, Observer
from .plain_attention import erase, layout_of, plain, put_plain
from .verification_result import difference

_FINDING = PIPELINE[: PIPELINE.index(prove_masks) + 1]
_RANDOM = "the attention it replaces was not compared, as dropout makes it random"
_NO_DTYPE = "the attention it replaces was not compared, as flash-attn takes neither float32 nor float64"
_PLAIN = "computed as plain attention, as flash-attn takes neither float32 nor float64"


class FunctionalGraphs:
    """A backend that runs Dynamo's graphs op by op, with attention as `lighthouse_attention`, and notes all calls.

    Args:
        records: the calls of each graph of the rewritten run; expected: its calls as they ran, in order.
    """

    def __init__(
        self,
        config: LighthouseConfig,
        records: Sequence[Sequence[AttentionRecord]],
        expected: Sequence[ObservedCall],
        observer: Observer,
    ) -> None:
        self.config, self.expected, self.observer = config, expected, observer
        self._records = iter(records)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not torch.is_grad_enabled():
            gm.meta[CONTEXT] = PassContext(no_gradients=Refusal(reason="gradients are off"))
        separate_callers(gm)
        gm.meta[CALLS] = ()
        flash: set[fx.Node] = set()
        for step in _FINDING:
            before = {call.node for call in gm.meta[CALLS]}
            gm = step(gm, example_inputs, config=self.config)
            if step is find_flash_functions:
                flash = {call.node for call in gm.meta[CALLS]} - before
        records = next(self._records, ())
        if len(records) != len(gm.meta[CALLS]):
            raise unpaired(len(gm.meta[CALLS]), len(records))
        for index, record in enumerate(records):
            call: AttentionCall = gm.meta[CALLS][index]  # as the replacements before it left it
            if call.region.opaque:
                continue
            if record.rewritten or (stage.packed and record.inside_documents and not call.own_documents):
                unknown = _NO_DTYPE if call.node in flash else _RANDOM if call.dropout_p else ""
                gm.meta[CALLS] = self._insert(call, record, unknown, gm.meta[CALLS])
            elif call.node in flash and call.refusal is None:
                node, gm.meta[CALLS] = put_plain(call, gm.meta[CALLS])
                self._note(node, record, _PLAIN)
            else:
                self._note(call.node, record)
        for region in regions(gm):
            region.gm.recompile()
        return gm

    def _insert(
        self, call: AttentionCall, record: AttentionRecord, unknown: str, calls: Sequence[AttentionCall]
    ) -> tuple[AttentionCall, ...]:
        """Put the functional form in a call's place, or attention inside documents.

        `unknown` says why the model's own nodes are not run for comparison.
        """
        graph, node = call.node.graph, call.node
        own = call.documents if isinstance(call.documents, fx.Node) else None
        dense = None if unknown or not record.rewritten else node
        with graph.inserting_after(node):
            form = self._functional(call, record, unknown) if record.rewritten else self._kept_inside(call, record)
            arguments = (call.query, call.key, call.value, dense, own, call.dropout_p, call.scale, *call.projection)
            new = graph.call_function(form, arguments)
        calls = replace_node(node, new, calls, keep=lambda user: user is new)
        if dense is None:
            erase(call)
        return calls

    def _note(self, node: fx.Node, record: AttentionRecord, unknown: str = "") -> None:
        """Note a call that stays as it is."""
        with node.graph.inserting_after(node):
            node.graph.call_function(lambda: self.observer.note(ObservedCall(False, record=record, unknown=unknown)))

    def _kept_inside(self, call: AttentionCall, record: AttentionRecord) -> Callable[..., Tensor]:
        """Dense attention inside the documents that are on."""
        laid_out = layout_of(call)

        def form(
            query: Tensor, key: Tensor, value: Tensor, dense: None, own: None, dropout_p: float, scale: float | None,
            *projection: Tensor,
        ) -> Tensor:  # fmt: skip
            self.observer.note(ObservedCall(False, record=record))
            return laid_out(plain(query, key, value, True, scale, documents_on(query.device), dropout_p), projection)

        return form

    def _functional(self, call: AttentionCall, record: AttentionRecord, unknown: str) -> Callable[..., Tensor]:
        is_causal, laid_out = bool(call.is_causal), layout_of(call)
        special = record.scored != ""
        config = replace(self.config, scorer=record.scorer) if special else self.config

        def form(
            query: Tensor, key: Tensor, value: Tensor, dense: Tensor | None, own: Tensor | None, dropout_p: float,
            scale: float | None, *projection: Tensor,
        ) -> Tensor:  # fmt: skip
            model = self._model(record) if self.observer.forward else self._again(record, query)
            starts = documents_on(query.device) if own is None else starts_of(own)
            apart = None
            if dense is not None:
                inside = None if own is None else starts
                with torch.no_grad():
                    apart = difference([dense], [laid_out(plain(query, key, value, is_causal, scale, inside), projection)])
            times = key.shape[1] // model.tensors[1].shape[1]
            narrow = [x[:, ::times] for x in (key, value)]  # as many heads as the rewritten call has
            if not all(torch.equal(x.repeat_interleave(times, 1), wide) for x, wide in zip(narrow, (key, value), strict=True)):
                apart = math.inf
            query, key, value = query.view_as(query), *narrow
            scored = model.scored if special else (None, None)
            out = laid_out(
                lighthouse_attention(
                    query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True, dropout_p=dropout_p,
                    documents=starts, score_query=scored[0], score_key=scored[1], config=config,
                ),
                projection,
            )  # fmt: skip
            q, k = (x.detach() if raw is None else raw for x, raw in zip((query, key), scored, strict=True))
            pyramid = pyramid_over(query.shape[2], config)
            entries = slots = key.new_empty(*key.shape[:2], 0, dtype=torch.int32)
            if config.levels:
                entries, slots = select(
                    q, k, value.detach(), config.levels, config.pooling, pyramid.topk, pyramid.quota or 0, config.keep_first,
                    config.causal_selection, config.scorer, config.dilation, is_causal, scale, REVISION, starts,
                )  # fmt: skip
            noted = ObservedCall(True, record, (query, key, value), out, entries, slots, scored)
            noted.scale, noted.is_causal, noted.dropout_p, noted.starts = scale, is_causal, dropout_p, starts
            noted.dense, noted.unknown, noted.steps, noted.projection = apart, unknown, call.steps, projection
            self.observer.note(noted)
            return out

        return form

    def _model(self, record: AttentionRecord) -> ObservedCall:
        """The call of the rewritten run that comes next."""
        place = len(self.observer.calls)
        if place >= len(self.expected) or self.expected[place].record is not record:
            raise unpaired(place + 1, len(self.expected))
        return self.expected[place]

    def _again(self, record: AttentionRecord, query: Tensor) -> ObservedCall:
        """A checkpoint runs a call again with the same query. It watches the operations, and must not see the search."""
        with without_modes():
            return next(
                expected
                for call, expected in zip(self.observer.calls, self.expected, strict=False)
                if call.record is record and call.rewritten and torch.equal(call.tensors[0], query)
            )


def unpaired(found: int, expected: int) -> RuntimeError:
    """The error where the two runs do not make the same calls."""
    return RuntimeError(
        f"the model ran {found} attention calls in one run and {expected} in the other, so they cannot be paired: verify a "
        "part of the model that runs the same calls each time"
    )


def documents_on(device: torch.device) -> Tensor | None:
    """Where each token's document begins, int32 `[B, N]`; None where no `documents(...)` is on."""
    return None if stage.documents is None else stage.documents.on(device)
