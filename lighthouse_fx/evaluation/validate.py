"""`validate(model, data)`: is the pre-trained model the ordinary dense model that it should be, and a good one?

Five questions: is inference dense; is dense attention trained, which the loss under it shows beside the loss under
Lighthouse attention; does a longer context help; does a token's loss depend on what follows it; is a digit found again in a
long text. The model is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lighthouse_fx.arguments import check_integer
from lighthouse_fx.frontend.as_trained import AsTrained
from lighthouse_fx.frontend.existing_compilation import setting_of
from lighthouse_fx.frontend.explain import compile_anew
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.runtime import journal, stage

from .future_leak import CUTS, measure_leak
from .model_outputs import evaluating, logits_of, token_losses
from .passkey import Passkey, find_passkeys
from .validation_result import Inference, Paired, PositionLoss, Validation

_BUCKETS = 8  # each twice as long as the one before it
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest logit; elsewhere some roundings


def validate(
    model: nn.Module,
    data: Tensor | Iterable[Tensor],
    *,
    config: LighthouseConfig | None = None,
    passkey: Passkey | None = None,
    batch: int = 1,
    leak_cuts: int = 0,
    check_inference: bool = True,
    progress: bool = False,
) -> Validation:
    """Validate a language model on held-out text.

    Everything runs in eval mode without gradients. Dense means eager and under the model's own attention, even where the
    model is compiled. The Lighthouse loss is that of the graphs that training runs (`as_trained`), also without Inductor; as
    the choice of windows sees later tokens it is no likelihood, and serves as a comparison only.

    Args:
        model: compiled or not; from token numbers `[B, N]` it gives logits `[B, N, V]`, as a tensor, in `.logits` or first.
        data: token numbers, `[windows, N + 1]`, or batches `[B, N + 1]` of one length. Take several windows: what is
            concluded rests on how much they differ.
        config: the Lighthouse attention; by default as the model is compiled, otherwise `LighthouseConfig()`.
        passkey: look for passkeys, too: `Passkey(lengths=(4096, 16384), encode=tokenizer.encode)`.
        batch: windows at once, where data is a tensor.
        leak_cuts: measure the leak from the future (`future_leak`) at so many places, such as 96; 0: do not.
        check_inference: run the compiled model once; a model that is not compiled with this backend is for this.
        progress: show bars.

    Returns:
        A `Validation`: `print(result)`, `result.passed`, `result.save(folder)`.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy. RuntimeError: inside `documents()`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}: give a Module")
    if config is not None and not isinstance(config, LighthouseConfig):
        raise TypeError(f"config={config!r} is a {type(config).__name__}: give a LighthouseConfig")
    if stage.documents is not None:
        raise RuntimeError(
            f"validate() was called inside documents(), {stage.documents}, which the uncompiled model ignores, and its "
            "dense losses are that model's: call it outside, with windows of one document each"
        )
    check_integer("leak_cuts", leak_cuts, least=0, example=CUTS)
    batches = _checked(data, batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches = [rows.to(device) for rows in batches]
    length = batches[0].shape[1] - 1
    half, quarter = length // 2, max(1, length // 4)
    lighthouse = AsTrained(model, config)
    dense: list[Tensor] = []  # [B, N] each, as are the others
    approximate: list[Tensor] = []
    cut: list[Tensor] = []
    calls: list[AttentionRecord] = []
    with evaluating(model):
        for rows in track(batches, "losses", transient=True, disable=not progress):
            with torch.compiler.set_stance("force_eager"):
                dense.append(token_losses(model, rows))
                cut.append(token_losses(model, rows[:, half:])[:, -quarter:])
            losses = token_losses(model, rows, call=lighthouse)
            calls = calls or lighthouse.calls
            if any(call.rewritten for call in calls):  # otherwise it is dense attention, and no other loss
                approximate.append(losses)
        with torch.compiler.set_stance("force_eager"):
            vocabulary = logits_of(model, batches[0][:1, half:-1]).shape[-1]  # of a length that it was given above
        inference = _inference(model, batches[0][:, :-1], lighthouse.config) if check_inference else None
        leak = None
        if leak_cuts:
            leak = measure_leak(model, lighthouse, torch.cat(batches), leak_cuts, batch=len(batches[0]))
        found = None
        if passkey is not None:
            with torch.compiler.set_stance("force_eager"):
                found = find_passkeys(model, passkey, device=device, progress=progress)
    own = torch.cat(dense)
    other = torch.cat(approximate) if approximate else None
    return Validation(
        title=type(getattr(model, "_orig_mod", model)).__name__,
        config=lighthouse.config,
        windows=len(own),
        length=length,
        dense_loss=own.mean().item(),
        guessing=math.log(vocabulary),
        lighthouse_loss=None if other is None else other.mean().item(),
        gap=None if other is None else _paired(own - other),
        context_gain=_paired(torch.cat(cut) - own[:, -quarter:]) if length >= 4 else None,
        positions=_by_position(own, other),
        calls=tuple(calls),
        inference=inference,
        leak=leak,
        passkey=found,
    )


def _checked(data: Any, batch: int) -> list[Tensor]:
    """Batches of token numbers of one length."""
    check_integer("batch", batch, least=1)
    batches = list(data.split(batch)) if isinstance(data, Tensor) and data.dim() == 2 else data
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        shown = f"has shape {list(data.shape)}" if isinstance(data, Tensor) else f"is a {type(data).__name__}"
        raise ValueError(f"data {shown}: give token numbers [windows, N + 1], or batches of them")
    batches = list(batches)
    for rows in batches:
        if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.is_floating_point() or rows.is_complex():
            shown = f"{list(rows.shape)} of {rows.dtype}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise ValueError(f"data has {shown}: give token numbers, integers [B, N + 1]")
    widths = {rows.shape[1] for rows in batches}
    if len(widths) != 1 or min(widths) < 2 or not sum(map(len, batches)):
        raise ValueError(f"data has windows of {sorted(widths)} tokens: give at least one window, all of one length N + 1 > 1")
    return [rows.long() for rows in batches]


def _inference(model: nn.Module, ids: Tensor, config: LighthouseConfig) -> Inference:
    """The compiled model in eval mode without gradients, in the Lighthouse stage, against the eager one."""
    call: Any = model
    if not setting_of(model).compiled:
        options = {field.name: getattr(config, field.name) for field in fields(config)}
        call = compile_anew(model, "lighthouse", options=options)
    with torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            eager = logits_of(model, ids)
        with stage.pretraining(), journal.watch() as calls:
            compiled = logits_of(model, ids, call=call)
    scale = max(1.0, eager.abs().max().item())
    return Inference(
        difference=(compiled.double() - eager.double()).abs().max().item(),
        tolerance=scale * _TOLERANCE.get(eager.dtype, 4 * torch.finfo(eager.dtype).eps),
        calls=len(calls),
        rewritten=sum(record.rewritten for record in calls),
    )


def _paired(differences: Tensor) -> Paired:
    """The mean over windows of the mean difference of a window's tokens, `[windows, tokens]`."""
    means = differences.mean(dim=1)  # [windows]
    error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else math.inf
    return Paired(mean=means.mean().item(), error=error, windows=len(means))


def _by_position(dense: Tensor, lighthouse: Tensor | None) -> tuple[PositionLoss, ...]:
    """Losses, `[windows, N]`, by where in the window a token is."""
    length = dense.shape[1]
    edges = sorted({0, *(length >> places for places in range(_BUCKETS))})
    return tuple(
        PositionLoss(
            start=start,
            end=end,
            dense=dense[:, start:end].mean().item(),
            lighthouse=None if lighthouse is None else lighthouse[:, start:end].mean().item(),
        )
        for start, end in pairwise(edges)
    )
