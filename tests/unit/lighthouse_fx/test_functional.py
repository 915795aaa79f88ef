"""`lighthouse_attention` from end to end against the brute force: outputs and all gradients, in every type."""

import logging
import re
import warnings
from contextlib import nullcontext

import brute_force
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION
from lighthouse_fx.passes import config as passes_config

pytestmark = pytest.mark.usefixtures("kernels")
OPS = torch.ops.lighthouse_fx

# (B, H, G, N, D, Dv) and the configuration
CASES = [
    ((2, 4, 2, 37, 6, 6), dict(levels=3, pooling=2, topk=4, quota=2)),
    ((1, 6, 1, 41, 4, 3), dict(levels=2, pooling=4, topk=3)),
    ((1, 2, 2, 29, 5, 7), dict(levels=3, pooling=3, topk=2, quota=1)),
    ((2, 1, 1, 16, 4, 4), dict(levels=3, pooling=4, topk=1)),
    ((1, 3, 3, 45, 4, 4), dict(levels=5, pooling=2, topk=6, quota=3)),
    ((1, 4, 2, 73, 3, 3), dict(levels=2, pooling=8, topk=4)),
    ((1, 2, 1, 9, 4, 4), dict(levels=2, pooling=2, topk=16)),  # everything is expanded
    ((1, 2, 1, 19, 4, 4), dict(levels=1, pooling=3, topk=2)),  # no pyramid: dense attention
]


def qkv(sizes, dtype=torch.float64, grad=True):
    batch, heads, groups, length, size, value_size = sizes
    return [
        torch.randn(batch, count, length, d, dtype=dtype, requires_grad=grad)
        for count, d in ((heads, size), (groups, size), (groups, value_size))
    ]


def selected(q, k, v, config, is_causal=True, scale=None):
    """The op's own selection."""
    pyramid = config.levels, config.pooling, config.topk, config.quota or 0, config.keep_first, config.causal_selection
    return OPS.select(q, k, v, *pyramid, config.scorer, config.dilation, is_causal, scale, REVISION)


def selected_by_norm(q, k, config, is_causal=True):
    """The brute force's selection, which sees nothing of the package but the numbers of the configuration."""
    names = ("levels", "pooling", "topk", "quota", "keep_first")
    pyramid = dict(length=q.shape[2], **{name: getattr(config, name) for name in names})
    pyramid["causal_selection"] = config.causal_selection and is_causal
    return brute_force.select_all(*brute_force.norm_scores(q.detach(), k.detach()), **pyramid)


