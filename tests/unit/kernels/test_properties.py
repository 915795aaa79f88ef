"""What holds for every input: valid selections, no holes, causality, determinism, shapes."""

import brute_force
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from selections import assert_same, assert_valid

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid, reference
from lighthouse_fx.kernels.reference.scorers import token_scores

OPS = torch.ops.lighthouse_fx
PROPERTY = settings(deadline=None, derandomize=True, max_examples=60, database=None)


@st.composite
def pyramids(draw, longest=150):
    """Any pyramid: budgets beyond the windows there are, lengths below a coarsest window, tiles without windows."""
    quota, tiles = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    return dict(
        length=draw(st.integers(1, longest)),
        levels=draw(st.integers(1, 5)),
        pooling=draw(st.integers(2, 9)),
        topk=quota * tiles,
        quota=draw(st.sampled_from([quota, None])),
        keep_first=draw(st.booleans()),
        causal_selection=draw(st.booleans()),
    )


SCORES = st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 7.0, 3e38, float("inf"), float("-inf"), float("nan")])


def inputs(pyramid, heads=2, groups=1, size=3, dtype=torch.float32, batch=1, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [
        torch.randn(batch, count, pyramid["length"], size, generator=generator).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def select(q, k, v, pyramid):
    names = ("levels", "pooling", "topk")
    rest = pyramid["quota"] or 0, pyramid["keep_first"], pyramid.get("causal_selection", True), "norm", 1, True, None, REVISION
    return OPS.select(q, k, v, *(pyramid[name] for name in names), *rest)


def with_selection(q, k, v, entries, slots, pyramid, is_causal=True):
    """Everything but the selection."""
    levels, pooling = pyramid["levels"], pyramid["pooling"]
    pooled = [OPS.gather(x, entries, slots, levels, pooling, REVISION) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*pooled, is_causal=is_causal, enable_gqa=True)
    return OPS.scatter(out, entries, slots, pyramid["length"], levels, pooling, is_causal, REVISION)


# --- selection --------------------------------------------------------------------------------------------------------


@PROPERTY
@given(pyramids(), st.data())
def test_selection_is_the_brute_force_for_any_scores(pyramid, data):
    length = pyramid["length"]
    s_q, s_k = (data.draw(st.lists(SCORES, min_size=length, max_size=length)) for _ in range(2))
    found = reference.select_windows(torch.tensor([[s_q]]), torch.tensor([[s_k]]), Pyramid(**pyramid))
    selections = [[brute_force.select(s_q, s_k, **pyramid)]]
    assert_valid(*found, **pyramid)
    assert_same(found, selections, length, pyramid["levels"], pyramid["pooling"])


@PROPERTY
@given(pyramids(longest=2000), st.integers(0, 5))
def test_length_is_static(pyramid, seed):
    """S follows from the configuration alone: it is the same for all scores, rows and heads."""
    expected = Pyramid(**pyramid).gathered
    assert expected == brute_force.gathered_length(
        *(pyramid[name] for name in ("length", "levels", "pooling", "topk", "quota"))
    )
    q, k, v = inputs(pyramid, 4, 2, batch=2, seed=seed)
    entries, slots = select(q, k, v, pyramid)
    assert entries.shape == (2, 2, expected)
    assert slots.shape == (2, 2, sum(brute_force.level_sizes(*list(pyramid.values())[:3])))


@PROPERTY
@given(pyramids(), st.booleans(), st.integers(0, 5))
def test_no_holes(pyramid, is_causal, seed):
    """Every token has a contribution, and never two from one level."""
    pyramid = pyramid | dict(keep_first=True)
    entries, slots = select(*inputs(pyramid, seed=seed), pyramid)
    length, levels, pooling = pyramid["length"], pyramid["levels"], pyramid["pooling"]
    counts = [[0] * levels for _ in range(length)]
    for level, index in brute_force.from_tensor(entries, length, levels, pooling)[0][0]:
        for token in brute_force.reached((level, index), length, pooling, is_causal):
            counts[token][level] += 1
    assert all(sum(count) >= 1 and max(count) <= 1 for count in counts) or not is_causal
    ones = torch.ones(1, 1, entries.shape[2], 1)
    contributions = OPS.scatter(ones, entries, slots, length, levels, pooling, is_causal, REVISION)
    assert contributions.flatten().tolist() == [sum(count) for count in counts]
    assert contributions.min() >= 1


# --- causality --------------------------------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=40)
@given(pyramids(longest=60), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.data())
def test_later_tokens_change_nothing(pyramid, dtype, data):
    """The selection held fixed, changing token j changes no output before j, not by a bit."""
    q, k, v = (x.detach() for x in inputs(pyramid, dtype=dtype))
    entries, slots = select(q, k, v, pyramid)
    before = with_selection(q, k, v, entries, slots, pyramid)
    j = data.draw(st.integers(0, pyramid["length"] - 1))
    for changed in range(3):
        other = [x.clone() for x in (q, k, v)]
        other[changed][:, :, j] += 3
        after = with_selection(*other, entries, slots, pyramid)
        assert torch.equal(after[:, :, :j], before[:, :, :j])


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        dict(length=23, levels=3, pooling=2, topk=4, quota=2),
        dict(length=26, levels=3, pooling=3, topk=1, quota=None),
        dict(length=21, levels=2, pooling=5, topk=2, quota=1),
        dict(length=19, levels=4, pooling=2, topk=2, quota=None),
    ],
    ids=str,
)
def test_no_gradient_from_later_tokens(fields, keep_first):
    """Every output token in turn: its gradient is exactly zero at every later token, and not zero at its own."""
    pyramid = fields | dict(keep_first=keep_first)
    tensors = inputs(pyramid, dtype=torch.float64)
    entries, slots = select(*tensors, pyramid)
    out = with_selection(*tensors, entries, slots, pyramid)
    for token in range(pyramid["length"]):
        grads = torch.autograd.grad(out[:, :, token].square().sum(), tensors, retain_graph=True)
        for grad in grads:
            assert grad[:, :, token + 1 :].count_nonzero() == 0
        if keep_first:
            assert grads[2].count_nonzero() > 0


