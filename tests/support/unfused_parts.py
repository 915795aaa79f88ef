"""What attention that is written out is put together from, in the tests."""

import torch
from graphs import B, D, H, N

SCALE = 0.3


def seen(n=N):
    return torch.ones(n, n, dtype=torch.bool).tril()


def hidden(n=N):
    return ~seen(n)


def scores(q, k):
    return q @ k.transpose(-2, -1)


def qkv(groups=H, dtype=torch.float64):
    return [torch.randn(B, h, N, D, dtype=dtype, requires_grad=True) for h in (H, groups, groups)]
