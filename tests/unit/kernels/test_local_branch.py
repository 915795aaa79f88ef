"""The local branch against loops in float64: windowed attention, attention with its log-sum-exp, their merge, and all of it."""

from contextlib import nullcontext

import brute_documents
import brute_force
import brute_local
import pytest
import torch
import torch.nn.functional as F

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid, reference
from lighthouse_fx.kernels.ops import local_branch
from lighthouse_fx.kernels.packed.attention import starts_of
from lighthouse_fx.kernels.reference import local as plain

pytestmark = pytest.mark.usefixtures("kernels")
OPS = torch.ops.lighthouse_fx
EXACT = dict(rtol=1e-10, atol=1e-10)

# (B, H, G, N, D, Dv), the window and the pyramid: odd sizes, tails, windows of one token and near the length
CASES = [
    ((2, 4, 2, 37, 6, 6), 5, dict(levels=3, pooling=2, topk=4, quota=2)),
    ((1, 3, 1, 41, 4, 3), 1, dict(levels=2, pooling=4, topk=3)),
    ((1, 2, 2, 29, 5, 7), 28, dict(levels=3, pooling=3, topk=2, quota=1)),
    ((1, 2, 1, 70, 4, 4), 33, dict(levels=2, pooling=8, topk=4)),
    ((2, 2, 1, 23, 4, 4), 4, dict(levels=0)),
    ((1, 2, 2, 65, 3, 5), 40, dict(levels=0)),
]
ROWS = [(10, 23, 4), (1, 1, 30, 5), (16, 21), (37,)]  # lengths of documents


def qkv(sizes, dtype=torch.float64):
    batch, heads, groups, length, dim, value_dim = sizes
    shapes = (heads, dim), (groups, dim), (groups, value_dim)
    return [torch.randn(batch, count, length, size, dtype=dtype).requires_grad_() for count, size in shapes]


def selections(q, k, config, is_causal, numbers=None):
    if config.levels == 0:
        return [[[]] * k.shape[1]] * k.shape[0]
    scores = brute_force.norm_scores(q.detach(), k.detach())
    pyramid = {name: getattr(config, name) for name in ("levels", "pooling", "topk", "quota")} | dict(length=q.shape[2])
    if numbers is None:
        return brute_force.select_all(*scores, causal_selection=is_causal, **pyramid)
    rows = zip(*scores, numbers, strict=True)
    return [[brute_documents.select(*of, row, **pyramid) for of in zip(s_q, s_k, strict=True)] for s_q, s_k, row in rows]


def expected(q, k, v, config, is_causal, scale=None, numbers=None):
    def head(q, k, v, entries, numbers):
        fields = dict(window=config.local_window, is_causal=is_causal, scale=scale, numbers=numbers)
        if not entries:
            return torch.stack([out for out, _ in brute_local.local(q, k, v, **fields)])
        return brute_local.lighthouse(q, k, v, entries, pooling=config.pooling, levels=config.levels, **fields)

    rows = [[row] * k.shape[1] for row in numbers or [None] * len(k)]
    return brute_local.per_head(head, q, k, v, selections(q, k, config, is_causal, numbers), rows)


def assert_equal_with_gradients(found, oracle, tensors, **tolerance):
    torch.testing.assert_close(found, oracle, **tolerance)
    grad = torch.randn_like(oracle)
    pair = (torch.autograd.grad(x, tensors, grad, retain_graph=True) for x in (found, oracle))
    torch.testing.assert_close(*pair, **tolerance)


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal, scale", [(True, None), (False, None), (True, 0.7)])
@pytest.mark.parametrize("sizes, window, fields", CASES, ids=str)
def test_equals_brute_force(sizes, window, fields, is_causal, scale):
    tensors, config = qkv(sizes), LighthouseConfig(local_window=window, **fields)
    out = lighthouse_attention(*tensors, is_causal=is_causal, scale=scale, enable_gqa=True, config=config)
    assert_equal_with_gradients(out, expected(*tensors, config, is_causal, scale), tensors, **EXACT)


@pytest.mark.parametrize("fields", [dict(levels=3, pooling=2, topk=6), dict(levels=0)], ids=str)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_documents_equal_brute_force(lengths, fields):
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    tensors, config = qkv((1, 4, 2, 37, 6, 5)), LighthouseConfig(local_window=6, **fields)
    out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, documents=numbers, config=config)
    assert_equal_with_gradients(out, expected(*tensors, config, True, numbers=numbers.tolist()), tensors, **EXACT)


def test_sequence_no_longer_than_the_window_is_dense():
    tensors = qkv((1, 4, 2, 24, 6, 6))
    numbers = torch.tensor([[0] * 10 + [1] * 14])
    for fields in (dict(levels=2, topk=2), dict(levels=0)):
        config = LighthouseConfig(local_window=24, **fields)
        out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=config)
        assert torch.equal(out, F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True))
        inside = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, documents=numbers, config=config)
        mask = (numbers[:, :, None] == numbers[:, None]).tril()
        dense = F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(inside, dense, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    sizes, config = (1, 4, 2, 100, 8, 8), LighthouseConfig(local_window=20, levels=2, topk=8)
    tensors = qkv(sizes, dtype)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=config)
    exact = expected(*wide, config, True)
    assert out.dtype == dtype
    grad = torch.randn_like(exact).to(dtype)
    found, oracle = torch.autograd.grad(out, tensors, grad), torch.autograd.grad(exact, wide, grad.double())
    for x, y in zip((out, *found), (exact, *oracle), strict=True):
        assert (x.double() - y).norm() <= 6 * torch.finfo(dtype).eps * y.norm()


