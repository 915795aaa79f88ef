"""Compile every kernel for an H100 on a machine without a GPU, and print a line for each: its name and its registers.

Run by test_triton.py in a process of its own, without Triton's interpreter. A stand-in for Triton's driver answers what the
launcher asks before it compiles; nothing is launched.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lighthouse_fx.kernels import Pyramid, reference, triton


class Hopper:
    """Triton's driver, as far as compiling needs one."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


launch = JITFunction.run


def compile_only(self, *args, grid, warmup, **kwargs):
    compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
    print(self.fn.__name__, len(compiled.asm["cubin"]))
    return compiled


def main():
    driver.set_active(Hopper())
    JITFunction.run = compile_only
    for length, levels, pooling, topk, dim, dtype in (
        (98_304, 3, 4, 1536, 128, torch.bfloat16),
        (1000, 4, 2, 30, 96, torch.float32),
        (501, 1, 2, 4, 16, torch.float64),
    ):
        pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk)
        tokens = torch.zeros(1, 2, length, dim, dtype=dtype)
        scores = torch.zeros(1, 1, pyramid.size - length)
        entries, slots = reference.choose_windows(scores, scores, pyramid)
        rows = torch.zeros(1, 2, entries.shape[2], dim, dtype=dtype)
        triton.norm_scores(tokens, 1, pyramid)
        triton.choose_windows(scores, scores, pyramid)
        triton.gather(tokens, entries, pyramid)
        triton.gather_backward(rows, slots, pyramid)
        for is_causal in (True, False):
            triton.scatter(rows, slots, pyramid, is_causal=is_causal)
            triton.scatter_backward(tokens, entries, pyramid, is_causal=is_causal)
    for dtype in (torch.bool, torch.bfloat16, torch.float32, torch.float64):
        triton.is_causal_mask(torch.zeros(1, 1, 256, 256, dtype=dtype))


if __name__ == "__main__":
    main()
