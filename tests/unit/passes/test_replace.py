"""Attention that reads another attention's output: each rewrite must reach what is known of the calls after it."""

import pytest
import torch
import torch.nn.functional as F
from graphs import B, H, N, heads, traced
from small_models import CONFIG, FIELDS, causal, passes_only
from torch import nn

import lighthouse_fx
from lighthouse_fx import lighthouse_attention, verify
from lighthouse_fx.passes import CALLS

CHAINS = {
    "query": lambda attend, q, k, v: attend(attend(q, k, v), k, v),
    "key": lambda attend, q, k, v: attend(q, attend(q, k, v), v),
    "value": lambda attend, q, k, v: attend(q, k, attend(q, k, v)),
    "query, key and value": lambda attend, q, k, v: attend(*(attend(q, k, v),) * 3),
    "of two calls": lambda attend, q, k, v: attend(attend(q, k, v), attend(k, q, v), v),
    "three deep": lambda attend, q, k, v: attend(attend(attend(q, k, v), k, v), k, v),
}


def sparse(q, k, v, **arguments):
    return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=CONFIG, **arguments)


def run(function, *tensors):
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), tensors)]


def compiled(function, **options):
    return torch.compile(function, backend=passes_only, options=FIELDS | options, fullgraph=True)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_attention_on_attention(chain):
    tensors = [heads(dtype=torch.float64) for _ in range(3)]
    found = run(compiled(lambda q, k, v: chain(causal, q, k, v)), *tensors)
    torch.testing.assert_close(found, run(lambda q, k, v: chain(sparse, q, k, v), *tensors))


def test_an_output_as_what_the_scorer_reads():
    """The second query is a norm of the first output, so that output itself is scored."""

    def model(attend, q, k, v, **scored):
        raw = attend(q, k, v)
        return attend(F.rms_norm(raw, (raw.shape[-1],)), k, v, **dict.fromkeys(scored, raw))

    tensors = [heads(dtype=torch.float64) for _ in range(3)]
    (gm,) = traced(lambda q, k, v: model(causal, q, k, v), *tensors)
    assert "query before its norm" in gm.meta[CALLS][1].scored
    found = run(compiled(lambda q, k, v: model(causal, q, k, v)), *tensors)
    torch.testing.assert_close(found, run(lambda q, k, v: model(sparse, q, k, v, score_query=None), *tensors))


def test_an_output_as_the_mask():
    """A mask that nobody could prove is checked as the graph runs: here the first output, dense and kept inside documents."""

    def model(q, k, v, wide):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(q, k, wide))

    q, k, v = heads(grad=False), heads(grad=False), heads()
    wide = heads(size=N, grad=False)
    run = compiled(model, assume_causal=True)
    one = lighthouse_fx.documents(torch.zeros(B, N, dtype=torch.int64))
    with one, pytest.raises(ValueError, match="is not the causal mask"):
        run(q, k, v, wide)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_kept_inside_documents(chain):
    """Calls that stay dense are replaced as well where documents are on."""
    tensors = [heads(dtype=torch.float64) for _ in range(3)]
    numbers = torch.arange(N).div(N // 4, rounding_mode="floor").expand(B, N)
    same = numbers[:, None, :, None] == numbers[:, None, None]
    with lighthouse_fx.dense(), lighthouse_fx.documents(numbers):
        found = run(compiled(lambda q, k, v: chain(causal, q, k, v)), *tensors)

    def inside(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=same.tril())

    torch.testing.assert_close(found, run(lambda q, k, v: chain(inside, q, k, v), *tensors))


@pytest.mark.parametrize("chain", [chain for name, chain in CHAINS.items() if "and" not in name])
def test_verify_follows_the_chain(chain):
    """Its two sides replace calls in ways of their own."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(H * 8, 3 * H * 8)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (H, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
            return chain(causal, q, k, v)

    assert verify(Chain(), torch.randn(B, N, H * 8), config=CONFIG).passed
