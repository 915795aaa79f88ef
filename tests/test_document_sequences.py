"""Attention to the sequences that documents become: what the kernels are told is true and close, and they compute the same."""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import CONFIG, FIELDS, Model, gradients, inputs, passes_only

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, functional, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid, documents, known_documents, sequences
from lighthouse_fx.passes import check

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


# --- what a kernel is told ----------------------------------------------------------------------------------------------


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


# --- layouts, with kernels of plain PyTorch -----------------------------------------------------------------------------


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
    """As the kernels do it, from the output that they are given: rows without gradient need not be theirs."""
    again = plain_forward(query, key, value, bounds, longest, scale)[1]
    torch.testing.assert_close(again.flatten(), sums, equal_nan=True)
    grads = []
    for w, _, rows in weights(query, key, bounds, longest, scale):
        q, k, v, g, o = (x[rows].transpose(0, 1) for x in (query, key, value, grad, out))  # [heads or 1, rows, D]
        of_scores = w * (g @ v.mT - (g * o).sum(-1, keepdim=True)) * scale
        of_all = of_scores @ k, (of_scores.mT @ q).sum(0, keepdim=True), (w.mT @ g).sum(0, keepdim=True)
        grads.append([x.transpose(0, 1) for x in of_all])
    return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))


def as_rows(*tensors):
    """`[batch, heads, rows, D]` as the rows of equally many sequences of equal length, and their bounds."""
    batch, _, rows, _ = tensors[0].shape
    bounds = torch.arange(0, batch * rows + 1, rows)
    return [x.transpose(1, 2).flatten(0, 1).contiguous() for x in tensors], bounds, rows


def plain_cudnn_forward(query, key, value, scale):
    rows, bounds, longest = as_rows(query, key, value)
    out, sums = plain_forward(*rows, bounds, longest, scale)
    batch, heads, count = query.shape[:3]
    return out.view(batch, count, heads, -1).transpose(1, 2), sums.view(heads, batch, count).transpose(0, 1)[..., None]


def plain_cudnn_backward(grad, query, key, value, out, sums, scale):
    batch, heads, count = query.shape[:3]
    sums = sums[: batch * heads * count].view(batch, heads, count).transpose(0, 1).flatten()
    rows, bounds, longest = as_rows(grad, query, key, value, out)
    grads = plain_backward(*rows, sums, bounds, longest, scale)
    return [x.unflatten(0, (batch, count)).transpose(1, 2) for x in grads]


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(sequences, "flash_forward", plain_forward)
    monkeypatch.setattr(sequences, "flash_backward", plain_backward)
    monkeypatch.setattr(sequences, "cudnn_forward", plain_cudnn_forward)
    monkeypatch.setattr(sequences, "cudnn_backward", plain_cudnn_backward)


