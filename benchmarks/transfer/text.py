"""The text of the programme: Python source as bytes, split by package, and rows in which segments come back from far behind.

No text is downloaded: it is the Python packages that the machine has. Packages are held out whole, chosen by a hash of their
name; a file that is there twice counts once. Half of all rows are *mixed*: running text in which earlier segments are
repeated at a distance that no sliding window reaches, so that long range can be learnt, and measured by itself.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_HELD_OUT = 6  # one package in so many
_OF_ONE_PACKAGE = 300_000  # bytes of it that are held out at most, so that no package decides the result
_COPIES = ("_vendor", "vendored", "third_party", "extern", "externals")  # folders of other packages' code
_FILE = (500, 300_000)  # bytes


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text held out, of different packages."""

    train: np.ndarray
    held: np.ndarray
    packages: int
    held_packages: tuple[str, ...]


def read_corpus(limit: int = 400_000_000) -> Corpus:
    """The machine's Python packages; the same on every call."""
    files = sorted({(package, path) for root in _roots() for package, path in _files(root)})
    random.Random(0).shuffle(files)
    seen: set[bytes] = set()
    train, held, of_package = bytearray(), bytearray(), dict[str, int]()
    packages: set[str] = set()
    for package, path in files:
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest = hashlib.sha1(content).digest()
        if not _FILE[0] < len(content) < _FILE[1] or digest in seen:
            continue
        seen.add(digest)
        packages.add(package)
        if not _is_held(package):
            train += content + b"\0"
        elif of_package.get(package, 0) < _OF_ONE_PACKAGE:
            of_package[package] = of_package.get(package, 0) + len(content)
            held += content + b"\0"
        if len(train) > limit:
            break
    return Corpus(
        np.frombuffer(bytes(train), np.uint8),
        np.frombuffer(bytes(held), np.uint8),
        len(packages),
        tuple(sorted(of_package)),
    )


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    known = [paths["stdlib"], paths["purelib"], paths["platlib"], "/usr/lib/python3/dist-packages"]
    return sorted({Path(path).resolve() for path in known if Path(path).is_dir()})


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """The Python files below a root, with the name of the package at its top."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if parts[0] in ("site-packages", "dist-packages") or any(part in _COPIES for part in parts):
            continue
        yield parts[0].removesuffix(".py").lower(), path


def _is_held(package: str) -> bool:
    return int.from_bytes(hashlib.sha256(package.encode()).digest()[:4], "big") % _HELD_OUT == 0


@dataclass(frozen=True)
class Copy:
    """Bytes `[start, start + length)` of a row are those `distance` before."""

    start: int
    length: int
    distance: int


@dataclass(frozen=True)
class Rows:
    """Rows of `length + 1` bytes cut from a text.

    In a mixed row of 16,384 the segments repeated have 256 to 1,024 bytes, at distances of 4,096 to 16,384; each byte of
    the running text is repeated once at most, so a repeat's distance is that of its nearest occurrence (unless the source
    repeats itself). The first 32 bytes of a repeat, by which it is recognised, are not measured. Other lengths in proportion.
    """

    length: int

    @property
    def segment(self) -> tuple[int, int]:
        """The shortest and longest segment that is repeated."""
        return self.length // 64, self.length // 16

    @property
    def nearest(self) -> int:
        """The shortest distance of a repeat."""
        return self.length // 4

    @property
    def unmeasured(self) -> int:
        """Bytes at the start of a repeat by which it is recognised."""
        return max(2, self.length // 512)

    def plain(self, text: np.ndarray, start: int) -> np.ndarray:
        """Running text from a place on."""
        return text[start : start + self.length + 1]

    def mixed(self, text: np.ndarray, start: int, rng: random.Random) -> tuple[np.ndarray, list[Copy]]:
        """Running text from a place on, with segments repeated: from where it can be, half of the row is repeats."""
        row = np.empty(self.length + 1, np.uint8)
        fresh: list[tuple[int, int]] = []  # place and length of what has not been repeated
        copies: list[Copy] = []
        at = 0
        while at < len(row):
            eligible = [i for i, (place, _) in enumerate(fresh) if at - place >= self.nearest]
            if eligible and rng.random() < 0.5:
                place, size = fresh.pop(rng.choice(eligible))
                size = min(size, len(row) - at)
                row[at : at + size] = row[place : place + size]
                copies.append(Copy(at, size, at - place))
            else:
                size = min(rng.randint(*self.segment), len(row) - at)
                row[at : at + size] = text[start : start + size]
                fresh.append((at, size))
                start += size
            at += size
        return row, copies


class Batches:
    """Endless training rows, even ones plain and odd ones mixed; the same for the same seed, whatever is trained on them."""

    def __init__(self, text: np.ndarray, rows: Rows, batch: int, seed: int) -> None:
        self._text, self._rows, self._batch = text, rows, batch
        self._rng = random.Random(1_000_003 * (seed + 1))

    def next(self) -> Tensor:
        """uint8 `[batch, length + 1]`"""
        rows = []
        for i in range(self._batch):
            start = self._rng.randrange(len(self._text) - self._rows.length - 1)
            mixed = i % 2 == 1
            row = self._rows.mixed(self._text, start, self._rng)[0] if mixed else self._rows.plain(self._text, start)
            rows.append(row)
        return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Held:
    """Held-out windows, even ones plain and odd ones mixed, and what of their targets is repeated.

    Attributes:
        tokens: uint8 `[W, N + 1]`.
        distance: int32 `[W, N]`, for each target how far behind the segment lies of which it is a repeat; 0: it is none, or
            among the bytes by which a repeat is recognised.
        original: bool `[W, N]`, the same targets where they stand first.
    """

    tokens: Tensor
    distance: Tensor
    original: Tensor

    def first(self, count: int) -> Held:
        """The first windows alone."""
        return Held(self.tokens[:count], self.distance[:count], self.original[:count])

    def to(self, device: torch.device) -> Held:
        """The same on a device."""
        return Held(self.tokens.to(device), self.distance.to(device), self.original.to(device))


def held_windows(text: np.ndarray, rows: Rows, count: int) -> Held:
    """Windows spread evenly over the held-out text; without overlap where it is long enough."""
    rng = random.Random(7)
    starts = np.linspace(0, len(text) - rows.length - 1, count).astype(int)
    tokens = np.empty((count, rows.length + 1), np.uint8)
    distance = torch.zeros(count, rows.length, dtype=torch.int32)
    original = torch.zeros(count, rows.length, dtype=torch.bool)
    for i, start in enumerate(starts):
        if i % 2 == 0:
            tokens[i] = rows.plain(text, start)
            continue
        tokens[i], copies = rows.mixed(text, start, rng)
        for copy in copies:
            # Target j of the row is its byte j + 1.
            targets = slice(copy.start + rows.unmeasured - 1, copy.start + copy.length - 1)
            distance[i, targets] = copy.distance
            original[i, targets.start - copy.distance : targets.stop - copy.distance] = True
    return Held(torch.from_numpy(tokens), distance, original)
