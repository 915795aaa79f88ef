"""Self-attention is told from cross-attention by the rows that query and key are projected from, not by the graph's inputs."""

import pytest
import torch
import torch.nn.functional as F
from small_models import FIELDS, HEADS, TOKENS, WIDTH, inputs, passes_only
from torch import nn

import lighthouse_fx

TARGET, SOURCE = slice(0, TOKENS), slice(TOKENS, 2 * TOKENS)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Attention whose queries and keys a function takes from what the model is given; projected by the module's own layers."""

    def __init__(self, take, is_causal=False):
        super().__init__()
        self.take, self.is_causal = take, is_causal
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.both, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, *given):
        q, k = self.take(self, *given)
        return F.scaled_dot_product_attention(heads(q), heads(k), heads(self.value(k)), is_causal=self.is_causal)


def only_call(model, *args):
    """What became of the model's only attention call, and that a dense one computes what the model does."""
    before = len(lighthouse_fx.reports())
    out = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)(*args)
    (report,) = lighthouse_fx.reports()[before:]
    (call,) = report.calls
    if not call.rewritten:
        torch.testing.assert_close(out, model(*args), rtol=0, atol=0)
    return call


def long():
    return torch.randn(2, 2 * TOKENS, WIDTH)


TWO_SEQUENCES = {
    "slices": lambda m, x: (m.query(x[:, TARGET]), m.key(x[:, SOURCE])),
    "chunks": lambda m, x: (m.query(x.chunk(2, 1)[1]), m.key(x.chunk(2, 1)[0])),
    "split": lambda m, x: (m.query(x.split(TOKENS, 1)[1]), m.key(x.split(TOKENS, 1)[0])),
    "narrow": lambda m, x: (m.query(x.narrow(1, TOKENS, TOKENS)), m.key(x.narrow(1, 0, TOKENS))),
    "every other token": lambda m, x: (m.query(x[:, ::2]), m.key(x[:, 1::2])),
    "unbound": lambda m, x: (lambda pair: (m.query(pair[0]), m.key(pair[1])))(x.unflatten(1, (2, TOKENS)).unbind(1)[::-1]),
    "selected": lambda m, x: (m.query(x.unflatten(1, (2, -1))[:, 0]), m.key(x.unflatten(1, (2, -1)).select(1, 1))),
    "after the projection": lambda m, x: (m.query(x)[:, TARGET], m.key(x)[:, SOURCE]),
    "cut behind one projection": lambda m, x: (lambda y: (y[:, TARGET], y[:, SOURCE]))(m.query(x)),
    "gathered": lambda m, x: (m.query(x[:, torch.arange(TOKENS)]), m.key(x[:, torch.arange(TOKENS, 2 * TOKENS)])),
    "normed": lambda m, x: (lambda y: (m.query(y[:, TARGET]), m.key(y[:, SOURCE])))(m.norm(x)),
    "beside each other": lambda m, x: (lambda y: (m.query(y[..., :WIDTH]), m.key(y[..., WIDTH:])))(
        x.unflatten(1, (2, -1)).transpose(1, 2).flatten(2)
    ),
    "positions in common": lambda m, x: (m.query(x[:, TARGET] + x[:, :1]), m.key(x[:, SOURCE] + x[:, :1])),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_SEQUENCES)
def test_two_parts_of_one_tensor_are_two_sequences(name):
    call = only_call(Attention(TWO_SEQUENCES[name]), long())
    assert not call.rewritten and "cross-attention" in call.reason


def test_two_batches_of_one_tensor_are_two_sequences():
    def take(m, x):
        return (m.query(x[:2]), m.key(x[2:]))
    call = only_call(Attention(take), torch.randn(4, TOKENS, WIDTH))
    assert not call.rewritten and "cross-attention" in call.reason


def test_parts_that_were_not_projected_are_two_sequences():
    def take(m, x):
        return (x[:, TARGET], x[:, SOURCE])
    call = only_call(Attention(take), long().requires_grad_())
    assert not call.rewritten and "cross-attention" in call.reason


def test_an_activation_in_common_does_not_hide_another():
    def take(m, x, memory, place):
        return (m.query(x + place), m.key(memory + place))
    call = only_call(Attention(take), inputs(), inputs(), inputs())
    assert not call.rewritten and "cross-attention" in call.reason


