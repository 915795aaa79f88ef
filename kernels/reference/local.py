"""Attention and its log-sum-exp in plain PyTorch: over all rows, or inside a local window in O(N w) memory.

What runs where no stock kernel does, and what the stock kernels must equal. Gradients are those of the operations themselves.
Sums are taken in float32, or in float64 for float64 inputs. Source: SPEC.md, "The local branch".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import widen

_LEAST_BLOCK = 32  # queries of a block: narrower windows would make many small products


def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, scale: float, dropout_p: float = 0.0,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over all rows: `[B, H, S, D]`, `[B, G, S, D]`, `[B, G, S, Dv]` -> `[B, H, S, Dv]`, `[B, H, S]`.

    Args:
        segments: `[B, G, S]`, rows attend to those of their own number only.
    """
    groups, rows = key.shape[1], query.shape[2]
    place = torch.arange(rows, device=query.device)
    shown = (place[:, None] >= place) if is_causal else torch.ones((), dtype=torch.bool, device=query.device)
    if segments is not None:
        shown = (shown & (segments[..., :, None] == segments[..., None, :]))[:, :, None]  # [B, G, 1, S, S]
    out, lse = _attend(query.unflatten(1, (groups, -1)), key[:, :, None], value[:, :, None], shown, scale, dropout_p)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each token to itself and the `window - 1` tokens before it, or on either side if not `is_causal`.

    Blocks of queries meet the keys that any of them may see.

    Args:
        query: `[B, H, N, D]`; key: `[B, G, N, D]`; value: `[B, G, N, Dv]`.
        starts: int32 `[B, N]`, where each token's document begins; no token attends to what lies before.

    Returns:
        `[B, H, N, Dv]` and the log-sum-exp `[B, H, N]`.
    """
    groups, length = key.shape[1], query.shape[2]
    block = max(window, _LEAST_BLOCK)
    blocks, before, behind = -(-length // block), window - 1, 0 if is_causal else window - 1
    padding, span = blocks * block - length, before + block + behind
    q = F.pad(query, (0, 0, 0, padding)).unflatten(2, (blocks, block)).unflatten(1, (groups, -1))  # [B, G, R, n, block, D]
    k, v = (
        F.pad(x, (0, 0, before, padding + behind)).unfold(2, span, block).transpose(-1, -2)[:, :, None]
        for x in (key, value)
    )  # [B, G, 1, n, span, D]
    first = torch.arange(blocks, device=query.device)[:, None, None] * block
    i = first + torch.arange(block, device=query.device)[:, None]  # [n, block, 1]
    j = first - before + torch.arange(span, device=query.device)  # [n, 1, span]
    shown = (j >= 0) & ((j < length) | (i >= length)) & (i - j < window) & (j - i <= behind)  # [n, block, span]
    if starts is not None:
        document = F.pad(starts, (0, padding)).unflatten(1, (blocks, block))  # [B, n, block]
        shown = (shown & (j >= document[..., None]))[:, None, None]
    out, lse = _attend(q, k, v, shown, scale, dropout_p)
    out = out.flatten(3, 4).flatten(1, 2)[:, :, :length]
    return out.to(query.dtype), lse.flatten(3, 4).flatten(1, 2)[:, :, :length]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, shown: Tensor, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Rows `[.., I, D]` attend to rows `[.., J, D]` where `shown`: the output and the log-sum-exp `[.., I]`, both wide."""
    with torch.autocast(query.device.type, enabled=False):  # in the type of its inputs, as a kernel would
        q, k, v = (widen(x) for x in (query, key, value))
        scores = (q * scale) @ k.transpose(-1, -2)
        scores = scores.masked_fill(~shown, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = F.dropout((scores - lse[..., None]).exp(), dropout_p)
        return weights @ v, lse
