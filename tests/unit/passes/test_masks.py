"""Masks that are provably only causal count as causal and leave the graph; every other mask is left alone."""

import operator

import pytest
import torch
from graphs import H, N, assert_refused, attend, by_arange, heads, only_call, targets, traced
from small_models import CONFIG
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx.passes import CALLS, run_passes


def in_place(*steps, start=lambda: torch.full((N, N), float("-inf"))):
    """A mask on which statements work in place, so that the attention reads it by its first name."""

    def build():
        mask = start()
        for step in steps:
            step(mask)
        return mask

    return build


def assign(mask, condition, value):
    mask[condition] = value


def times_later(mask):
    mask *= torch.arange(N) > torch.arange(N).reshape(-1, 1)
    return mask


def after_an_empty_cache():
    """As in Llama's first code."""
    return torch.hstack([torch.zeros((N, 0)), torch.full((N, N), float("-inf")).triu(1)])


# Written by statements. After each, the same memory holds something else.
IN_PLACE = {
    "fill, then triangle": in_place(
        lambda mask: mask.fill_(float("-inf")), lambda mask: mask.triu_(1), start=lambda: torch.empty(N, N)
    ),
    "zero below": in_place(lambda mask: mask.masked_fill_(by_arange(), 0)),
    "BART": in_place(lambda mask: mask.masked_fill_(torch.arange(N) < (torch.arange(N) + 1).view(mask.size(-1), 1), 0)),
    "assigned": in_place(lambda mask: assign(mask, ~by_arange(), float("-inf")), start=lambda: torch.zeros(N, N)),
    "assigned twice": in_place(
        lambda mask: assign(mask, by_arange(), 5.0), lambda mask: assign(mask, mask == 5, 0.0)
    ),
    "overwritten": in_place(
        lambda mask: mask.copy_(by_arange()), start=lambda: torch.ones(N, N, dtype=torch.bool)
    ),
    "triangle, and again where it is not 0": in_place(
        lambda mask: mask.masked_fill_(mask.bool(), float("-inf")), start=lambda: torch.ones(N, N).triu(1)
    ),
    "times a comparison": lambda: times_later(torch.full((N, N), torch.finfo(torch.float32).min)),
    "triangle times a comparison": lambda: times_later(torch.full((N, N), torch.finfo(torch.float32).min).triu(1))[None, None],
    "or in place": lambda: operator.ior(torch.arange(N)[:, None] > torch.arange(N), torch.ones(N, N).tril().bool()),
    "view after the writes": lambda: in_place(lambda mask: mask.triu_(1))()[None, None].expand(2, 1, -1, -1),
}

CAUSAL = IN_PLACE | {
    "tril of ones": lambda: torch.tril(torch.ones(N, N, dtype=torch.bool)),
    "ones.tril().bool()": lambda: torch.ones(N, N).tril().bool(),
    "triu inverted": lambda: ~torch.ones(N, N, dtype=torch.bool).triu(1),
    "arange comparison": by_arange,
    "broadcast arange": lambda: torch.arange(N).view(1, 1, N, 1) >= torch.arange(N).view(1, 1, 1, N),
    "strict comparison": lambda: torch.arange(N) < (torch.arange(N) + 1).unsqueeze(1),
    "scaled comparison": lambda: (torch.arange(N) * 2).unsqueeze(1) >= torch.arange(N) * 2,
    "equal or later": lambda: (torch.arange(N)[:, None] > torch.arange(N)) | (torch.arange(N)[:, None] == torch.arange(N)),
    "additive": lambda: torch.full((N, N), float("-inf")).triu(1),
    "additive in place": lambda: torch.full((N, N), float("-inf")).triu_(1),
    "lowest": lambda: torch.zeros(N, N).masked_fill(~by_arange(), torch.finfo(torch.float32).min),
    "where": lambda: torch.where(by_arange(), 0.0, float("-inf")),
    "one minus, times lowest": lambda: (1.0 - by_arange().float()) * torch.finfo(torch.float32).min,
    "expanded": lambda: by_arange()[None, None].expand(2, H, N, N),
    "window wider than the sequence": lambda: by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < N),
    "slice of a longer one": lambda: by_arange(2 * N)[None, None, :N, :N],
    "later rows and columns": lambda: by_arange(2 * N)[N:, N:],
    "by index tensors": lambda: by_arange()[torch.arange(N)[:, None], torch.arange(N)[None, :]],
}

