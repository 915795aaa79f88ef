"""Lighthouse attention as a function, with the layout and arguments of `scaled_dot_product_attention`."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .kernels import Pyramid, attend
from .kernels.packed.attention import document_problem, starts_of
from .kernels.packed.plan import summary
from .kernels.shapes import shape_problem, tensor_problem
from .passes.config import LighthouseConfig
from .passes.pyramid import pyramid_over

_log = logging.getLogger(__name__)
_DEFAULT = LighthouseConfig()  # Dynamo cannot trace how one is made
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    documents: Tensor | None = None,
    score_query: Tensor | None = None,
    score_key: Tensor | None = None,
    config: LighthouseConfig | None = None,
) -> Tensor:
    """Lighthouse attention, eager or compiled, differentiable in query, key and value.

    Args:
        query: `[B, H, N, D]`, floating point; key: `[B, G, N, D]`; value: `[B, G, N, Dv]`, of the same dtype and device.
        is_causal: tokens see only earlier tokens, as with a causal mask.
        scale: factor on the scores, `1/sqrt(D)` by default.
        enable_gqa: allow `G < H`, grouped-query attention; `H % G` must be 0.
        dropout_p: probability of dropping an attention weight in the gathered sub-sequence.
        documents: integer `[B, N]`, the number of each token's document; attention, which must be causal, stays inside. Runs of
            equal numbers are documents, so `[1, 0, 1]` is three. On the CPU, or where query is, which is slower on a GPU.
        score_query: `[B, H, N, *]`, what the `norm` scorer reads in place of query; score_key: `[B, G, N, *]`. Where a norm
            makes all queries and keys equally long (QK-norm), give them as they were before it. No gradient flows here.
        config: the pyramid and the scorer, `LighthouseConfig()` by default. `max_kept`, `dense_layers` and `assume_causal`
            concern the compiler only: a call of this function is always Lighthouse, whatever the stage.

    Returns:
        `[B, H, N, Dv]`. A sequence shorter than one coarsest window (`p^(L-1)` tokens), or no longer than `local_window`, is
        plain dense attention.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
        NotImplementedError: forward-mode differentiation, as of `scaled_dot_product_attention`.

    Source: SPEC.md, "The four stages".
    """
    config = _DEFAULT if config is None else config
    _check_numbers(is_causal=is_causal, enable_gqa=enable_gqa, scale=scale, dropout_p=dropout_p, config=config)
    _check_tensors(query, key, value, enable_gqa=enable_gqa)
    starts = known = None
    if documents is not None:
        starts, known = _starts(documents, query, value, is_causal=is_causal, config=config)
    _check_scored("score_query", score_query, query, config)
    _check_scored("score_key", score_key, key, config)
    pyramid = pyramid_over(query.shape[2], config)
    is_dense = pyramid.coarse == 0 or query.shape[2] <= config.local_window
    if is_dense and starts is None:
        _log.debug(
            "dense: %d tokens are fewer than one coarsest window of %d, or no more than local_window=%d",
            query.shape[2], pyramid.widest, config.local_window,
        )  # fmt: skip
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p
        )
    if is_dense:  # inside documents: all tokens are entries
        pyramid = Pyramid(length=query.shape[2], levels=1, pooling=2, topk=1)
    return attend(
        query,
        key,
        value,
        pyramid,
        scorer=config.scorer,
        dilation=config.dilation,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        kernel=config.kernel,
        starts=starts,
        max_documents=config.max_documents,
        known=known,
        score_q=score_query,
        score_k=score_key,
        local_window=0 if is_dense else config.local_window,
    )


def _starts(
    documents: Tensor, query: Tensor, value: Tensor, *, is_causal: bool, config: LighthouseConfig
) -> tuple[Tensor, Tensor | None]:
    """Where each token's document begins, where query is, and what is known of that on the CPU."""
    if not isinstance(documents, Tensor) or documents.dtype not in _INTEGERS:
        shown = f"has dtype {documents.dtype}" if isinstance(documents, Tensor) else f"is a {type(documents).__name__}"
        raise TypeError(f"documents {shown}: give an integer tensor [batch, tokens]")
    expected = [query.shape[0], query.shape[2]]
    if list(documents.shape) != expected:
        raise ValueError(f"documents has shape {list(documents.shape)}, and the queries are {expected}: give [batch, tokens]")
    on_cpu = documents.device.type == "cpu"
    if documents.device != query.device and not on_cpu:
        raise ValueError(f"documents is on {documents.device} and query on {query.device}: documents.cpu(), or there as well")
    if not is_causal:
        raise ValueError("documents with is_causal=False: pass is_causal=True; only causal attention is kept inside documents")
    if (problem := document_problem(query, value, config.kernel)) is not None:
        raise ValueError(problem)
    starts = starts_of(documents)
    return starts.to(query.device, non_blocking=True), summary(starts) if on_cpu else None


def _check_numbers(*, is_causal: Any, enable_gqa: Any, scale: Any, dropout_p: Any, config: Any) -> None:
    if not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}={flag!r} is a {type(flag).__name__}: give True or False")
    if not _is_number(dropout_p):
        raise TypeError(
            f"dropout_p={dropout_p!r} is a {type(dropout_p).__name__}: give a number from 0 to 1, such as dropout_p=0.0"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(
            f"dropout_p={dropout_p} is not a probability: give a number from 0 to 1, such as dropout_p=0.0"
        )
    if scale is None:
        return
    if not _is_number(scale):
        raise TypeError(
            f"scale={scale!r} is a {type(scale).__name__}: give a number (float(scale) of a tensor), "
            "or None for 1/sqrt(head dimension)"
        )
    if not abs(scale) < math.inf:  # which torch.compile can trace with a dynamic scale; isfinite it cannot
        raise ValueError(f"scale={scale} is not finite: give a finite number, or None for 1/sqrt(head dimension)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool) -> None:
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name}={x!r} is a {type(x).__name__}: give a tensor [batch, heads, tokens, head dimension]"
            )
        if problem := tensor_problem(name, x):
            raise TypeError(problem)
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name} has a tangent, and lighthouse_attention has no derivative in forward mode: use reverse mode, such as "
                "torch.func.vjp, or scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
            )
    if problem := shape_problem(query.shape, key.shape, value.shape, enable_gqa=enable_gqa):
        raise ValueError(problem)
    for what, found in (
        ("dtype", [x.dtype for x in tensors.values()]),
        ("device", [x.device for x in tensors.values()]),
    ):
        if len(set(found)) > 1:
            raise ValueError(
                f"query, key and value differ in {what}: {', '.join(map(str, found))}: convert them with .to({found[0]})"
            )


def _check_scored(name: str, x: Any, like: Tensor, config: LighthouseConfig) -> None:
    """What a scorer is to read must have a row for every row of query or key."""
    if x is None:
        return
    of = name.removeprefix("score_")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}={x!r} is a {type(x).__name__}: give a tensor with the rows of {of}, or None")
    if config.scorer != "norm":
        raise ValueError(
            f"{name} was given and the scorer is {config.scorer!r}, which attends with query and key themselves: leave {name} "
            "out, or use scorer='norm'"
        )
    if problem := tensor_problem(name, x):
        raise TypeError(problem)
    if x.dim() != 4 or x.shape[:3] != like.shape[:3] or x.shape[3] == 0:
        shapes = f"{list(x.shape)}, and {of} {list(like.shape)}"
        raise ValueError(f"{name} has shape {shapes}: give the same batch, heads and tokens, and any last dimension")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} and {of} on {like.device}: move it with .to({str(like.device)!r})")
