"""Selection against the brute force, entry by entry: lengths, poolings, levels, quotas, ties, groups, bad numbers."""

import math

import brute_force
import pytest
import torch
from selections import assert_same, assert_valid

from lighthouse_fx.kernels import REVISION, Pyramid, reference
from lighthouse_fx.kernels.geometry import half_of
from lighthouse_fx.kernels.reference.scorers import token_scores

pytestmark = pytest.mark.usefixtures("kernels")
OPS = torch.ops.lighthouse_fx
INF, NAN = math.inf, math.nan


def exact_rows(batch, heads, length, largest, dtype=torch.float32):
    """Rows `[B, heads, N, 3]` with a single non-zero integer: their norms are exact in any order of summation."""
    size = torch.randint(0, largest + 1, (batch, heads, length, 1)) * (1 - 2 * torch.randint(0, 2, (1,)))
    place = torch.randint(0, 3, (batch, heads, length, 1))
    return torch.zeros(batch, heads, length, 3, dtype=dtype).scatter(-1, place, size.to(dtype))


def select(q, k, v=None, *, scorer="norm", dilation=4, is_causal=True, scale=None, length=None, quota=None, **pyramid):
    return OPS.select(
        q,
        k,
        k if v is None else v,
        pyramid["levels"],
        pyramid["pooling"],
        pyramid["topk"],
        quota or 0,
        pyramid.get("keep_first", True),
        pyramid.get("causal_selection", True),
        scorer,
        dilation,
        is_causal,
        scale,
        REVISION,
    )


