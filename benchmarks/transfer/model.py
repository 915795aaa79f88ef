"""A byte-level model in the style of Llama, 27M parameters at the programme's size, whose attention is given from outside.

Tokens of all rows lie flat, `[rows * length, width]`, so that what is compiled never sees how a row is cut, and each part is
compiled once for all forms of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stock import compiled_on_gpu

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # three [rows, heads, length, dim] -> one


@dataclass(frozen=True)
class Size:
    """The size of a model and of its steps."""

    length: int = 16_384
    width: int = 512
    layers: int = 8
    heads: int = 4
    rows: int = 2
    theta: float = 500_000.0

    @property
    def dim(self) -> int:
        """Dimensions of a head."""
        return self.width // self.heads


def _normed(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, eps=1e-6).to(dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _project(
    x: Tensor, scale: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of flat tokens: each `[tokens, heads, dim]`."""
    q, k, v = F.linear(_normed(x, scale, dtype), weight.to(dtype)).view(len(x), 3, heads, -1).unbind(1)
    return _rotated(q, cos, sin).contiguous(), _rotated(k, cos, sin).contiguous(), v.contiguous()


def _finish(
    x: Tensor, attended: Tensor, out: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype
) -> Tensor:
    """What follows attention in a block. The residual stream is float32."""
    x = x + F.linear(attended.flatten(1), out.to(dtype))
    hidden = _normed(x, scale, dtype)
    return x + F.linear(F.silu(F.linear(hidden, gate.to(dtype))) * F.linear(hidden, up.to(dtype)), down.to(dtype))


def _byte_losses(x: Tensor, scale: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    logits = F.linear(_normed(x, scale, dtype), head.to(dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none")


project, finish, byte_losses = (
    compiled_on_gpu(function, fullgraph=True, dynamic=False) for function in (_project, _finish, _byte_losses)
)


class Block(nn.Module):
    """One layer; its parts are functions above."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, inner, small = size.width, 3 * size.width, 0.02 / math.sqrt(2 * size.layers)
        self.before, self.between = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv, self.gate, self.up = (_matrix(rows, width, 0.02) for rows in (3 * width, inner, inner))
        self.out, self.down = _matrix(width, width, small), _matrix(width, inner, small)


class Model(nn.Module):
    """Bytes in, the loss of each next byte out."""

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.embedding = _matrix(256, size.width, 0.02)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.last = nn.Parameter(torch.ones(size.width))
        self.head = _matrix(256, size.width, 0.02)
        rates = size.theta ** (-torch.arange(0, size.dim, 2).float() / size.dim)
        angles = (torch.arange(size.length).float()[:, None] * rates).repeat(size.rows, 1)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.to(device)

    def forward(self, inputs: Tensor, targets: Tensor, attention: list[Attention]) -> Tensor:
        """The loss of every target, `[rows, length]`; one attention for each layer."""
        rows, length = inputs.shape
        x = F.embedding(inputs.flatten(), self.embedding)
        for block, attend in zip(self.blocks, attention, strict=True):
            flat = project(x, block.before, block.qkv, self.cos, self.sin, self.size.heads, self.dtype)
            q, k, v = (part.view(rows, length, *part.shape[1:]).transpose(1, 2) for part in flat)
            attended = attend(q, k, v).transpose(1, 2).reshape(rows * length, self.size.heads, -1)
            x = finish(x, attended, block.out, block.between, block.gate, block.up, block.down, self.dtype)
        losses: Tensor = byte_losses(x, self.last, self.head, targets.flatten(), self.dtype)
        return losses.view(rows, length)


def _matrix(rows: int, columns: int, deviation: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * deviation)
