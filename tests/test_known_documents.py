"""What the CPU knows of documents is true of every selection, and close; and what has a call of its own for it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lighthouse_fx.kernels import REVISION, Pyramid, documents, known_documents, sequences

OPS = torch.ops.lighthouse_fx


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def split(length, cuts):
    """Lengths of the documents that borders at these places make."""
    places = sorted({0, length, *(cut for cut in cuts if cut < length)})
    return [after - before for before, after in pairwise(places)]


def starts_of(*rows):
    return documents.starts_of(torch.cat([numbered(*lengths) for lengths in rows]))


@pytest.fixture
def small(monkeypatch):
    """Documents of a few tokens may have a call of their own."""
    monkeypatch.setattr(known_documents, "_ROWS", 0)
    for module in (known_documents, sequences):
        monkeypatch.setattr(module, "PIECE", 4)


def test_what_the_cpu_knows():
    known = known_documents.summary(starts_of((10, 23, 31), (37, 27), (64,), (1,) * 64))
    assert [row[:1] + row[2:] for row in known.tolist()] == [[3, 31, 23], [2, 37, 27], [1, 64, 0], [64, 1, 1]]
    assert known[:3, 1].tolist() == [33, 0, 0]
    assert known_documents.summary(starts_of((1,))).tolist() == [[1, 0, 1, 0]]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.lists(st.integers(1, 140), max_size=12), min_size=2, max_size=2),
    pooling=st.integers(2, 4),
    levels=st.integers(1, 3),
    topk=st.sampled_from([2, 8, 64]),
    quota=st.sampled_from([None, 2]),
    length=st.integers(20, 150),
    cudnn=st.booleans(),
)
def test_no_selection_has_more_than_the_kernels_are_told(small, cuts, pooling, levels, topk, quota, length, cudnn):
    starts = starts_of(*(split(length, row) for row in cuts))
    q, k = torch.randn(2, 4, length, 4), torch.randn(2, 2, length, 4)
    entries, _ = OPS.select(q, k, k, levels, pooling, topk, quota or 0, True, "norm", 64, True, None, REVISION, starts)
    pyramid = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota)
    segments = documents._segments(entries, starts, pyramid)
    known = known_documents.summary(starts)
    told = known_documents.plan(known, pyramid, batch=2, groups=2, most=256, cudnn=cudnn)
    bounds = sequences.bounds_of(sequences._cut(segments, told), told.sequences, 256)
    assert bounds[-1] == segments.numel() and bounds.diff().max() <= told.longest <= entries.shape[2]
    if not told.apart:
        assert told.sequences == 2 * int(known[:, 0].sum()) + 4
    for part in told.apart:
        count = (segments[part.row] == part.first).sum(-1)
        assert (count > 0).all() and (count <= part.rows).all() and part.rows <= entries.shape[2]


def test_the_bound_is_close_where_quotas_fill():
    """At the paper's size: a document has about as large a share of the entries as of the tokens."""
    pyramid = Pyramid(length=98_304)
    for share in (0.1, 0.3, 0.5, 0.9, 1.0):
        tokens = round(share * pyramid.length)
        for first in (0, (pyramid.length - tokens) // 2, pyramid.length - tokens):
            entries = known_documents.entries_at_most(first, tokens, pyramid)
            assert share * pyramid.gathered <= entries <= (share + 0.17) * pyramid.gathered


def planned(*lengths, cudnn=True, **fields):
    pyramid = Pyramid(length=sum(lengths), **fields)
    return known_documents.plan(
        known_documents.summary(starts_of(lengths)), pyramid, batch=1, groups=8, most=256, cudnn=cudnn
    )


def test_cudnn_gets_a_document_that_is_worth_it():
    for lengths, expected in {
        (98_304,): 18_432,
        (93_000, 5_304): 18_432,
        (5_304, 93_000): 18_432,
        (60_000, 38_304): 12_672,
        (8_192,) * 12: 0,
        (512,) * 192: 0,
    }.items():
        told = planned(*lengths)
        assert [part.rows for part in told.apart] == ([expected] if expected else []), lengths
        assert not planned(*lengths, cudnn=False).apart
    assert planned(93_000, 5_304).longest < 18_432 * 0.4  # what is left is short
    (dense,) = planned(1_000, 70_000, 27_304, levels=1).apart
    assert dense.first == 1_000 and 70_000 <= dense.rows <= 74_000


def test_cudnn_gets_few_different_shapes():
    """It makes a plan for each."""
    found = {part.rows for first in range(1_000, 90_000, 4_999) for part in planned(first, 98_304 - first).apart}
    assert 4 <= len(found) <= 16


def test_where_only_the_gpu_knows_it_is_the_most_there_can_be():
    pyramid = Pyramid(length=100, levels=3, pooling=2, topk=8)
    for unknown in (None, torch.zeros(2, known_documents.FIELDS, dtype=torch.int64)):
        told = known_documents.plan(unknown, pyramid, batch=2, groups=3, most=7, cudnn=True)
        assert told == known_documents.Plan(48, pyramid.gathered)


def test_more_documents_than_the_configuration_allows():
    pyramid = Pyramid(length=9, levels=1, topk=8)
    with pytest.raises(ValueError, match=r"9 documents in a row: there are more than max_documents=8.*larger max_documents"):
        known_documents.plan(
            known_documents.summary(starts_of((1,) * 9)), pyramid, batch=1, groups=1, most=8, cudnn=False
        )
