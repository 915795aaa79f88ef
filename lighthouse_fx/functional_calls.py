"""An eager model whose attention calls run as `lighthouse_attention`: the side of `verify` that knows no graph.

    scaled_dot_product_attention(q, k, v, mask)   ->   lighthouse_attention(q, k, v, is_causal=True, documents=...)

Which calls, the report of the rewritten side says. What they compute follows from the call itself, the configuration and the
documents that are on. One thing can only come from the graph: the queries and keys from before a norm (QK-norm), as the
call has no trace of them. They are taken only where the report says that it is scored by them; everywhere else the scorer
reads the call's own query and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import stage
from .config import LighthouseConfig
from .functional import lighthouse_attention
from .kernels import REVISION, reference, select
from .observed import ObservedCall, Observer


class FunctionalCalls(TorchFunctionMode):
    """Runs attention calls as `lighthouse_attention`, those that the rewritten run rewrote, and notes all of them."""

    def __init__(self, config: LighthouseConfig, expected: Sequence[ObservedCall], observer: Observer) -> None:
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
        if model is None or model.record is None or not model.rewritten:
            if stage.packed and model is not None and model.record is not None and model.record.inside_documents:
                starts = documents_on(query.device)
                assert starts is not None
                attn_mask = (starts[:, :, None] == starts[:, None, :]).tril()[:, None]  # [B, 1, N, N]
                is_causal = False
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            self.observer.note(ObservedCall(False, (query, key, value), out))
            return out
        groups = model.tensors[1].shape[1]
        key, value = (_unrepeated(x, groups) for x in (key, value))
        is_causal = is_causal if attn_mask is None else _is_causal(attn_mask, query.shape[2])
        special = model.record.scored != ""
        config = replace(self.config, scorer=model.record.scorer) if special else self.config
        scored = model.scored if special else (None, None)
        starts = documents_on(query.device)
        out = lighthouse_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
            dropout_p=dropout_p,
            documents=starts,
            score_query=scored[0],
            score_key=scored[1],
            config=config,
        )
        q, k = (x.detach() if raw is None else raw for x, raw in zip((query, key), scored, strict=True))
        entries, slots = select(
            q, k, value.detach(), config.levels, config.pooling, config.topk, config.quota or 0, config.keep_first,
            config.scorer, config.dilation, is_causal, scale, REVISION, starts,
        )  # fmt: skip
        call = ObservedCall(True, (query, key, value), out, model.record, entries, slots, scored)
        call.scale, call.is_causal, call.dropout_p = scale, is_causal, dropout_p
        self.observer.note(call)
        return out

    def _model(self, query: Tensor) -> ObservedCall | None:
        place = len(self.observer.calls)
        return self.expected[place] if place < len(self.expected) else None

    def _again(self, query: Tensor) -> ObservedCall | None:
        """A checkpoint runs a call again with the same query."""
        return next((call for call in self.observer.calls if torch.equal(call.tensors[0], query)), None)


def documents_on(device: torch.device) -> Tensor | None:
    """Where each token's document begins, int32 `[B, N]`; None where no `documents(...)` is on."""
    return None if stage.documents is None else stage.documents.on(device)


def _unrepeated(x: Tensor, groups: int) -> Tensor:
    """Keys or values without repeated heads: `[B, H, N, D]` -> `[B, G, N, D]`."""
    few = x[:, :: x.shape[1] // groups]
    if not torch.equal(few.repeat_interleave(x.shape[1] // groups, 1), x):
        raise RuntimeError(f"the rewrite took {x.shape[1]} heads for {groups} repeated ones, and they are not: report this")
    return few


def _is_causal(mask: Tensor, length: int) -> bool:
    """Whether the mask of a call that was rewritten is the causal one. Otherwise it must hide nothing."""
    if bool((mask if mask.dtype == torch.bool else mask == 0).all()):
        return False
    if not reference.is_causal_mask(mask.expand(*mask.shape[:-2], length, length)):
        raise RuntimeError("the rewrite took an attention mask for the causal one, or for one of nothing: report this")
    return True