FULL = {
    "ones": lambda: torch.ones(N, N, dtype=torch.bool),
    "positions from 0 on, as transformers 5.17 writes it": lambda: ((torch.arange(N) + 0)[:, None] >= 0).expand(2, 1, N, N),
    "keys not below 0": lambda: ~(torch.arange(N) < 0).expand(N, N),
    "0 is no position more": lambda: torch.less(0 * torch.arange(N), torch.arange(N) + 1).expand(N, N),
    "the sum of both": lambda: torch.arange(N)[:, None] + 2 * torch.arange(N) != -1,
}

OTHER = {
    "first row sees nothing": lambda: (torch.arange(N)[:, None] >= 1).expand(N, N),
    "first row sees nothing, counted from -1": lambda: (torch.arange(-1, N - 1)[:, None] >= 0).expand(N, N),
    "last key hidden": lambda: (torch.arange(N) < N - 1).expand(N, N),
    "last key hidden, counted down": lambda: (N - 2 - torch.arange(N) >= 0).expand(N, N),
    "wraps around": lambda: (torch.arange(N, dtype=torch.int32) + (2**31 - 2) >= 0).expand(N, N),
    "all hidden": lambda: (torch.arange(N) < 0).expand(N, N),
    "strictly causal": lambda: torch.ones(N, N, dtype=torch.bool).tril(-1),
    "one ahead": lambda: torch.ones(N, N, dtype=torch.bool).tril(1),
    "anti-causal": lambda: torch.ones(N, N, dtype=torch.bool).triu(),
    "sliding window": lambda: by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < N - 1),
    "every other key": lambda: by_arange() & (torch.arange(N) * 2 > 3),
    "bias": lambda: -0.5 * (torch.arange(N)[:, None] - torch.arange(N)).float(),
    "soft mask": lambda: torch.where(by_arange(), 0.0, -5.0),
    "random": lambda: by_arange() & (torch.rand(N, N) > 0.1),
    "first row and column": lambda: torch.arange(N)[:, None] >= torch.arange(N).flip(0),
    "nothing": lambda: by_arange(2 * N)[:N, N:],
    "places in a square": lambda: torch.arange(N * N).unflatten(0, (N, N)) <= torch.arange(N)[:, None],
    "every other place in a square": lambda: (
        torch.arange(N * N).unflatten(0, (N // 2, 2, N)).flatten(0, 1) % N <= torch.arange(N)[:, None] // 2 * 2
    ),
    "reversed index": lambda: by_arange()[torch.arange(N)[:, None], (N - 1 - torch.arange(N))[None, :]],
    "negative index": lambda: by_arange()[(torch.arange(N) - 1)[:, None], torch.arange(N)[None, :]],
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_mask_is_proved_and_disappears(name):
    build = CAUSAL[name]
    reference = build()
    assert torch.equal(reference == (True if reference.dtype == torch.bool else 0), by_arange().expand_as(reference))
    gm, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is None, call.refusal
    assert call.is_causal is True
    assert len([node for node in gm.graph.nodes if node.op == "placeholder"]) == 1
    left = [t for t in targets(gm) if "lighthouse" not in str(t) and "getitem" not in str(t)]
    assert left == [torch.ops.aten.scaled_dot_product_attention.default]  # nothing of the mask is left
    assert not [node for node in gm.graph.nodes if node.op == "call_method"]


@pytest.mark.parametrize("name", ["equal or later", "assigned twice", "arange comparison"])
def test_comparisons_as_older_torch_traces_them(name):
    """torch 2.11 writes `x == y` as a call of the method `__eq__`."""
    names = {operator.eq: "__eq__", operator.ge: "__ge__", operator.gt: "__gt__"}
    changed, build = [], CAUSAL[name]

    def backend(gm, example_inputs):
        for node in gm.graph.nodes:
            if node.target in names:
                node.op, node.target = "call_method", names[node.target]
                changed.append(node)
        gm.recompile()
        (call,) = run_passes(gm, example_inputs, config=CONFIG).meta[CALLS]
        assert call.refusal is None, call.refusal
        return gm

    torch.compile(lambda q: attend(q, build()), backend=backend)(heads())
    assert changed


@pytest.mark.parametrize("name", OTHER)
def test_other_mask_is_left(name):
    build = OTHER[name]
    gm, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is not None
    assert "lighthouse" not in str(targets(gm))


@pytest.mark.parametrize("name", FULL)
def test_full_mask_is_no_mask(name):
    build = FULL[name]
    assert build().all()
    gm, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is None and call.is_causal is False
    assert "arange" not in str(targets(gm))


def test_sliding_window_is_named():
    window = 5
    refusal = assert_refused(
        lambda q: attend(q, by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < window)), heads(), because="sliding"
    )
    assert f"last {window}" in refusal.reason


def test_window_is_judged_at_the_real_length_not_at_a_sample():
    """A window of 32 looks causal in any sample of up to 32 tokens."""
    assert_refused(
        lambda q: attend(q, by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < 32)), heads(), because="last 32"
    )


