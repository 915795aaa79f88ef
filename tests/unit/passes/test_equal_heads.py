"""Key/value heads that are equal in groups, however they came to be: undone where that is proved, and only there."""

import pytest
import torch
import torch.nn.functional as F
from graphs import B, D, G, H, N, gathered_heads, heads, only_call, with_gradients
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx

R = H // G
COS, SIN = torch.rand(1, 1, N, D), torch.rand(1, 1, N, D)


def wide(x):
    return x[:, :, None].expand(B, G, R, N, D).reshape(B, H, N, D)


def rotated(x):
    turned = torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1)
    return x * COS.to(x.dtype) + turned * SIN.to(x.dtype)


def as_falcon(x):
    """[B, N, G, R, D], flattened with tokens before heads, and only then rotated."""
    x = x.transpose(1, 2).unsqueeze(3)
    x = torch.broadcast_to(x, (B, N, G, R, D)).flatten(2, 3)
    return rotated(x.transpose(1, 2).reshape(B, H, N, D))


EQUAL = {  # heads that are repeated -> the same without repeating them
    "Falcon": (as_falcon, rotated),
    "rotated": (lambda x: rotated(x.repeat_interleave(R, 1)), rotated),
    "part of the tokens": (lambda x: wide(torch.cat([x, x], 2)[:, :, :N]) * 1.0, lambda x: x),
    "one factor for each group": (
        lambda x: wide(x) * torch.arange(1, G + 1).repeat_interleave(R, 0)[:, None, None].to(x.dtype),
        lambda x: x * torch.arange(1, G + 1)[:, None, None].to(x.dtype),
    ),
    "normed": (lambda x: F.layer_norm(wide(x), (D,)), lambda x: F.layer_norm(x, (D,))),
    "what was repeated is written to": (lambda x: (y := x * 1, y.repeat_interleave(R, dim=1), y.mul_(2))[1], lambda x: x),
    "a negative dimension": (lambda x: x.repeat_interleave(R, -3).square(), lambda x: x.square()),
}


def qkv():
    return [heads(count, dtype=torch.float64) for count in (H, G, G)]


@pytest.mark.parametrize("spelling", EQUAL)
def test_equal_heads_become_one(spelling):
    repeat, alone = EQUAL[spelling]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), wide(v) * 1.5, is_causal=True)

    def oracle(q, k, v):
        raw = {"score_key": k} if spelling == "normed" else {}
        return lighthouse_fx.lighthouse_attention(
            q, alone(k), v * 1.5, is_causal=True, enable_gqa=True, config=CONFIG, **raw
        )

    gm, call = only_call(attention, *qkv())
    assert call.refusal is None and gathered_heads(gm) == [H, G, G]
    tensors = qkv()
    found = with_gradients(torch.compile(attention, backend=passes_only, options=FIELDS), tensors)
    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-10, atol=1e-12)


def test_one_run_divides_the_other():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1) * 2, v.expand(B, H, N, D) * 2, is_causal=True)

    def oracle(q, k, v):
        v = v.expand(B, G, N, D)
        return lighthouse_fx.lighthouse_attention(q, k * 2, v * 2, is_causal=True, enable_gqa=True, config=CONFIG)

    tensors = [heads(count, dtype=torch.float64) for count in (H, G, 1)]
    gm, _ = only_call(attention, *tensors)
    assert gathered_heads(gm) == [H, G, G]
    found = with_gradients(torch.compile(attention, backend=passes_only, options=FIELDS), tensors)
    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-10, atol=1e-12)


def one_head_written_to(x):
    x = wide(x) * 1.0
    x[:, 1] = x[:, 1] * 2
    return x * 1.0


def written_through_a_view(x):
    x = wide(x) * 1.0
    y = x * 1.0
    y.view(B * H, N, D)[1].mul_(2)
    return y


UNEQUAL = {
    "a factor for each head": lambda x: wide(x) * torch.arange(1, H + 1, dtype=x.dtype)[:, None, None],
    "a sum over heads": lambda x: wide(x) + wide(x).cumsum(1),
    "rolled heads": lambda x: wide(x).roll(1, 1) * 1.0,
    "whole blocks": lambda x: x[:, None].expand(B, R, G, N, D).flatten(1, 2) * 1.0,
    "one after the other": lambda x: torch.cat([x, x], 1) * 1.0,
    "dropped out": lambda x: F.dropout(wide(x), 0.5),
    "heads and tokens exchanged": lambda x: wide(x).transpose(1, 2).reshape(B, H, N, D) * 1.0,
    "one head written to": one_head_written_to,
    "written through a view": written_through_a_view,
    "only some heads": lambda x: wide(x)[:, [0, 2, 3, 3]] * 1.0,
    "from the second head on": lambda x: torch.cat([wide(x), wide(x)], 1)[:, 1 : H + 1] * 1.0,
    "normed over heads": lambda x: F.layer_norm(wide(x), (H, N, D), torch.arange(H * N * D, dtype=x.dtype).view(H, N, D)),
}


@pytest.mark.parametrize("spelling", UNEQUAL)
@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_only_looks_like_it_is_left(spelling, which):
    other = UNEQUAL[spelling]

    def both(k, v):
        return (other(k), wide(v) * 1.5) if which == "keys" else (wide(k) * 1.5, other(v))

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, *both(k, v), is_causal=True)

    gm, call = only_call(attention, *qkv())
    assert call.refusal is None and gathered_heads(gm) == [H, H, H]
    if spelling == "dropped out":
        return
    tensors = qkv()

    def oracle(q, k, v):
        scorer = {"scorer": call.scorer, "dilation": CONFIG.dilation} if call.scorer != "norm" else {}
        config = lighthouse_fx.LighthouseConfig(**FIELDS, **scorer)
        return lighthouse_fx.lighthouse_attention(q, *both(k, v), is_causal=True, config=config)

    found = with_gradients(torch.compile(attention, backend=passes_only, options=FIELDS), tensors)
    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-10, atol=1e-12)


def test_a_call_that_stays_dense_keeps_the_users_graph():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, as_falcon(k), as_falcon(v), is_causal=True)

    gm, call = only_call(attention, *(x.detach() for x in qkv()))
    assert call.refusal is not None and "::" not in str(gm.graph) and f"slice(None, None, {R})" not in str(gm.graph)
