"""`topk=None`, the default: half of the sequence is expanded, whatever its length, static or dynamic, in one graph."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import causal, passes_only
from torch._dynamo.testing import CompileCounterWithBackend

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.passes.pyramid import pyramid_over


@given(
    length=st.integers(1, 200_000),
    levels=st.integers(2, 5),
    pooling=st.integers(2, 9),
    quota=st.sampled_from([None, 1, 7, 128]),
)
@settings(deadline=None)
def test_half_of_the_tokens_in_whole_tiles(length, levels, pooling, quota):
    pyramid = pyramid_over(length, LighthouseConfig(levels=levels, pooling=pooling, quota=quota))
    expanded = (levels - 1) * pooling * pyramid.topk  # entries below the coarsest level, where all tiles are full
    of_tile = 2 * (levels - 1) * pooling * pyramid.quota_  # tokens
    assert pyramid.topk == pyramid.tiles * pyramid.quota_ and pyramid.quota_ in ([quota] if quota else [2, 16, 64, 128])
    if length < of_tile:
        assert pyramid.tiles == 1 and (quota or pyramid.quota_ == 2)
    else:
        assert length / 4 < expanded <= length / 2 and length // of_tile == pyramid.tiles
        assert pyramid.gathered <= pyramid.coarse + (length - pyramid.covered) + expanded
        if quota is None and pyramid.quota_ < 128:
            larger = {2: 16, 16: 64, 64: 128}[pyramid.quota_]
            assert length < larger // pyramid.quota_ * of_tile, "a larger quota would fit"


@pytest.mark.parametrize(("length", "topk", "gathered"), [(2048, 256, 1536), (16_384, 2048, 12_288), (98_304, 12_288, 73_728)])
def test_the_lengths_of_the_evidence(length, topk, gathered):
    """What the published runs had (docs/evidence.md)."""
    pyramid = pyramid_over(length, LighthouseConfig())
    assert (pyramid.levels, pyramid.pooling, pyramid.topk, pyramid.quota_, pyramid.gathered) == (2, 4, topk, 128, gathered)


@pytest.mark.parametrize("length", [24, 63, 100, 1023, 1025, 3000, 16_385, 50_001, 98_305])
def test_it_is_worth_it_at_any_length(length):
    config = LighthouseConfig()
    q = torch.empty(1, 2, length, 16, device="meta", requires_grad=True)
    report = lighthouse_fx.explain(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q, config=config)
    assert report.rewritten == 1 and report.calls[0].gathered == pyramid_over(length, config).gathered


def test_the_papers_pyramid():
    assert LighthouseConfig.paper() == LighthouseConfig(
        levels=3, pooling=4, topk=1536, max_kept=0.75, causal_selection=False
    )
    smaller = LighthouseConfig.paper(topk=64, max_kept=0.8, causal_selection=True)
    assert smaller == LighthouseConfig(levels=3, topk=64)
    kept = [pyramid_over(length, LighthouseConfig.paper()).gathered / length for length in (13_900, 14_100, 98_304)]
    assert kept[0] > LighthouseConfig.paper().max_kept > kept[1] and kept[2] == 0.1875  # as its docstring says
    for fields in ({"pooling": 1}, {"width": 2}):
        with pytest.raises((TypeError, ValueError), match=next(iter(fields))):
            LighthouseConfig.paper(**fields)


def both(call, length, *, dtype=torch.float64, **arguments):
    torch.manual_seed(length)
    tensors = [torch.randn(2, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    out = call(*tensors, **arguments)
    return out, *torch.autograd.grad(out.square().sum(), tensors)


@pytest.mark.parametrize("fields", [{}, {"levels": 3, "quota": 4}, {"levels": 3, "scorer": "dilated", "dilation": 4}])
def test_any_length_is_the_functional_form(fields):
    """Without a graph for every length: one for each quota that lengths are long enough for."""
    counter = CompileCounterWithBackend("eager")

    def backend(gm, example_inputs):
        counter.frame_count += 1
        return passes_only(gm, example_inputs, options=fields)

    run = torch.compile(causal, backend=backend, dynamic=True, fullgraph=True)
    for length in (1100, 1024, 4099, 2500, 520, 600, 1023, 1500, 200):  # quotas of 128, 64 and 16, of three levels less
        found = both(run, length)
        assert lighthouse_fx.reports()[-1].rewritten == 1
        expected = both(lighthouse_attention, length, is_causal=True, enable_gqa=True, config=LighthouseConfig(**fields))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert counter.frame_count <= (3 if "levels" not in fields else 4)


@pytest.mark.parametrize("lengths", [(256, 300, 257, 511)])
def test_any_length_through_inductor(lengths):
    run = torch.compile(causal, backend="lighthouse", fullgraph=True, dynamic=True)
    before = len(lighthouse_fx.reports())
    for length in lengths:  # not in float64: torch 2.11 takes the CPU kernel's logsumexp of that for float32
        found = both(run, length, dtype=torch.float32)
        expected = both(lighthouse_attention, length, dtype=torch.float32, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    reports = lighthouse_fx.reports()[before:]
    assert [report.rewritten for report in reports] == [1]


@pytest.mark.gpu
def test_gpu_any_length():
    run = torch.compile(causal, backend="lighthouse", fullgraph=True, dynamic=True)
    before = len(lighthouse_fx.reports())
    for length in (4096, 5001, 8190, 2048):
        q, k, v = (
            torch.randn(1, heads, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        )
        pairs = []
        for call in (run, lambda *x: lighthouse_attention(*x, is_causal=True, enable_gqa=True)):
            out = call(q, k, v)
            pairs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        for found, expected in zip(*pairs, strict=True):
            assert (found - expected).norm() < 0.01 * expected.norm()
    assert [report.rewritten for report in lighthouse_fx.reports()[before:]] == [1]


def test_any_length_inside_documents():
    run = torch.compile(causal, backend=passes_only, fullgraph=True, dynamic=True)
    for length in (300, 400, 411):
        numbers = (torch.arange(length) > 133).int().expand(2, -1).contiguous()
        with lighthouse_fx.documents(numbers):
            found = both(run, length)
        expected = both(lighthouse_attention, length, is_causal=True, enable_gqa=True, documents=numbers)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_heads_are_no_symbols():
    """dynamic=True makes symbols of them, too; each number of heads has its graph."""
    run = torch.compile(causal, backend=passes_only, fullgraph=True, dynamic=True)
    before = len(lighthouse_fx.reports())
    for heads, length in ((4, 100), (4, 120), (8, 100)):
        q, k = torch.randn(1, heads, length, 8, requires_grad=True), torch.randn(1, 2, length, 8)
        torch.testing.assert_close(run(q, k, k), lighthouse_attention(q, k, k, is_causal=True, enable_gqa=True))
    assert len(lighthouse_fx.reports()) == before + 2


RANGES = [
    (passes_only, {}, 2048, 8192),
    (passes_only, {}, 1024, 1 << 20),
    (passes_only, {"levels": 3, "topk": 64}, 2048, 8192),
    ("lighthouse", {"topk": 64}, 2048, 8192),  # with a topk that follows the length Inductor itself guards on strides
]


@pytest.mark.parametrize(("backend", "fields", "least", "most"), RANGES)
def test_a_length_that_is_said_to_be_in_a_range(backend, fields, least, most):
    """No guard may be left that holds at every length of it: `mark_dynamic` takes that for one that does not."""
    run = torch.compile(causal, backend=backend, fullgraph=True, options=fields)
    before = len(lighthouse_fx.reports())
    for length in (2100, 4097):
        tensors = [torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 2, min=least, max=most)
        form = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=LighthouseConfig(**fields))
        torch.testing.assert_close(run(*tensors), form, rtol=1e-4, atol=1e-4)
    assert [report.rewritten for report in lighthouse_fx.reports()[before:]] == [1]


@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [({"levels": 3, "topk": 1536}, 64, 2048), ({"levels": 2, "topk": 4, "max_kept": 0.3}, 20, 70)],
)
def test_a_range_in_which_it_is_never_worth_it(fields, least, most):
    run = torch.compile(causal, backend=passes_only, fullgraph=True, options=fields)
    q = torch.randn(1, 2, 66, 8, requires_grad=True)
    torch._dynamo.mark_dynamic(q, 2, min=least, max=most)
    torch.testing.assert_close(run(q, q, q), causal(q, q, q))
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and "not worth it" in call.reason


@given(
    length=st.integers(8, 100_000),
    topk=st.sampled_from([None, 1, 64, 1536]),
    levels=st.integers(2, 4),
    pooling=st.integers(2, 8),
)
def test_what_is_gathered_is_below_its_bound(length, topk, levels, pooling):
    config = LighthouseConfig(levels=levels, pooling=pooling, topk=topk)
    pyramid = pyramid_over(length, config)
    assert pyramid.gathered < pyramid.gathered_below(length)
    if topk is None and length >= 2 * (levels - 1) * pooling * 128:  # as of a length that is a symbol
        assert pyramid.gathered < length / pyramid.widest + pyramid.widest + length / 2


def test_a_length_that_hangs_on_data_stays_dense():
    def packed(x, wanted):
        x = x[:, torch.nonzero(wanted)[:, 0]]
        torch._check(x.shape[1] >= 64)
        torch._check(x.shape[1] <= 190)
        q, k, v = (x[:, None] * scale for scale in (1.0, 2.0, 3.0))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    x, wanted = torch.randn(1, 200, 8, requires_grad=True), torch.arange(200) % 3 > 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(packed, backend=passes_only, fullgraph=True)
        torch.testing.assert_close(run(x, wanted), packed(x, wanted))
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and "hang on data" in call.reason


@pytest.mark.parametrize("mode", ["dense", "eval"])
def test_dense_attention_inside_documents_has_no_graph_for_a_quota(mode):
    run = torch.compile(causal, backend=passes_only, fullgraph=True, dynamic=True)
    before = len(lighthouse_fx.reports())
    for length in (1100, 1030, 600, 100):
        numbers = (torch.arange(length) > 33).int().expand(2, -1).contiguous()
        on = lighthouse_fx.dense() if mode == "dense" else torch.no_grad()
        with on, lighthouse_fx.documents(numbers):
            q, k, v = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
            seen = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]
            expected = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
            torch.testing.assert_close(run(q, k, v), expected, rtol=1e-4, atol=1e-5)
    assert len(lighthouse_fx.reports()) == before + 1


def test_guards_that_are_compiled():
    """In C++ they have 64 bits, and are not evaluated in order."""
    with torch._dynamo.config.patch(enable_cpp_symbolic_shape_guards=True):
        run = torch.compile(causal, backend=passes_only, fullgraph=True, dynamic=True)
        for length in (1100, 600, 8191, 100):
            q = torch.randn(1, 1, length, 4, requires_grad=True)
            torch.testing.assert_close(run(q, q, q), lighthouse_attention(q, q, q, is_causal=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_function_without_a_configuration_is_traced(dynamic):
    run = torch.compile(partial(lighthouse_attention, is_causal=True), backend="eager", fullgraph=True, dynamic=dynamic)
    q = torch.randn(1, 2, 200, 8)
    assert torch.equal(run(q, q, q), lighthouse_attention(q, q, q, is_causal=True))