ONE_SEQUENCE = {
    "projections": lambda m, x: (m.query(x), m.key(x)),
    "one projection": lambda m, x: m.both(x).chunk(2, -1),
    "the same part": lambda m, x: (m.query(x[:, 1:]), m.key(x[:, 1:])),
    "the same part, behind the projections": lambda m, x: (m.query(x)[:, :-1], m.key(x).narrow(1, 0, x.shape[1] - 1)),
    "a norm of each": lambda m, x: (m.query(m.norm(x)), m.key(F.normalize(x, dim=-1))),
    "products": lambda m, x: (x @ m.query.weight.T, torch.einsum("bnc,dc->bnd", x, m.key.weight)),
    "addmm": lambda m, x: (torch.addmm(m.query.bias, x.flatten(0, 1), m.query.weight).view_as(x), m.key(x)),
    "tokens first": lambda m, x: (m.query(x.transpose(0, 1)).transpose(0, 1), m.key(x)),
    "low rank": lambda m, x: (m.query(x) + m.value(F.dropout(m.key(x), 0.1)), m.key(x)),
    "a norm written out": lambda m, x: (m.query(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), m.key(x)),
    "layers between": lambda m, x: (m.query(F.gelu(m.value(x)) + x), m.key(x)),
    "a convolution": lambda m, x: (F.conv1d(x.mT, m.query.weight[..., None]).mT, m.key(x)),
    "fewer features": lambda m, x: (m.query(x), F.linear(x[..., 4:], m.key.weight[:, 4:])),
    "a copy": lambda m, x: (m.query(x), torch.empty_like(x).copy_(m.key(x))),
}


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_projections_of_one_activation_are_self_attention(name):
    call = only_call(Attention(ONE_SEQUENCE[name]), inputs(tokens=TOKENS + 1))
    assert call.rewritten, call.reason


@pytest.mark.parametrize("shape", [(TOKENS, 1), (2, TOKENS, 1), (2, TOKENS, WIDTH)], ids=["per token", "per row", "full"])
@pytest.mark.parametrize("side", ["query", "key"])
def test_a_factor_of_one_side_is_no_other_sequence(shape, side):
    def take(m, x, factor):
        q, k = m.query(x), m.key(x)
        return (q * factor, k) if side == "query" else (q, k * factor)

    call = only_call(Attention(take), inputs(), torch.rand(shape))
    assert call.rewritten, call.reason


def test_a_factor_in_common_does_not_hide_two_sequences():
    def take(m, x, memory, factor):
        return (m.query(x) * factor, m.key(memory) * factor)
    call = only_call(Attention(take), inputs(), inputs(), torch.rand(2, TOKENS, WIDTH))
    assert not call.rewritten and "cross-attention" in call.reason


def test_one_tensor_under_two_names_is_decided_as_two_tensors():
    model, x = Attention(lambda m, x, memory: (m.query(x), m.key(memory))), inputs()
    assert "cross-attention" in only_call(model, x, inputs()).reason
    torch._dynamo.reset()
    call = only_call(model, x, x)
    assert not call.rewritten and "cross-attention" in call.reason
    assert "L['given'][0] and L['given'][1]" in call.reason and "one argument" in call.remedy


def test_names_of_a_tensor_do_not_matter_behind_what_is_computed_once():
    def take(m, x, residual):
        y = m.norm(x)
        return m.query(y), m.key(y)

    x = inputs()
    assert only_call(Attention(take), x, x).rewritten


def test_keys_of_an_earlier_layer_in_a_causal_model_are_of_the_same_tokens():
    def take(m, x):
        k = m.key(x)
        later = x + F.scaled_dot_product_attention(*[heads(m.value(x))] * 3, is_causal=True).transpose(1, 2).flatten(2)
        return m.query(later), k

    model = Attention(take, is_causal=True)
    report = lighthouse_fx.explain(model, inputs(), config=lighthouse_fx.LighthouseConfig(**FIELDS))
    assert [call.rewritten for call in report.calls] == [True, True], report.summary()


def test_a_query_of_data_and_a_key_of_unknown_origin_are_not_taken_for_one_sequence():
    def take(m, x, k):
        return (m.query(x), k)
    assert "cross-attention" in only_call(Attention(take), inputs(), inputs()).reason
