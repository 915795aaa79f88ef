"""Attention to the sequences that documents become: what the kernels are told is true and close, and they compute the same."""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import CONFIG, FIELDS, Model, gradients, inputs, passes_only

import lighthouse_fx
from lighthouse_fx import functional, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid, documents, sequences
from lighthouse_fx.passes import check

OPS = torch.ops.lighthouse_fx


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def split(length, cuts):
    """Lengths of the documents that borders at these places make."""
    places = sorted({0, length, *(cut for cut in cuts if cut < length)})
    return [after - before for before, after in pairwise(places)]


# --- what a kernel is told ----------------------------------------------------------------------------------------------


def test_extent_of_documents():
    starts = documents.starts_of(torch.cat([numbered(10, 23, 31), numbered(37, 27)]))
    assert sequences.extent(starts).tolist() == [5, 3, 37]
    assert sequences.extent(documents.starts_of(numbered(64))).tolist() == [1, 1, 64]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 140), max_size=12), min_size=2, max_size=2),
    pooling=st.integers(2, 4),
    levels=st.integers(1, 3),
    topk=st.sampled_from([2, 8, 64]),
    length=st.integers(20, 150),
)
def test_no_selection_has_more_sequences_or_longer_ones(cuts, pooling, levels, topk, length):
    starts = documents.starts_of(torch.cat([numbered(*split(length, row)) for row in cuts]))
    q, k = torch.randn(2, 4, length, 4), torch.randn(2, 2, length, 4)
    entries, _ = OPS.select(q, k, k, levels, pooling, topk, 0, True, "norm", 64, True, None, REVISION, starts)
    segments = documents._segments(entries, starts, Pyramid(length=length, levels=levels, pooling=pooling, topk=1))
    bounds = documents._bounds(segments, 256)
    told, longest = sequences.limits(
        sequences.extent(starts), batch=2, groups=2, gathered=entries.shape[2], levels=levels, pooling=pooling, most=256
    )
    assert bounds[told] == segments.numel()
    assert bounds.diff().max() <= longest <= entries.shape[2]
    assert told == 2 * int((starts == torch.arange(length)).sum()) + 4


def test_where_only_the_gpu_knows_it_is_the_most_there_can_be():
    shape = dict(batch=2, groups=3, gathered=40, levels=3, pooling=2, most=7)
    for unknown in (None, torch.zeros(3, dtype=torch.int64)):
        assert sequences.limits(unknown, **shape) == (48, 40)


def test_more_documents_than_the_configuration_allows():
    with pytest.raises(ValueError, match=r"9 documents in a row: there are more than max_documents=8.*larger max_documents"):
        sequences.limits(torch.tensor([9, 9, 1]), batch=1, groups=1, gathered=9, levels=1, pooling=2, most=8)


def test_cudnn_is_told_of_few_different_shapes():
    """It builds a plan for each."""
    bounds, q = torch.arange(4 * 257 + 1, dtype=torch.int32), torch.empty(4 * 1000, 1, 8)
    told = {
        (len(some) - 1, longest)
        for count in range(1, 256)
        for size in range(1, 1000, 7)
        for some, longest in [
            sequences._told(q, bounds, torch.tensor([count, count, size]), 1, 4, 2, 2, "cudnn")
        ]
    }
    assert len(told) <= 9 * 11
    exact, longest = sequences._told(q, bounds, torch.tensor([3, 3, 100]), 1, 4, 2, 2, "flash")
    assert len(exact) - 1 == 16 and longest == 150


# --- layouts, with a kernel of plain PyTorch ----------------------------------------------------------------------------


def weights(query, key, bounds, longest, scale):
    """`[heads, rows, rows]` of each sequence, the logarithms of their sums, and its first row and the one after its last."""
    assert bounds[-1] == len(query) and bounds.diff().max() <= longest
    for begin, end in pairwise(bounds.tolist()):
        q, k = (x[begin:end].transpose(0, 1) for x in (query, key))  # [heads, rows, D]
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * scale).masked_fill(hidden, -math.inf)
        yield scores.softmax(-1), scores.logsumexp(-1), slice(begin, end)


def plain_forward(query, key, value, bounds, longest, scale):
    """What the kernels compute, sequence by sequence, in any precision."""
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    found = [(w @ value[rows].transpose(0, 1), sums) for w, sums, rows in weights(query, key, bounds, longest, scale)]
    return torch.cat([out.transpose(0, 1) for out, _ in found]), torch.cat([sums for _, sums in found], 1).float()


def plain_backward(grad, query, key, value, out, sums, bounds, longest, scale):
    again, others = plain_forward(query, key, value, bounds, longest, scale)
    torch.testing.assert_close((again, others.flatten()), (out, sums))
    grads = []
    for w, _, rows in weights(query, key, bounds, longest, scale):
        q, k, v, g = (x[rows].transpose(0, 1) for x in (query, key, value, grad))  # [heads or 1, rows, D]
        of_w = g @ v.mT
        of_scores = w * (of_w - (of_w * w).sum(-1, keepdim=True)) * scale
        of_all = of_scores @ k, (of_scores.mT @ q).sum(0, keepdim=True), (w.mT @ g).sum(0, keepdim=True)
        grads.append([x.transpose(0, 1) for x in of_all])
    return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))


