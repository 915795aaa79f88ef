"""The plain PyTorch twin of every op: what the kernels must equal, and what runs where there is no kernel.

It favours being read: the pooled pyramid is materialised, which the kernels never do. Sums are taken in float32, or in
float64 for float64 inputs. Everything is a gather through `entries` (slot -> window) or `slots` (window -> slot, -1 where
the window is no entry), so nothing depends on the order of atomics. Source: SPEC.md, "The four stages", "The local branch".
"""

from .masks import hidden_from, is_causal_mask, rows_that_are_causal
from .merge import merge, merge_backward, shift_output
from .pooling import gather, gather_backward
from .scatter import own_document, scatter, scatter_backward
from .selection import choose_windows, norm_scores, ranks_by_previous, select_windows, window_scores

__all__ = [
    "choose_windows",
    "gather",
    "gather_backward",
    "hidden_from",
    "is_causal_mask",
    "merge",
    "merge_backward",
    "norm_scores",
    "own_document",
    "ranks_by_previous",
    "rows_that_are_causal",
    "scatter",
    "scatter_backward",
    "select_windows",
    "shift_output",
    "window_scores",
]
