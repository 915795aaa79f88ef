"""Whether Triton's interpreter works here: that of Triton 3.6, which torch 2.11 brings, cannot loop with numpy 2.4."""

import importlib.util

import pytest
import torch


def skip_without_interpreter():
    """Skip the test where Triton's kernels cannot run on the CPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, and a machine without a GPU")
    import looping_kernel

    if problem := looping_kernel.problem():
        pytest.skip(problem)
