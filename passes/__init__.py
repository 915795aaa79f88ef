"""The compiler passes over Dynamo's graph, before AOTAutograd sees it: find, prove, check, undo, score,
undo what is left, rewrite, clean up.

Each is `(gm, example_inputs, *, config) -> gm` and opens with the graph before and after. `PIPELINE` is their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from lighthouse_fx.config import LighthouseConfig

from .by_hand import find_by_hand
from .call import CALLS, DENSE, LAYERS, TRAINING, AttentionCall, Refusal
from .check import check_attention
from .document_input import add_document_input
from .equal_heads import undo_equal_heads
from .find import find_attention
from .flash_functions import find_flash_functions
from .flex import find_flex
from .leftovers import remove_leftovers
from .masks import prove_masks
from .multi_head import find_multi_head
from .raw_scores import score_raw
from .repeated_heads import undo_repeated_heads
from .rewrite import rewrite_attention

PIPELINE: list[Callable[..., fx.GraphModule]] = [
    find_attention,
    find_multi_head,
    find_by_hand,
    find_flex,
    find_flash_functions,
    prove_masks,
    add_document_input,
    check_attention,
    undo_repeated_heads,
    score_raw,
    undo_equal_heads,
    rewrite_attention,
    remove_leftovers,
]


def run_passes(gm: fx.GraphModule, example_inputs: Sequence[Any], *, config: LighthouseConfig) -> fx.GraphModule:
    """Run the pipeline. Afterwards `gm.meta[CALLS]` says what became of each attention call."""
    for step in PIPELINE:
        gm = step(gm, example_inputs, config=config)
    return gm


__all__ = ["CALLS", "DENSE", "LAYERS", "PIPELINE", "TRAINING", "AttentionCall", "Refusal", "run_passes"]
