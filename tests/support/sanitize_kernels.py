"""Every kernel once, at small and awkward sizes, for NVIDIA's compute-sanitizer on a machine with a GPU:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python tests/support/sanitize_kernels.py

Without caching each tensor is an allocation of its own, so that a read or write beyond one is seen.
"""

import torch

from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.kernels import triton as kernels


def main():
    torch.set_default_device("cuda")
    for length, levels, pooling, topk, dim, dtype in (
        (203, 4, 2, 6, 5, torch.float32),
        (97, 3, 4, 3, 80, torch.bfloat16),
        (1031, 3, 4, 64, 128, torch.bfloat16),
        (150, 2, 16, 2, 96, torch.float16),
        (63, 1, 2, 4, 16, torch.float64),
    ):
        pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk)
        tokens = torch.randn(2, length, 4, dim, dtype=dtype).transpose(1, 2)
        tokens[0, 0, 3] = float("nan")
        windows = kernels.norm_scores(tokens, 2, pyramid)
        entries, slots = kernels.choose_windows(windows, windows, pyramid)
        rows = kernels.gather(tokens, entries, pyramid)
        kernels.gather_backward(rows, slots, pyramid)
        for is_causal in (True, False):
            kernels.scatter(rows, slots, pyramid, is_causal=is_causal)
            kernels.scatter_backward(tokens, entries, pyramid, is_causal=is_causal)
        assert not kernels.is_causal_mask(torch.randn(2, 3, length, length, dtype=dtype))
        assert kernels.is_causal_mask(torch.ones(length, length, dtype=torch.bool).tril())
        torch.cuda.synchronize()
        print(length, levels, pooling, "done", flush=True)


if __name__ == "__main__":
    main()
