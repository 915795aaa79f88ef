"""Attention that is written out: what counts as attention, what it is rewritten into, and what must be left alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from corpus import NEVER, SCALE, UNFUSED, bias, hidden, qkv, scores, seen
from graphs import B, D, G, H, N, only_call, traced, with_gradients
from small_models import CONFIG, FIELDS, Model, assert_same_gradients, functional, inputs, passes_only, twin
from torch import nn

import lighthouse_fx
from lighthouse_fx.passes import CALLS, run_passes
from lighthouse_fx.passes.attention_call import fake
from lighthouse_fx.passes.match.sdpa import is_attention

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def assert_becomes(function, oracle, tensors, tolerance=TIGHT):
    """Same numbers and gradients as the oracle, and nothing of size N x N left; gives back the call."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(run_passes(gm, example_inputs, config=CONFIG))
        return gm

    found = with_gradients(torch.compile(function, backend=backend, fullgraph=True), tensors)
    (call,) = graphs[0].meta[CALLS]
    assert call.refusal is None, call.refusal
    square = [node.name for node in graphs[0].graph.nodes if (x := fake(node)) is not None and x.shape[-2:] == (N, N)]
    assert not square
    torch.testing.assert_close(found, with_gradients(oracle, tensors), **tolerance)
    return call


@pytest.mark.parametrize("spelling", UNFUSED)
def test_every_spelling_is_the_functional_form(spelling):
    turned = spelling == "turned around"

    def oracle(q, k, v):
        out = lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, config=CONFIG)
        return out.transpose(1, 2) if turned else out

    tensors = qkv()
    dense = F.scaled_dot_product_attention(*tensors, is_causal=True, scale=SCALE)
    written_out = UNFUSED[spelling](*tensors)
    torch.testing.assert_close(written_out.transpose(1, 2) if turned else written_out, dense, **TIGHT)
    call = assert_becomes(UNFUSED[spelling], oracle, tensors)
    assert call.is_causal


def test_einsum_in_which_the_second_factor_asks():
    def function(q, k, v):
        return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhji", q, k).softmax(-1), v)

    assert_becomes(function, lambda q, k, v: lighthouse_fx.lighthouse_attention(k, q, v, scale=1.0, config=CONFIG), qkv())


def test_without_a_mask():
    def function(q, k, v):
        return (scores(q, k) / math.sqrt(D)).softmax(-1) @ v

    call = assert_becomes(function, lambda *x: lighthouse_fx.lighthouse_attention(*x, config=CONFIG), qkv())
    assert not call.is_causal


def test_softmax_in_float32():
    def function(q, k, v):
        return F.softmax(scores(q, k) * SCALE + bias(q.dtype), dim=-1, dtype=torch.float32).to(q.dtype) @ v

    def oracle(q, k, v):
        return lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, config=CONFIG)

    assert_becomes(function, oracle, qkv(dtype=torch.bfloat16), {"rtol": 2e-2, "atol": 4e-2})


def test_repeated_heads_are_undone():
    def function(q, k, v):
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        return (scores(q, k) * SCALE + bias()).softmax(-1) @ v

    def oracle(q, k, v):
        return lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True, config=CONFIG)

    assert fake(assert_becomes(function, oracle, qkv(G)).key).shape == (B, G, N, D)


def test_one_head_of_keys_for_all():
    def oracle(q, k, v):
        return lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True, config=CONFIG)

    assert_becomes(UNFUSED["added"], oracle, qkv(1))


def test_dropout_carries_over():
    module = nn.Dropout(0.25)
    gm, call = only_call(lambda q, k, v: module((scores(q, k) * SCALE + bias()).softmax(-1)) @ v, *qkv())
    assert call.refusal is None and call.dropout_p == 0.25
    (inner,) = filter(is_attention, gm.graph.nodes)
    assert inner.args[4] == 0.25  # dropout_p
    _, call = only_call(lambda q, k, v: module.eval()((scores(q, k) * SCALE + bias()).softmax(-1)) @ v, *qkv())
    assert call.dropout_p == 0.0


def grouped(q, k, v):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (scores(q, k) / math.sqrt(D)).masked_fill(hidden(), NEVER).softmax(-1) @ v


@pytest.mark.parametrize("checkpointing", [None, "inside"])
def test_a_model(checkpointing):
    model = Model(attend=grouped, checkpointing=checkpointing).double()
    compiled = torch.compile(model, backend=passes_only, options=FIELDS)
    assert_same_gradients(compiled, twin(model, functional()), inputs(dtype=torch.float64), **TIGHT)
    assert lighthouse_fx.reports()[-1].rewritten == 2, lighthouse_fx.reports()[-1].summary()


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.slow
def test_a_model_through_inductor():
    model = Model(attend=grouped, checkpointing="inside").double()
    compiled = torch.compile(model, backend="lighthouse", options=FIELDS)
    assert_same_gradients(compiled, twin(model, functional()), inputs(dtype=torch.float64), rtol=1e-8, atol=1e-10)
    with lighthouse_fx.dense():
        x = inputs(dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-8, atol=1e-10)


