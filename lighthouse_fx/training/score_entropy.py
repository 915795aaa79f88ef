"""How decided the scores of a model's attention are: the normalised entropy of the window scores, per key/value head.

Let `s(l, i)` be the score of window `i` of level `l`: the largest score of a token in it (max-pooled, as the selection does),
by the scorer that the selection uses and on what it reads, with QK-norm the raw projections. Over the `W` windows of the level,

    p_i = s(l, i) / sum of s(l, .)        entropy = -(sum of p_i * log p_i) / log W        0 (one window) to 1 (all alike)

and a key/value head's entropy is the mean over query and key scores, the levels 1 to L-1, and the rows of the batch. All
windows of a level take part, not only those that compete under the present budget, nor each tile by itself: so the figure does
not depend on `topk`. Windows that are expanded in any case (the first; those that a document's border divides) count by their
scores like the others, and a level of a single window takes no part. Norms differ little from window to window, so the figure
is near 1 (0.99 to 1.00 in a small model); what tells layers apart is how near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lighthouse_fx.evaluation.model_outputs import evaluating
from lighthouse_fx.frontend.as_trained import AsTrained
from lighthouse_fx.kernels import Pyramid, reference
from lighthouse_fx.kernels.reference.scorers import token_scores
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.ir.subgraphs import regions
from lighthouse_fx.passes.rewrite.lighthouse import REWRITTEN_FROM
from lighthouse_fx.report.report import AttentionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEntropy:
    """One attention call: `heads` are the normalised entropies of its key/value heads.

    They are NaN where scores are infinite or all 0. `module` is the path of the module that calls it; `length` is N.
    """

    module: str
    length: int
    heads: tuple[float, ...]


class EntropyProbe:
    """Measures a model: `probe(*args)` runs a forward of it and returns its rewritten attention calls in order.

    The forward is that of training under `config`, inside the documents that are on, but in eval mode, without gradients and
    without Inductor. The random numbers that follow are those that would have followed without it.
    """

    def __init__(self, model: nn.Module, config: LighthouseConfig) -> None:
        self.config = config
        self._model = model
        self._run = AsTrained(model, config, observe=self._observe, inside_documents=True)
        self._found: list[CallEntropy] = []

    @property
    def records(self) -> Sequence[AttentionRecord]:
        """The attention calls of the last forward, rewritten or with the reason why not."""
        return self._run.calls

    def __call__(self, *args: Any, **kwargs: Any) -> list[CallEntropy]:
        self._found = []
        gpus = {p.device for p in self._model.parameters() if p.device.type == "cuda"}
        with evaluating(self._model), torch.random.fork_rng(list(gpus)):
            self._run(*args, **kwargs)
        return self._found

    def _observe(self, gm: fx.GraphModule, records: Sequence[AttentionRecord]) -> None:
        """Before each selection, look at what it reads; the graph computes what it did."""
        for region in regions(gm):
            graph = region.gm.graph
            for node in graph.find_nodes(op="call_function", target=torch.ops.lighthouse_fx.select.default):
                with graph.inserting_before(node):
                    graph.call_function(self._noting(records[node.meta[REWRITTEN_FROM]].module), node.args)
            region.gm.recompile()

    def _noting(self, module: str) -> Callable[..., None]:
        """A function of what the selection in a module gets, which notes the entropies."""

        def note(
            q: Tensor, k: Tensor, v: Tensor, levels: int, pooling: int, topk: int, quota: int, keep_first: bool,
            causal_selection: bool, scorer: str, dilation: int, is_causal: bool, scale: float | None, *_: Any,
        ) -> None:  # fmt: skip
            pyramid = Pyramid(length=q.shape[2], levels=levels, pooling=pooling, topk=1)
            scores = token_scores(q, k, v, scorer=scorer, dilation=dilation, is_causal=is_causal, scale=scale)
            heads = head_entropies(*scores, pyramid).tolist()
            self._found.append(CallEntropy(module=module, length=q.shape[2], heads=tuple(heads)))

        return note


def head_entropies(token_q: Tensor, token_k: Tensor, pyramid: Pyramid) -> Tensor:
    """The normalised entropy of each key/value head, from the scores of its tokens, `[B, G, N]` each: float64 `[G]`.

    Scores are norms, so none is negative; NaN and minus infinity, which the selection takes for the lowest, count as 0.
    """
    found = []
    for tokens in (token_q, token_k):
        windows = reference.window_scores(tokens, pyramid).clamp(min=0).double()  # [B, G, P - N]
        by_level = windows.split([pyramid.windows(level) for level in range(1, pyramid.levels)], dim=-1)
        found += [normalised_entropy(level).mean(0) for level in by_level if level.shape[-1] > 1]
    if not found:
        return token_q.new_full((token_q.shape[1],), math.nan, dtype=torch.float64)
    return torch.stack(found).mean(0)


def normalised_entropy(scores: Tensor) -> Tensor:
    """The entropy of scores taken as shares of their sum, over that of equal scores: `[..., W]` -> `[...]`, with W > 1."""
    shares = scores / scores.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy / math.log(scores.shape[-1])
