"""The local branch on a GPU: stock kernels and Triton's merge in bfloat16, against plain PyTorch in float64 on the CPU."""

import pytest
import torch

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels.ops import local_branch
from lighthouse_fx.kernels.packed.attention import starts_of
from lighthouse_fx.kernels.reference import local as plain

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-2  # of norms; bfloat16 keeps 8 bits, measured errors are some 3e-3


def qkv(length, heads=4, groups=2, dim=64, dtype=torch.bfloat16):
    return [torch.randn(1, count, length, dim).to(dtype) for count in (heads, groups, groups)]


def on(device, tensors, dtype=None):
    return [x.detach().to(device=device, dtype=dtype or x.dtype).requires_grad_() for x in tensors]


def run(call, tensors, grads):
    out = call(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(out, tensors, grads)


def assert_close(found, exact, tolerance=TOLERANCE):
    for x, y in zip(found, exact, strict=True):
        assert x.isfinite().all()
        assert (x.double().cpu() - y).norm() <= tolerance * y.norm()


def documents_of(length):
    lengths = [length // 2 + 3, 1, length // 5]
    return torch.arange(4).repeat_interleave(torch.tensor([*lengths, length - sum(lengths)]))


@pytest.mark.parametrize("is_causal, documents", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("length", [1000, 4096])
@pytest.mark.parametrize("window", [1, 128, 512])
def test_window(window, length, is_causal, documents):
    tensors = qkv(length)
    starts = starts_of(documents_of(length)[None]) if documents else None
    grads = [torch.randn(1, 4, length, 64).bfloat16(), torch.randn(1, 4, length)]

    def stock(*x):
        told = None if starts is None else starts.cuda()
        return local_branch.local_attention(*x, window, 0.0, is_causal, None, True, told, 8)

    def twin(*x):
        return plain.local_attention(*x, window, is_causal=is_causal, scale=64**-0.5, starts=starts)

    exact = run(twin, on("cpu", tensors, torch.float64), [x.double() for x in grads])
    assert_close(run(stock, on("cuda", tensors), [x.cuda() for x in grads]), exact)


@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("length", [1000, 4096])
def test_log_sum_exp_and_its_gradient(length, kernel):
    tensors, grads = qkv(length, dim=128), [torch.randn(1, 4, length, 128).bfloat16(), torch.randn(1, 4, length)]

    def stock(*x):
        return local_branch.attention_and_lse(*x, 0.0, True, None, True, kernel)

    def twin(*x):
        return plain.attention_and_lse(*x, is_causal=True, scale=128**-0.5)

    exact = run(twin, on("cpu", tensors, torch.float64), [x.double() for x in grads])
    assert_close(run(stock, on("cuda", tensors), [x.cuda() for x in grads]), exact)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("fields", [dict(levels=3, topk=128), dict(levels=2), dict(levels=0)], ids=str)
@pytest.mark.parametrize("length", [1000, 4096])
def test_layer(length, fields, documents):
    """The whole layer. It selects by norms that no rounding changes: in float64 of the same bfloat16 numbers."""
    tensors, config = qkv(length), LighthouseConfig(local_window=128, **fields)
    numbers = documents_of(length)[None] if documents else None
    grads = [torch.randn(1, 4, length, 64).bfloat16()]

    def call(*x):
        return lighthouse_attention(*x, is_causal=True, enable_gqa=True, documents=numbers, config=config)

    exact = run(call, on("cpu", tensors, torch.float64), [x.double() for x in grads])
    found = run(call, on("cuda", tensors), [x.cuda() for x in grads])
    assert_close(found, exact, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_without_a_windowed_kernel(dtype):
    tensors, config = qkv(1000, dtype=dtype), LighthouseConfig(local_window=128, levels=3, topk=128)
    grads = [torch.randn(1, 4, 1000, 64, dtype=dtype)]

    def call(*x):
        return lighthouse_attention(*x, is_causal=True, enable_gqa=True, config=config)

    exact = run(call, on("cpu", tensors, torch.float64), [x.double() for x in grads])
    assert_close(run(call, on("cuda", tensors), [x.cuda() for x in grads]), exact, 5e-3 if dtype == torch.float32 else 1e-10)


def test_dropout_is_the_same_forward_and_backward():
    """With values of one, the output is the sum of what is left of the weights: its gradient by v tells which are left."""
    q, k, _ = on("cuda", qkv(1024))
    v = torch.ones_like(k).requires_grad_()
    for call in (
        lambda: local_branch.local_attention(q, k, v, 128, 0.3, True, None, True),
        lambda: local_branch.attention_and_lse(q, k, v, 0.3, True, None, True, "auto"),
    ):
        out, _ = call()
        (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
        assert abs(grad.float().sum() / out.float().sum() - 1) < 1e-2
        assert (out.float() - 1).abs().mean() > 1e-2


def test_compiled_layer():
    tensors = qkv(4096, dim=128)
    config = LighthouseConfig(local_window=512, levels=3, topk=256)
    grad = [torch.randn(1, 4, 4096, 128).bfloat16().cuda()]

    def call(*x):
        return lighthouse_attention(*x, is_causal=True, enable_gqa=True, config=config)

    found = run(torch.compile(call, fullgraph=True), on("cuda", tensors), grad)
    own = run(call, on("cuda", tensors), grad)
    assert_close(found, [x.double().cpu() for x in own], 5e-3)