def test_mask_from_an_input_is_left_even_if_it_is_causal_today():
    refusal = assert_refused(attend, heads(), by_arange(), because="depends on the input")
    assert "attention_mask" in refusal.remedy


def test_mask_with_a_padding_term_is_left():
    padding = torch.ones(2, 1, 1, N, dtype=torch.bool)
    assert_refused(lambda q, p: attend(q, by_arange() & p), heads(), padding, because="depends on the input")


def test_mask_from_a_buffer_is_left():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", by_arange())

        def forward(self, q):
            return attend(q, self.bias)

    assert_refused(Model(), heads(), because="depends on the input")


def test_mask_written_to_in_place_is_left():
    def function(q):
        mask = by_arange()
        mask[3, 1] = False
        return attend(q, mask)

    assert_refused(function, heads(), because="changed in place")


def test_mask_written_to_through_a_view_is_left():
    def function(q):
        mask = torch.zeros(N, N).masked_fill(~by_arange(), float("-inf"))
        mask[2].fill_(0.0)
        return attend(q, mask)

    assert_refused(function, heads(), because="changed in place")


def test_mask_written_to_between_two_calls_is_read_as_it_was_then():
    def function(q):
        mask = torch.zeros(N, N, dtype=torch.bool)
        first = attend(q, mask.fill_(True))
        mask.tril_()
        return first, attend(q, mask)

    (gm,) = traced(function, heads())
    first, second = gm.meta[CALLS]
    assert "changed in place" in first.refusal.reason  # by what comes later
    assert second.refusal is None and second.is_causal is True


def test_writes_to_a_mask_stay_while_something_else_reads_it():
    def function(q):
        mask = in_place(lambda mask: mask.triu_(1))()
        return attend(q, mask), mask

    gm, call = only_call(function, q := heads())
    assert call.refusal is None and call.is_causal is True
    assert "triu_" in [node.target for node in gm.graph.nodes]
    _, mask = gm(q)
    assert torch.equal(mask == 0, by_arange())


def test_mask_used_elsewhere_stays_for_that():
    def function(q):
        mask = by_arange()
        return attend(q, mask) + mask.sum()

    gm, call = only_call(function, heads())
    assert call.refusal is None
    assert "sum" in [node.target for node in gm.graph.nodes]
    found = gm(q := heads())[0]
    torch.testing.assert_close(
        found, lighthouse_fx.lighthouse_attention(q, q, q, is_causal=True, config=CONFIG) + by_arange().sum()
    )


def test_mask_made_outside_a_checkpoint_is_followed_into_it_and_dropped():
    def function(q):
        mask = by_arange()
        return checkpoint(attend, q, mask, use_reentrant=False)

    gm, call = only_call(function, heads())
    assert call.refusal is None and call.is_causal is True
    (wrapped,) = [node for node in gm.graph.nodes if "checkpoint" in str(node.target)]
    assert len(wrapped.args) == 2  # the subgraph and q
    assert "arange" not in str(targets(gm))


def test_dynamic_length():
    def function(q):
        positions = torch.arange(q.shape[2])
        return attend(q, positions[:, None] >= positions)

    q = heads()
    torch._dynamo.mark_dynamic(q, 2)
    _, call = only_call(function, q)
    assert call.refusal is None and call.is_causal is True
