"""Real text that every machine has: the source of the Python standard library, read as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Tests repeat themselves; tables of characters are not prose; site-packages differ from machine to machine.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
HELD_OUT = 0.05  # share of the text at its end, for validation
SHORTEST_FILE = 8_192  # bytes: a short file teaches nothing about a long context


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes for training and, from the end of the text, bytes for validation."""

    train: Tensor  # [bytes] uint8
    validation: Tensor  # [bytes] uint8
    source: str
    files: int
    sha256: str

    def batch(self, step: int, *, batch: int, length: int, seed: int) -> Tensor:
        """The training windows of a step, [batch, length + 1]; a window is not seen twice before all have been seen."""
        windows = (len(self.train) - 1) // length
        rows = []
        for number in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(number, windows)
            order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed + epoch))
            start = int(order[place]) * length
            rows.append(self.train[start : start + length + 1])
        return torch.stack(rows).long()

    def validation_windows(self, count: int, *, length: int) -> Tensor:
        """Windows spread evenly over the held-out tail, [count, length + 1]."""
        starts = torch.linspace(0, len(self.validation) - length - 1, count).long()
        return torch.stack([self.validation[start : start + length + 1] for start in starts]).long()


def read_text(folder: str = "", *, length: int) -> Text:
    """All Python files of a folder (by default the standard library's) of some length, in the order of their paths.

    Raises:
        ValueError: where there is too little text for windows of `length` bytes.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    left_out = LEFT_OUT if not folder else {"__pycache__"}
    paths = [path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts)]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    files = [content for content in (path.read_bytes() for path in paths) if len(content) >= SHORTEST_FILE]
    content = b"".join(files)
    held_out = max(int(HELD_OUT * len(content)), length + 1)
    if len(content) < held_out + 2 * length:
        raise ValueError(f"{root} has {len(content):,} bytes of Python source: too little for --seq-len {length}")
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return Text(
        train=data[:-held_out],
        validation=data[-held_out:],
        source=str(root),
        files=len(files),
        sha256=hashlib.sha256(content).hexdigest(),
    )
