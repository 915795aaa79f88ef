"""Text to packed rows, with a position that a checkpoint keeps.

    document | document | docu      each document ends with the end-of-text token; a row is sequence_length + 1 tokens
    ment | document | document      what does not fit goes on in the next row, where it is a document of its own

Every rank reads the rows of all ranks and trains on its own. So the position in the data is one number of documents, whatever
the number of ranks, and a run can go on with more or fewer of them.
"""

from __future__ import annotations

import glob
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

STDLIB = "stdlib"  # the source of Python's standard library, for machines without network
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_END = "<|endoftext|>"


class Source(Protocol):
    """An endless stream of documents that can be left and entered again."""

    tokenizer: PreTrainedTokenizerBase

    def texts(self) -> Iterator[str]:
        """Texts to train a tokenizer on."""

    def hold_out(self, tokens: int) -> list[np.ndarray]:
        """Remove documents of at least so many tokens from the front of the data, and return them."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def open_source(*, text: str | None = None, shards: str | None = None, dataset: dict[str, Any] | None = None,
                column: str = "text", seed: int = 0) -> Source:  # fmt: skip
    """The section `data` of the YAML file: one of text, shards and dataset.

    Raises:
        ValueError: none or several are given, or a pattern matches no file. ImportError: `datasets` is not installed.
    """
    given = {"text": text, "shards": shards, "dataset": dataset}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"data has {given}: give exactly one of text, shards and dataset")
    return HubData(dataset, column, seed) if dataset is not None else Files(text or shards or "", seed)


class Files:
    """Documents in files, which are shuffled anew for each epoch.

    A text file is one document. A shard (.npy, token numbers in one dimension) holds many, each with its end-of-text token.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, pattern: str, seed: int) -> None:
        if pattern == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            paths = [str(p) for p in root.rglob("*.py") if not _LEFT_OUT.intersection(p.relative_to(root).parts)]
        else:
            paths = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not paths:
            raise ValueError(f"data: {pattern!r} matches no file: give a pattern such as '/data/**/*.txt', or '{STDLIB}'")
        self.seed, self.pattern = seed, pattern
        self.paths = sorted(paths)
        random.Random(seed).shuffle(self.paths)
        self.epoch = self.file = self.document = 0

    def texts(self) -> Iterator[str]:
        if shards := [path for path in self.paths if path.endswith(".npy")]:
            raise ValueError(f"tokenizer: {shards[0]} has tokens already: give the tokenizer that made them, tokenizer.from")
        return (Path(path).read_text(errors="replace") for path in self.paths)

    def hold_out(self, tokens: int) -> list[np.ndarray]:
        held: list[np.ndarray] = []
        while sum(map(len, held)) < tokens:
            if len(self.paths) < 2:
                raise ValueError(f"data: {self.pattern!r} has too few files to hold out {tokens} tokens: give more")
            held += self._read(self.paths.pop(0))
        return held

    def _read(self, path: str) -> list[np.ndarray]:
        if not path.endswith(".npy"):
            return [_encode(self.tokenizer, Path(path).read_text(errors="replace"))]
        tokens = np.load(path, mmap_mode="r")
        ends = np.flatnonzero(tokens == self.tokenizer.eos_token_id) + 1
        return [part for part in np.split(tokens, ends) if len(part)]

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            order = random.Random(f"{self.seed} {self.epoch}").sample(self.paths, len(self.paths))
            while self.file < len(order):
                documents = self._read(order[self.file])
                while self.document < len(documents):
                    self.document += 1
                    yield documents[self.document - 1]
                self.file, self.document = self.file + 1, 0
            self.epoch, self.file = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"files": len(self.paths), "epoch": self.epoch, "file": self.file, "document": self.document}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["files"] != len(self.paths):
            raise ValueError(
                f"data: {self.pattern!r} matches {len(self.paths)} files, and {state['files']} when the checkpoint was saved: "
                "give the same data, or begin a new run with another `out`"
            )
        self.epoch, self.file, self.document = state["epoch"], state["file"], state["document"]