# --- what must not be rewritten ---------------------------------------------------------------------------------------


def scores_written_to(q, k, v):
    weights = scores(q, k)
    weights.masked_fill_(hidden(), NEVER)  # whose result nobody uses
    return weights.softmax(-1) @ v


def query_written_to(q, k, v):
    q = q + 0
    weights = scores(q, k).softmax(-1)
    q.mul_(2.0)
    return weights @ v + q.mean()


def without_gradient(q, k, v):
    with torch.no_grad():
        weights = scores(q, k).softmax(-1)
    return weights @ v


def sink(q, k, v):
    """As GPT-OSS has it."""
    weights = torch.cat([scores(q, k) + bias(), torch.ones(1, H, 1, 1, dtype=q.dtype).expand(B, -1, N, -1)], -1)
    weights = weights - weights.max(-1, keepdim=True).values
    return F.softmax(weights, -1)[..., :-1] @ v


def weights_returned(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


def weights_used_twice(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.mean()


def mask_from_scores(q, k, v):
    weights = scores(q, k)
    return weights.masked_fill(weights < 0, NEVER).softmax(-1) @ v


def written_into_the_mask(q, k, v):
    mask = bias()[None, None].expand(B, H, N, N).contiguous()
    mask += scores(q, k)
    return mask.softmax(-1) @ v


OTHER = {
    "a boolean mask is added": (lambda q, k, v: (scores(q, k) + seen()).softmax(-1) @ v, "a bias other than 0 and -inf"),
    "a mask upside down": (lambda q, k, v: scores(q, k).masked_fill(seen(), NEVER).softmax(-1) @ v, "neither causal"),
    "one token too many": (
        lambda q, k, v: scores(q, k).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(1), NEVER).softmax(-1) @ v,
        "neither causal",
    ),
    "a window": (
        lambda q, k, v: scores(q, k).masked_fill(hidden() | torch.ones(N, N, dtype=torch.bool).tril(-9), NEVER).softmax(-1) @ v,
        "sliding window",
    ),
    "a number that is not lowest": (
        lambda q, k, v: scores(q, k).masked_fill(hidden(), -1e9).softmax(-1) @ v, "another number than -inf"
    ),
    "another dtype's lowest": (
        lambda q, k, v: (scores(q, k) + bias(low=torch.finfo(torch.float16).min)).softmax(-1) @ v, "a bias other than"
    ),
    "a bias": (
        lambda q, k, v: (scores(q, k) + torch.arange(N, dtype=q.dtype)).softmax(-1) @ v, "not proved to be only causal"
    ),
    "two masks": (lambda q, k, v: (scores(q, k) + bias() + bias()).softmax(-1) @ v, "more than one mask"),
    "masked, then scaled": (lambda q, k, v: ((scores(q, k) + bias()) * SCALE).softmax(-1) @ v, "after they are masked"),
    "soft-capping": (lambda q, k, v: (torch.tanh(scores(q, k) / 5) * 5).softmax(-1) @ v, "hand: soft-capping"),
    "a negative scale": (lambda q, k, v: (scores(q, k) * -1).softmax(-1) @ v, "scale is -1"),
    "a tensor as scale": (lambda q, k, v: (scores(q, k) * q.mean()).softmax(-1) @ v, "computed in the graph"),
    "scores to the power": (lambda q, k, v: (2 / scores(q, k)).softmax(-1) @ v, "divides by the scores"),
    "scores and scores": (lambda q, k, v: (scores(q, k) + scores(k, q)).softmax(-1) @ v, "adds scores to scores"),
    "softmax over queries": (lambda q, k, v: scores(q, k).softmax(-2) @ v, "does not go over the keys"),
    "weights masked": (lambda q, k, v: scores(q, k).softmax(-1).masked_fill(hidden(), 0.0) @ v, "weights are changed"),
    "weights scaled": (lambda q, k, v: (scores(q, k).softmax(-1) * 2) @ v, "weights are changed"),
    "weights detached": (lambda q, k, v: scores(q, k).softmax(-1).detach() @ v, "weights are changed by"),
    "dropped twice": (lambda q, k, v: F.dropout(F.dropout(scores(q, k).softmax(-1), 0.5), 0.5) @ v, "dropped twice"),
    "values of weights": (lambda q, k, v: (w := scores(q, k).softmax(-1)) @ w, "in a way that is not understood"),
    "weights on the right": (lambda q, k, v: v.mT @ scores(q, k).softmax(-1), "in a way that is not understood"),
    "weights returned": (weights_returned, "are returned"),
    "weights used twice": (weights_used_twice, "also used by"),
    "two values": (lambda q, k, v: (w := scores(q, k).softmax(-1)) @ v + w @ k, "also used by"),
    "scores written to": (scores_written_to, "also used by"),
    "a mask of the scores": (mask_from_scores, "also used by"),
    "scores written into the mask": (written_into_the_mask, "another tensor"),
    "query written to": (query_written_to, "changed in place"),
    "no gradient between": (without_gradient, "gradients stop"),
    "a sink": (sink, "attention sinks"),
    "heads that talk": (
        lambda q, k, v: torch.einsum("bhnm,hg->bgnm", scores(q, k), torch.eye(H, dtype=q.dtype)).softmax(-1) @ v,
        "not understood",
    ),
    "exponentials": (lambda q, k, v: scores(q, k).log_softmax(-1).exp() @ v, "not understood"),
    "softmax of one more": (
        lambda q, k, v: F.pad(scores(q, k) + bias(), (1, 0)).softmax(-1)[..., 1:] @ v, "attention sinks"
    ),
    "five dimensions": (
        lambda q, k, v: (scores(q[:, :, None], k[:, :, None]).softmax(-1) @ v[:, :, None])[:, :, 0], "5 and 5 dimensions"
    ),
    "another dtype of values": (
        lambda q, k, v: scores(q.float(), k.float()).softmax(-1).to(v.dtype) @ v, "differ in dtype"
    ),
    "shorter keys": (lambda q, k, v: scores(q, k[:, :, 1:]).softmax(-1) @ v[:, :, 1:], "lengths differ"),
    "batches that broadcast": (lambda q, k, v: scores(q[:1], k).softmax(-1) @ v, "batch sizes differ"),
    "heads that broadcast the other way": (lambda q, k, v: scores(q[:, :1], k).softmax(-1) @ v, "query has 1 heads and key 4"),
    "a mask that makes heads": (
        lambda q, k, v: (scores(q[:, :1], k[:, :1]) + torch.zeros(1, H, N, N, dtype=q.dtype)).softmax(-1) @ v, "changed by"
    ),
}  # fmt: skip



@pytest.mark.parametrize("case", OTHER)
def test_what_is_not_provably_attention_is_listed_and_left(case):
    function, because = OTHER[case]
    tensors, graphs = qkv(), []

    def backend(gm, example_inputs):
        graphs.append(str(gm.graph))
        graphs.append(run_passes(gm, example_inputs, config=CONFIG))
        return gm

    torch.manual_seed(1)
    found = torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    before, gm = graphs
    assert gm.meta[CALLS], "not found"
    assert all(call.refusal is not None for call in gm.meta[CALLS])
    assert any(because in call.refusal.reason for call in gm.meta[CALLS]), [c.refusal for c in gm.meta[CALLS]]
    assert str(gm.graph) == before  # the user's own
    torch.manual_seed(1)
    torch.testing.assert_close(found, function(*tensors), equal_nan=True, **TIGHT)


SCALED = {
    "times": lambda scores, scale: scores * scale,
    "over": lambda scores, scale: scores / (1 / scale),
    "twice": lambda scores, scale: 2.0 * scores * scale / 2.0,
}


@pytest.mark.parametrize("how", SCALED)
def test_layers_whose_scales_differ(how):
    """A module's float becomes an input of the graph as soon as two modules differ in it."""

    class Scaled(nn.Module):
        def __init__(self, scale, by_hand):
            super().__init__()
            self.scale, self.by_hand = scale, by_hand

        def forward(self, q, k, v):
            if not self.by_hand:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return SCALED[how](scores(q, k), self.scale).masked_fill(hidden(), NEVER).softmax(-1) @ v

    tensors = qkv()
    for number in range(1, 4):
        found, expected = (
            torch.compile(Scaled(1 / number, by_hand), backend=passes_only, options=FIELDS)(*tensors)
            for by_hand in (True, False)
        )
        torch.testing.assert_close(found, expected, **TIGHT)
        gradients = (torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected))
        torch.testing.assert_close(*gradients, **TIGHT)
    assert all(call.rewritten for report in lighthouse_fx.reports() for call in report.calls)


