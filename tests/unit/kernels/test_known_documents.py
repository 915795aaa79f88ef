"""What the CPU knows of documents is true of every selection, and close; and what has a call of its own for it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lighthouse_fx.kernels import REVISION, Pyramid
from lighthouse_fx.kernels.packed import attention, plan, varlen

OPS = torch.ops.lighthouse_fx


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def split(length, cuts):
    """Lengths of the documents that borders at these places make."""
    places = sorted({0, length, *(cut for cut in cuts if cut < length)})
    return [after - before for before, after in pairwise(places)]


def starts_of(*rows):
    return attention.starts_of(torch.cat([numbered(*lengths) for lengths in rows]))


@pytest.fixture
def small(monkeypatch):
    """Documents of a few tokens may have a call of their own, and are cut into small pieces."""
    monkeypatch.setattr(plan, "_MOST_OF_ITS_ROW", 0.3)
    for module in (plan, varlen):
        monkeypatch.setattr(module, "PIECE", 4)


def test_what_the_cpu_knows():
    known = plan.summary(starts_of((10, 23, 31), (37, 27), (64,), (1,) * 64))
    assert [row[:1] + row[2:] for row in known.tolist()] == [[3, 31, 23], [2, 37, 27], [1, 64, 0], [64, 1, 1]]
    assert known[:3, 1].tolist() == [33, 0, 0]
    assert plan.summary(starts_of((1,))).tolist() == [[1, 0, 1, 0]]


@st.composite
def cuts(draw):
    """Borders, also such that documents are as long as one another, in step with tiles or not."""
    if draw(st.booleans()):
        return draw(st.lists(st.integers(1, 140), max_size=12))
    return list(range(draw(st.integers(0, 20)), 140, draw(st.integers(1, 60))))[:40]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(cuts(), min_size=2, max_size=2),
    pooling=st.integers(2, 4),
    levels=st.integers(1, 3),
    topk=st.sampled_from([2, 3, 8, 64]),
    quota=st.sampled_from([None, 1, 2]),
    length=st.integers(12, 150),
    cudnn=st.booleans(),
)
@example(cuts=[[9], [9]], pooling=3, levels=3, topk=3, quota=1, length=17, cudnn=False)
def test_no_selection_has_more_than_the_kernels_are_told(small, cuts, pooling, levels, topk, quota, length, cudnn):
    quota = quota if quota is None or topk % quota == 0 else 1
    starts = starts_of(*(split(length, row) for row in cuts))
    q, k = torch.randn(2, 4, length, 4), torch.randn(2, 2, length, 4)
    entries, _ = OPS.select(q, k, k, levels, pooling, topk, quota or 0, True, True, "norm", 64, True, None, REVISION, starts)
    pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota)
    segments = attention.segments_of(entries, starts, pyramid)
    known = plan.summary(starts)
    told = plan.plan(known, pyramid, batch=2, groups=2, most=256, cudnn=cudnn)
    longest = varlen.longest_of(segments, starts, 256, in_front=levels > 1)
    bounds = longest.bounds if told.apart else varlen.bounds_of(segments, 2 * 2 * 257, 256)
    assert bounds[told.sequences] == segments.numel()
    if not told.apart:
        assert bounds.diff().max() <= told.longest <= entries.shape[2]
        assert told.sequences == 2 * int(known[:, 0].sum()) + 4
    own = longest.own.view(segments.shape)
    assert torch.equal(own, segments == known[:, 1, None, None]) and (own.any(-1).all() or not told.apart)


def test_the_bound_is_close_where_quotas_fill():
    """At the paper's size: a document has about as large a share of the entries as of the tokens."""
    pyramid = Pyramid(length=98_304, levels=3, pooling=4, topk=1536)
    for share in (0.1, 0.3, 0.5, 0.9, 1.0):
        tokens = round(share * pyramid.length)
        for first in (0, (pyramid.length - tokens) // 2, pyramid.length - tokens):
            entries = plan.entries_at_most(first, tokens, pyramid)
            assert share * pyramid.gathered <= entries <= (share + 0.17) * pyramid.gathered


def planned(*lengths, cudnn=True, **fields):
    pyramid = Pyramid(**{"length": sum(lengths), "levels": 3, "pooling": 4, "topk": 1536} | fields)
    known = plan.summary(starts_of(lengths))
    return plan.plan(known, pyramid, batch=1, groups=8, most=256, cudnn=cudnn)


def test_documents_across_tiles_have_more_entries_than_one_that_is_a_tile():
    pyramid, generator = Pyramid(length=16_384, levels=3, pooling=4, topk=1024), torch.Generator().manual_seed(0)
    starts = starts_of((2048, 300, *[2048] * 6, 1748))
    q, k = torch.randn(2, 1, 2, 16_384, 4, generator=generator).unbind()
    entries, _ = OPS.select(q, k, k, 3, 4, 1024, 0, True, True, "norm", 64, True, None, REVISION, starts)
    bounds = varlen.bounds_of(attention.segments_of(entries, starts, pyramid), 2 * 257, 256)
    told = plan.plan(plan.summary(starts), pyramid, batch=1, groups=2, most=256, cudnn=True)
    of_a_tile = plan.entries_at_most(0, 2048, pyramid)
    assert of_a_tile < bounds.diff().max() <= told.longest <= 2 * of_a_tile


def test_cudnn_gets_a_document_that_fills_most_of_its_row():
    for lengths, apart in {
        (98_304,): True,
        (93_000, 5_304): True,
        (5_304, 93_000): True,
        (60_000, 38_304): False,
        (8_192,) * 12: False,
        (512,) * 192: False,
    }.items():
        assert bool(planned(*lengths).apart) == apart, lengths
        assert not planned(*lengths, cudnn=False).apart
    assert planned(93_000, 5_304).longest < 18_432 * 0.4  # what is left is short
    assert planned(1_000, 90_000, 7_304, levels=1).apart and not planned(1_000, 65_000, 32_304, levels=1).apart


def test_the_cpu_and_the_gpu_agree_on_the_longest():
    """The first of those that are equally long."""
    for lengths in ((5, 9, 9, 1, 9), (3, 3, 3, 3), (1, 2, 3), (6,)):
        starts = starts_of(lengths)
        first = sum(lengths[: lengths.index(max(lengths))])
        assert plan.summary(starts)[0, 1] == first
        begins, tokens = plan.unpacked(plan.by_length(starts).amax(-1), starts.shape[1])
        assert (begins.item(), tokens.item()) == (first, max(lengths))


def test_where_only_the_gpu_knows_it_is_the_most_there_can_be():
    pyramid = Pyramid(length=100, levels=3, pooling=2, topk=8)
    told = plan.plan(None, pyramid, batch=2, groups=3, most=7, cudnn=True)
    assert told == plan.Plan(48, pyramid.gathered)


def test_more_documents_than_the_configuration_allows():
    pyramid = Pyramid(length=9, levels=1, pooling=4, topk=8)
    known = plan.summary(starts_of((1,) * 9))
    with pytest.raises(ValueError, match=r"9 documents in a row: there are more than max_documents=8.*larger max_documents"):
        plan.plan(known, pyramid, batch=1, groups=1, most=8, cudnn=False)
