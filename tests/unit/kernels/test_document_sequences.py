"""Attention to the sequences that documents become computes what a mask says: with plain kernels, and on a GPU."""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, Model, gradients, inputs, passes_only

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, functional, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid
from lighthouse_fx.kernels.packed import attention, varlen
from lighthouse_fx.kernels.packed import plan as known_documents
from lighthouse_fx.passes.decide import legality

OPS = torch.ops.lighthouse_fx


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def starts_of(*rows):
    return attention.starts_of(torch.cat([numbered(*lengths) for lengths in rows]))


@pytest.fixture
def small(monkeypatch):
    """Documents of a few tokens may have a call of their own, and are cut into small pieces."""
    monkeypatch.setattr(known_documents, "_MOST_OF_ITS_ROW", 0.3)
    for module in (known_documents, varlen):
        monkeypatch.setattr(module, "PIECE", 4)


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
    sums = sums.view(batch, heads, count).transpose(0, 1).flatten()
    rows, bounds, longest = as_rows(grad, query, key, value, out)
    grads = plain_backward(*rows, sums, bounds, longest, scale)
    return [x.unflatten(0, (batch, count)).transpose(1, 2) for x in grads]


@pytest.fixture
def plain_kernels(monkeypatch):
    monkeypatch.setattr(varlen, "flash_forward", plain_forward)
    monkeypatch.setattr(varlen, "flash_backward", plain_backward)
    monkeypatch.setattr(varlen, "cudnn_forward", plain_cudnn_forward)
    monkeypatch.setattr(varlen, "cudnn_backward", plain_cudnn_backward)