@pytest.mark.parametrize("spelling", ["bmm", "einsum, tokens first"])
def test_where_it_stays_dense_the_users_graph_runs(spelling):
    graphs = []

    def untouched(gm, _):
        graphs.append(str(gm.graph))
        return gm

    frozen = [x.detach() for x in qkv()]
    torch.compile(UNFUSED[spelling], backend=untouched)(*frozen)
    torch._dynamo.reset()
    gm, call = only_call(UNFUSED[spelling], *frozen)
    assert "needs no gradient" in call.refusal.reason
    assert str(gm.graph) == graphs[0]


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(2 * N, 2 * N)).view(1, 1, 2 * N, 2 * N))

    def forward(self, q, k, v):
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.bias[:, :, :N, :N] == 0, NEVER)
        return F.softmax(weights, dim=-1) @ v


def test_a_buffer_may_hold_anything():
    _, call = only_call(NanoGPT(), *qkv())
    assert "depends on the input" in call.refusal.reason and "bias" in call.refusal.reason
    assert "buffer" in call.refusal.remedy


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v),  # linear attention
        lambda q, k, v: (q @ k.mT) @ v,
        lambda q, k, v: scores(q, k).softmax(-1).sum(-1),
        lambda q, k, v: F.linear(q, torch.ones(N, D, dtype=q.dtype)).softmax(-1) @ v,  # a router over parameters
    ],
)
def test_what_is_no_attention_is_not_listed(function):
    (gm,) = traced(function, *qkv())
    assert not gm.meta[CALLS]