class HubData:
    """Documents of a data set of the library `datasets`: streamed in its own order, or local and shuffled once."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, arguments: dict[str, Any], column: str, seed: int) -> None:
        try:
            from datasets import Dataset, load_dataset
        except ImportError as error:
            raise ImportError("data.dataset needs the library: pip install datasets; or give data.text") from error
        data = load_dataset(**arguments)
        if isinstance(data, dict):
            raise ValueError(f"data.dataset has no split: give one of {', '.join(data)}, such as split: {next(iter(data))}")
        if column not in (data.column_names or [column]):
            raise ValueError(f"data.column={column!r}: the data set has {', '.join(data.column_names)}")
        self.data = data.shuffle(seed=seed).to_iterable_dataset() if isinstance(data, Dataset) else data
        self.column, self.epoch, self.place, self.held = column, 0, 0, 0

    def texts(self) -> Iterator[str]:
        return (example[self.column] for example in self.data.take(10_000))

    def hold_out(self, tokens: int) -> list[np.ndarray]:
        held: list[np.ndarray] = []
        for example in self.data:
            held.append(_encode(self.tokenizer, example[self.column]))
            if sum(map(len, held)) >= tokens:
                break
        self.held = len(held)
        return held

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            self.data.set_epoch(self.epoch)  # a state that was loaded is that of its epoch only
            for example in self.data:
                self.place += 1
                if self.place > self.held:  # counted here: the state of `data.skip(n)` does not resume exactly
                    yield _encode(self.tokenizer, example[self.column])
            if self.place <= self.held:
                raise ValueError(f"data.dataset has {self.place} documents, all held out: give more, or fewer evaluation_rows")
            self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place, "data": self.data.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]
        self.data.load_state_dict(state["data"])


class Rows(IterableDataset):  # type: ignore[type-arg]
    """The rows of one step after another, for all ranks: `tokens` and `documents`, both int32 `[rows, length + 1]`.

    Its state is the source's before the document that is being read, and how many tokens of that are used.
    """

    def __init__(self, source: Source, *, rows: int, length: int) -> None:
        self.source, self.shape = source, (rows, length + 1)
        self._before, self._taken = source.state_dict(), 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        documents = iter(self.source)
        document, number = next(documents) if self._taken else np.empty(0, np.int32), 0
        while True:
            tokens, numbers = np.empty((2, self.shape[0] * self.shape[1]), np.int32)
            filled = 0
            while filled < len(tokens):
                if self._taken == len(document):
                    self._before, self._taken = self.source.state_dict(), 0
                    document, number = next(documents), number + 1
                part = document[self._taken :][: len(tokens) - filled]
                tokens[filled : filled + len(part)], numbers[filled : filled + len(part)] = part, number
                filled, self._taken = filled + len(part), self._taken + len(part)
            yield {"tokens": _rows(tokens, self.shape), "documents": _rows(numbers, self.shape)}

    def state_dict(self) -> dict[str, Any]:
        return {"source": self._before, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before, self._taken = state["source"], state["taken"]
        self.source.load_state_dict(self._before)


def hold_out(source: Source, *, rows: int, length: int) -> dict[str, Tensor]:
    """Packed rows for evaluation, which training does not see."""
    held = source.hold_out(rows * (length + 1))
    tokens = np.concatenate(held)[: rows * (length + 1)]
    numbers = np.repeat(np.arange(len(held), dtype=np.int32), list(map(len, held)))[: len(tokens)]
    return {"tokens": _rows(tokens, (rows, length + 1)), "documents": _rows(numbers, (rows, length + 1))}


def train_tokenizer(source: Source, vocabulary: int, folder: Path) -> None:
    """Write a byte-level BPE tokenizer, in which each digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(source.texts(), trainer)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=_END, eos_token=_END).save_pretrained(unfinished)
    unfinished.replace(folder)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer with an end-of-text token.

    Raises:
        ValueError: it has none.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name} has no eos_token, which ends each document: give another tokenizer")
    tokenizer.model_max_length = int(1e30)  # documents may be longer than a row
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray([*tokens, tokenizer.eos_token_id], dtype=np.int32)


def _rows(flat: np.ndarray, shape: tuple[int, int]) -> Tensor:
    return torch.from_numpy(flat.astype(np.int32).reshape(shape))
