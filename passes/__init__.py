"""The compiler passes over Dynamo's graph, before AOTAutograd sees it: find, prove, check, undo, score,
undo what is left, rewrite, clean up.

Each is `(gm, example_inputs, *, config) -> gm` and opens with the graph before and after. `PIPELINE` is their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from .attention_call import CALLS, CONTEXT, AttentionCall, PassContext, Refusal
from .config import LighthouseConfig
from .decide.document_input import add_document_input
from .decide.legality import check_legality
from .decide.policy import check_policy
from .masks.prove import prove_masks
from .match.flash_attn import find_flash_functions
from .match.flex import find_flex
from .match.mha import find_multi_head
from .match.sdpa import find_attention
from .match.unfused import find_by_hand
from .pass_log import PassLog
from .rewrite.cleanup import remove_leftovers
from .rewrite.equal_heads import undo_equal_heads
from .rewrite.lighthouse import rewrite_attention
from .rewrite.qk_norm import score_raw
from .rewrite.repeat_kv import undo_repeated_heads

PIPELINE: list[Callable[..., fx.GraphModule]] = [
    find_attention,
    find_multi_head,
    find_by_hand,
    find_flex,
    find_flash_functions,
    prove_masks,
    add_document_input,
    check_legality,
    check_policy,
    undo_repeated_heads,
    score_raw,
    undo_equal_heads,
    rewrite_attention,
    remove_leftovers,
]


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Run the pipeline. Afterwards `gm.meta[CALLS]` says what became of each attention call."""
    log = PassLog(gm)
    for step in PIPELINE:
        gm = log.run(step, gm, example_inputs, config=config)
    return gm


__all__ = ["CALLS", "CONTEXT", "PIPELINE", "AttentionCall", "PassContext", "Refusal", "run_passes"]
