"""Which tensors the ops take, said once for the functional form (an error) and for the compiler pass (a refusal)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DIMENSIONS = ("batch entries", "heads", "tokens", "head dimensions")


def tensor_problem(name: str, x: Tensor) -> str | None:
    """What is wrong with one of query, key and value apart from its shape, with the remedy, or None."""
    if type(x).__name__ == "DTensor":
        return (
            f"{name} is a DTensor, for which Lighthouse's operators have no sharding rules: give each rank its own heads as a "
            f"plain tensor, such as {name}.to_local()"
        )
    if x.is_nested:
        return f"{name} is a nested tensor: pad the batch to one length, such as {name}.to_padded_tensor(0.0), or pack it"
    if x.layout != torch.strided:
        return f"{name} has layout {x.layout}: give a dense tensor, such as {name}.to_dense()"
    if x.dtype not in _DTYPES:
        return f"{name} has dtype {x.dtype}: give float16, bfloat16, float32 or float64, such as {name}.float()"
    return None


def shape_problem(query: Sequence[int], key: Sequence[int], value: Sequence[int], *, enable_gqa: bool) -> str | None:
    """What is wrong with these shapes, with the remedy, or None.

    Args:
        query: should be `[B, H, N, D]`; key: `[B, G, N, D]`; value: `[B, G, N, Dv]`, with `H % G == 0`.
    """
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) != 4:
            return f"{name} has shape {_show(shape)}, not 4 dimensions: give [batch, heads, tokens, head dimension]"
        for size, what in zip(shape, _DIMENSIONS, strict=True):
            if isinstance(size, int) and size == 0:  # a symbolic size is never 0: torch.compile makes that a constant
                return f"{name} has shape {_show(shape)}, so no {what}: give at least one"
    if not query[0] == key[0] == value[0]:
        return f"batch sizes differ: query {query[0]}, key {key[0]}, value {value[0]}: give all the same batch"
    if key[1] != value[1]:
        return f"key has {key[1]} heads and value {value[1]}: give both the same number"
    if query[1] != key[1]:
        if not enable_gqa:
            return f"query has {query[1]} heads and key {key[1]}: pass enable_gqa=True, or repeat the key/value heads"
        if key[1] == 0 or query[1] % key[1]:
            return f"query has {query[1]} heads, no multiple of the {key[1]} key/value heads: H % G must be 0"
    if not query[2] == key[2] == value[2]:
        return (
            f"lengths differ: query {query[2]}, key {key[2]}, value {value[2]} tokens: "
            "Lighthouse is self-attention over one sequence; cross-attention and cached decoding stay dense"
        )
    if query[3] != key[3]:
        return f"query has head dimension {query[3]} and key {key[3]}: give both the same"
    return None


def _show(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