def lengths(pooling, levels):
    """Lengths to try: shorter than a coarsest window, exactly one, one token more, primes, multiples, a few windows."""
    widest = pooling ** (levels - 1)
    some = {1, widest - 1, widest, widest + 1, 2 * widest + widest // 2, 7 * widest, 11 * widest + 1}
    return sorted(n for n in some | {97, 211} if 0 < n < 40_000)


# (topk, quota): alone, odd, one per tile, more tiles than windows, the default.
BUDGETS = [(1, None), (2, None), (3, None), (6, 3), (4, 1), (12, 2), (30, 5), (256, None), (258, 6)]


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("pooling", [2, 3, 4, 8])
def test_equals_brute_force(pooling, levels, keep_first, kernels):
    for i, length in enumerate(lengths(pooling, levels)):
        budgets = BUDGETS if length < 1000 else BUDGETS[i % 3 :: 3]
        if kernels == "interpreted":
            budgets = BUDGETS[i % 7 : 7 : 7] if length < 300 else []  # large ones take it too long
        largest = (2, 5, 1000)[i % 3]  # nearly all tied, many tied, few tied
        q, k = exact_rows(1, 2, length, largest), exact_rows(1, 1, length, largest)
        scores = [[x.abs().amax((1, 3)).tolist()] for x in (q, k)]
        for topk, quota in budgets:
            pyramid = dict(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota, keep_first=keep_first)
            selections = brute_force.select_all(*scores, **pyramid)
            assert_same(select(q, k, **pyramid), selections, length, levels, pooling)
            expected = brute_force.gathered_length(length, levels, pooling, topk, quota)
            assert Pyramid(**pyramid).gathered == expected == len(selections[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, heads, groups", [(1, 1, 1), (3, 2, 2), (2, 4, 2), (2, 6, 1), (1, 6, 3)])
def test_each_row_and_group_by_itself(batch, heads, groups, dtype, kernels):
    length = 67 if kernels == "interpreted" else 151
    pyramid = dict(length=length, levels=3, pooling=3, topk=6, quota=3, keep_first=True)
    q, k = exact_rows(batch, heads, length, 50, dtype), exact_rows(batch, groups, length, 50, dtype)
    selections = brute_force.select_all(*brute_force.norm_scores(q, k), **pyramid)
    assert_same(select(q, k, **pyramid), selections, length, 3, 3)


def test_random_scores_without_ties():
    pyramid = dict(length=203, levels=4, pooling=2, topk=10, quota=5, keep_first=True)
    q, k = torch.randn(2, 4, 203, 16), torch.randn(2, 2, 203, 16)
    selections = brute_force.select_all(*brute_force.norm_scores(q, k), **pyramid)
    assert_same(select(q, k, **pyramid), selections, 203, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_norm_scores(dtype):
    q, k = torch.randn(2, 6, 31, 16).to(dtype), torch.randn(2, 3, 31, 16).to(dtype)
    found = token_scores(q, k, k, scorer="norm", dilation=1, is_causal=True, scale=None)
    for score, expected in zip(found, brute_force.norm_scores(q, k), strict=True):
        assert score.dtype == torch.float32
        torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-6, atol=0)


def test_ties_go_to_the_lower_index():
    ones = torch.ones(1, 1, 64, 2)
    for causal_selection, first in ((False, 0), (True, 2)):  # causally, the first window ranks lowest
        pyramid = dict(levels=2, pooling=2, topk=6, keep_first=False, causal_selection=causal_selection)
        entries, _ = select(ones, ones, **pyramid)
        expanded = [window for window in brute_force.from_tensor(entries, 64, 2, 2)[0][0] if window[0] == 0]
        assert expanded == [(0, token) for token in range(first, first + 12)]


def test_query_half_then_key_half():
    """Window 5 is largest by query and by key: it takes one place of the query half only."""
    q, k = torch.ones(1, 1, 40, 1), torch.ones(1, 1, 40, 1)
    q[0, 0, [20, 28]], k[0, 0, [21, 33, 8]] = torch.tensor([[9.0], [8.0]]), torch.tensor([[9.0], [8.0], [7.0]])
    published, causal = ((False, [2, 5, 7, 8]), (True, [0, 2, 5, 8])), ((False, [3, 6, 8, 9]), (True, [0, 3, 6, 9]))
    for causal_selection, (keep_first, windows) in [(False, x) for x in published] + [(True, x) for x in causal]:
        pyramid = dict(levels=2, pooling=4, topk=4, keep_first=keep_first, causal_selection=causal_selection)
        entries, _ = select(q, k, **pyramid)
        tokens = [window[1] for window in brute_force.from_tensor(entries, 40, 2, 4)[0][0] if window[0] == 0]
        assert sorted({token // 4 for token in tokens}) == windows


def test_odd_quota_gives_queries_the_larger_half():
    q, k = torch.ones(1, 1, 40, 1), torch.ones(1, 1, 40, 1)
    q[0, 0, [8, 16, 24]], k[0, 0, [12, 20, 28]] = torch.tensor([[3.0]]), torch.tensor([[3.0]])
    for topk, windows in ((3, [2, 3, 4]), (1, [2])):
        entries, _ = select(q, k, levels=2, pooling=4, topk=topk, keep_first=False, causal_selection=False)
        tokens = [window[1] for window in brute_force.from_tensor(entries, 40, 2, 4)[0][0] if window[0] == 0]
        assert sorted({token // 4 for token in tokens}) == windows


def test_keep_first_expands_window_zero_at_every_level():
    q, k = torch.ones(1, 1, 81, 1), torch.ones(1, 1, 81, 1)
    q[0, 0, :27], k[0, 0, :27] = 0, 0
    for keep_first in (True, False):
        entries, _ = select(q, k, levels=4, pooling=3, topk=1, keep_first=keep_first)
        windows = set(brute_force.from_tensor(entries, 81, 4, 3)[0][0])
        assert ({(0, 0), (1, 0), (2, 0)} <= windows) == keep_first
        assert (3, 0) in windows


@pytest.mark.parametrize(
    "topk, quota", [(1536, 128), (6144, 128), (2048, 128), (100, 100), (192, 96), (1000, 125), (7, 7), (1, 1), (509, 509),
     (59 * 59, 59 * 59), (122, 122), (265, 265), (62, 62)]  # never below 64 where 64 windows are expanded
)
def test_default_quota(topk, quota):
    assert brute_force.usual_quota(topk) == quota
    assert Pyramid(length=1, levels=3, pooling=4, topk=topk).quota_ == quota


@pytest.mark.parametrize("length, quota", [(4096, 128), (1024, 128), (1023, 64), (512, 64), (511, 16), (128, 16), (127, 2)])
def test_quota_that_follows_the_length_is_64_where_the_length_allows(length, quota):
    assert half_of(length, levels=2, pooling=4)[1] == quota


@pytest.mark.parametrize(
    "length, levels, pooling, topk, gathered",
    [
        (98_304, 3, 4, 1536, 98_304 // 16 + 2 * 4 * 1536),  # the paper's setting
        (98_304, 3, 2, 6144, 98_304 // 4 + 2 * 2 * 6144),
        (32_768, 3, 4, 1536, 32_768 // 16 + 2 * 4 * 1536),  # the research code stops here
        (98_304, 3, 2, 1536, 98_304 // 4 + 2 * 2 * 1536),
        (98_304, 1, 4, 1536, 98_304),
        (15, 3, 4, 1536, 15),  # shorter than a coarsest window
    ],
)
def test_static_length(length, levels, pooling, topk, gathered):
    assert Pyramid(length=length, levels=levels, pooling=pooling, topk=topk).gathered == gathered
    assert brute_force.gathered_length(length, levels, pooling, topk) == gathered


def test_length_at_which_the_research_code_stops():
    pyramid = dict(length=32_768, levels=3, pooling=4, topk=1536, quota=None, keep_first=True)
    q, k = torch.randn(1, 1, 32_768, 2), torch.randn(1, 1, 32_768, 2)
    assert_valid(*select(q, k, **pyramid), **pyramid)


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("bad", [[NAN], [INF], [-INF], [NAN, INF], [NAN, 1e38, INF]])
@pytest.mark.parametrize("share", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_numbers_that_are_not_finite(which, share, bad, keep_first, kernels):
    if kernels == "interpreted" and (which, share) != ("both", 0.6):
        pytest.skip("the interpreter is slow, and this is its worst case")
    pyramid = dict(length=83, levels=3, pooling=3, topk=4, quota=2, keep_first=keep_first)
    q, k = torch.randn(2, 4, 83, 4), torch.randn(2, 2, 83, 4)
    for x in [q, k] if which == "both" else [q] if which == "q" else [k]:
        where = torch.rand(x.shape) < (share if share == 1 else share / x.shape[-1])
        x[where] = torch.tensor(bad)[torch.randint(0, len(bad), (int(where.sum()),))]
    assert_valid(*select(q, k, **pyramid), **pyramid)


def test_scores_that_are_not_finite_have_their_place():
    """NaN and -inf are the lowest score, together with the lowest number; +inf is the highest; the lower index first."""
    pyramid = dict(length=90, levels=3, pooling=3, topk=6, quota=3)
    kinds = torch.tensor([NAN, -INF, INF, 0.0, 1.0, 2.0, brute_force.LOWEST, 3e38])
    s_q, s_k = (kinds[torch.randint(0, len(kinds), (4, 2, 90))] for _ in range(2))
    for keep_first in (True, False):
        selections = brute_force.select_all(s_q.tolist(), s_k.tolist(), keep_first=keep_first, **pyramid)
        found = reference.select_windows(s_q, s_k, Pyramid(keep_first=keep_first, **pyramid))
        assert_same(found, selections, 90, 3, 3)


def test_strided_inputs():
    pyramid = dict(length=77, levels=3, pooling=2, topk=4, quota=2, keep_first=True)
    q, k = exact_rows(2, 4, 77, 99), exact_rows(2, 2, 77, 99)
    expected = select(q, k, **pyramid)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert not strided[0].is_contiguous()
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k)]
    for inputs in (strided, turned, [q.repeat(1, 1, 1, 2)[..., ::2], k[:, :1].expand(-1, 2, -1, -1)]):
        found = select(*inputs, **pyramid)
        if inputs is strided or inputs is turned:
            assert torch.equal(found[0], expected[0])
        assert_same(found, brute_force.select_all(*brute_force.norm_scores(*inputs), **pyramid), 77, 3, 2)


def test_no_gradient_passes_the_selection():
    q, k = (torch.randn(1, 2, 40, 4, requires_grad=True) for _ in range(2))
    for x in select(q, k, levels=2, pooling=4, topk=4):
        assert not x.requires_grad


# --- the dilated scorer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "heads, groups, length, dilation, scale",
    [(2, 2, 24, 4, None), (4, 2, 29, 4, 0.3), (6, 1, 17, 3, None), (2, 1, 7, 16, None), (1, 1, 19, 1, None)],
)
def test_dilated_scores(heads, groups, length, dilation, scale, is_causal):
    q, k, v = torch.randn(2, heads, length, 8), torch.randn(2, groups, length, 8), torch.randn(2, groups, length, 5)
    found = token_scores(q, k, v, scorer="dilated", dilation=dilation, is_causal=is_causal, scale=scale)
    expected = brute_force.dilated_scores(q, k, v, dilation, is_causal, scale)
    for score, oracle in zip(found, expected, strict=True):
        assert score.shape == (2, groups, length) and score.dtype == torch.float32
        torch.testing.assert_close(score.double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dilated_selection(dtype):
    """The op with the dilated scorer selects by those scores."""
    pyramid = dict(length=93, levels=3, pooling=3, topk=4, quota=2, keep_first=True)
    q, k, v = (torch.randn(2, heads, 93, 8).to(dtype) for heads in (4, 2, 2))
    found = select(q, k, v, scorer="dilated", dilation=5, **pyramid)
    scores = token_scores(q, k, v, scorer="dilated", dilation=5, is_causal=True, scale=None)
    assert_same(found, brute_force.select_all(*(s.tolist() for s in scores), **pyramid), 93, 3, 3)
