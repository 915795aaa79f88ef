"""A Triton kernel with a loop, which some versions of Triton's interpreter cannot run."""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _count(out, n):
    for i in range(0, n):
        tl.store(out + i, i)


@functools.cache
def problem():
    """What hinders it, or ""."""
    out = torch.zeros(3, dtype=torch.int32)
    try:
        _count[(1,)](out, 3)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter fails in a loop: {error}"
    assert out.tolist() == [0, 1, 2]
    return ""
