"""Packed documents: against brute force, nothing crosses a border, no token is left out, every way to say where they are."""

import itertools
import warnings
from functools import partial

import brute_documents as brute
import pytest
import torch
import torch.nn.functional as F
from brute_force import from_tensor, norm_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    CONFIG,
    FIELDS,
    HEADS,
    TOKENS,
    Model,
    assert_same_gradients,
    gradients,
    inputs,
    passes_only,
    twin,
)
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import REVISION, Pyramid
from lighthouse_fx.kernels.ops import pyramid_ops as registered
from lighthouse_fx.kernels.packed import attention
from lighthouse_fx.kernels.packed.varlen import bounds_of

OPS = torch.ops.lighthouse_fx


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def qkv(length, heads=4, groups=2, dim=8, dtype=torch.float64, batch=1, value_dim=None):
    dims = (dim, dim, value_dim or dim)
    return [
        torch.randn(batch, count, length, size, dtype=dtype, requires_grad=True)
        for count, size in zip((heads, groups, groups), dims, strict=True)
    ]


def brute_force(q, k, v, numbers, config, scale=None):
    """Values `[B, H, N, Dv]` and entries `[batch][group]`, from the loops."""
    s_q, s_k = norm_scores(q.detach(), k.detach())
    share, rows, chosen = q.shape[1] // k.shape[1], [], []
    for b, of_row in enumerate(numbers.tolist()):
        pyramid = dict(length=len(of_row), levels=config.levels, pooling=config.pooling, topk=config.topk, quota=config.quota)
        chosen.append([brute.select(s_q[b][g], s_k[b][g], of_row, **pyramid) for g in range(k.shape[1])])
        heads = [
            brute.lighthouse(
                q[b, h], k[b, h // share], v[b, h // share], chosen[b][h // share], of_row, pooling=config.pooling, scale=scale,
                levels=config.levels, causal_selection=config.causal_selection,
            )
            for h in range(q.shape[1])
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows), chosen


CASES = [
    # p, L, k, quota, lengths of documents
    (2, 3, 8, None, (64,)),
    (2, 3, 8, None, (10, 23, 31)),
    (4, 2, 4, 4, (5, 32, 4, 23, 3)),
    (3, 3, 12, 6, (1, 30, 1, 1, 29, 9)),  # a tail of 8 tokens, single tokens
    (2, 4, 8, 4, (17, 40, 8)),
    (2, 3, 4, 2, (3, 4, 5, 6, 7, 8, 9)),  # more borders than the quota holds
    (2, 1, 4, None, (9, 11)),  # one level: dense inside documents
    (4, 3, 4, None, (3, 5)),  # shorter than a coarsest window: the tail is all
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_brute_force(case, kernels):
    pooling, levels, topk, quota, lengths = case
    config = LighthouseConfig(levels=levels, pooling=pooling, topk=topk, quota=quota)
    on_gpu = kernels == "gpu"
    numbers, tensors = numbered(*lengths), qkv(sum(lengths), value_dim=None if on_gpu else 12)
    expected, chosen = brute_force(*(x.cpu() for x in tensors), numbers.cpu(), config)
    options = levels, pooling, topk, quota or 0, True, True, "norm", 64, True, None, REVISION
    entries, _ = OPS.select(*tensors, *options, attention.starts_of(numbers))
    assert from_tensor(entries.cpu(), sum(lengths), levels, pooling) == chosen
    if on_gpu:
        tensors = [x.detach().bfloat16().requires_grad_() for x in tensors]
        expected, again = brute_force(*(x.cpu().double() for x in tensors), numbers.cpu(), config)
        if again != chosen:
            pytest.skip("rounding to bfloat16 chose other windows")
    found = lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, documents=numbers, config=config)
    tolerance = dict(rtol=2e-2, atol=2e-2) if on_gpu else {}
    torch.testing.assert_close(found.double().cpu(), expected, **tolerance)
    grad = torch.randn_like(found)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    expected, _ = brute_force(*exact, numbers.cpu(), config)
    for x, y in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, exact, grad.cpu().double()), strict=True
    ):
        torch.testing.assert_close(x.double().cpu(), y, **tolerance)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    pooling=st.integers(2, 4),
    levels=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_nothing_crosses_a_border_and_no_token_is_left_out(lengths, pooling, levels, seed):
    torch.manual_seed(seed)
    numbers, length = numbered(*lengths), sum(lengths)
    config = LighthouseConfig(levels=levels, pooling=pooling, topk=64, quota=64)  # room for every border
    tensors = qkv(length, heads=1, groups=1, dim=4)
    kept = numbers == torch.randint(len(lengths), ())
    out = lighthouse_attention(*tensors, is_causal=True, documents=numbers, config=config)
    assert (out.abs().sum(-1) > 0).all()
    # Everything outside one document changes, also into NaN and infinity: inside, nothing does.
    spoiled = [torch.where(kept[:, None, :, None], x.detach(), 1e3 * torch.randn_like(x)) for x in tensors]
    if not torch.equal(*(selected(x, numbers, config, kept) for x in (tensors, spoiled))):
        return  # scores outside the document share its tiles: the choice inside may change, and then so do the values
    other = lighthouse_attention(*spoiled, is_causal=True, documents=numbers, config=config)
    torch.testing.assert_close(out[..., kept[0], :], other[..., kept[0], :])
    grads = torch.autograd.grad(out[..., kept[0], :].sum(), tensors)
    assert all((grad[..., ~kept[0], :] == 0).all() for grad in grads)


