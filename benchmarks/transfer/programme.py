"""A worker of the programme: takes runs from a queue, one after the other, until none is left that the time allows.

    PYTHONPATH=... python -m transfer.programme --queue queue.json --out results --seconds 900

Start one for each GPU (`CUDA_VISIBLE_DEVICES`), with the same `--out`: a run is taken by one of them. The queue may be
changed meanwhile; an entry with `"worker": 1` is left to that worker. Each run has a file `NAME.jsonl`, written as it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by deterministic matrix products

import torch

from . import forms
from .model import Size
from .text import Batches, Corpus, Rows, held_windows, read_corpus
from .training import Run, train


def main() -> None:
    """Work through the queue."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = _log_to(arguments.out / f"worker{arguments.worker}.log")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = Size(**json.loads(arguments.size))
    rows = Rows(size.length)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_corpus)
        log(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
        if device.type == "cuda":
            forms.use_cudnn()
        corpus: Corpus = reading.result()
    log(
        f"{len(corpus.train)} bytes to train on, {len(corpus.held)} held out, "
        f"{corpus.packages} packages, held out: {' '.join(corpus.held_packages)}"
    )
    held = held_windows(corpus.held, rows, arguments.windows).to(device)
    log(f"ready after {time.process_time():.0f} s of CPU time")
    while (run := _take(arguments.queue, arguments.out, _deadline(arguments), arguments.worker)) is not None:
        log(f"{run.name} begins")
        try:
            batches = Batches(corpus.train, rows, size.rows, run.seed)
            with (arguments.out / f"{run.name}.jsonl").open("w") as file:
                train(run, size, device, batches, held, _Recorder(file, log, run.name), _deadline(arguments))
        except Exception:
            log(f"{run.name} FAILED\n{traceback.format_exc()[-3000:]}")
    log("nothing left to do in time")


class _Recorder:
    """Writes records as they come, and says the most important in the log."""

    def __init__(self, file: Any, log: Any, name: str) -> None:
        self._file, self._log, self._name = file, log, name

    def __call__(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        shown = {key: value for key, value in record.items() if not isinstance(value, list) and key != "size"}
        self._log(f"{self._name} {json.dumps(shown)}")


def _take(queue: Path, out: Path, deadline: float, worker: int) -> Run | None:
    """The first run that nobody has taken and that ends in time."""
    known = {field.name for field in fields(Run)}
    for entry in json.loads(queue.read_text()):
        fields_given: dict[str, Any] = {key: value for key, value in entry.items() if key in known}
        fields_given["forms"] = tuple(fields_given.get("forms", ()))
        run = Run(**fields_given)
        if time.time() + run.need > deadline or entry.get("worker", worker) != worker:
            continue
        try:
            (out / f"{run.name}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        return run
    return None


def _deadline(arguments: argparse.Namespace) -> float:
    """When to stop: `deadline` in the output folder, seconds since 1970, overrules the argument."""
    file = arguments.out / "deadline"
    return float(file.read_text()) if file.exists() else arguments.end


def _log_to(path: Path) -> Any:
    began = time.time()

    def log(line: str) -> None:
        with path.open("a") as file:
            file.write(f"{time.time() - began:7.1f} {line}\n")

    return log


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--size", default="{}", help="JSON, fields of model.Size")
    parser.add_argument("--windows", type=int, default=256, help="held out, for the final evaluation")
    parser.add_argument("--worker", type=int, default=0)
    arguments = parser.parse_args()
    arguments.end = time.time() + arguments.seconds
    return arguments


if __name__ == "__main__":
    main()