def switch_on(monkeypatch, *kernels):
    """As on a GPU: attention inside documents goes sequence by sequence."""
    for module in (attention, import_module("lighthouse_fx.runtime.document_inputs")):
        monkeypatch.setattr(module, "in_sequences", lambda device: True)
    monkeypatch.setattr(attention, "_able", lambda *_: kernels)
    for module in (attention, legality, functional):
        monkeypatch.setattr(module, "document_problem", lambda *_: None)  # it asks for 16 bits


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kernels", [("flash",), ("cudnn", "flash")])
@pytest.mark.parametrize("heads, dim, value_dim", [(2, 8, 8), (4, 8, 8), (4, 6, 10)])
def test_the_same_as_with_a_mask(small, plain_kernels, monkeypatch, heads, dim, value_dim, kernels, known):
    starts = starts_of((10, 12, 42), (37, 27), (61, 3), (8,) * 8)
    q, k, v = (
        torch.randn(4, count, 64, size, dtype=torch.float64)
        for count, size in ((heads, dim), (2, dim), (2, value_dim))
    )
    entries, _ = OPS.select(q, k, v, 3, 2, 8, 4, True, True, "norm", 64, True, None, REVISION, starts)
    gathered = entries.shape[2]
    tensors = [torch.randn(*x.shape[:2], gathered, x.shape[3], dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    summary = known_documents.summary(starts) if known else None
    arguments = *tensors, entries, starts, 3, 2, 8, 4, 0.0, None, True, 10, "auto", summary
    expected = attention._attention(*arguments)
    switch_on(monkeypatch, *kernels)
    found = attention._attention(*arguments)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for x, y in zip(torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(x, y)
    pyramid = Pyramid(length=64, levels=3, pooling=2, topk=8, quota=4)
    apart = known_documents.plan(summary, pyramid, batch=4, groups=2, most=10, cudnn="cudnn" in kernels).apart
    assert bool(apart) == (known and "cudnn" in kernels)


def test_nothing_of_another_document_is_in_a_documents_own_call(small, plain_kernels, monkeypatch):
    """Not even a NaN, where its rows are brought to the front: a selection has them in front, and others behind them."""
    switch_on(monkeypatch, "cudnn", "flash")
    starts, own = starts_of((6, 54, 4)), torch.arange(64).clamp(6, 59) == torch.arange(64)
    entries = torch.arange(64, dtype=torch.int32).expand(1, 2, 64)
    tensors = [torch.randn(1, 2, 64, 8, dtype=torch.float64) for _ in range(3)]
    spoiled = [torch.where(own[:, None], x, torch.nan).requires_grad_() for x in tensors]
    tensors = [x.requires_grad_() for x in tensors]
    known = known_documents.summary(starts)
    out, other = (
        attention._attention(*x, entries, starts, 1, 2, 8, 0, 0.0, None, True, 8, "auto", known) for x in (tensors, spoiled)
    )
    torch.testing.assert_close(other[:, :, own], out[:, :, own])
    for x, y in zip(
        torch.autograd.grad(out[:, :, own].sum(), tensors), torch.autograd.grad(other[:, :, own].sum(), spoiled), strict=True
    ):
        torch.testing.assert_close(y[:, :, own], x[:, :, own])


@pytest.mark.parametrize("in_front", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_opcheck(small, plain_kernels, told, in_front):
    q = torch.randn(20, 2, 8, requires_grad=True)
    k, v = torch.randn(2, 20, 1, 8, requires_grad=True).unbind()
    segments, starts = torch.tensor([[[0] * 8 + [8] * 2, [0] * 7 + [8] * 3]], dtype=torch.int32), starts_of((8, 2))
    known = known_documents.summary(starts) if told else None
    longest = [x for x in varlen.longest_of(segments, starts, 3, in_front=in_front) if x is not None]
    arguments = varlen.bounds_of(segments, 8, 3), longest, known, 1, 2, 10, 1, 2, 8, 0, 3, 0.3, REVISION
    torch.library.opcheck(varlen.attend_in_sequences, (q, k, v, *arguments))


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
        monkeypatch.setattr(varlen, "plan", noted)
        return told

    return begin


@pytest.mark.parametrize(
    "backend, options, checkpointing",
    [
        (passes_only, {}, None),
        (passes_only, {}, "inside"),
        (passes_only, {"dense_layers": (0,)}, "inside"),
        pytest.param("lighthouse", {"dense_layers": (0,)}, "inside", marks=pytest.mark.sweep),
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
    assert told and all(plan.apart for plan in told)


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
    monkeypatch.setattr(known_documents, "_MOST_OF_ITS_ROW", 0.3)
    length = 4096
    starts = starts_of((3500, 596), (200, 3000, 896), (4095, 1), (64,) * 64)
    q = torch.randn(4, heads, length, dim)
    k, v = torch.randn(2, 4, 2, length, dim).unbind()
    pyramid = Pyramid(length=length, levels=levels, pooling=4, topk=256)
    entries = torch.arange(length, dtype=torch.int32).expand(4, 2, length)
    if levels > 1:
        entries, _ = OPS.select(q, k, v, levels, 4, 256, 0, True, True, "norm", 64, True, None, REVISION, starts)
    gathered = pyramid.gathered
    made = [torch.randn(4, x.shape[1], gathered, dim, dtype=torch.bfloat16) for x in (q, k, v)]
    exact = [x.float().cuda().requires_grad_() for x in made]
    tensors = [x.cuda().requires_grad_() for x in made]
    segments = attention.segments_of(entries, starts, pyramid).cuda()
    summary = known_documents.summary(starts) if known else None
    found = attention._attention(
        *tensors, entries.cuda(), starts.cuda(), levels, 4, 256, 0, 0.0, None, True, 70, kernel, summary
    )
    grad = torch.randn_like(found)
    grads = torch.autograd.grad(found, tensors, grad)
    told = known_documents.plan(summary, pyramid, batch=4, groups=2, most=70, cudnn=kernel == "auto" and dim <= 128)
    on_hopper = kernel == "auto" and dim <= 128 and torch.cuda.get_device_capability() >= (9, 0)
    assert not on_hopper or bool(told.apart) == known
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
    monkeypatch.setattr(known_documents, "_MOST_OF_ITS_ROW", 0.3)
    config = LighthouseConfig.paper(topk=256)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both(call, tensors):
        out = call(*tensors)
        return out.detach().clone(), *(x.clone() for x in torch.autograd.grad(out, tensors, torch.ones_like(out)))

    run = torch.compile(attend, backend="lighthouse", options={"levels": 3, "topk": 256, **options}, fullgraph=True)
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
    config = LighthouseConfig.paper(topk=128)
    out = lighthouse_attention(q, k, v, is_causal=True, documents=numbered(1500, 548), dropout_p=0.5, config=config)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(x.isfinite().all() for x in (out, *grads))