def test_poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        tensors, config = qkv((1, 4, 2, 45, 6, 6)), LighthouseConfig(local_window=7, levels=3, pooling=2, topk=4)
        runs = []
        for _ in range(2):
            out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=config)
            runs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert all(x.isfinite().all() and torch.equal(x, y) for x, y in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length, window", [(1, 1), (50, 1), (50, 2), (33, 32), (100, 33), (64, 64), (65, 64), (20, 50)])
def test_local_attention(length, window, is_causal):
    tensors = qkv((2, 4, 2, length, 5, 3))
    out, lse = local_branch.local_attention(*tensors, window, 0.0, is_causal, None, True)
    place = torch.arange(length)
    apart = place[:, None] - place
    shown = (apart < window) & (apart > (-1 if is_causal else -window))
    assert_equal_with_gradients(
        out, F.scaled_dot_product_attention(*tensors, attn_mask=shown, enable_gqa=True), tensors, **EXACT
    )
    scores = tensors[0].unflatten(1, (2, -1)) @ tensors[1][:, :, None].transpose(-1, -2) * 5**-0.5
    exact = scores.masked_fill(~shown, -torch.inf).logsumexp(-1).flatten(1, 2)
    assert_equal_with_gradients(lse, exact, tensors[:2], **EXACT)


@pytest.mark.parametrize("is_causal", [True, False])
def test_log_sum_exp_has_a_gradient_through_the_stock_backward(is_causal):
    tensors = qkv((2, 4, 2, 70, 8, 5))
    stock = local_branch.attention_and_lse(*tensors, 0.0, is_causal, None, True, "auto")
    exact = plain.attention_and_lse(*tensors, is_causal=is_causal, scale=8**-0.5)
    grads = [torch.randn_like(x) for x in exact]
    torch.testing.assert_close(stock, exact, **EXACT)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, tensors, grads, retain_graph=True) for x in (stock, exact)), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shifted_output_stays_finite_where_the_gradient_cancels(dtype):
    """Rows whose gradient is zero keep their output; where it is tiny, the quotient is bounded and what it is to do holds."""
    from lighthouse_fx.kernels.ops.dispatch import kernels_for

    out, grad, grad_lse = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6) + 3
    grad[:, :, 1], grad[:, :, 2] = 0, grad[:, :, 2] * 1e-3
    grad[:, :, 3, 1:], grad[:, :, 4] = 0, torch.finfo(dtype).tiny
    out, grad = out.to(dtype), grad.to(dtype)
    grad_lse = grad_lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    shifted = kernels_for(out).shift_output(out, grad, grad_lse)
    assert shifted.isfinite().all() and torch.equal(shifted[:, :, 1], out[:, :, 1])
    passed_on = ((out.double() - shifted.double()) * grad.double()).sum(-1)
    for row in (0, 2, 3, 5):
        torch.testing.assert_close(
            passed_on[:, :, row], grad_lse[:, :, row].double(), rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps
        )


def test_cancelling_gradient_through_the_stock_backward():
    """An entry whose tokens' gradients cancel but for 1e-6 of them still passes on that of its log-sum-exp, within rounding."""
    tensors = [x.detach().float().requires_grad_() for x in qkv((1, 2, 2, 40, 8, 8))]
    stock = local_branch.attention_and_lse(*tensors, 0.0, True, None, True, "auto")
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = plain.attention_and_lse(*wide, is_causal=True, scale=8**-0.5)
    grads = torch.randn_like(exact[0]) * 1e-6, torch.randn_like(exact[1])
    found = torch.autograd.grad(stock, tensors, [x.float() for x in grads])
    for x, y in zip(found, torch.autograd.grad(exact, wide, grads), strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


def test_dropout_is_of_weights_and_leaves_the_log_sum_exp():
    tensors = [x.detach() for x in qkv((1, 2, 2, 512, 4, 4))]
    for call in (
        lambda p: local_branch.local_attention(*tensors, 64, p, True, None, True),
        lambda p: local_branch.attention_and_lse(*tensors, p, True, None, True, "auto"),
    ):
        whole, dropped = call(0.0), [call(0.25) for _ in range(64)]
        assert all(torch.equal(lse, dropped[0][1]) for _, lse in dropped)
        torch.testing.assert_close(dropped[0][1], whole[1], **EXACT)
        mean = torch.stack([out for out, _ in dropped]).mean(0)
        assert (dropped[0][0] - whole[0]).norm() > 0.01 * whole[0].norm()
        assert (mean - whole[0])[:, :, 64:].norm() < 0.25 * whole[0][:, :, 64:].norm()


def parts(documents, dtype=torch.float32):
    pyramid = Pyramid(length=37, levels=3, pooling=2, topk=4)
    entries, slots = reference.select_windows(torch.rand(2, 2, 37), torch.rand(2, 2, 37), pyramid)
    starts = starts_of(torch.tensor([0] * 11 + [1] * 26).expand(2, -1)) if documents else None
    rows, tokens = entries.shape[2], 37
    shapes = (2, 4, rows, 6), (2, 4, rows), (2, 4, tokens, 6), (2, 4, tokens)
    given = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return (*given, entries, slots, 3, 2, True, REVISION, starts, documents)


@pytest.mark.parametrize("documents", [False, True])
def test_opcheck(documents):
    arguments = parts(documents)
    torch.library.opcheck(OPS.merge.default, arguments)
    q, k, v = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3))
    torch.library.opcheck(
        OPS.stock_attention.default, (q, k, v, None, 20, 0, True, 0.0, 0.3, "cpu", REVISION)
    )


