"""Scorers: functions from q, k and v to two scores of every token, per key/value head. Source: SPEC.md, "Scorers".

`norm` ranks by the norms of queries and keys. `dilated` and `gla` rank by the norms of what two passes give, once as (q, k, v)
and once with q and k exchanged: causal attention inside strided sub-sequences, or linear attention with a fixed decay.
No gradient flows through a score. (For `norm` the kernels read q and k themselves and do not come here.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

DECAY = 31 / 32  # of `gla`, a token: half of the state is left after 22 tokens
_CHUNK = 64  # tokens that `gla` in plain PyTorch attends to at once


def token_scores(
    q: Tensor, k: Tensor, v: Tensor, *, scorer: str, dilation: int, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The two scores of every token.

    Args:
        q: `[B, H, N, D]`; k: `[B, G, N, D]`; v: `[B, G, N, Dv]`; any floating dtype, any strides.

    Returns:
        `s_q` and `s_k`, float32 `[B, G, N]`.
    """
    groups = k.shape[1]
    if scorer == "norm":
        return norms(q, groups), norms(k, groups)
    score: Callable[..., Tensor] = _linear if scorer == "gla" else partial(_dilated, dilation)
    repeat = q.shape[1] // groups
    # As keys, the queries have more heads than the values: only then do values have to be repeated.
    wide_k, wide_v = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
    forward = score(q, k, v, is_causal, scale)
    exchanged = score(wide_k, q, wide_v, is_causal, scale)
    return _largest_of_group(forward, groups), _largest_of_group(exchanged, groups)


def norms(x: Tensor, groups: int) -> Tensor:
    """The largest norm of a group's rows, in float32: `[B, Hx, N, D]` -> `[B, G, N]`."""
    return _largest_of_group(_row_norms(x), groups)


def _largest_of_group(scores: Tensor, groups: int) -> Tensor:
    """`[B, Hx, N]` -> `[B, G, N]`"""
    largest: Tensor = scores.unflatten(1, (groups, -1)).amax(2)
    return largest


def _row_norms(x: Tensor) -> Tensor:
    x = x.float() if x.dtype == torch.float64 else x
    result: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)  # narrower types: widened without a copy
    return result


def _dilated(dilation: int, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Norms `[B, H, N]` of attention inside each of `dilation` strided sub-sequences."""
    short, longer = divmod(q.shape[2], dilation)
    grouped = q.shape[1] != k.shape[1]
    scores = q.new_empty(q.shape[:3], dtype=torch.float32)
    # The first `longer` streams have one token more than the others: two batches of equal length.
    for first, last, tokens in ((0, longer, short + 1), (longer, dilation, short)):
        if first == last or tokens == 0:
            continue
        for row in range(q.shape[0]):
            a, b, c, written = (
                _streams(x[row], dilation, first, last - first, tokens) for x in (q, k, v, scores[..., None])
            )
            out = F.scaled_dot_product_attention(a, b, c, is_causal=is_causal, scale=scale, enable_gqa=grouped)
            written[..., 0] = _row_norms(out)
    return scores


def _streams(x: Tensor, dilation: int, first: int, streams: int, tokens: int) -> Tensor:
    """A view, without a copy, of some sub-sequences: `[H, N, D]` -> `[streams, H, tokens, D]`."""
    head, token, dim = x.stride()
    shape = (streams, x.shape[0], tokens, x.shape[2])
    return x.as_strided(shape, (token, head, token * dilation, dim), x.storage_offset() + first * token)


def _linear(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """Norms `[B, H, N]` of linear attention whose state loses a fixed share with each token, always causal."""
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.device.type == "cuda":
        return _row_norms(_fla(q, k, v, scale))
    return _row_norms(_linear_attention(q, k, v, scale))


def _fla(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    require_fla()
    from fla.ops.simple_gla import chunk_simple_gla

    decay = torch.full((q.shape[1],), math.log(DECAY), dtype=torch.float32, device=q.device)
    tokens_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # [B, N, H, D], as models have it: no copy
    out: Tensor = chunk_simple_gla(*tokens_first, g_gamma=decay, scale=scale)[0]
    return out.transpose(1, 2)


def require_fla() -> None:
    """Raise unless fla-core can be imported.

    Raises:
        ImportError: naming the extra.
    """
    try:
        import fla.ops.simple_gla  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "scorer='gla' needs fla-core on a GPU: pip install 'lighthouse-fx[gla]', or use scorer='norm'"
        ) from error


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same in plain PyTorch, chunk by chunk: `o_i = scale * sum over j <= i of DECAY^(i-j) (q_i . k_j) v_j`."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(wide) for x in (q * scale, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])  # [B, H, D, Dv]
    outs = []
    for start in range(0, q.shape[2], _CHUNK):
        qs, ks, vs = (x[:, :, start : start + _CHUNK] for x in (q, k, v))
        age = torch.arange(qs.shape[2], device=q.device, dtype=wide)
        within = (DECAY ** (age[:, None] - age)).tril()  # [chunk, chunk]
        outs.append((qs @ ks.mT * within) @ vs + (qs * DECAY ** (age + 1)[:, None]) @ state)
        left = DECAY ** (age[-1] - age)[:, None]  # what is left of each token at the end of the chunk
        state = state * DECAY ** (age[-1] + 1) + (ks * left).mT @ vs
    return torch.cat(outs, 2)
