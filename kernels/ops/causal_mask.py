"""The check that a mask is the causal mask, where the compiler took that on trust (`assume_causal`).

    zero = lighthouse_fx.check_causal(mask, call, ...)      # raises where the mask is any other
    entries = entries + zero

An op without a result that is used is dead code to the compiler: AOTAutograd and Inductor remove it, with its error. So the
check returns a zero that they know nothing of, and what the attention reads is computed with it. Equal checks become one,
as equal operations do, so a mask that all layers share is read once.

The causal mask is True for the keys 0 to i of query i and False elsewhere; or, added to the scores, 0 for those and -inf,
or the lowest number of its dtype, elsewhere. NaN is neither. In a mask wider than bfloat16, bfloat16's lowest, -3.39e38, and
float32's are low enough, too: a mask may be made in one dtype and added in another. A query always has key i besides, and
exp is exactly 0 unless scores of one query lie 3e38 apart, which float32's own lowest does not allow either. float16's lowest
hides a key in a float16 mask only: scores that lie 65,504 apart are possible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import rows_that_are_causal
from ..torch_private import assert_async
from .dispatch import kernels_for


@torch.library.custom_op("lighthouse_fx::check_causal", mutates_args=())
def check_causal(mask: Tensor, call: str, revision: str) -> Tensor:
    """Raise where a mask is not the causal mask. On CUDA that is a device-side assertion, and nobody waits for the GPU.

    Args:
        mask: bool or floating point `[.., N, N]`; call: the attention that it belongs to, for the message.

    Returns:
        An int32 zero, `[]`.
    """
    mask = _without_repeats(mask)
    right = kernels_for(mask).is_causal_mask(mask)
    if mask.device.type == "cuda":
        assert_async(right, _message(call, "is not the causal mask"))
    elif not right:
        raise ValueError(_message(call, _flaw(mask)))
    return torch.zeros((), dtype=torch.int32, device=mask.device)


@check_causal.register_fake
def _(mask: Tensor, *_: Any) -> Tensor:
    return mask.new_empty((), dtype=torch.int32)


def _without_repeats(mask: Tensor) -> Tensor:
    """An expanded mask as it was before: batch rows and heads that share memory are looked at once."""
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _flaw(mask: Tensor) -> str:
    """The first thing that is wrong with a mask."""
    start, right = next((start, right) for start, right in rows_that_are_causal(mask) if not right.all())
    *lead, row, key = (~right).nonzero()[0].tolist()
    value, query = mask[(*lead, start + row, key)].item(), start + row
    place = "".join(f" of {name} {index}" for name, index in zip(("head", "batch row"), reversed(lead), strict=False))
    what = f"adds {value}" if mask.dtype != torch.bool else "shows it" if value else "hides it"
    return f"is not the causal mask: for query {query} and key {key}{place} it {what}"


def _message(call: str, what: str) -> str:
    return (
        f"the attn_mask of {call} {what}. assume_causal=True promised that it is: leave assume_causal off and the call "
        "stays dense; for padded batches pack documents instead, without padding"
    )
