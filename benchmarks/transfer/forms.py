"""The forms of attention that are compared: dense, a sliding window, short contexts, pyramids and own queries.

A form is written as a dict, `{"kind": "pyramid", "topk": 384, "local": 512}`, and built by `build`. Not fused and not meant to
be fast: what a form would cost is the cost model's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse_fx.kernels import REVISION
from lighthouse_fx.kernels.geometry import Pyramid
from lighthouse_fx.kernels.ops.dispatch import kernels_for

from . import stock
from .model import Attention

_OPS = torch.ops.lighthouse_fx
_LEAST = -60.0  # of an exponent; smaller shares are nothing


def use_cudnn() -> None:
    """Dense attention by cuDNN alone, which is the fastest on Hopper: another kernel would not go unnoticed."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def build(form: dict[str, Any]) -> Attention:
    """The attention that a form describes."""
    kinds: dict[str, Callable[..., Tensor]] = {
        "dense": dense,
        "window": window,
        "short": short,
        "pyramid": pyramid,
        "own": own_queries,
    }
    arguments = dict(form)
    return partial(kinds[arguments.pop("kind")], **arguments)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The model's own attention."""
    if not q.is_cuda:
        return stock.plain(q, k, v)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def window(q: Tensor, k: Tensor, v: Tensor, *, width: int) -> Tensor:
    """Each token attends to itself and the `width - 1` before it."""
    return stock.attend(q, k, v, window=width)[0]


def short(q: Tensor, k: Tensor, v: Tensor, *, length: int) -> Tensor:
    """Rows cut into short contexts: nobody sees beyond the borders at multiples of `length`."""
    rows, heads, whole, dim = q.shape
    parts = (x.transpose(1, 2).reshape(-1, length, heads, dim).transpose(1, 2) for x in (q, k, v))
    return dense(*parts).transpose(1, 2).reshape(rows, whole, heads, dim).transpose(1, 2)


def pyramid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    levels: int = 3,
    pooling: int = 4,
    topk: int,
    local: int = 0,
    merge: str = "lse",
    rank: str = "past",
) -> Tensor:
    """Pooled queries, keys and values, beside a local branch.

    Args:
        local: width of the local branch; 0: none.
        merge: "lse", one softmax-weighted mean over all that a token is given, or "sum", as published.
        rank: what a window is ranked by: "past", the window before it (causal); "own", itself (published: leaks); "random".
    """
    shape = Pyramid(length=q.shape[2], levels=levels, pooling=pooling, topk=topk)
    entries, slots = choose(q, k, shape, rank)
    gathered = (_OPS.gather(x.contiguous(), entries, slots, levels, pooling, REVISION) for x in (q, k, v))
    out, lse = stock.attend(*gathered)
    near, near_lse = stock.attend(q, k, v, window=local) if local else (None, None)

    def spread(x: Tensor) -> Tensor:
        result: Tensor = _OPS.scatter(x.contiguous(), entries, slots, q.shape[2], levels, pooling, True, REVISION)
        return result

    if merge == "sum":
        total = spread(out)
        return total if near is None else total + near
    top = lse.detach().amax(-1, keepdim=True)
    if near_lse is not None:
        top = torch.maximum(top, near_lse.detach().amax(-1, keepdim=True))
    weighted, weight = _weighted(out, lse, top)
    return _blend(spread(weighted), spread(weight), near, near_lse, top, v.dtype)


def choose(q: Tensor, k: Tensor, shape: Pyramid, rank: str) -> tuple[Tensor, Tensor]:
    """Which windows are entries, without gradient: `entries` and `slots` as the library's `select` returns them."""
    kernels = kernels_for(q)
    with torch.no_grad():
        scores = [kernels.norm_scores(x, k.shape[1], shape) for x in (q, k)]
        if rank == "random":
            scores = [torch.rand_like(x) for x in scores]
        elif rank == "past":
            scores = [_of_the_window_before(x, shape) for x in scores]
        entries, slots = kernels.choose_windows(*(x.contiguous() for x in scores), shape)
    return entries, slots


def _of_the_window_before(scores: Tensor, shape: Pyramid) -> Tensor:
    """Each window has the score of the one before it on its level; the first has none (and is expanded)."""
    per_level = scores.split([shape.windows(level) for level in range(1, shape.levels)], dim=-1)
    return torch.cat([F.pad(x[..., :-1], (1, 0)) for x in per_level], -1)


def own_queries(
    q: Tensor, k: Tensor, v: Tensor, *, levels: int = 3, pooling: int = 4, topk: int, tiles: int, local: int
) -> Tensor:
    """Queries not pooled: each token attends to the entries of complete earlier tiles and to its local window.

    What is chosen in a tile is seen from later tiles alone, so a window is ranked by itself and nothing leaks. A local window
    at least as wide as a tile leaves no gap.
    """
    length = q.shape[2]
    shape = Pyramid(length=length, levels=levels, pooling=pooling, topk=topk, quota=topk // tiles)
    assert length % tiles == 0 and shape.gathered % tiles == 0 and local >= length // tiles
    entries, slots = choose(q, k, shape, "own")
    far_k, far_v = (_OPS.gather(x.contiguous(), entries, slots, levels, pooling, REVISION) for x in (k, v))
    near, near_lse = stock.attend(q, k, v, window=local)
    tokens, of_tile = length // tiles, shape.gathered // tiles
    outs, lses = [near[:, :, :tokens]], [torch.full_like(near_lse[:, :, :tokens], -torch.inf)]
    for tile in range(1, tiles):
        seen = slice(0, tile * of_tile)
        queries = q[:, :, tile * tokens : (tile + 1) * tokens]
        out, lse = stock.attend(queries, far_k[:, :, seen], far_v[:, :, seen], causal=False)
        outs.append(out)
        lses.append(lse)
    return _two(torch.cat(outs, 2), torch.cat(lses, 2), near, near_lse)


def _weighted(out: Tensor, lse: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Entries' outputs times their share, and the shares themselves, as wide as the scatter kernel takes."""
    weight = (lse - top).clamp(min=_LEAST).exp()[..., None]
    return out.float() * weight, weight.expand(-1, -1, -1, 16).contiguous()


def _blend(
    total: Tensor, share: Tensor, near: Tensor | None, near_lse: Tensor | None, top: Tensor, dtype: torch.dtype
) -> Tensor:
    """The mean of what the entries give and the local branch, by their shares."""
    share = share[..., :1]
    if near is not None and near_lse is not None:
        weight = (near_lse - top).clamp(min=_LEAST).exp()[..., None]
        total, share = total + near.float() * weight, share + weight
    return (total / share).to(dtype)


def _two(far: Tensor, far_lse: Tensor, near: Tensor, near_lse: Tensor) -> Tensor:
    """Two branches merged by their log-sum-exp."""
    share = torch.sigmoid(far_lse - near_lse)[..., None]
    return (far.float() * share + near.float() * (1 - share)).to(near.dtype)


_weighted, _blend, _two = (stock.compiled_on_gpu(f, dynamic=False) for f in (_weighted, _blend, _two))