def test_merge_ignores_what_does_not_concern_a_token(kernels):
    """With nothing but the local window in reach, or far below it, the output is the local one."""
    out, lse, local_out, local_lse, *rest = parts(False, torch.float64)
    merged, total = OPS.merge(out, lse - 1000, local_out, local_lse, *rest)
    torch.testing.assert_close(merged, local_out, **EXACT)
    torch.testing.assert_close(total, local_lse, **EXACT)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [dict(levels=2, topk=8), dict(levels=0)], ids=str)
def test_rewritten_and_compiled(fields, kernels):
    if kernels != "plain":
        pytest.skip("compiled graphs keep the op")
    options = dict(local_window=16, **fields)
    run = torch.compile(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), backend="lighthouse", fullgraph=True,
        options=options,
    )  # fmt: skip
    tensors = qkv((1, 4, 2, 100, 8, 8), torch.float32)
    out = run(*tensors)
    assert lighthouse_fx.reports()[-1].rewritten == 1
    own = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=LighthouseConfig(**options))
    assert_equal_with_gradients(out, own, tensors, rtol=1e-4, atol=1e-5)
    dense = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert not torch.allclose(out, dense, atol=1e-3)
    short = [x[:, :, :16] for x in tensors]
    assert torch.equal(run(*short), F.scaled_dot_product_attention(*short, is_causal=True, enable_gqa=True))


def test_function_compiles_without_breaks(kernels):
    if kernels != "plain":
        pytest.skip("compiled graphs keep the op")
    config = LighthouseConfig(local_window=16, levels=3, pooling=2, topk=8)
    tensors = qkv((1, 4, 2, 100, 8, 8), torch.float32)

    def call(*x):
        return lighthouse_attention(*x, is_causal=True, enable_gqa=True, config=config)

    found = torch.compile(call, fullgraph=True)(*tensors)
    assert_equal_with_gradients(found, call(*tensors), tensors, rtol=1e-4, atol=1e-5)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_sliding_window_is_the_local_branch_alone():
    assert LighthouseConfig.sliding_window(512) == LighthouseConfig(levels=0, local_window=512)
    for wrong, message in (
        (dict(levels=0), "levels=0 and local_window=0 leave nothing to attend to"),
        (dict(local_window=-1), "local_window=-1 is below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LighthouseConfig(**wrong)
    with pytest.raises(ValueError, match="local_window=0 leave nothing"):
        LighthouseConfig.sliding_window(0)


@pytest.mark.parametrize("kernel", ["flash-attn-4", "flash-attn"])
def test_kernel_without_log_sum_exp_is_an_error(kernel):
    tensors = qkv((1, 2, 2, 40, 8, 8))
    with pytest.raises(ValueError, match=f"kernel='{kernel}' is not tried with a local branch.*use kernel='auto'"):
        local_branch.attention_and_lse(*tensors, 0.0, True, None, True, kernel)


@pytest.mark.parametrize("fields", [dict(levels=2, topk=8), dict(levels=0)], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_verified(fields, documents, kernels):
    """`verify` compares the rewritten graph with the functional form and with the plain twins."""
    if kernels != "plain":
        pytest.skip("compiled graphs keep the op")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    numbers = torch.tensor([[0] * 30 + [1] * 34])
    with lighthouse_fx.documents(numbers) if documents else nullcontext():
        found = lighthouse_fx.verify(Model(), torch.randn(1, 64, 16), config=LighthouseConfig(local_window=8, **fields))
    assert found.passed and len(found.checks) > 4, str(found)


def test_report_counts_the_local_branch(kernels):
    if kernels != "plain":
        pytest.skip("a report of a graph")
    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    for fields, gathered, ranked in ((dict(levels=2, topk=4), 32, "norm"), (dict(levels=0), 0, "")):
        config = LighthouseConfig(local_window=16, **fields)
        report = lighthouse_fx.explain(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q, config=config)
        call = report.calls[0]
        assert (call.gathered, call.local_window, call.scorer) == (gathered, 16, ranked)
        assert call.flops_share == (gathered / 64) ** 2 + 1 - (48 / 64) ** 2
        assert "yes, local window of 16" in " ".join(str(report).split())
