"""Lighthouse attention as a function, with the layout and arguments of `scaled_dot_product_attention`."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LighthouseConfig
from .kernels import attend
from .kernels.shapes import shape_problem, tensor_problem
from .passes.check import pyramid_over

_log = logging.getLogger(__name__)


def lighthouse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    config: LighthouseConfig | None = None,
) -> Tensor:
    """Lighthouse attention, eager or compiled, differentiable in query, key and value.

    Args:
        query: `[B, H, N, D]`, floating point; key: `[B, G, N, D]`; value: `[B, G, N, Dv]`, of the same dtype and device.
        is_causal: tokens see only earlier tokens, as with a causal mask.
        scale: factor on the scores, `1/sqrt(D)` by default.
        enable_gqa: allow `G < H`, grouped-query attention; `H % G` must be 0.
        dropout_p: probability of dropping an attention weight in the gathered sub-sequence.
        config: the pyramid and the scorer, `LighthouseConfig()` by default. `max_kept`, `dense_layers` and `assume_causal`
            concern the compiler only: a call of this function is always Lighthouse, whatever the stage.

    Returns:
        `[B, H, N, Dv]`. A sequence shorter than one coarsest window (`p^(L-1)` tokens) is plain dense attention.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Source: SPEC.md, "The four stages".
    """
    config = LighthouseConfig() if config is None else config
    _check_numbers(is_causal=is_causal, enable_gqa=enable_gqa, scale=scale, dropout_p=dropout_p, config=config)
    _check_tensors(query, key, value, enable_gqa=enable_gqa)
    pyramid = pyramid_over(query.shape[2], config)
    if pyramid.coarse == 0:
        _log.debug("dense: %d tokens are fewer than one coarsest window of %d", query.shape[2], pyramid.widest)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p
        )
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
    )


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