def switch_on(monkeypatch, *kernels):
    """As on a GPU: attention inside documents goes sequence by sequence."""
    for module in (documents, import_module("lighthouse_fx.documents")):
        monkeypatch.setattr(module, "in_sequences", lambda device: True)
    monkeypatch.setattr(documents, "_able", lambda *_: kernels)
    for module in (documents, check, functional):
        monkeypatch.setattr(module, "document_problem", lambda *_: None)  # it asks for 16 bits


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kernels", [("flash",), ("cudnn", "flash")])
@pytest.mark.parametrize("heads, dim, value_dim", [(2, 8, 8), (4, 8, 8), (4, 6, 10)])
def test_the_same_as_with_a_mask(small, plain_kernels, monkeypatch, heads, dim, value_dim, kernels, known):
    starts = starts_of((10, 12, 42), (37, 27), (61, 3), (7,) * 8 + (3, 5))
    q, k, v = (
        torch.randn(4, count, 64, size, dtype=torch.float64)
        for count, size in ((heads, dim), (2, dim), (2, value_dim))
    )
    entries, _ = OPS.select(q, k, v, 3, 2, 8, 4, True, "norm", 64, True, None, REVISION, starts)
    gathered = entries.shape[2]
    tensors = [torch.randn(*x.shape[:2], gathered, x.shape[3], dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    summary = known_documents.summary(starts) if known else None
    arguments = *tensors, entries, starts, 3, 2, 8, 4, 0.0, None, True, 10, "auto", summary
    expected = documents._attention(*arguments)
    switch_on(monkeypatch, *kernels)
    found = documents._attention(*arguments)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for x, y in zip(torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(x, y)
    pyramid = Pyramid(length=64, levels=3, pooling=2, topk=8, quota=4)
    apart = known_documents.plan(summary, pyramid, batch=4, groups=2, most=10, cudnn="cudnn" in kernels).apart
    assert [part.row for part in apart] == ([0, 1, 2] if known and "cudnn" in kernels else [])


def test_nothing_of_another_document_is_in_a_documents_own_call(small, plain_kernels, monkeypatch):
    """Not even a NaN."""
    switch_on(monkeypatch, "cudnn", "flash")
    starts, own = starts_of((6, 54, 4)), torch.arange(64).clamp(6, 59) == torch.arange(64)
    entries = torch.arange(64, dtype=torch.int32).expand(1, 2, 64)
    tensors = [torch.randn(1, 2, 64, 8, dtype=torch.float64) for _ in range(3)]
    spoiled = [torch.where(own[:, None], x, torch.nan).requires_grad_() for x in tensors]
    tensors = [x.requires_grad_() for x in tensors]
    known = known_documents.summary(starts)
    out, other = (
        documents._attention(*x, entries, starts, 1, 2, 8, 0, 0.0, None, True, 8, "auto", known) for x in (tensors, spoiled)
    )
    torch.testing.assert_close(other[:, :, own], out[:, :, own])
    for x, y in zip(
        torch.autograd.grad(out[:, :, own].sum(), tensors), torch.autograd.grad(other[:, :, own].sum(), spoiled), strict=True
    ):
        torch.testing.assert_close(y[:, :, own], x[:, :, own])


@pytest.mark.parametrize("told", [True, False])
def test_opcheck(small, plain_kernels, told):
    q = torch.randn(20, 2, 8, requires_grad=True)
    k, v = torch.randn(2, 20, 1, 8, requires_grad=True).unbind()
    segments = torch.tensor([[[0] * 8 + [8] * 2, [0] * 7 + [8] * 3]], dtype=torch.int32)
    known = known_documents.summary(starts_of((8, 2))) if told else None
    arguments = q, k, v, segments, known, 10, 1, 2, 8, 0, 3, 0.3, True, REVISION
    torch.library.opcheck(sequences.attend_in_sequences, arguments)


# --- compiled, with those kernels ---------------------------------------------------------------------------------------


NUMBERS = torch.cat([numbered(10, 23, 31), numbered(37, 27)])


@pytest.fixture
def in_sequences(small, plain_kernels, monkeypatch):
    """Makes attention go sequence by sequence from its call on, as on a GPU, and gives a list of what the kernels are told."""
    told = []

    def noted(*arguments, **shape):
        told.append(known_documents.plan(*arguments, **shape))
        return told[-1]

    def begin(*kernels):
        switch_on(monkeypatch, *kernels)
        monkeypatch.setattr(sequences, "plan", noted)
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
        told = in_sequences("cudnn", "flash")
        torch._dynamo.reset()
        found = gradients(torch.compile(model, backend=backend, options=FIELDS | options, fullgraph=True), x)
    torch.testing.assert_close(found, expected)
    assert told and all(len(plan.apart) == 2 for plan in told)


def test_other_numbers_of_documents_need_no_other_graph(in_sequences):
    told, run = in_sequences("flash"), torch.compile(Model(1), backend=passes_only, options=dict(FIELDS), fullgraph=True)
    before = len(lighthouse_fx.reports())
    for lengths in ((60, 4), (30, 30, 4), (4,) * 16):
        told.clear()
        with lighthouse_fx.documents(numbered(*lengths)):
            run(inputs(batch=1))
        (plan,) = told
        assert plan.sequences == 2 * (len(lengths) + 1) and plan.longest <= 2 * max(*lengths, len(lengths))
    assert len(lighthouse_fx.reports()) == before + 1


def test_more_documents_than_the_configuration_allows_when_compiled(in_sequences):
    in_sequences("flash")
    run = torch.compile(Model(1), backend=passes_only, options=FIELDS | {"max_documents": 2})
    with lighthouse_fx.documents(numbered(30, 30, 4)), pytest.raises(ValueError, match=r"has 3 documents.*max_documents=2"):
        run(inputs(batch=1))


def test_the_functional_form_takes_documents_from_the_cpu(in_sequences):
    told = in_sequences("flash")
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    lighthouse_attention(q, k, v, is_causal=True, documents=numbered(30, 34), config=CONFIG)
    (plan,) = told
    assert plan.sequences == 2 * 3


# --- on a GPU, with the real ones ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kernel", ["auto", "flash"])
@pytest.mark.parametrize("heads, dim", [(2, 128), (8, 64), (4, 80), (2, 256)])
@pytest.mark.parametrize("levels", [1, 3])
def test_gpu_computes_what_the_mask_says(monkeypatch, levels, heads, dim, kernel, known):
    """Values and gradients, where cuDNN gets long documents and where it does not."""
    monkeypatch.setattr(known_documents, "_ROWS", 0)
    length = 4096
    starts = starts_of((3500, 596), (200, 3000, 896), (4095, 1), (64,) * 64)
    q = torch.randn(4, heads, length, dim)
    k, v = torch.randn(2, 4, 2, length, dim).unbind()
    pyramid = Pyramid(length=length, levels=levels, topk=256)
    entries = torch.arange(length, dtype=torch.int32).expand(4, 2, length)
    if levels > 1:
        entries, _ = OPS.select(q, k, v, levels, 4, 256, 0, True, "norm", 64, True, None, REVISION, starts)
    gathered = pyramid.gathered
    made = [torch.randn(4, x.shape[1], gathered, dim, dtype=torch.bfloat16) for x in (q, k, v)]
    exact = [x.float().cuda().requires_grad_() for x in made]
    tensors = [x.cuda().requires_grad_() for x in made]
    segments = documents._segments(entries, starts, pyramid).cuda()
    summary = known_documents.summary(starts) if known else None
    found = documents._attention(
        *tensors, entries.cuda(), starts.cuda(), levels, 4, 256, 0, 0.0, None, True, 70, kernel, summary
    )
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, grad)
    told = known_documents.plan(summary, pyramid, batch=4, groups=2, most=70, cudnn=kernel == "auto" and dim <= 128)
    on_hopper = kernel == "auto" and dim <= 128 and torch.cuda.get_device_capability() >= (9, 0)
    assert not on_hopper or len(told.apart) == (3 if known else 0)
    for row in range(4):  # one at a time: the mask is large
        mask = (segments[row, :, :, None] == segments[row, :, None, :]).tril().repeat_interleave(heads // 2, 0)
        expected = F.scaled_dot_product_attention(*(x[row] for x in exact), attn_mask=mask, enable_gqa=True)
        assert relative(found[row], expected) < 1e-2
        expected_grads = torch.autograd.grad(expected, exact, grad[row].float())
        for x, y in zip(grads, expected_grads, strict=True):
            assert relative(x[row], y[row]) < 2e-2


def relative(x, y):
    return ((x.float() - y).norm() / y.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"triton.cudagraphs": True}])
def test_gpu_graph_serves_any_number_of_documents(monkeypatch, options):
    """Also where launches are recorded: those of attention inside documents must not be."""
    monkeypatch.setattr(known_documents, "_ROWS", 0)
    config = LighthouseConfig(topk=256, max_kept=1.0)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both(call, tensors):
        out = call(*tensors)
        return out.detach().clone(), *(x.clone() for x in torch.autograd.grad(out, tensors, torch.ones_like(out)))

    run = torch.compile(attend, backend="lighthouse", options={"topk": 256, "max_kept": 1.0, **options}, fullgraph=True)
    tensors = [torch.randn(1, 4, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    before = len(lighthouse_fx.reports())
    rows = [(3000, 1096), (64,) * 64, (200, 3800, 96), (1024,) * 4]
    for lengths in rows * 2:
        for numbers in (numbered(*lengths), numbered(*lengths).cuda()):
            expected = both(
                lambda q, k, v, numbers=numbers: lighthouse_attention(
                    q, k, v, is_causal=True, documents=numbers, config=config
                ),
                tensors,
            )
            with lighthouse_fx.documents(numbers):
                found = both(run, tensors)
            for x, y in zip(found, expected, strict=True):
                assert relative(x, y.float()) < 1e-2
    assert len(lighthouse_fx.reports()) == before + 1


@pytest.mark.gpu
def test_gpu_takes_dropout_inside_documents():
    q, k, v = (torch.randn(1, 2, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    config = LighthouseConfig(topk=128)
    out = lighthouse_attention(q, k, v, is_causal=True, documents=numbered(1500, 548), dropout_p=0.5, config=config)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *grads))