def test_bidirectional_tokens_see_the_whole_sequence():
    pyramid = dict(length=24, levels=3, pooling=2, topk=2, quota=None, keep_first=True)
    tensors = inputs(pyramid, dtype=torch.float64)
    entries, slots = select(*tensors, pyramid)
    out = with_selection(*tensors, entries, slots, pyramid, is_causal=False)
    for token in range(24):
        (grad,) = torch.autograd.grad(out[:, :, token].sum(), tensors[2], retain_graph=True)
        assert (grad != 0).all()


@PROPERTY
@given(pyramids(longest=100), st.sampled_from(["norm", "dilated", "gla"]), st.data())
def test_no_window_is_ranked_by_its_own_tokens_or_later_ones(pyramid, scorer, data):
    """With everything behind a token replaced, windows that hold it or begin before it rank as they did, at every level."""
    length, levels, pooling = (pyramid[name] for name in ("length", "levels", "pooling"))
    shape, token = Pyramid(**pyramid), data.draw(st.integers(0, length - 1))

    def ranks(q, k, v):
        scores = token_scores(q, k, v, scorer=scorer, dilation=3, is_causal=True, scale=None)
        return [reference.ranks_by_previous(reference.window_scores(s, shape), shape)[0, 0] for s in scores]

    tensors = [x.detach() for x in inputs(pyramid)]
    others = [torch.cat([x[:, :, : token + 1], 9 * torch.randn_like(x[:, :, token + 1 :])], 2) for x in tensors]
    windows = [window for window in brute_force.all_windows(length, levels, pooling) if window[0] > 0]
    held = torch.tensor([index * pooling**level <= token for level, index in windows], dtype=torch.bool)
    for before, after in zip(ranks(*tensors), ranks(*others), strict=True):
        assert torch.equal(before[held], after[held])