def selected(tensors, numbers, config, kept):
    """The slots of a document's own windows: present or not."""
    options = config.levels, config.pooling, config.topk, config.quota or 0, True, True, "norm", 64, True, None, REVISION
    starts = attention.starts_of(numbers)
    _, slots = OPS.select(*tensors, *options, starts)
    pyramid = Pyramid(length=numbers.shape[1], levels=config.levels, pooling=config.pooling, topk=1)
    own = [kept[0, : pyramid.windows(n) * config.pooling**n].unflatten(0, (-1, config.pooling**n)).any(1)
           for n in range(config.levels)]
    return (slots >= 0)[0, 0][torch.cat(own)]


def test_as_if_each_document_were_alone_where_all_is_kept():
    """With a budget for every window the result is that of plain attention on finest entries and pooled ones alike: compare
    one packed row with a row in which another document stands before."""
    config = LighthouseConfig(levels=3, pooling=2, topk=64)
    q, k, v = qkv(32)
    alone = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, documents=numbered(32), config=config)
    before = [torch.cat([torch.randn_like(x[:, :, :8]), x], 2) for x in (q, k, v)]
    packed = lighthouse_attention(*before, is_causal=True, enable_gqa=True, documents=numbered(8, 32), config=config)
    torch.testing.assert_close(packed[:, :, 8:], alone)
    torch.testing.assert_close(
        alone, lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
    )  # one document is no document


@pytest.mark.parametrize("keep_first", [True, False])
def test_rows_of_one_document_are_compiled_as_without_documents(keep_first):
    """Also where window 0 has to be expanded for no document's sake."""
    config = LighthouseConfig(levels=3, pooling=2, topk=2, keep_first=keep_first)
    q, k, v = qkv(61)
    numbers = torch.zeros(q.shape[0], 61, dtype=torch.int32)
    form = partial(lighthouse_attention, is_causal=True, enable_gqa=True, config=config)
    torch.testing.assert_close(form(q, k, v, documents=numbers), form(q, k, v), rtol=1e-9, atol=1e-9)
    numbers[0, 40:] = 1  # the other row is what it was
    torch.testing.assert_close(form(q, k, v, documents=numbers)[1:], form(q, k, v)[1:], rtol=1e-9, atol=1e-9)


# --- the ops ----------------------------------------------------------------------------------------------------------


def test_end_of_a_document_is_not_told_before_it(kernels):
    """Tokens in a window that a border divides get, before the border, what they get where it is not expanded."""
    q, k, v = (torch.ones(1, 1, 64, 8) * torch.randn(64, 1) for _ in range(3))
    k[:, :, 44:48] = 100  # window 12 has the last place
    config = LighthouseConfig(levels=2, pooling=4, topk=2)
    rows, options = (numbered(64), numbered(31, 33)), (2, 4, 2, 0, True, True, "norm", 64, True, None, REVISION)
    one, two = (lighthouse_attention(q, k, v, is_causal=True, documents=row, config=config) for row in rows)
    entries = [OPS.select(q, k, v, *options, attention.starts_of(row))[0].flatten().tolist() for row in rows]
    assert [28 in x for x in entries] == [False, True]
    torch.testing.assert_close(one[:, :, :31], two[:, :, :31])
    published = LighthouseConfig(levels=2, pooling=4, topk=2, causal_selection=False)
    told = lighthouse_attention(q, k, v, is_causal=True, documents=numbered(31, 33), config=published)
    assert not torch.allclose(told[:, :, 28:31], two[:, :, 28:31])


