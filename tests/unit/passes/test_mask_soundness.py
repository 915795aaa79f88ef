"""What looks causal and is not: rounding, integers that wrap around, writes to memory, arguments by name.

The proof of a mask has to be right, never merely plausible: a wrong one lets a model see the future. Each mask in `WRONG`
was once taken for causal, or would be if a single check were missing.
"""

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from graphs import attend, by_arange, only_call, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FIELDS, passes_only
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels.reference import masks
from lighthouse_fx.passes.ir import aliasing
from lighthouse_fx.passes.masks.rules import OPERATIONS

N = 320  # more than bfloat16 and int8 can count


def heads():
    return torch.randn(1, 2, N, 4, requires_grad=True)


def positions(**options):
    return torch.arange(N, **options)


def in_rows(dim):
    """The number of each column, by way of all places of a square."""
    return torch.arange(N * N).unflatten(dim, (-1, N)) - N * positions()[:, None]


def at_least(x):
    return x[:, None] >= x


def square(value, dtype=None):
    return torch.full((N, N), value, dtype=dtype)


def lower(dtype=None):
    return torch.ones(N, N, dtype=dtype).tril()


def bias():
    return torch.where(by_arange(N), 0.0, -math.inf)


def assign(x, index, value):
    x[index] = value
    return x


def read_again(through_a_view):
    """Half of the mask is written to; the other half reads the same memory as if it still held ones."""
    ones = torch.ones(N, N)
    strict = (ones.view(N, N) if through_a_view else ones).tril_(-1)
    return strict.bool() | (ones.bool() & by_arange(N))


def in_order(*steps):
    mask = torch.full((N, N), -math.inf).triu_(1)
    for step in steps:
        step(mask)
    return mask


def view_before_a_write():
    """The view shows what is written after it was made."""
    mask = lower(torch.bool)
    view = mask[None, None]
    mask.fill_(True)
    return view & True


def read_before_a_write():
    """The copy does not."""
    mask = torch.ones(N, N, dtype=torch.bool)
    copy = mask.clone()
    mask.tril_()
    return copy & mask.tril(-1)


def conjunction_before_a_write():
    """Nor does what was computed from it."""
    window = torch.ones(N, N, dtype=torch.bool).triu(-3)
    both = window & lower(torch.bool)
    window.copy_(lower(torch.bool))
    return both


def first_differs():
    """1 between all neighbours, except before the first position."""
    i = positions()
    return torch.diff(i, prepend=i[:1] - 2)


