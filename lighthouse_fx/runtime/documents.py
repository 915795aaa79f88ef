"""`documents(...)`: attention of packed rows stays inside each document, in models compiled with the backend.

    with lighthouse_fx.documents(numbers):          # forward and backward
        loss = model(tokens); loss.backward()

How a compiled graph gets them: `document_inputs.py`. What is computed: `kernels/packed/attention.py`. Attention that stays
dense by choice (excluded layers, the dense stage, evaluation, short sequences) is kept inside documents, too, on all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lighthouse_fx.kernels.packed.attention import starts_of

from . import stage
from .packed_rows import PackedRows


def starts_from(document_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Where each token's document begins, int32 `[B, N]`, from either form.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    if (document_ids is None) == (cu_seqlens is None):
        raise TypeError(
            "give either document_ids, an integer tensor [batch, tokens], or cu_seqlens, an integer tensor [documents + 1]"
        )
    name, given = ("document_ids", document_ids) if document_ids is not None else ("cu_seqlens", cu_seqlens)
    if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        shown = f"has dtype {given.dtype}" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
        raise TypeError(f"{name} {shown}: give an integer tensor")
    if document_ids is not None:
        if document_ids.dim() != 2 or 0 in document_ids.shape:
            raise ValueError(f"{name} has shape {list(document_ids.shape)}: give [batch, tokens], one number for each token")
        return starts_of(document_ids)
    assert cu_seqlens is not None
    bounds = cu_seqlens.long()
    if bounds.dim() != 1 or len(bounds) < 2 or bounds[0] != 0 or bool((bounds.diff() < 0).any()) or bounds[-1] < 1:
        raise ValueError(f"{name}={bounds.tolist()}: give one packed row's borders, such as [0, 100, 250], from 0 and rising")
    return bounds[:-1].repeat_interleave(bounds.diff()).int()[None]


class Documents(PackedRows):
    """What `documents` returns: a context manager.

    On are the documents entered last among those not left yet, in whichever order they are left.
    """

    def __enter__(self) -> Documents:
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError("documents() was entered inside a compiled function: enter it around the compiled call")
        stage.enter_documents(self)
        return self

    def __exit__(self, *error: object) -> None:
        stage.leave_documents(self)


def documents(document_ids: Tensor | None = None, *, cu_seqlens: Tensor | None = None) -> Documents:
    """Keep attention inside the documents of packed rows, in models compiled with the backend, as a context manager.

    Args:
        document_ids: integer `[B, N]`: tokens with equal numbers beside each other are one document.
        cu_seqlens: integer `[documents + 1]`, the borders of one packed row, `[0, ..., N]`; instead of `document_ids`.

    Give tensors on the CPU, as a data loader makes them: those on a GPU are waited for and copied there, once. So kernels can
    be told how many documents there are, windows that the budget cannot expand are warned of, and rows of one document each are
    treated as what they are. Keep the backward inside the context.
    Dense attention stays inside documents as well, in excluded layers, the dense stage and evaluation. Only attention that the
    backend cannot rewrite at all does not (a warning says so): there the model's own mask has to do it. What is computed:
    README, "Packed documents".

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.
    """
    return Documents(starts_from(document_ids, cu_seqlens=cu_seqlens))