@PROPERTY
@given(pyramids(longest=100), st.data())
def test_last_window_of_a_tile_is_told_nothing_of_what_follows(pyramid, data):
    """With two levels its tokens' outputs are bitwise the same: no window behind it competes with those that they can see."""
    pyramid |= dict(levels=2, causal_selection=True)
    length, pooling, quota = pyramid["length"], pyramid["pooling"], pyramid["quota"]
    last = [tile[-1] for tile in brute_force.tiles(length, 2, pooling, pyramid["topk"], quota) if tile]
    assume(last)
    token = data.draw(st.sampled_from(last)) * pooling + data.draw(st.integers(0, pooling - 1))
    config = LighthouseConfig(**{name: value for name, value in pyramid.items() if name != "length"})
    tensors = [x.detach() for x in inputs(pyramid)]
    others = [torch.cat([x[:, :, : token + 1], 9 * torch.randn_like(x[:, :, token + 1 :])], 2) for x in tensors]
    before, after = (
        lighthouse_attention(*x, is_causal=True, enable_gqa=True, config=config) for x in (tensors, others)
    )
    window = slice(token // pooling * pooling, token + 1)
    assert torch.equal(before[:, :, window], after[:, :, window])


def test_published_selection_tells_of_what_follows():
    """The same, by its own scores: what stands behind a token in its window decides whether the token has an entry."""
    q, k, v = (torch.randn(1, 1, 64, 4) for _ in range(3))
    q[:, :, 8:16], k[:, :, 8:16] = 0, 0  # windows 2 and 3: neither makes window 3 an entry's
    other = q.clone()
    other[:, :, 15] = 100
    for causal_selection, expanded in ((True, [False, False]), (False, [False, True])):
        pyramid = dict(levels=2, pooling=4, topk=8, quota=None, keep_first=True, causal_selection=causal_selection)
        entries = [select(x, k, v, pyramid)[0].flatten().tolist() for x in (q, other)]
        assert [13 in of for of in entries] == expanded


def test_bidirectional_attention_ranks_windows_by_themselves():
    tensors = [x.detach() for x in inputs(dict(length=64), 1)]
    fields = dict(levels=3, pooling=2, topk=4)
    outs = [
        lighthouse_attention(*tensors, config=LighthouseConfig(causal_selection=causal, **fields)) for causal in (True, False)
    ]
    assert torch.equal(*outs)


# --- determinism ------------------------------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=25)
@given(
    pyramids(longest=100),
    st.booleans(),
    st.sampled_from(["norm", "dilated"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_bitwise_the_same_twice(pyramid, is_causal, scorer, dtype):
    fields = {name: value for name, value in pyramid.items() if name != "length"}
    config = LighthouseConfig(scorer=scorer, dilation=3, **fields)

    def run():
        tensors = inputs(pyramid, 4, 2, dtype=dtype, batch=2)
        out = lighthouse_attention(*tensors, is_causal=is_causal, enable_gqa=True, config=config)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)
    assert [x.shape for x in first[1:]] == [x.shape for x in inputs(pyramid, 4, 2, batch=2)]


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic_mode_accepts_everything(threads):
    """`torch.use_deterministic_algorithms(True)` raises at any operation that is not deterministic: none is."""
    pyramid = dict(length=700, levels=3, pooling=4, topk=32, quota=8, keep_first=True)
    config = LighthouseConfig(levels=3, pooling=4, topk=32, quota=8)
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    try:
        results = []
        for _ in range(2):
            tensors = inputs(pyramid, 4, 2, size=8)
            out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=config)
            results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@settings(PROPERTY, max_examples=40)
@given(pyramids(longest=80), st.data())
def test_bad_numbers_leave_a_valid_selection(pyramid, data):
    q, k, v = (x.detach() for x in inputs(pyramid, 4, 2))
    for x in (q, k):
        for _ in range(data.draw(st.integers(0, 4))):
            token = data.draw(st.integers(0, pyramid["length"] - 1))
            x[:, data.draw(st.integers(0, x.shape[1] - 1)), token, 0] = data.draw(
                st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38])
            )
    assert_valid(*select(q, k, v, pyramid), **pyramid)


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_do_not_stop_a_call(bad, scorer):
    """Forward and backward run through; with NaN in one row of the batch, the other row is what it was."""
    config = LighthouseConfig(levels=3, pooling=2, topk=4, quota=2, scorer=scorer, dilation=4)
    pyramid = dict(length=37)
    clean, spoiled = (inputs(pyramid, 4, 2, batch=2, dtype=torch.float64) for _ in range(2))
    for x in spoiled:
        x.data[0, :, 5] = bad
    results = []
    for tensors in (clean, spoiled):
        out = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=config)
        results.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for good, other in zip(*results, strict=True):
        assert torch.equal(good[1], other[1])