WRONG = {
    # positions that their dtype cannot hold
    "arange in bfloat16": lambda: at_least(positions(dtype=torch.bfloat16)),
    "arange in float16": lambda: at_least(torch.arange(2048, 2048 + N, dtype=torch.float16)),
    "arange to int8": lambda: at_least(positions().to(torch.int8)),
    "cumsum in bfloat16": lambda: at_least(torch.ones(N, dtype=torch.bfloat16).cumsum(0)),
    "cumsum in int8": lambda: at_least(torch.ones(N, dtype=torch.int8).cumsum(0, dtype=torch.int8)),
    "large float32": lambda: at_least(positions().float() + 100000000),
    "large int64 compared as float32": lambda: (positions() + 2**24)[:, None] >= positions().float() + 2**24,
    "int32 overflows": lambda: at_least(positions(dtype=torch.int32) * 2**24),
    "bool of positions": lambda: at_least(positions().bool()),
    # constants that their dtype rounds or wraps around
    "uint8 below zero": lambda: (lower(torch.uint8) * 2 - 1) > 0,
    "int8 above 127": lambda: (lower(torch.int8) * 64 * 4) != 0,
    "float16 sum": lambda: square(2048.0, torch.float16) + torch.ones(N, N, dtype=torch.float16).triu(1) == 2048,
    "float32 epsilon": lambda: square(1.0) + square(1e-9).triu(1) == 1.0,
    "int64 rounded to float32": lambda: (lower(torch.int64) + 2**24).float() != 2**24,
    "NaN bias": lambda: torch.where(by_arange(N), 0.0, math.nan),
    "infinity times zero": lambda: (~by_arange(N)).float() * -math.inf,
    # other readings of the same name
    "view of the bits": lambda: lower().view(torch.int32) == 1,
    "logical and of integers": lambda: ~torch.logical_and(lower(torch.int64) + 1, torch.ones(N, N, dtype=torch.int64)),
    "method where": lambda: square(0.0).where(~by_arange(N), -math.inf),
    "arange from a start, end by name": lambda: torch.arange(5, end=N + 5)[None, :] <= positions()[:, None],
    "arange to an end, start by name": lambda: positions()[None, :] <= torch.arange(start=5, end=N + 5)[:, None],
    "scaled addition": lambda: torch.add(positions()[:, None], 1, alpha=2) >= positions() + 1,
    # memory that is written to in between
    "written to and read again": lambda: read_again(False),
    "written to through a view": lambda: read_again(True),
    "written to last": lambda: in_order(lambda mask: mask.zero_()),
    "written to in two steps": lambda: in_order(lambda mask: mask.fill_(-math.inf), lambda mask: mask.triu_(2)),
    "assigned another number": lambda: in_order(lambda mask: assign(mask, by_arange(N), -1.0)),
    "assigned a row": lambda: in_order(lambda mask: assign(mask, positions() == 3, 0.0)),
    "multiplied in place": lambda: in_order(lambda mask: operator.imul(mask, 0.0)),
    "view made before a write": view_before_a_write,
    "copy made before a write": read_before_a_write,
    "conjunction made before a write": conjunction_before_a_write,
    "memory as it was found": lambda: torch.empty(N, N).tril_() * 0 + torch.eye(N),
    # steps of the proof that must all be checked
    "rows in another order": lambda: by_arange(N).index_select(0, (positions() - N + 1) * -1),
    "narrowed further on": lambda: by_arange(2 * N).narrow(0, 1, N).narrow(1, 0, N),
    "permuted": lambda: lower(torch.bool).permute(1, 0),
    "transposed": lambda: lower(torch.bool).t(),
    "attribute T": lambda: lower(torch.bool).T,
    "attribute mT": lambda: lower(torch.bool)[None, None].mT,
    "grids exchanged": lambda: operator.ge(*torch.meshgrid(positions(), positions(), indexing="xy")),
    "two halves": lambda: torch.cat([lower(torch.bool)[: N // 2], lower(torch.bool)[: N // 2]]),
    "logarithm": lambda: (lower() * 2).log(),
    "positions repeated": lambda: positions()[: N // 2].repeat(2)[:, None] >= positions(),
    "first difference": lambda: by_arange(N) & (first_differs() == 1),
    "sums of positions": lambda: by_arange(N) & (positions().cumsum(0) <= 0),
    "index from the end": lambda: torch.ones(N, N, dtype=torch.bool).tril(1)[(positions() - 1)[:, None], positions()],
}  # fmt: skip


@torch.library.custom_op("lighthouse_test::show_all", mutates_args=("mask",))
def show_all(mask: torch.Tensor) -> None:
    mask.zero_()


@show_all.register_fake
def _(mask):
    pass


@torch.library.custom_op("lighthouse_test::total", mutates_args=())
def total(x: torch.Tensor) -> torch.Tensor:
    return x.sum()


@total.register_fake
def _(x):
    return x.new_empty(())


def make_alias_and_zero(mask):
    alias = torch.empty(0)
    alias.set_(mask)
    alias.zero_()


WRITES = {
    "relu, inplace by name": lambda mask: F.relu(mask, inplace=True),
    "relu, inplace by position": lambda mask: F.relu(mask, True),
    "hardtanh": lambda mask: F.hardtanh(mask, -1.0, 1.0, inplace=True),
    "list of tensors": lambda mask: torch._foreach_zero_([mask]),
    "list of views": lambda mask: torch._foreach_zero_(mask.unbind(0)),
    "custom operation": lambda mask: torch.ops.lighthouse_test.show_all(mask),
    "custom operation, by name": lambda mask: torch.ops.lighthouse_test.show_all(mask=mask),
    "out by name": lambda mask: torch.mul(input=mask, other=0.0, out=mask),
    "out beside a new tensor": lambda mask: torch.mul(torch.zeros(N, N), 0.0, out=mask),
    "out of a creator": lambda mask: torch.zeros(N, N, out=mask),
    "assignment": lambda mask: assign(mask, 0, 0.0),
    "view": lambda mask: mask.view(-1).zero_(),
    "transposed attribute": lambda mask: mask.T.zero_(),
    "data": lambda mask: mask.data.zero_(),
    "view of a view": lambda mask: mask[None][0].masked_fill_(torch.ones(N, N, dtype=torch.bool), 0.0),
    "operator on a view": lambda mask: operator.imul(mask.view(N, N), 0.0),
    "assignment to a view": lambda mask: assign(mask.T, torch.ones(N, N, dtype=torch.bool), 0.0),
    "numbers one by one": lambda mask: assign(mask, torch.ones(N, N, dtype=torch.bool), torch.zeros(N * N)),
    "another tensor on the same memory": make_alias_and_zero,
    "nested tensor": lambda mask: torch.nested.nested_tensor_from_jagged(mask, torch.tensor([0, N])).mul_(0.0),
    "renormalised embedding": lambda mask: F.embedding(positions(), mask, max_norm=0.5),
    "inside a checkpoint": lambda mask: checkpoint(lambda x: x.zero_(), mask, use_reentrant=False),
    "statistics of batch norm": lambda mask: F.batch_norm(torch.randn(4, N), mask[1], mask[2], training=True),
}

READS = {
    "embedding": lambda q, i, mask: F.embedding(i, q[0, 0]),
    "rotary": lambda q, i, mask: torch.outer(i.float(), q[0, 0, 0]).cos(),
    "list of tensors": lambda q, i, mask: torch._foreach_add([mask, mask], 1.0)[0],
    "custom operation": lambda q, i, mask: torch.ops.lighthouse_test.total(mask),
    "written into another": lambda q, i, mask: torch.zeros(N, N).copy_(mask),
    "masks another": lambda q, i, mask: q.matmul(q.mT).masked_fill_(mask == 0, 0.0),
    "indexes another": lambda q, i, mask: assign(torch.zeros(N, N), mask == 0, 1.0),
    "relu": lambda q, i, mask: F.relu(mask, inplace=False),
    "checkpoint": lambda q, i, mask: checkpoint(lambda x: x.exp(), mask, use_reentrant=False),
    "vmap of another": lambda q, i, mask: torch.func.vmap(torch.sum)(q),
}

RIGHT = {
    "tril by name": lambda: torch.tril(input=torch.ones(N, N), diagonal=0).bool(),
    "unsqueeze by name": lambda: torch.unsqueeze(input=positions(), dim=1) >= positions(),
    "logical and of floats": lambda: torch.logical_and(lower(), torch.ones(N, N)),
    "method where": lambda: square(0.0).where(by_arange(N), -math.inf),
    "float positions": lambda: at_least(positions(dtype=torch.float32) - 1.0),
    "int32 positions": lambda: at_least(positions(dtype=torch.int32)),
    "step by name": lambda: at_least(torch.arange(0, 2 * N, step=2)),
    "lowest of bfloat16": lambda: ((1 - lower(torch.bfloat16)) * torch.finfo(torch.bfloat16).min).float() == 0,
    "int8": lambda: lower(torch.int8).bool(),
    "tensor of a tensor": lambda: at_least(torch.tensor(positions())),
    "same mask many times": lambda: many_times(by_arange(N)),
    "index_select": lambda: by_arange(2 * N)[None, None].index_select(2, positions())[..., :N],
    "narrow": lambda: by_arange(2 * N).narrow(0, 0, N).narrow(1, 0, N),
    "select": lambda: by_arange(N).expand(2, N, N).select(0, 1),
    "permute": lambda: torch.ones(N, N).triu().permute(1, 0).bool(),
    "permute by name": lambda: torch.permute(torch.ones(1, N, N).triu(), dims=(0, -1, 1)).bool(),
    "t": lambda: torch.ones(N, N).triu().t().bool(),
    "attribute T": lambda: torch.ones(N, N, dtype=torch.bool).triu().T,
    "attribute mT": lambda: torch.ones(1, N, N, dtype=torch.bool).triu().mT,
    "grids": lambda: operator.ge(*torch.meshgrid(positions(), positions(), indexing="ij")),
    "grids exchanged": lambda: operator.le(*torch.meshgrid(positions(), positions(), indexing="xy")),
    "joined to nothing": lambda: torch.cat([torch.zeros(N, 0), bias()], dim=-1),
    "stacked to nothing": lambda: torch.hstack([torch.zeros(N, 0), bias()]),
    "logarithm": lambda: lower().log(),
    "isinf": lambda: ~square(-math.inf).triu(1).isinf(),
    "repeated rows": lambda: positions().repeat(N, 1) <= positions()[:, None],
    "unflattened batch": lambda: by_arange(N).expand(2, N, N).unflatten(0, (1, -1)),
    "unflattened by name": lambda: torch.unflatten(by_arange(N)[None], dim=0, sizes=(1, 1)),
    "unflattened positions": lambda: in_rows(0) <= positions()[:, None],
    "unflattened positions, counted from behind": lambda: in_rows(-1) <= positions()[:, None],
    "repeated batch": lambda: by_arange(N)[None, None].repeat(1, 2, 1, 1),
    "comparisons by their long names": lambda: torch.greater_equal(positions()[:, None], positions()).logical_and(
        torch.less(positions(), N + positions()[:, None])
    ),
    "byte": lambda: torch.ones(N, N).byte().tril().bool(),
    "view_as": lambda: by_arange(N).view_as(torch.empty(1, N, N)),
    "PyTorch's own": lambda: torch.nn.Transformer.generate_square_subsequent_mask(N),
    "CausalBias, upper left": lambda: causal_upper_left(N, N),
    "CausalBias, lower right": lambda: causal_lower_right(N, N),
}


def many_times(mask):
    """As a tree, 2**40 nodes."""
    for _ in range(40):
        mask = mask & mask
    return mask


def lets_through(mask):
    return mask if mask.dtype == torch.bool else mask == 0


@pytest.mark.parametrize("name", WRONG)
def test_mask_that_only_looks_causal_is_left(name):
    build = WRONG[name]
    assert build().isnan().any() or not torch.equal(lets_through(build()), by_arange(N).expand(build().shape))
    gm, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is not None
    assert "lighthouse" not in str(targets(gm))
    assert "not understood" not in call.refusal.reason


@pytest.mark.parametrize("name", RIGHT)
def test_causal_mask_in_an_unusual_spelling_is_proved(name):
    build = RIGHT[name]
    if type(build()) is torch.Tensor:
        assert torch.equal(lets_through(build()), by_arange(N).expand(build().shape))
    _, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is None and call.is_causal is True, call.refusal


def test_one_element_index_is_no_full_mask():
    _, call = only_call(lambda q: attend(q, by_arange(N)[True]), heads())
    assert call.refusal is not None


def test_index_of_booleans_is_no_index_of_positions():
    def function(q):
        all_positions = positions()[torch.ones(N, dtype=torch.bool)]
        torch._check(all_positions.shape[0] == N)
        return attend(q, by_arange(N) & (all_positions <= 1))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, call = only_call(function, heads())
    assert "index" in call.refusal.reason


def test_tensor_subclass_is_left():
    """A wrapper's views do not show whose memory they share."""
    two = TwoTensor(torch.ones(2), torch.ones(2))
    _, call = only_call(lambda q, two: attend(q, two.new_ones((N, N), dtype=torch.bool).tril()), heads(), two)
    assert "TwoTensor" in call.refusal.reason


@pytest.mark.parametrize("name", WRITES)
def test_mask_that_something_writes_to_is_left(name):
    def function(q):
        mask = bias()
        WRITES[name](mask)
        return attend(q, mask)

    _, call = only_call(function, heads())
    assert "may be changed in place" in call.refusal.reason


@pytest.mark.parametrize("name", READS)
def test_mask_that_is_only_read_elsewhere_is_proved(name):
    def function(q):
        i = positions()
        mask = torch.where(at_least(i), 0.0, -math.inf)
        other = READS[name](q, i, mask)
        return attend(q, mask), other

    _, call = only_call(function, heads())
    assert call.refusal is None and call.is_causal is True, call.refusal


# --- subgraphs that several calls share -------------------------------------------------------------------------------


@torch.compiler.nested_compile_region
def shared_attend(q, mask):
    return attend(q, mask)


@torch.compiler.nested_compile_region
def shared_zero(mask):
    return mask.zero_().sum()


def test_shared_subgraph_with_the_same_kind_of_mask_is_proved():
    _, call = only_call(lambda q: shared_attend(q, by_arange(N)) + shared_attend(q, lower(torch.bool)), heads())
    assert call.refusal is None and call.is_causal is True and len(call.region.callers) == 2


def test_shared_subgraph_with_two_kinds_of_masks_is_left():
    _, call = only_call(
        lambda q: shared_attend(q, by_arange(N)) + shared_attend(q, lower(torch.bool).tril(-1)), heads()
    )
    assert "differs between the places" in call.refusal.reason and len(call.region.callers) == 2


def test_write_in_a_shared_subgraph_counts_for_each_of_its_callers():
    """The subgraph was traced with the first mask; the second is written to all the same."""

    def function(q):
        first, second = bias(), bias()
        return attend(q, second) + shared_zero(first) + shared_zero(second)

    _, call = only_call(function, heads())
    assert "may be changed in place, by zero_" in call.refusal.reason


# --- masks that are assumed to be causal, and lie ---------------------------------------------------------------------

ASSUME = LighthouseConfig(**FIELDS, assume_causal=True)
M = 64  # tokens


def additive(dtype, hidden=None):
    """The causal mask as numbers to add: 0, and -inf or what is given."""
    return torch.zeros(M, M, dtype=dtype).masked_fill(~by_arange(M), -math.inf if hidden is None else hidden)


def with_value(mask, *at, value):
    mask = mask.clone()
    mask[at] = value
    return mask


def repeated(mask):
    return mask.repeat(2, 3, 1, 1)  # [B, H, N, N]


TRUE = {
    "bool": lambda: by_arange(M),
    "-inf": lambda: additive(torch.float32),
    "lowest": lambda: additive(torch.float32, torch.finfo(torch.float32).min),
    "lowest of float16": lambda: additive(torch.float16, torch.finfo(torch.float16).min),
    "lowest of bfloat16": lambda: additive(torch.bfloat16, torch.finfo(torch.bfloat16).min),
    "-inf and lowest": lambda: with_value(additive(torch.float32), 0, 1, value=torch.finfo(torch.float32).min),
    "minus zero": lambda: with_value(additive(torch.float32), 3, 3, value=-0.0),
    "transposed": lambda: torch.ones(M, M).triu().bool().T,
    "every other row and column": lambda: by_arange(2 * M)[::2, ::2],
    "repeated": lambda: repeated(by_arange(M)),
    "expanded": lambda: by_arange(M).expand(2, 3, M, M),
}
LIES = {
    "the last token hides the first": lambda: with_value(by_arange(M), M - 1, 0, value=False),
    "the first token sees the last": lambda: with_value(by_arange(M), 0, M - 1, value=True),
    "below the diagonal": lambda: torch.eye(M, dtype=torch.bool),
    "above the diagonal": lambda: torch.ones(M, M, dtype=torch.bool),
    "without the diagonal": lambda: by_arange(M) & ~torch.eye(M, dtype=torch.bool),
    "one above the diagonal": lambda: torch.ones(M, M, dtype=torch.bool).tril(1),
    "nothing is seen": lambda: torch.zeros(M, M, dtype=torch.bool),
    "one row hidden": lambda: with_value(by_arange(M), 17, value=False),
    "one batch row": lambda: with_value(repeated(by_arange(M)), 1, 2, M - 1, M - 1, value=False),
    "one head": lambda: with_value(repeated(by_arange(M)), slice(None), 1, 0, 1, value=True),
    "a head of a mask without batch": lambda: with_value(by_arange(M).repeat(3, 1, 1), 2, 5, 6, value=True),
    "padding on the left": lambda: by_arange(M) & (torch.arange(M) > 2),
    "padding on the right": lambda: by_arange(M) & (torch.arange(M) < M - 1),
    "sliding window": lambda: by_arange(M) & ~torch.ones(M, M, dtype=torch.bool).tril(-40),
    "documents": lambda: by_arange(M) & (torch.arange(M)[:, None] // 32 == torch.arange(M) // 32),
    "NaN where it hides": lambda: with_value(additive(torch.float32), 0, 1, value=math.nan),
    "NaN where it shows": lambda: with_value(additive(torch.float32), 1, 0, value=math.nan),
    "+inf where it hides": lambda: with_value(additive(torch.float32), 0, 1, value=math.inf),
    "a bias": lambda: with_value(additive(torch.float32), M - 1, 0, value=1e-30),
    "a negative bias": lambda: with_value(additive(torch.float32), M - 1, 0, value=-1.0),
    "nearly hidden": lambda: additive(torch.float32, -1e9),
    "nearly hidden in float16": lambda: additive(torch.float16, -65472.0),
    "float16's lowest in a wider mask": lambda: additive(torch.float32, torch.finfo(torch.float16).min),
    "ones and zeros, not added": lambda: by_arange(M).float(),
    "hides where it should show": lambda: additive(torch.float16).T,
}  # fmt: skip


def small_heads(dtype=torch.float32):
    return torch.randn(2, 3, M, 4, dtype=dtype, requires_grad=True)


def assumed(mask):
    run = torch.compile(attend, backend=passes_only, options=FIELDS | {"assume_causal": True}, fullgraph=True)
    return run, small_heads(torch.float32 if mask.dtype == torch.bool else mask.dtype)


@pytest.mark.parametrize("name", TRUE)
def test_assumed_mask_that_is_causal_passes(name):
    mask = TRUE[name]()
    run, q = assumed(mask)
    oracle = lighthouse_attention(q, q, q, is_causal=True, config=ASSUME)
    torch.testing.assert_close(run(q, mask), oracle, rtol=0, atol=0)


@pytest.mark.parametrize("name", LIES)
def test_large_mask_is_looked_at_in_parts(name, monkeypatch):
    mask = LIES[name]()
    monkeypatch.setattr(masks, "_LOOKED_AT", 3 * mask.numel() // M)  # three rows at a time
    with pytest.raises(ValueError, match=r"^the attn_mask of layer 3 is not the causal mask: for query"):
        torch.ops.lighthouse_fx.check_causal(mask, "layer 3", "")
    assert torch.ops.lighthouse_fx.check_causal(by_arange(M), "layer 3", "").item() == 0


@pytest.mark.parametrize("name", LIES)
def test_assumed_mask_that_lies_raises(name):
    mask = LIES[name]()
    run, q = assumed(mask)
    with pytest.raises(ValueError, match="is not the causal mask: for query"):
        run(q, mask)


@pytest.mark.slow
def test_assumed_mask_is_checked_at_each_call_when_it_is_written_to_in_between():
    def function(q, mask):
        first = attend(q, mask)
        mask[2, 9] = True
        return first + attend(q, mask)

    for backend in (passes_only, "lighthouse"):
        run = torch.compile(function, backend=backend, options=FIELDS | {"assume_causal": True}, fullgraph=True)
        with pytest.raises(Exception, match="for query 2 and key 9 it shows it"):
            run(small_heads(), by_arange(M))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [passes_only, "lighthouse"])
def test_assumed_mask_that_is_written_to_after_its_use_passes(backend):
    def function(q, mask):
        out = attend(q, mask)
        mask.zero_()
        return out

    run, q = torch.compile(function, backend=backend, options=FIELDS | {"assume_causal": True}), small_heads()
    oracle = lighthouse_attention(q, q, q, is_causal=True, config=ASSUME)
    torch.testing.assert_close(run(q, by_arange(M)), oracle)


@pytest.mark.slow
def test_lie_is_found_where_little_of_the_output_is_used():

    def function(q, mask):
        return attend(q, mask)[:, :, :1]

    run = torch.compile(function, backend="lighthouse", options=FIELDS | {"assume_causal": True}, fullgraph=True)
    with pytest.raises(Exception, match="for query 60 and key 63 it shows it"):
        run(small_heads(), with_value(by_arange(M), 60, 63, value=True))


# --- a compilation never fails because of a mask ----------------------------------------------------------------------


def raises(*args):
    raise ZeroDivisionError


def fail_in_proof(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "tril", (raises, ("input", "diagonal")))


def fail_to_find_writes(monkeypatch):
    monkeypatch.setattr(aliasing, "_may_write_to", raises)


@pytest.mark.parametrize("fail", [fail_in_proof, fail_to_find_writes])
def test_failure_in_the_proof_is_a_refusal(fail, monkeypatch, caplog):
    fail(monkeypatch)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    _, call = only_call(lambda q: attend(q, lower(torch.bool)), heads())
    assert "internal error in the proof of its mask, ZeroDivisionError" in call.refusal.reason
    assert "ZeroDivisionError" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("fail", [fail_in_proof, fail_to_find_writes])
def test_failure_in_the_proof_is_raised_in_tests(fail, monkeypatch):
    fail(monkeypatch)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        only_call(lambda q: attend(q, lower(torch.bool)), heads())


@pytest.mark.parametrize(
    "build",
    [
        lambda: bias().to(torch.int64) == 0,
        lambda: torch.tensor([True] * N).expand(N, N).tril(),
        lambda: lower(torch.bool).unbind(0)[0].expand(N, N),
        lambda: lower(torch.complex64) == 1,
        lambda: lower(torch.bool)[[*range(N)]],
    ],
)
def test_odd_mask_is_a_refusal_and_no_crash(build):
    _, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is not None


# --- masks at random --------------------------------------------------------------------------------------------------

DTYPES = [torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]
NUMBERS = [0, 1, -1, 2, 0.5, 127, 2**24, 1e-9, math.inf, -math.inf, N]
STARTS = st.one_of(
    st.sampled_from(DTYPES).map(lambda dtype: lambda: torch.ones(N, N, dtype=dtype).tril()),
    st.sampled_from(DTYPES[1:]).map(lambda dtype: lambda: torch.arange(N, dtype=dtype)[:, None] - torch.arange(N)),
    st.sampled_from(DTYPES).map(
        lambda dtype: lambda: torch.ones(N, dtype=dtype).cumsum(0, dtype=dtype)[:, None] - positions()
    ),
    st.sampled_from(NUMBERS).map(lambda number: lambda: square(number).triu(1)),
)


def lower_in_place(x, diagonal, part):
    """Statements on a copy, of which a view taken before, the copy itself or what the statement returns goes on."""
    copy = x.clone()
    view = copy.view(N, N) if copy.is_contiguous() else copy
    after = copy.tril_(diagonal)
    return (view, copy, after)[part]


def assign_in_place(x, part):
    copy = x.clone()
    before = copy == 0
    copy[by_arange(N)] = 1
    return (before, copy, copy.clone() + before)[part]


UNARY = st.one_of(
    st.tuples(st.integers(-1, 1), st.integers(0, 2)).map(lambda both: lambda x: lower_in_place(x, *both)),
    st.integers(0, 2).map(lambda part: lambda x: assign_in_place(x, part)),
    st.sampled_from(DTYPES).map(lambda dtype: lambda x: x.to(dtype)),
    st.integers(-1, 1).map(lambda diagonal: lambda x: x.tril(diagonal)),
    st.tuples(
        st.sampled_from([torch.add, torch.mul, torch.ge, torch.eq, torch.lt, torch.logical_xor]),
        st.sampled_from(NUMBERS),
    ).map(lambda both: lambda x: both[0](x, torch.tensor(both[1]))),
    st.just(torch.bitwise_not),
)
BINARY = st.sampled_from(
    [
        torch.add,
        torch.sub,
        torch.mul,
        torch.ge,
        torch.ne,
        torch.logical_and,
        torch.bitwise_or,
        lambda a, b: a.where(b == 0, 0),
    ]
)
PROGRAMS = st.recursive(
    STARTS,
    lambda inner: st.one_of(
        st.tuples(UNARY, inner).map(lambda step: lambda: step[0](step[1]())),
        st.tuples(BINARY, inner, inner).map(lambda step: lambda: step[0](step[1](), step[2]())),
    ),
    max_leaves=3,
)
ENDS = st.sampled_from([lambda x: x.bool(), lambda x: x >= 0, lambda x: x == 0, lambda x: x.float()])


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(program=PROGRAMS, end=ENDS)
def test_verdict_is_true_of_any_mask(program, end):
    try:
        mask = end(program())
    except (RuntimeError, NotImplementedError):  # PyTorch has no such operation for the dtype
        return
    torch._dynamo.reset()
    _, call = only_call(lambda q: attend(q, end(program())), heads())
    if call.refusal is None:
        assert torch.equal(lets_through(mask), by_arange(N) if call.is_causal else torch.ones(N, N, dtype=torch.bool))
        assert mask.dtype == torch.bool or not ((mask != 0) & ~(mask <= torch.finfo(mask.dtype).min)).any()
    else:
        assert "not understood" not in call.refusal.reason