# --- float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("sizes, fields", CASES, ids=str)
def test_equals_brute_force(sizes, fields, is_causal, keep_first, scale):
    config = LighthouseConfig(keep_first=keep_first, **fields)
    inputs = qkv(sizes)
    out = lighthouse_attention(*inputs, is_causal=is_causal, scale=scale, enable_gqa=sizes[1] != sizes[2], config=config)
    selections = selected_by_norm(*inputs[:2], config, is_causal)
    expected = brute_force.lighthouse(
        *inputs, selections, pooling=config.pooling, is_causal=is_causal, scale=scale
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    found, oracle = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(found, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
def test_dilated_equals_brute_force(is_causal):
    config = LighthouseConfig(levels=3, pooling=3, topk=4, quota=2, scorer="dilated", dilation=4)
    inputs = qkv((2, 4, 2, 47, 4, 3))
    out = lighthouse_attention(*inputs, is_causal=is_causal, enable_gqa=True, config=config)
    entries, _ = selected(*inputs, config, is_causal)
    selections = brute_force.from_tensor(entries, 47, 3, 3)
    expected = brute_force.lighthouse(*inputs, selections, pooling=3, is_causal=is_causal)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    found, oracle = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(found, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients_by_finite_differences(is_causal, kernels):
    """The selection is constant near these inputs; no gradient flows through it."""
    if kernels == "interpreted":
        pytest.skip("thousands of launches; the gradients are compared above")
    config = LighthouseConfig(levels=3, pooling=2, topk=2, quota=1)
    inputs = qkv((1, 2, 1, 11, 2, 2))

    def function(*inputs):
        return lighthouse_attention(*inputs, is_causal=is_causal, enable_gqa=True, config=config)

    assert torch.autograd.gradcheck(function, inputs)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of scaled_dot_product_attention differentiate once
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input_alone(which):
    sizes, fields = CASES[0]
    inputs = qkv(sizes)
    config = LighthouseConfig(**fields)
    out = lighthouse_attention(*inputs, is_causal=True, enable_gqa=True, config=config)
    expected = torch.autograd.grad(out.sum(), inputs)[which]
    inputs = [x.detach().requires_grad_(i == which) for i, x in enumerate(inputs)]
    lighthouse_attention(*inputs, is_causal=True, enable_gqa=True, config=config).sum().backward()
    torch.testing.assert_close(inputs[which].grad, expected, rtol=0, atol=0)
    assert [x.grad is None for x in inputs] == [i != which for i in range(3)]


# --- narrower types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes, fields", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_narrow_types_within_a_float64_budget(sizes, fields, dtype, is_causal, kernels):
    """At most twice the error that dense attention in the same type makes on the brute force's own sub-sequence."""
    config = LighthouseConfig(**fields)
    inputs = [x.to(dtype).detach().requires_grad_() for x in qkv(sizes)]
    gqa = sizes[1] != sizes[2]
    selections = selected_by_norm(*inputs[:2], config, is_causal)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = brute_force.lighthouse(*exact_inputs, selections, pooling=config.pooling, is_causal=is_causal)
    grad = torch.randn_like(exact).to(dtype)
    exact = exact, *torch.autograd.grad(exact, exact_inputs, grad.double())

    out = lighthouse_attention(*inputs, is_causal=is_causal, enable_gqa=gqa, config=config)
    found = out, *torch.autograd.grad(out, inputs, grad)

    # The yardstick: everything in float64 but for one rounding to `dtype` wherever a tensor of that type must lie.
    rounded = Round.apply
    exact_gather = [brute_force.per_head(brute_force.gather, x, selections, config.pooling) for x in exact_inputs]
    pooled = [rounded(x, dtype) for x in exact_gather]
    # A GPU's stock kernels err more in float32 than the plain formula: there, they are the yardstick.
    with sdpa_kernel(SDPBackend.MATH) if kernels != "gpu" else nullcontext():
        inner = F.scaled_dot_product_attention(
            *(x.to(dtype) for x in pooled), is_causal=is_causal, enable_gqa=gqa
        ).double()
    arguments = sizes[3], config.pooling, is_causal
    yardstick = rounded(brute_force.per_head(brute_force.scatter, inner, selections, *arguments), dtype)
    yardstick = yardstick, *torch.autograd.grad(yardstick, exact_inputs, grad.double())

    for ours, theirs, truth in zip(found, yardstick, exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = (ours.double() - truth).norm(), (theirs.double() - truth).norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.norm()


class Round(torch.autograd.Function):
    """Round a float64 tensor, and the gradient that comes back, to a narrower type and back."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.to(dtype).double()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).double(), None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_type(dtype):
    for sizes, fields in CASES:
        q, k, v = qkv(sizes, dtype)
        out = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=LighthouseConfig(**fields))
        assert out.shape == (*q.shape[:3], v.shape[3])
        assert out.dtype == dtype


# --- what carries over from scaled_dot_product_attention ---------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length, levels", [(15, 3), (1, 2), (40, 1)])
def test_no_coarsest_window_is_dense_attention(length, levels, is_causal, caplog):
    inputs = qkv((2, 4, 2, length, 4, 3))
    config = LighthouseConfig(levels=levels, pooling=4, topk=2)
    with caplog.at_level(logging.DEBUG, logger="lighthouse_fx"):
        out = lighthouse_attention(*inputs, is_causal=is_causal, scale=0.4, enable_gqa=True, config=config)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=is_causal, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    if length < 4 ** (levels - 1):
        assert any(f"{length} tokens" in message for message in caplog.messages)  # the reason


def test_is_the_five_ops(kernels):
    """Select, three gathers, scaled_dot_product_attention with the call's own arguments, scatter: bit for bit."""
    if kernels == "gpu":
        pytest.skip("the stock kernel is chosen there: test_gpu.py")
    config = LighthouseConfig(levels=3, pooling=2, topk=4, quota=2)
    q, k, v = qkv((2, 4, 2, 37, 8, 8), torch.float32)
    entries, slots = selected(q, k, v, config, True, 0.3)
    pooled = [OPS.gather(x, entries, slots, 3, 2, REVISION) for x in (q, k, v)]
    torch.manual_seed(3)
    inner = F.scaled_dot_product_attention(*pooled, is_causal=True, scale=0.3, enable_gqa=True, dropout_p=0.4)
    expected = OPS.scatter(inner, entries, slots, 37, 3, 2, True, REVISION)
    torch.manual_seed(3)
    out = lighthouse_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True, dropout_p=0.4, config=config)
    assert torch.equal(out, expected)


def test_dropout(kernels):
    if kernels == "interpreted":
        pytest.skip("hundreds of runs; nothing of it is in our kernels")
    config = LighthouseConfig(levels=2, pooling=2, topk=2)
    q, k, v = qkv((1, 1, 1, 12, 4, 4), torch.float32, grad=False)

    def run(p, seed):
        torch.manual_seed(seed)
        return lighthouse_attention(q, k, v, is_causal=True, dropout_p=p, config=config)

    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert torch.equal(run(0.0, 1), run(0.0, 2))
    if kernels != "gpu":  # where stock attention itself gives NaN
        assert run(1.0, 1).count_nonzero() == 0
    samples = torch.stack([run(0.3, seed) for seed in range(400)])
    off = (samples.mean(0) - run(0.0, 0)).abs()
    assert (off <= 5 * samples.std(0) / 20 + 1e-6).all()  # dropped weights are made up for: right on average


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs(dtype):
    """The layout that models have: projections `[B, N, H, D]` seen as `[B, H, N, D]`, one of them shared memory."""
    config = LighthouseConfig(levels=3, pooling=2, topk=4, quota=2)
    projected = torch.randn(2, 37, 8, 6).to(dtype).requires_grad_()  # [B, N, H + 2G, D]
    strided = [x.transpose(1, 2) for x in projected.split([4, 2, 2], dim=2)]
    plain = [x.detach().contiguous().requires_grad_() for x in strided]
    outs = [lighthouse_attention(*x, is_causal=True, enable_gqa=True, config=config) for x in (strided, plain)]
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else {}
    torch.testing.assert_close(*outs, **tolerance)
    grad = torch.randn_like(outs[0]).transpose(1, 2).contiguous().transpose(1, 2)
    (found,) = torch.autograd.grad(outs[0], projected, grad)
    expected = torch.cat([x.transpose(1, 2) for x in torch.autograd.grad(outs[1], plain, grad)], dim=2)
    torch.testing.assert_close(found, expected, **tolerance)


def test_default_configuration():
    q, k, v = qkv((1, 2, 1, 100, 4, 4))
    assert LighthouseConfig() == LighthouseConfig(levels=2, pooling=4, topk=None, keep_first=True, scorer="norm")
    out = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True)
    explicit = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=LighthouseConfig())
    assert torch.equal(out, explicit)


def test_no_grad_is_the_same_function():
    config = LighthouseConfig(levels=2, pooling=2, topk=2)
    q, k, v = qkv((1, 2, 1, 30, 4, 4))
    with torch.no_grad():
        out = lighthouse_attention(q, k, v, enable_gqa=True, config=config)
    assert not out.requires_grad
    assert torch.equal(out, lighthouse_attention(q, k, v, enable_gqa=True, config=config))


@pytest.mark.parametrize(
    "fields, warns",
    [
        (dict(quota=32), "quota=32 expands fewer than 64 windows per tile.*use quota=64 or more"),
        (dict(topk=48), "topk=48 expands fewer than 64 windows per tile.*use topk=64 or more"),
        (dict(topk=128, quota=16), "quota=16"),
        (dict(quota=32, causal_selection=False), None),
        (dict(levels=1, topk=8), None),
        (dict(topk=59 * 59), None),
        (dict(quota=64), None),
        (dict(), None),
    ],
    ids=str,
)
def test_small_quota_warns_once(fields, warns):
    passes_config._warn_of_small_quota.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            LighthouseConfig(**fields)
    assert len(found) == (warns is not None)
    for warning in found:
        assert re.search(warns, str(warning.message)) and warning.filename == __file__


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_an_error(name, grad):
    """The operators have no derivative in forward mode; a tangent that is dropped would count as zero."""
    place = ("query", "key", "value").index(name)
    tensors = [torch.randn(1, 2, 64, 8, dtype=torch.float64, requires_grad=grad) for _ in range(3)]
    direction = torch.randn_like(tensors[place])

    def call(x):
        given = [x if n == place else y for n, y in enumerate(tensors)]
        return lighthouse_attention(*given, is_causal=True, config=LighthouseConfig(pooling=2, topk=8))

    with pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
        torch.func.jvp(call, (tensors[place],), (direction,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} has a tangent"):
        call(forward_ad.make_dual(tensors[place], direction))
