"""The spellings of attention that the tests of passes and of `verify` share: masks, attention that is written out, outcomes."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from graphs import B, D, H, N, by_arange

NEVER = float("-inf")
SCALE = 0.3


def seen(n=N):
    return torch.ones(n, n, dtype=torch.bool).tril()


def hidden(n=N):
    return ~seen(n)


def scores(q, k):
    return q @ k.transpose(-2, -1)


def bias(dtype=torch.float64, low=NEVER):
    return torch.full((N, N), low, dtype=dtype).triu(1)


def qkv(groups=H, dtype=torch.float64):
    return [torch.randn(B, h, N, D, dtype=dtype, requires_grad=True) for h in (H, groups, groups)]


# --- masks of scaled_dot_product_attention ----------------------------------------------------------------------------


def made_in_place(*steps, start=lambda: torch.full((N, N), float("-inf"))):
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
    "fill, then triangle": made_in_place(
        lambda mask: mask.fill_(float("-inf")), lambda mask: mask.triu_(1), start=lambda: torch.empty(N, N)
    ),
    "zero below": made_in_place(lambda mask: mask.masked_fill_(by_arange(), 0)),
    "BART": made_in_place(lambda mask: mask.masked_fill_(torch.arange(N) < (torch.arange(N) + 1).view(mask.size(-1), 1), 0)),
    "assigned": made_in_place(lambda mask: assign(mask, ~by_arange(), float("-inf")), start=lambda: torch.zeros(N, N)),
    "assigned twice": made_in_place(
        lambda mask: assign(mask, by_arange(), 5.0), lambda mask: assign(mask, mask == 5, 0.0)
    ),
    "overwritten": made_in_place(
        lambda mask: mask.copy_(by_arange()), start=lambda: torch.ones(N, N, dtype=torch.bool)
    ),
    "triangle, and again where it is not 0": made_in_place(
        lambda mask: mask.masked_fill_(mask.bool(), float("-inf")), start=lambda: torch.ones(N, N).triu(1)
    ),
    "times a comparison": lambda: times_later(torch.full((N, N), torch.finfo(torch.float32).min)),
    "triangle times a comparison": lambda: times_later(torch.full((N, N), torch.finfo(torch.float32).min).triu(1))[None, None],
    "or in place": lambda: operator.ior(torch.arange(N)[:, None] > torch.arange(N), torch.ones(N, N).tril().bool()),
    "view after the writes": lambda: made_in_place(lambda mask: mask.triu_(1))()[None, None].expand(2, 1, -1, -1),
}

CAUSAL_MASKS = IN_PLACE | {
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

FULL_MASKS = {  # which hide nothing
    "ones": lambda: torch.ones(N, N, dtype=torch.bool),
    "positions from 0 on, as transformers 5.17 writes it": lambda: ((torch.arange(N) + 0)[:, None] >= 0).expand(2, 1, N, N),
    "keys not below 0": lambda: ~(torch.arange(N) < 0).expand(N, N),
    "0 is no position more": lambda: torch.less(0 * torch.arange(N), torch.arange(N) + 1).expand(N, N),
    "the sum of both": lambda: torch.arange(N)[:, None] + 2 * torch.arange(N) != -1,
}

OTHER_MASKS = {
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


# --- attention that is written out ------------------------------------------------------------------------------------


def in_three_dimensions(q, k, v, scores=lambda q, k: torch.bmm(q, k.transpose(1, 2)) * SCALE):
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    weights = scores(q, k).masked_fill(hidden(), NEVER).softmax(-1)
    return torch.bmm(weights, v).view(B, H, N, D)


def masked_in_four_dimensions(q, k, v):
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    wide = torch.bmm(q * SCALE, k.mT).view(B, H, N, N) + bias(q.dtype)
    return torch.bmm(F.softmax(wide.view(B * H, N, N), dim=-1), v).view(B, H, N, D)


def added_by_baddbmm(q, k, v):
    q, k, v = (x.reshape(B * H, N, D) for x in (q, k, v))
    weights = torch.baddbmm(bias(q.dtype)[None].expand(B * H, N, N), q, k.transpose(1, 2), beta=1, alpha=SCALE).softmax(-1)
    return weights.bmm(v).view(B, H, N, D)


def in_place(q, k, v):
    weights = scores(q, k)
    weights *= SCALE
    weights = weights.masked_fill_(hidden(), NEVER)
    return weights.softmax(-1) @ v


def tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, D]
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE + bias(q.dtype)).softmax(dim=-1)
    return torch.einsum("bhnm, bmhd -> bnhd", weights, v).transpose(1, 2)


UNFUSED = {  # each is causal attention of scale SCALE
    "masked_fill": lambda q, k, v: (scores(q, k) * SCALE).masked_fill(hidden(), NEVER).softmax(-1) @ v,
    "equal to zero": lambda q, k, v: (SCALE * scores(q, k)).masked_fill(torch.ones(N, N).tril() == 0, NEVER).softmax(-1) @ v,
    "lowest": lambda q, k, v: (
        (scores(q, k) / (1 / SCALE)).masked_fill(mask=hidden(), value=torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "where": lambda q, k, v: torch.where(seen(), scores(q, k) * SCALE, NEVER).softmax(-1) @ v,
    "where, the other way": lambda q, k, v: torch.where(hidden(), NEVER, scores(q, k) * SCALE).softmax(-1) @ v,
    "Tensor.where": lambda q, k, v: (scores(q, k) * SCALE).where(seen(), torch.finfo(q.dtype).min).softmax(-1) @ v,
    "where, a tensor": lambda q, k, v: (
        torch.where(seen(), scores(q, k) * SCALE, torch.full((), NEVER, dtype=q.dtype)).softmax(-1) @ v
    ),
    "added": lambda q, k, v: F.softmax(scores(q, k) * SCALE + bias(q.dtype), dim=-1) @ v,
    "added, with heads": lambda q, k, v: F.softmax(bias(q.dtype)[None, None] + scores(q, k) * SCALE, dim=3) @ v,
    "matmul and permute": lambda q, k, v: torch.matmul(
        torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) * SCALE + bias(q.dtype), dim=-1), v
    ),
    "scaled query": lambda q, k, v: torch.softmax((q * SCALE) @ k.mT + bias(q.dtype), -1) @ v,
    "scaled key": lambda q, k, v: torch.softmax(q @ (k / (1 / SCALE)).transpose(2, 3) + bias(q.dtype), -1) @ v,
    "scaled twice": lambda q, k, v: torch.softmax((q * 0.6) @ k.mT / 2 + bias(q.dtype), -1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE + bias(q.dtype)).softmax(-1), v
    ),
    "einsum, key first": lambda q, k, v: (torch.einsum("bhjd,bhid->bhij", k, q) * SCALE + bias(q.dtype)).softmax(-1) @ v,
    "einsum, tokens first": tokens_first,
    "einsum, any order": lambda q, k, v: torch.einsum(
        "bhij,hbjd->bhid",
        (torch.einsum("bhjd,bhid->bhij", k, q) * SCALE).masked_fill(hidden(), NEVER).softmax(-1),
        v.transpose(0, 1),
    ),
    "bmm": in_three_dimensions,
    "bmm, masked in four dimensions": masked_in_four_dimensions,
    "baddbmm": added_by_baddbmm,
    "baddbmm that adds nothing": lambda q, k, v: in_three_dimensions(
        q, k, v, lambda q, k: torch.baddbmm(torch.empty(1, 1, 1, dtype=q.dtype), q, k.mT, beta=0, alpha=SCALE)
    ),
    "in place": in_place,
    "dropout of nothing": lambda q, k, v: F.dropout((scores(q, k) * SCALE + bias(q.dtype)).softmax(-1), 0.0) @ v,
    "dropout in eval mode": lambda q, k, v: (
        F.dropout((scores(q, k) * SCALE + bias(q.dtype)).softmax(-1), 0.5, training=False) @ v
    ),
    "turned around": lambda q, k, v: (torch.softmax(scores(q, k) * SCALE + bias(q.dtype), -1).to(v.dtype) @ v).transpose(1, 2),
}


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spelling:
    """One way to write attention, and what the passes make of it."""

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # each [B, H, N, D]
    outcome: Literal["causal", "full", "dense"]


def masked(build):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=build())


SPELLINGS = [
    *(Spelling(f"mask: {name}", masked(build), "causal") for name, build in CAUSAL_MASKS.items()),
    *(Spelling(f"mask: {name}", masked(build), "full") for name, build in FULL_MASKS.items()),
    *(Spelling(f"mask: {name}", masked(build), "dense") for name, build in OTHER_MASKS.items()),
    *(Spelling(f"written out: {name}", function, "causal") for name, function in UNFUSED.items()),
]