def test_opcheck():
    q, k, v = qkv(29, dtype=torch.float32)
    starts = attention.starts_of(numbered(10, 19))
    options = (3, 2, 4, 2, True, True, "norm", 64, True, None, REVISION)
    torch.library.opcheck(registered.select, (q.detach(), k.detach(), v.detach(), *options, starts))
    entries, slots = OPS.select(q, k, v, *options, starts)
    rows = torch.randn(1, 4, entries.shape[2], 8, requires_grad=True)
    torch.library.opcheck(registered.scatter, (rows, entries, slots, 29, 3, 2, True, REVISION, starts))
    torch.library.opcheck(registered.scatter_backward, (q, entries, slots, 3, 2, True, REVISION, starts))


def test_crowded_out_is_what_is_missing():
    """The count says whether every divided window was expanded."""
    for lengths in [(10, 23, 31), (3, 4, 5, 6, 7, 8, 31), (64,)]:
        numbers = numbered(*lengths)
        for topk, keep_first in itertools.product((2, 4, 8, 16), (True, False)):
            pyramid = Pyramid(length=64, levels=3, pooling=2, topk=topk, keep_first=keep_first)
            options = 3, 2, topk, 0, keep_first, True, "norm", 64, True, None, REVISION
            starts = attention.starts_of(numbers)
            entries, _ = OPS.select(*qkv(64), *options, starts)
            windows = from_tensor(entries, 64, 3, 2)[0][0]
            expanded = {(level + 1, index // 2) for level, index in windows if level < 2}
            number = [(1, i) for i in range(32)] + [(2, i) for i in range(16)]
            wanted = {number[n] for n in attention.must_expand(starts, pyramid)[0].nonzero().flatten().tolist()}
            assert (attention.crowded_out(starts, pyramid).item() == 0) == (wanted <= expanded), (lengths, topk)


def test_bounds_of_the_sequences_that_flash_attention_gets():
    segments = torch.tensor([[[0, 0, 2, 2, 9], [0, 0, 0, 2, 2]]], dtype=torch.int32)
    assert bounds_of(segments, 8, most=3).tolist() == [0, 2, 4, 5, 8, 10, 10, 10, 10]
    with pytest.raises(RuntimeError, match="more than max_documents=1 documents"):
        bounds_of(segments, 4, most=1)


# --- compiled ---------------------------------------------------------------------------------------------------------


def by_functional_form(numbers, config=CONFIG):
    return lambda q, k, v: lighthouse_attention(
        q, k, v, is_causal=True, enable_gqa=True, documents=numbers, config=config
    )


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.parametrize("checkpointing", [None, "inside"])
@pytest.mark.parametrize("backend", [passes_only, "lighthouse"])
def test_compiled(backend, checkpointing):
    model, x = Model(checkpointing=checkpointing).double(), inputs(dtype=torch.float64)
    numbers = torch.cat([numbered(10, 23, 31), numbered(64)])
    run = torch.compile(model, backend=backend, options=dict(FIELDS), fullgraph=True)
    with lighthouse_fx.documents(numbers):
        assert_same_gradients(run, twin(model, by_functional_form(numbers)), x)
    assert lighthouse_fx.reports()[-1].rewritten == 2


def test_other_documents_need_no_other_graph_and_none_are_another():
    model, x = Model().double(), inputs(batch=1, dtype=torch.float64)
    run = torch.compile(model, backend=passes_only, options=dict(FIELDS))
    before = len(lighthouse_fx.reports())
    for numbers in (numbered(10, 54), numbered(30, 30, 4)):
        with lighthouse_fx.documents(numbers):
            assert_same_gradients(run, twin(model, by_functional_form(numbers)), x)
    assert len(lighthouse_fx.reports()) == before + 1
    assert_same_gradients(run, twin(model, by_functional_form(None)), x)
    assert len(lighthouse_fx.reports()) == before + 2


def test_one_document_in_each_row_is_no_documents():
    model, x = Model(1), inputs(batch=1)
    run = torch.compile(model, backend=passes_only, options=dict(FIELDS))
    run(x)
    before = len(lighthouse_fx.reports())
    with lighthouse_fx.documents(numbered(10, 54)), lighthouse_fx.documents(numbered(64)):
        run(x)
    assert len(lighthouse_fx.reports()) == before


def test_borders_instead_of_numbers():
    borders = torch.tensor([0, 10, 33, 64])
    assert torch.equal(
        lighthouse_fx.documents(cu_seqlens=borders).starts, lighthouse_fx.documents(numbered(10, 23, 31)).starts
    )
    assert lighthouse_fx.documents(cu_seqlens=torch.tensor([0, 3, 3, 4])).starts.tolist() == [[0, 0, 0, 3]]


def test_checkpoint_whose_backward_runs_outside_is_an_error():
    model, x = Model(1), inputs(batch=1).requires_grad_()
    run = torch.compile(model, backend="lighthouse", options=dict(FIELDS))
    with lighthouse_fx.documents(numbered(10, 54)):
        loss = checkpoint(run, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match="again under other documents"):
        loss.backward()
    with lighthouse_fx.documents(numbered(10, 54)):
        loss = checkpoint(run, x, use_reentrant=False).sum()
    with lighthouse_fx.documents(numbered(20, 44)), pytest.raises(RuntimeError, match="under other documents"):
        loss.backward()
    with lighthouse_fx.documents(numbered(10, 54)):
        loss = checkpoint(run, x, use_reentrant=False).sum()
    with lighthouse_fx.documents(numbered(10, 54) + 7):  # the same documents
        loss.backward()


def test_attention_that_stays_dense_is_warned_of():
    def model(x):
        q = x.view(1, TOKENS, HEADS, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)

    run = torch.compile(model, backend=passes_only, options=dict(FIELDS))
    with lighthouse_fx.documents(numbered(10, 54)), pytest.warns(UserWarning, match="ignores it"):
        run(inputs(batch=1).requires_grad_())
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and "not causal is not kept inside documents" in call.reason


def test_windows_that_are_crowded_out_are_warned_of_once():
    run = torch.compile(Model(1), backend=passes_only, options={**FIELDS, "topk": 2})
    x, packed = inputs(batch=1), lighthouse_fx.documents(numbered(*[4] * 16))
    with packed, pytest.warns(UserWarning, match=r"windows at borders of documents are more than topk=2"):
        run(x)
    with packed, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)
        with lighthouse_fx.documents(numbered(64)):
            run(x)


def test_what_is_no_document():
    with pytest.raises(TypeError, match=r"either document_ids.*or cu_seqlens"):
        lighthouse_fx.documents()
    with pytest.raises(TypeError, match=r"document_ids has dtype torch\.float32"):
        lighthouse_fx.documents(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"document_ids has shape \[4\]"):
        lighthouse_fx.documents(torch.zeros(4, dtype=torch.int32))
    for wrong in ([1, 4], [0, 3, 2], [0]):
        with pytest.raises(ValueError, match="cu_seqlens="):
            lighthouse_fx.documents(cu_seqlens=torch.tensor(wrong))
    q, k, v = qkv(16)
    for match, arguments in {
        "documents has shape": dict(documents=numbered(15)),
        "documents with is_causal=False": dict(documents=numbered(16), is_causal=False),
        "documents has dtype": dict(documents=numbered(16).double()),
    }.items():
        with pytest.raises((TypeError, ValueError), match=match):
            lighthouse_attention(q, k, v, **{"is_causal": True, "enable_gqa": True} | arguments)


def test_gradients_are_those_of_the_numbers_alone():
    """A call inside documents() is not the call outside, in values or gradients."""
    model, x = Model(1).double(), inputs(batch=1, dtype=torch.float64)
    run = torch.compile(model, backend=passes_only, options=dict(FIELDS))
    with lighthouse_fx.documents(numbered(10, 54)):
        inside, _ = gradients(run, x)
    outside, _ = gradients(run, x)
    assert not torch.allclose(inside, outside)
