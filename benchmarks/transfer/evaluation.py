"""What is measured of a model on held-out windows: its loss, by position and on far repeats, and how much it sees ahead."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .model import Attention, Model
from .text import Held

BUCKETS = 16  # of positions along a row
_CUTS_A_WINDOW = 8


def distances(length: int) -> list[int]:
    """Borders of the distances by which repeats are told apart: 4,096, 6,144, 8,192, 12,288 and 16,384 at length 16,384."""
    return [length * part // 8 for part in (2, 3, 4, 6, 8)]


@torch.no_grad()
def byte_losses(model: Model, attention: list[Attention], held: Held, device: torch.device) -> Tensor:
    """float32 `[W, N]`, on the device."""
    rows = model.size.rows
    found = []
    for i in range(0, len(held.tokens), rows):
        tokens = held.tokens[i : i + rows].to(device).long()
        found.append(model(tokens[:, :-1], tokens[:, 1:], attention).float())
    return torch.cat(found)


def means(model: Model, attention: list[Attention], held: Held, device: torch.device) -> dict[str, float]:
    """Means over the windows: all, plain and mixed ones, repeats from afar, and the same bytes where they stand first."""
    losses = byte_losses(model, attention, held, device)
    return _means(losses, held)


def _means(losses: Tensor, held: Held) -> dict[str, float]:
    repeated = held.distance.to(losses.device) > 0
    original = held.original.to(losses.device)
    parts = {
        "loss": losses, "plain": losses[::2], "mixed": losses[1::2], "far": losses[repeated], "first": losses[original],
    }  # fmt: skip
    return {name: round(part.mean().item(), 5) for name, part in parts.items()}


def whole(model: Model, attention: list[Attention], held: Held, device: torch.device) -> dict[str, Any]:
    """The final evaluation, kept by window so that runs can be compared window by window."""
    losses = byte_losses(model, attention, held, device)
    distance = held.distance.to(device)
    borders = distances(model.size.length)
    by_distance, sums, counts = [], [], []
    for low, high in pairwise(borders):
        inside = (distance >= low) & (distance < high)
        by_distance.append(round(losses[inside].mean().item(), 5))
        sums.append((losses * inside).sum(1))
        counts.append(inside.sum(1))
    original = held.original.to(device)
    position = losses.unflatten(1, (BUCKETS, -1)).mean(2)
    return {
        "dense": _means(losses, held),
        "windows": _list(losses.mean(1)),
        "far_windows": _list(torch.stack(sums).sum(0)[1::2] / torch.stack(counts).sum(0)[1::2].clamp_min(1)),
        "first_windows": _list(((losses * original).sum(1) / original.sum(1).clamp_min(1))[1::2]),
        "distances": borders,
        "far_by_distance": by_distance,
        "far_bytes": torch.stack(counts).sum(1).tolist(),
        "position_plain": _list(position[::2].mean(0)),
        "position_mixed": _list(position[1::2].mean(0)),
    }


@torch.no_grad()
def leak(
    model: Model, attention: list[Attention], held: Held, device: torch.device, cuts: int = 96, reach: int = 16
) -> dict[str, Any]:
    """How much worse a byte is predicted, in nats, when all that follows its place is other text; 0 where nothing leaks.

    Returns:
        `leak` and its standard error over the cuts, for the byte right behind the place; `by_distance` for those before.
    """
    size = model.size
    generator = torch.Generator().manual_seed(5)
    windows = -(-cuts // _CUTS_A_WINDOW)
    held = held.first(windows + windows % size.rows)
    base = byte_losses(model, attention, held, device)
    places: list[tuple[int, int]] = []
    rows = []
    for j in range(cuts):
        window = j % windows
        at = int(torch.randint(size.length // 8, size.length - 32, (1,), generator=generator))
        true, other = held.tokens[window], held.tokens[(window + 5) % windows]
        rows.append(torch.cat([true[: at + 1], other[at + 1 :]]))
        places.append((window, at))
    changes = []
    for j in range(0, cuts, size.rows):
        targets = torch.stack([held.tokens[window] for window, _ in places[j : j + size.rows]])[:, 1:]
        inputs = torch.stack(rows[j : j + size.rows])[:, :-1]
        losses = model(inputs.to(device).long(), targets.to(device).long(), attention).float()
        for row, (window, at) in enumerate(places[j : j + size.rows]):
            changes.append((losses[row] - base[window])[at - reach + 1 : at + 1].flip(0))
    found = torch.stack(changes).cpu()
    return {
        "leak": round(found[:, 0].mean().item(), 4),
        "error": round(found[:, 0].std().item() / len(found) ** 0.5, 4),
        "by_distance": _list(found.mean(0)[:8]),
    }


def _list(x: Tensor) -> list[float]:
    return [round(value, 5) for value in x.tolist()]