@pytest.fixture
def plain_kernels(monkeypatch):
    for kernel in ("flash", "cudnn"):
        monkeypatch.setattr(sequences, f"{kernel}_forward", plain_forward)
        monkeypatch.setattr(sequences, f"{kernel}_backward", plain_backward)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("heads, dim, value_dim", [(2, 8, 8), (4, 8, 8), (4, 6, 10)])
def test_the_same_as_with_a_mask(plain_kernels, heads, dim, value_dim, kernel, known):
    starts = documents.starts_of(torch.cat([numbered(10, 23, 31), numbered(37, 27)]))
    q, k, v = (
        torch.randn(2, count, 64, size, dtype=torch.float64)
        for count, size in ((heads, dim), (2, dim), (2, value_dim))
    )
    entries, _ = OPS.select(q, k, v, 3, 2, 8, 0, True, "norm", 64, True, None, REVISION, starts)
    segments = documents._segments(entries, starts, Pyramid(length=64, levels=3, pooling=2, topk=1))
    gathered = entries.shape[2]
    tensors = [torch.randn(*x.shape[:2], gathered, x.shape[3], dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    expected = documents._attention(*tensors, entries, starts, 3, 2, 0.0, None, True, 7, "auto")
    told = sequences.extent(starts) if known else None
    found = documents._varlen(*tensors, segments, 0.0, None, 7, kernel, told, 3, 2)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for x, y in zip(torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(x, y)


def test_opcheck(plain_kernels):
    q = torch.randn(20, 2, 8, requires_grad=True)
    k, v = torch.randn(2, 20, 1, 8, requires_grad=True).unbind()
    bounds, known = torch.tensor([0, 6, 10, 14, 20], dtype=torch.int32), torch.tensor([1, 1, 6])
    for told in (known, None):
        torch.library.opcheck(sequences.attend_to_sequences, (q, k, v, bounds, told, 1, 2, 1, 2, 0.3, "flash", REVISION))


# --- compiled, with those kernels ---------------------------------------------------------------------------------------


NUMBERS = torch.cat([numbered(10, 23, 31), numbered(37, 27)])


@pytest.fixture
def in_sequences(plain_kernels, monkeypatch):
    """Makes attention go sequence by sequence from its call on, as on a GPU, and gives a list of what the kernels are told."""
    told = []

    def noted(*args):
        told.append((len(args[3]) - 1, args[4]))
        return plain_forward(*args)

    def begin():
        for module in (documents, import_module("lighthouse_fx.documents")):
            monkeypatch.setattr(module, "in_sequences", lambda device: True)
        monkeypatch.setattr(documents, "_able", lambda *_: ["flash"])
        monkeypatch.setattr(sequences, "flash_forward", noted)
        for module in (documents, check, functional):
            monkeypatch.setattr(module, "document_problem", lambda *_: None)  # it asks for 16 bits
        return told

    return begin


@pytest.mark.parametrize(
    "backend, options, checkpointing",
    [
        (passes_only, {}, None),
        (passes_only, {}, "inside"),
        (passes_only, {"dense_layers": (0,)}, "inside"),
        pytest.param("lighthouse", {"dense_layers": (0,)}, "inside", marks=pytest.mark.slow),
    ],
)
def test_compiled(in_sequences, backend, options, checkpointing):
    model, x = Model(2, checkpointing=checkpointing).double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend=passes_only, options=FIELDS | options, fullgraph=True)
    with lighthouse_fx.documents(NUMBERS):
        expected = gradients(run, x)  # by masks
        told = in_sequences()
        torch._dynamo.reset()
        found = gradients(torch.compile(model, backend=backend, options=FIELDS | options, fullgraph=True), x)
    torch.testing.assert_close(found, expected)
    assert {sequences for sequences, _ in told} == {2 * 5 + 4}


def test_other_numbers_of_documents_need_no_other_graph(in_sequences):
    told, run = in_sequences(), torch.compile(Model(1), backend=passes_only, options=dict(FIELDS), fullgraph=True)
    before = len(lighthouse_fx.reports())
    for lengths in ((60, 4), (30, 30, 4), (4,) * 16):
        told.clear()
        with lighthouse_fx.documents(numbered(*lengths)):
            run(inputs(batch=1))
        ((count, longest),) = told
        assert count == 2 * (len(lengths) + 1) and longest <= 2 * max(*lengths, len(lengths))
    assert len(lighthouse_fx.reports()) == before + 1


def test_more_documents_than_the_configuration_allows_when_compiled(in_sequences):
    in_sequences()
    run = torch.compile(Model(1), backend=passes_only, options=FIELDS | {"max_documents": 2})
    with lighthouse_fx.documents(numbered(30, 30, 4)), pytest.raises(ValueError, match=r"has 3 documents.*max_documents=2"):
        run(inputs(batch=1))


def test_the_functional_form_takes_documents_from_the_cpu(in_sequences):
    told = in_sequences()
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    lighthouse_attention(q, k, v, is_causal=True, documents=numbered(30, 34), config=CONFIG)
    ((count, _),) = told
    assert count == 2 * 3
