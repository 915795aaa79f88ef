"""The Triton kernels under the names of their plain twins in `reference`."""

from .causal_mask import is_causal_mask
from .gather_scatter import gather, gather_backward, scatter, scatter_backward
from .merge import merge, merge_backward, shift_output
from .scores import norm_scores
from .select import choose_windows

__all__ = [
    "choose_windows",
    "gather",
    "gather_backward",
    "is_causal_mask",
    "merge",
    "merge_backward",
    "norm_scores",
    "scatter",
    "scatter_backward",
    "shift_output",
]
