"""On a GPU: compiled layers against float64, how they are launched, every mode, the choice of kernel, size limits, memory."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid, reference
from lighthouse_fx.kernels.reference.scorers import token_scores

pytestmark = pytest.mark.gpu
OPS = torch.ops.lighthouse_fx
OPTIONS = {"levels": 3, "pooling": 4, "topk": 64}
CONFIG = LighthouseConfig(**OPTIONS)


def qkv(length=1031, heads=4, groups=2, dim=64, dtype=torch.bfloat16, batch=2):
    return [
        torch.randn(batch, length, count, dim, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    ]


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def compiled(function=attention, options=OPTIONS, **arguments):
    return torch.compile(function, backend="lighthouse", options=dict(options), fullgraph=True, **arguments)


def run(function, tensors, grad):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, grad)]


def plain(q, k, v, entries, slots, config=CONFIG):
    """Plain PyTorch on a given selection, in whatever type comes in."""
    pyramid = Pyramid(length=q.shape[2], levels=config.levels, pooling=config.pooling, topk=config.topk)
    pooled = [Pooled.apply(x, entries, slots, pyramid) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        out = attention(*pooled)
    return Scattered.apply(out, entries, slots, pyramid)


class Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, entries, slots, pyramid):
        ctx.rest = slots, pyramid
        return reference.gather(x, entries, pyramid)

    @staticmethod
    def backward(ctx, grad):
        return reference.gather_backward(grad, *ctx.rest), None, None, None


class Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, entries, slots, pyramid):
        ctx.rest = entries, pyramid
        return reference.scatter(x, slots, pyramid, is_causal=True)

    @staticmethod
    def backward(ctx, grad):
        return reference.scatter_backward(grad, *ctx.rest, is_causal=True), None, None, None


def selection(q, k, v, config=CONFIG):
    pyramid = config.levels, config.pooling, config.topk, config.quota or 0, config.keep_first, config.causal_selection
    return OPS.select(q, k, v, *pyramid, config.scorer, config.dilation, True, None, REVISION)


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads, groups, dim", [(4, 4, 128), (8, 2, 64), (4, 1, 80), (2, 2, 96), (2, 2, 256), (2, 2, 16)])
def test_compiled_layer_against_float64(heads, groups, dim, dtype):
    tensors = qkv(heads=heads, groups=groups, dim=dim, dtype=dtype)
    grad = torch.randn_like(tensors[0])
    index = selection(*tensors)
    exact = run(lambda *x: plain(*x, *index), [x.detach().double().requires_grad_() for x in tensors], grad.double())
    twin = run(lambda *x: plain(*x, *index), tensors, grad)
    found = run(compiled(), tensors, grad)
    assert lighthouse_fx.reports()[-1].rewritten == 1
    for x, y, oracle in zip(found, twin, exact, strict=True):
        assert x.dtype == dtype
        assert relative(x, oracle) <= 2 * relative(y, oracle) + 1e-6


def test_kernels_are_launched_by_inductor():
    """No call back into Python for an op, and the stock attention that was chosen, forward and backward."""
    tensors = qkv(dim=128)
    grad = torch.randn_like(tensors[0])
    _, codes = run_and_get_code(run, compiled(), tensors, grad)
    code = "\n".join(codes)
    for kernel in ("_score_kernel", "_select_kernel", "_collect_kernel", "_spread_kernel"):
        assert re.search(rf"{kernel}_\d+\.run\(", code), kernel
    assert "torch.ops.lighthouse_fx" not in code
    if torch.cuda.get_device_capability() >= (9, 0):
        assert "_scaled_dot_product_cudnn_attention.default" in code
        assert "_scaled_dot_product_cudnn_attention_backward.default" in code


@pytest.mark.parametrize("kernel, op", [("flash", "flash"), ("efficient", "efficient"), ("cudnn", "cudnn")])
def test_kernel_is_the_one_asked_for(kernel, op):
    tensors = qkv(dim=128)
    if kernel == "efficient":
        tensors = qkv(heads=2, groups=2, dim=128)  # it takes no grouped heads
    _, codes = run_and_get_code(
        run, compiled(options={**OPTIONS, "kernel": kernel}), tensors, torch.randn_like(tensors[0])
    )
    code = "\n".join(codes)
    assert f"_scaled_dot_product_{op}_attention" in code
    assert f"_scaled_dot_product_{op}_attention_backward" in code


@pytest.mark.parametrize("form", ["compiled", "functional"])
def test_kernel_that_cannot_is_an_error(form):
    tensors = qkv(dtype=torch.float32)
    function = compiled(options={**OPTIONS, "kernel": "cudnn"})
    if form == "functional":
        config = LighthouseConfig(**OPTIONS, kernel="cudnn")

        def function(q, k, v):
            return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)

    with pytest.raises(Exception, match="kernel='cudnn' cannot attend"):
        function(*tensors)


def test_auto_heeds_what_the_user_switched_off():
    tensors = qkv(dim=128)
    run(compiled(), tensors, torch.randn_like(tensors[0]))  # now the compile cache has the graph with the usual order
    torch._dynamo.reset()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        _, codes = run_and_get_code(run, compiled(), tensors, torch.randn_like(tensors[0]))
    assert "_scaled_dot_product_flash_attention" in "\n".join(codes)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(options={**OPTIONS, "triton.cudagraphs": True}),
        dict(options={**OPTIONS, "max_autotune": True}),
        dict(dynamic=True),
        dict(dynamic=False),
    ],
    ids=str,
)
def test_every_mode_is_the_functional_form(arguments):
    function = compiled(**arguments)
    for length in (1031, 1280, 997):
        tensors = qkv(length)
        grad = torch.randn_like(tensors[0])
        expected = run(
            lambda q, k, v: lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=CONFIG), tensors, grad
        )
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = [x.clone() for x in run(function, tensors, grad)]
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_named_modes():
    """`mode=` and our fields do not go together in torch.compile; the stage gives the fields."""
    tensors = qkv()
    grad = torch.randn_like(tensors[0])
    expected = run(
        lambda q, k, v: lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=CONFIG), tensors, grad
    )
    for mode in ("reduce-overhead", "max-autotune"):
        torch._dynamo.reset()
        with lighthouse_fx.pretraining(CONFIG):
            function = torch.compile(attention, backend="lighthouse", mode=mode, fullgraph=True)
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                found = [x.clone() for x in run(function, tensors, grad)]
        assert lighthouse_fx.reports()[-1].rewritten == 1
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_autocast_and_checkpoint():
    linear = torch.nn.Linear(64, 64, device="cuda")
    tensors = qkv(dtype=torch.float32)

    def layer(q, k, v):
        return attention(linear(q), linear(k), linear(v))

    grad = torch.randn(tensors[0].shape, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        direct = run(compiled(layer), tensors, grad)
        again = run(lambda *x: checkpoint(compiled(layer), *x, use_reentrant=False), tensors, grad)
        inside = run(compiled(lambda *x: checkpoint(layer, *x, use_reentrant=False)), tensors, grad)
    assert direct[0].dtype == torch.bfloat16
    for x, y, z in zip(direct, again, inside, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(x, z, rtol=2e-2, atol=2e-2)


def test_bitwise_the_same_twice():
    """Everything but the stock attention's own backward, whose kernels may add in any order."""
    tensors = qkv(length=16_387, heads=8, groups=8, dim=128, batch=1)
    pyramid = Pyramid(length=16_387, levels=3, pooling=4, topk=1024)

    def once():
        entries, slots = OPS.select(*tensors, 3, 4, 1024, 0, True, "norm", 64, True, None, REVISION)
        rows = OPS.gather(tensors[0].detach(), entries, slots, 3, 4, REVISION)
        out = OPS.scatter(rows, entries, slots, pyramid.length, 3, 4, True, REVISION)
        back = OPS.scatter_backward(out, entries, slots, 3, 4, True, REVISION)
        return entries, slots, rows, out, back, OPS.gather_backward(back, entries, slots, pyramid.length, 3, 4, REVISION)

    for x, y in zip(once(), once(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_other_scorers(scorer):
    """The scores are plain PyTorch's, and the compiled layer selects by them."""
    if scorer == "gla":
        pytest.importorskip("fla", reason="needs fla-core, the extra `gla`")
    tensors = qkv(length=1024, dtype=torch.float32)
    arguments = dict(scorer=scorer, dilation=8, is_causal=True, scale=None)
    scores = token_scores(*tensors, **arguments)
    for on_gpu, exact in zip(scores, token_scores(*(x.cpu().double() for x in tensors), **arguments), strict=True):
        assert relative(on_gpu.cpu(), exact.double()) < 5e-3  # fla-core multiplies in tf32
    config = LighthouseConfig(**OPTIONS, scorer=scorer, dilation=8)
    out = compiled(options={**OPTIONS, "scorer": scorer, "dilation": 8})(*tensors)
    entries, slots = selection(*tensors, config)
    pyramid = Pyramid(length=1024, levels=3, pooling=4, topk=64)
    assert torch.equal(entries, reference.select_windows(*scores, pyramid)[0])
    torch.testing.assert_close(out, plain(*tensors, entries, slots), rtol=1e-2, atol=1e-2)


def test_a_million_tokens_and_more_than_two_to_the_31_numbers():
    heads, length, dim = 20, 2**20, 128
    x = torch.empty(1, length, heads, dim, dtype=torch.bfloat16, device="cuda").normal_().transpose(1, 2)
    assert x.numel() > 2**31
    pyramid = Pyramid(length=length, levels=3, pooling=4, topk=1024)
    entries, slots = OPS.select(x, x, x, 3, 4, 1024, 0, True, "norm", 64, True, None, REVISION)
    rows = OPS.gather(x, entries, slots, 3, 4, REVISION)
    last = slice(heads - 1, heads)
    one = [t[:, last].contiguous() for t in (entries, slots)]
    tail = x[:, last]
    assert torch.equal(rows[:, last], reference.gather(tail, one[0], pyramid))
    windows = reference.norm_scores(tail, 1, pyramid)
    chosen = reference.choose_windows(windows, windows, pyramid)
    assert (chosen[0] == one[0]).float().mean() > 0.99  # norms differ in their last bit
    out = OPS.scatter(rows, entries, slots, length, 3, 4, True, REVISION)
    torch.testing.assert_close(out[:, last], reference.scatter(rows[:, last], one[1], pyramid, is_causal=True))


def test_thousands_of_heads():
    x = torch.randn(64, 64, 300, 16, dtype=torch.bfloat16, device="cuda")
    pyramid = Pyramid(length=300, levels=2, pooling=4, topk=16)
    entries, slots = OPS.select(x, x, x, 2, 4, 16, 0, True, "norm", 64, True, None, REVISION)
    rows = OPS.gather(x, entries, slots, 2, 4, REVISION)
    torch.testing.assert_close(rows, reference.gather(x, entries, pyramid))


def test_memory_of_one_layer():
    """The figure that the benchmark publishes: forward plus backward at 98,304 tokens add at most 900 MB."""
    from lighthouse_fx.measure import layer as bench

    shape = bench.LayerShape(length=98_304)
    device = torch.device("cuda")
    tokens = bench._inputs(shape, shape.length, device)
    function = compiled(bench._attention, {"levels": 3, "topk": 1536})
    bench._both(function, tokens)
    assert bench.timing.added_memory(lambda: bench._both(function, tokens), device) <= 900e6
