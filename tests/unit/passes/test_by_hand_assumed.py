"""Attention by hand under `assume_causal` and `documents(...)`: masks from buffers, and what the check in the graph catches."""

import math

import pytest
import torch
import torch.nn.functional as F
from corpus import NEVER, SCALE, hidden, qkv, scores, seen
from graphs import B, H, N, only_call, with_gradients
from small_models import CONFIG, FIELDS, gradients, inputs, passes_only
from torch import nn

import lighthouse_fx
from lighthouse_fx import lighthouse_attention

OPTIONS = FIELDS | {"assume_causal": True}
LOWEST = torch.finfo(torch.float64).min


def bias(low=NEVER):
    return torch.zeros(N, N, dtype=torch.float64).masked_fill(hidden(), low)


def causal(q, k, v):
    return lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, config=CONFIG)


class NanoAttention(nn.Module):
    """nanoGPT's attention without its kernel: the mask is a buffer for the longest sequence."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.c_attn, self.c_proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(2 * N, 2 * N)).view(1, 1, 2 * N, 2 * N))

    def attend(self, q, k, v):
        length = q.size(2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return self.dropout(F.softmax(att, dim=-1)) @ v

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(x.shape[2], dim=2))
        return self.c_proj(self.attend(q, k, v).transpose(1, 2).contiguous().view(x.shape))


def test_a_buffer_as_in_nano_gpt():
    model, x = NanoAttention().double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend=passes_only, options=OPTIONS, fullgraph=True)
    loss, found = gradients(run, x)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.rewritten and call.assumed and call.is_causal
    oracle = NanoAttention().double()
    oracle.load_state_dict(model.state_dict())
    oracle.attend = lambda q, k, v: lighthouse_attention(q, k, v, is_causal=True, config=CONFIG)
    expected_loss, expected = gradients(oracle, x)
    torch.testing.assert_close((loss, found), (expected_loss, expected), rtol=1e-9, atol=1e-12)
    model.bias[0, 0, 9, 5] = 0  # a token that is hidden
    with pytest.raises(ValueError, match=r"query 9 and key 5 .* it hides it"):
        run(x)
    # Without the promise it is dense, and the reason says what would help.
    run = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)
    torch.testing.assert_close(run(x), model(x))
    (call,) = lighthouse_fx.reports()[-1].calls
    assert "not proved to be only causal" in call.reason and "assume_causal=True" in call.remedy


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.sweep
def test_through_inductor():
    model, x = NanoAttention().double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend="lighthouse", options=OPTIONS, fullgraph=True)
    oracle = torch.compile(model, backend=passes_only, options=OPTIONS, fullgraph=True)
    torch.testing.assert_close(gradients(run, x), gradients(oracle, x), rtol=1e-9, atol=1e-12)
    model.bias[0, 0, 9, 11] = 1
    with pytest.raises(Exception, match=r"query 9 and key 11 .* it shows it"):
        run(x)


# A mask that is an input, as each spelling wants it; and one that lies.
SPELLINGS = {
    "added": (lambda q, k, v, m: (scores(q, k) * SCALE + m).softmax(-1) @ v, bias, "adds"),
    "added, lowest": (lambda q, k, v, m: (scores(q, k) * SCALE + m).softmax(-1) @ v, lambda: bias(LOWEST), "adds"),
    "added, with heads": (
        lambda q, k, v, m: (m + scores(q, k) * SCALE).softmax(-1) @ v, lambda: bias().repeat(B, H, 1, 1), "adds"
    ),
    "masked_fill": (lambda q, k, v, m: (scores(q, k) * SCALE).masked_fill(m, NEVER).softmax(-1) @ v, hidden, "it"),
    "masked_fill_": (lambda q, k, v, m: (scores(q, k) * SCALE).masked_fill_(m, LOWEST).softmax(-1) @ v, hidden, "it"),
    "where": (lambda q, k, v, m: torch.where(m, scores(q, k) * SCALE, NEVER).softmax(-1) @ v, seen, "it"),
    "three dimensions": (
        lambda q, k, v, m: (
            (scores(q.flatten(0, 1), k.flatten(0, 1)) * SCALE).masked_fill(m, NEVER).softmax(-1) @ v.flatten(0, 1)
        ).view_as(q),
        lambda: hidden().expand(B * H, N, N),
        "it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_is_checked_as_it_is_applied(name):
    function, mask, flaw = SPELLINGS[name]
    tensors, mask = qkv(), mask().clone()
    run = torch.compile(function, backend=passes_only, options=OPTIONS, fullgraph=True)
    found = with_gradients(lambda *x: run(*x, mask), tensors)
    assert lighthouse_fx.reports()[-1].calls[0].assumed
    torch.testing.assert_close(found, with_gradients(causal, tensors), rtol=1e-9, atol=1e-12)
    for row, key in ((7, 3), (7, 9)):
        lie = mask.clone()
        lie[..., row, key] = (not lie.flatten()[row * N + key]) if lie.dtype == torch.bool else -1.0
        with pytest.raises(ValueError, match=rf"query {row} and key {key}.* {flaw}"):
            run(*tensors, lie)


def test_a_mask_that_is_written_to_after_it_was_applied():
    """The check reads it where the scores do."""

    def function(q, k, v, mask):
        masked = (scores(q, k) * SCALE).masked_fill(mask, NEVER)
        mask.zero_()
        return masked.softmax(-1) @ v

    tensors = qkv()
    run = torch.compile(function, backend=passes_only, options=OPTIONS, fullgraph=True)
    torch.testing.assert_close(run(*tensors, hidden()), causal(*tensors), rtol=1e-9, atol=1e-12)

    def other(q, k, v, mask):
        masked = (scores(q, k) * SCALE).masked_fill(mask, NEVER)
        mask.copy_(hidden())
        return masked.softmax(-1) @ v

    run = torch.compile(other, backend=passes_only, options=OPTIONS, fullgraph=True)
    with pytest.raises(ValueError, match="is not the causal mask"):
        run(*tensors, torch.zeros(N, N, dtype=torch.bool))


def test_a_mask_made_in_the_graph_and_written_to_after_it_was_applied():
    """The proof reads it where the scores do, too: a full mask that later becomes causal is none."""

    def function(q, k, v):
        mask = torch.zeros(N, N, dtype=torch.bool)
        masked = (scores(q, k) * SCALE).masked_fill(mask, NEVER)
        mask.copy_(torch.ones(N, N, dtype=torch.bool).triu(1))
        return masked.softmax(-1) @ v

    _, call = only_call(function, *qkv())
    assert "changed in place, by copy_" in call.refusal.reason


DOUBTFUL = {
    "another number": (
        lambda q, k, v, m: (scores(q, k) * SCALE).masked_fill(m, -1e9).softmax(-1) @ v, hidden, "another number"
    ),
    "a number that is an input": (
        lambda q, k, v, m: (scores(q, k) * SCALE).masked_fill(m[0], m[1]).softmax(-1) @ v,
        lambda: (hidden(), torch.tensor(NEVER, dtype=torch.float64)), "what fills the scores"
    ),
    "booleans are added": (lambda q, k, v, m: (scores(q, k) * SCALE + m).softmax(-1) @ v, seen, "torch.bool is not checked"),
    "narrower than the scores": (
        lambda q, k, v, m: (scores(q, k) * SCALE + m).softmax(-1) @ v,
        lambda: bias().float().clamp(min=torch.finfo(torch.float32).min), "torch.float32 is not checked"
    ),
    "trained": (
        lambda q, k, v, m: (scores(q, k) * SCALE + m).softmax(-1) @ v, lambda: bias().requires_grad_(), "trained"
    ),
    "one row for all": (
        lambda q, k, v, m: (scores(q, k) * SCALE).masked_fill(m, NEVER).softmax(-1) @ v, lambda: hidden()[:1], "has not a row"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_is_never_assumed(name):
    function, mask, because = DOUBTFUL[name]
    tensors, mask = qkv(), mask()
    run = torch.compile(function, backend=passes_only, options=OPTIONS, fullgraph=True)
    torch.testing.assert_close(run(*tensors, mask), function(*tensors, mask), equal_nan=True)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and because in call.reason


# --- documents, and norms ---------------------------------------------------------------------------------------------


def by_hand(q, k, v):
    return (scores(q, k) * SCALE).masked_fill(hidden(), NEVER).softmax(-1) @ v


def test_it_stays_inside_documents():
    tensors, numbers = qkv(), (torch.arange(N) // 24).expand(B, N)
    run = torch.compile(by_hand, backend=passes_only, options=FIELDS, fullgraph=True)
    with lighthouse_fx.documents(numbers):
        found = with_gradients(run, tensors)
    assert lighthouse_fx.reports()[-1].rewritten == 1

    def oracle(q, k, v):
        return lighthouse_attention(q, k, v, is_causal=True, scale=SCALE, documents=numbers, config=CONFIG)

    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-9, atol=1e-12)


def test_normed_queries_and_keys_are_scored_before_their_norms():
    def function(q, k, v):
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        return by_hand(q, k, v)

    _, call = only_call(function, *qkv())
    assert call.refusal is None and call.scored == "query and key before their norms"
    assert call.score_query is not call.query
