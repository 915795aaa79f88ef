"""The losses of a run: in training, on held-out rows under dense attention, of the saved model; leak and passkeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.evaluation.model_outputs import evaluating
from lighthouse_fx.evaluation.passkey import find_passkeys

IGNORED = -100  # the target of a token whose successor belongs to another document


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    """The next token of each, `[B, N]`, but for the last one of each document."""
    tokens, numbers = batch["tokens"].long(), batch["documents"]
    return tokens[:, 1:].masked_fill(numbers[:, 1:] != numbers[:, :-1], IGNORED)


def predicted(batch: dict[str, Tensor]) -> int:
    """How many tokens of the rows have a target."""
    return int((targets_of(batch) != IGNORED).sum())


def loss_sum(model: nn.Module, batch: dict[str, Tensor], rows: slice, device: torch.device) -> Tensor:
    """The sum of the losses of some rows, attention inside their documents; enter `documents(...)` around it."""
    tokens, targets = batch["tokens"][rows, :-1].long().to(device), targets_of(batch)[rows].to(device)
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, N, V]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=IGNORED)


def documents_of(batch: dict[str, Tensor], rows: slice) -> Any:
    return lighthouse_fx.documents(batch["documents"][rows, :-1])


@torch.no_grad()
def dense_loss(model: nn.Module, held_out: dict[str, Tensor], device: torch.device, rank: int, world: int) -> float:
    """The loss on held-out rows under dense attention, in nats a token. Each rank runs as many rows as the others."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = len(held_out["tokens"])
    with evaluating(model):
        for first in range(0, count, world):
            row = min(first + rank, count - 1)
            with documents_of(held_out, slice(row, row + 1)):
                loss = loss_sum(model, held_out, slice(row, row + 1), device)
            total += loss.double() * (first + rank < count)
    dist.all_reduce(total)
    return total.item() / predicted(held_out)


def probe(
    plain: nn.Module,
    config: LighthouseConfig,
    held_out: dict[str, Tensor],
    *,
    leak_cuts: int,
    passkey: dict[str, Any],
    tokenizer: Any,
) -> dict[str, float]:
    """Leak from the future and passkeys, on the model without its shards."""
    found = {}
    lighthouse_fx.compile(plain, config)
    if leak_cuts:
        with documents_of(held_out, slice(0, 1)):
            leak = lighthouse_fx.future_leak(plain, held_out["tokens"][:1], leak_cuts)
        found |= {"leak/lighthouse": leak.lighthouse[0].mean} if leak.lighthouse else {}
        found |= {"leak/dense": leak.dense[0].mean}
    if passkey:
        task = lighthouse_fx.Passkey(encode=lambda text: tokenizer.encode(text, add_special_tokens=False), **passkey)
        with evaluating(plain), torch.compiler.set_stance("force_eager"):
            found["passkey/accuracy"] = find_passkeys(plain, task, device=next(plain.parameters()).device).accuracy
    return found


@torch.no_grad()
def loss_of_export(folder: Path, held_out: dict[str, Tensor], device: torch.device) -> float:
    """The loss of a saved model, loaded by transformers alone, on the held-out documents one by one."""
    plain = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    targets, total = targets_of(held_out), 0.0
    for row, numbers in enumerate(held_out["documents"][:, :-1]):
        ends = [*(numbers.diff().nonzero().flatten() + 1).tolist(), len(numbers)]
        for start, end in zip([0, *ends], ends, strict=False):
            positions = torch.arange(start, end, device=device)[None]  # those that it had in its row
            tokens = held_out["tokens"][row, start:end].long().to(device)[None]
            logits = plain(input_ids=tokens, position_ids=positions, use_cache=False).logits[0].float()
            wanted = targets[row, start:end].to(device)
            total += F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED).item()
    return total / predicted(held_out)
