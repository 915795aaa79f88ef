"""Masks that are provably only causal count as causal and leave the graph; every other mask is left alone."""

import operator

import pytest
import torch
from corpus import CAUSAL_MASKS, FULL_MASKS, OTHER_MASKS, made_in_place
from graphs import N, assert_refused, attend, by_arange, heads, only_call, targets, traced
from small_models import CONFIG
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx.passes import CALLS, run_passes


@pytest.mark.parametrize("name", CAUSAL_MASKS)
def test_causal_mask_is_proved_and_disappears(name):
    build = CAUSAL_MASKS[name]
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
    changed, build = [], CAUSAL_MASKS[name]

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


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_mask_is_left(name):
    build = OTHER_MASKS[name]
    gm, call = only_call(lambda q: attend(q, build()), heads())
    assert call.refusal is not None
    assert "lighthouse" not in str(targets(gm))


@pytest.mark.parametrize("name", FULL_MASKS)
def test_full_mask_is_no_mask(name):
    build = FULL_MASKS[name]
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
        mask = made_in_place(lambda mask: mask.triu_(1))()
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
