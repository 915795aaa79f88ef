"""The Triton kernels under the names of their plain twins in `reference.py`."""

from .triton_mask import is_causal_mask
from .triton_rows import gather, gather_backward, scatter, scatter_backward
from .triton_score import norm_scores
from .triton_select import choose_windows

__all__ = ["choose_windows", "gather", "gather_backward", "is_causal_mask", "norm_scores", "scatter", "scatter_backward"]
