"""How long something takes on a device, and how much memory it adds. Medians; nothing of the device's settings is touched.

On a GPU a call is captured into a CUDA graph and its replays are timed by events, which leaves the launches out: they overlap
with other work in a model, or are themselves captured. What takes seconds is timed as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

_LONG_MS = 200.0  # launches no longer matter, and few repetitions do
_BUDGET_MS = 400.0

Call = Callable[[], object]


def milliseconds(call: Call, device: torch.device, *, captured: bool = True) -> float:
    """The median time of a call that has been made before.

    Args:
        captured: on a GPU, time the replays of a graph instead of launches one by one.
    """
    if device.type != "cuda":
        return _wall_time(call)
    once = _event_time(call, 1)
    if once > _LONG_MS:
        return once
    if captured:
        call = _capture(call)
        call()
        once = _event_time(call, 1)
    return _event_time(call, max(7, min(100, round(_BUDGET_MS / max(once, 1e-3)))))


def added_memory(call: Call, device: torch.device) -> int | None:
    """The most bytes that a call has in use beyond what was in use before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def copy_bandwidth(device: torch.device, *, size: int = 2**30) -> float:
    """Bytes a second, read plus written, of a large copy on the device: the ceiling of what only moves memory."""
    if device.type != "cuda":
        size //= 16
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    copy()
    # In a CUDA graph a copy takes another way, and a quarter longer.
    return 2 * size / (milliseconds(copy, device, captured=False) / 1000)


def _event_time(call: Call, repetitions: int) -> float:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return float(median(start.elapsed_time(end) for start, end in pairs))


def _capture(call: Call) -> Call:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _wall_time(call: Call) -> float:
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _BUDGET_MS and len(times) < 20):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)
