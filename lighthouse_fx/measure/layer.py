"""One attention layer, measured: Lighthouse as the backend compiles it, dense attention, attention on S alone, the floor.

`lighthouse bench` and `benchmarks/layer.py` are this. The layer is measured as it stands in a model: queries, keys and values
lie as projections leave them, `[B, N, H, D]`, and so does the output. Before it is timed, it is checked against plain PyTorch.
Where many layers are compared, `measure_function` does without the compiler, which takes most of the time of a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from lighthouse_fx.arguments import is_integer
from lighthouse_fx.extras import new_figure, save_figure
from lighthouse_fx.functional import lighthouse_attention
from lighthouse_fx.kernels import Pyramid, reference
from lighthouse_fx.kernels.sdpa import in_order, preferred
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.pyramid import pyramid_over

from . import timing


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """An attention layer: `N` tokens, `H` query heads, `G` key/value heads of `D`, in one batch row and type.

    Raises:
        ValueError: there is no such layer.
    """

    length: int
    heads: int = 8
    groups: int = 8
    dim: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("length", "heads", "groups", "dim"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name}={value!r}: give an integer of at least 1")
        if self.heads % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide heads={self.heads}: give a divisor, as many as the model has"
            )
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype={self.dtype!r}: give 'bfloat16', 'float16' or 'float32'")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """What was measured of one layer. Times are milliseconds, forward and forward plus backward.

    Attributes:
        layer: Lighthouse, compiled; launched: the same without a CUDA graph; dense: dense attention, None where it was not run;
        launched_dense: the same without a CUDA graph; inner: the same stock attention on S entries alone.
        floor: least time of everything around the attention, by memory traffic (SPEC.md, "Cost") over copy bandwidth.
        memory: bytes that forward plus backward add at most, output and gradients included; None on a CPU.
    """

    shape: LayerShape
    topk: int
    gathered: int
    layer: tuple[float, float]
    launched: tuple[float, float]
    dense: tuple[float, float] | None
    launched_dense: tuple[float, float] | None
    inner: tuple[float, float]
    floor: float
    memory: int | None

    @property
    def over_inner(self) -> float:
        """The whole layer's time over that of attention on S alone."""
        return self.layer[1] / self.inner[1]

    @property
    def speedup(self) -> float | None:
        """Dense time over the layer's."""
        return self.dense[1] / self.layer[1] if self.dense else None

    @property
    def over_floor(self) -> float:
        """The time around the attention over its floor."""
        return (self.layer[1] - self.inner[1]) / self.floor


def measure_layer(
    shape: LayerShape, config: LighthouseConfig, device: torch.device, *, bandwidth: float, dense: bool = True
) -> LayerTimes:
    """Measure one layer.

    Args:
        bandwidth: bytes a second of a copy on this device, for the floor.
        dense: whether to run dense attention, whose time grows with the square of the length.

    Raises:
        AssertionError: the layer's output or a gradient is not what plain PyTorch computes: no figure is worth anything then.
        ValueError: the layer would stay dense, or it has a local branch.
    """
    if config.local_window:
        raise ValueError(
            f"local_window={config.local_window}: this measures a pyramid alone. Measure a local branch with "
            "benchmarks/local_branch.py, or give local_window=0"
        )
    pyramid = pyramid_over(shape.length, config)
    gathered = pyramid.gathered
    check_gathers(shape.length, config)
    tokens = _inputs(shape, shape.length, device)
    torch.compiler.reset()
    compiled = torch.compile(
        _attention,
        backend="lighthouse",
        fullgraph=True,
        dynamic=False,
        options={field.name: getattr(config, field.name) for field in fields(config)} | {"max_kept": 1.0},
    )
    _check(compiled, shape, config, tokens)
    layer = _times(compiled, tokens, device)
    launched = _times(compiled, tokens, device, captured=False)
    memory = timing.added_memory(lambda: _both(compiled, tokens), device)
    del tokens
    with fastest_attention(device):
        entries = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in _inputs(shape, gathered, device)]
        inner = _times(_inner, entries, device)
        del entries
        dense_times = launched_dense = None
        if dense:
            tokens = _inputs(shape, shape.length, device)
            dense_times = _times(_attention, tokens, device)
            long = dense_times[1] > 100
            launched_dense = dense_times if long else _times(_attention, tokens, device, captured=False)
    return LayerTimes(
        shape=shape,
        topk=pyramid_over(shape.length, config).topk,
        gathered=gathered,
        layer=layer,
        launched=launched,
        dense=dense_times,
        launched_dense=launched_dense,
        inner=inner,
        floor=1000 * traffic(shape, gathered) / bandwidth,
        memory=memory,
    )


def check_gathers(length: int, config: LighthouseConfig, max_kept: float = 1.0) -> None:
    """Raise a ValueError where a layer of so many tokens would stay dense."""
    pyramid, default = pyramid_over(length, config), LighthouseConfig()
    if pyramid.coarse == 0 or pyramid.gathered > max_kept * length:
        other = pyramid_over(length, default)
        helps = other.coarse and not default.keeps_too_much(other.gathered, length)
        advice = f"fewer, such as levels={other.levels}, topk={other.topk}" if helps else "a longer sequence"
        raise ValueError(
            f"levels={config.levels}, pooling={config.pooling}, topk={pyramid.topk} gather {pyramid.gathered:,} of {length:,} "
            f"tokens, so attention stays dense: give {advice}"
        )


def measure_function(shape: LayerShape, config: LighthouseConfig, device: torch.device) -> tuple[float, int | None]:
    """Milliseconds of a layer that calls `lighthouse_attention`, forward plus backward, and the bytes that it adds.

    On a GPU its CUDA graph launches the kernels that a compiled layer launches, and no compiler is needed to capture it.

    Raises:
        AssertionError: as of `measure_layer`.
    """

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, N, H, D], [B, N, G, D] twice
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=gqa, config=config).transpose(1, 2)

    tokens = _inputs(shape, shape.length, device)
    _check(layer, shape, config, tokens)
    memory = timing.added_memory(lambda: _both(layer, tokens), device)
    grad = torch.randn_like(tokens[0])
    return timing.milliseconds(lambda: _both(layer, tokens, grad), device), memory


def measure_dense(shape: LayerShape, device: torch.device) -> float:
    """Milliseconds of dense attention, forward plus backward."""
    tokens = _inputs(shape, shape.length, device)
    grad = torch.randn_like(tokens[0])
    with fastest_attention(device):
        _both(_attention, tokens, grad)
        return timing.milliseconds(lambda: _both(_attention, tokens, grad), device)


def table(rows: Sequence[LayerTimes], title: str) -> Table:
    """The measurements as a rich table."""
    result = Table(title=title, title_justify="left")
    for column in (
        "N", "heads", "D", "k", "S", "layer fwd", "fwd+bwd", "attention on S", "dense",
        "over attention on S", "speed over dense", "around / floor", "memory",
    ):  # fmt: skip
        result.add_column(column, justify="right")
    for row in rows:
        shape = row.shape
        result.add_row(
            f"{shape.length:,}",
            f"{shape.heads}/{shape.groups}",
            str(shape.dim),
            f"{row.topk:,}",
            f"{row.gathered:,}",
            f"{row.layer[0]:.3f}",
            f"{row.layer[1]:.3f}",
            f"{row.inner[1]:.3f}",
            f"{row.dense[1]:.2f}" if row.dense else "-",
            f"{row.over_inner:.2f}x",
            f"{row.speedup:.2f}x" if row.speedup else "-",
            f"{row.over_floor:.2f}x",
            f"{row.memory / 1e6:,.0f} MB" if row.memory is not None else "-",
        )
    return result


def save_json(rows: Iterable[LayerTimes], path: Path, *, about: dict[str, Any]) -> None:
    """Write the measurements, with the card and the versions, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")


def save_picture(rows: Sequence[LayerTimes], path: Path, *, title: str) -> None:
    """Draw time against length; needs matplotlib, the extra `plot`."""
    figure = new_figure(12, 4.8)
    left, right = figure.subplots(1, 2)
    lengths = [row.shape.length for row in rows]
    dense = [(row.shape.length, row.dense[1], row.speedup) for row in rows if row.dense]
    if dense:
        left.plot([d[0] for d in dense], [d[1] for d in dense], "o-", color="#888888", label="dense attention")
    left.plot(lengths, [row.layer[1] for row in rows], "o-", color="#d9480f", label="Lighthouse layer")
    left.plot(lengths, [row.inner[1] for row in rows], "o--", color="#1971c2", label="attention on S alone")
    left.plot(lengths, [row.floor for row in rows], ":", color="#2b8a3e", label="memory floor of the rest")
    left.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="forward plus backward, ms")
    right.axhline(1, color="#888888", linewidth=1)
    if dense:
        right.plot([d[0] for d in dense], [d[2] for d in dense], "o-", color="#d9480f", label="speed over dense")
    right.plot(lengths, [row.over_inner for row in rows], "o--", color="#1971c2", label="time over attention on S")
    right.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="ratio")
    for axis in (left, right):
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


# --- what is timed ----------------------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, N, H, D]` as a model has it, to the same."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa).transpose(1, 2)


def _inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[B, H, S, D]`, the layout that suits the stock kernels, to the same."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _inputs(shape: LayerShape, length: int, device: torch.device) -> list[Tensor]:
    dtype = getattr(torch, shape.dtype)
    return [
        torch.randn(1, length, heads, shape.dim, dtype=dtype, device=device, requires_grad=True)
        for heads in (shape.heads, shape.groups, shape.groups)
    ]


def _both(
    attention: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = attention(*tensors)
    return out, torch.autograd.grad(out, tensors, out.detach() if grad is None else grad)


def _times(
    attention: Callable[..., Tensor], tensors: Sequence[Tensor], device: torch.device, *, captured: bool = True
) -> tuple[float, float]:
    grad = torch.randn_like(tensors[0])
    _both(attention, tensors, grad)
    forward = timing.milliseconds(lambda: attention(*tensors), device, captured=captured)
    return forward, timing.milliseconds(lambda: _both(attention, tensors, grad), device, captured=captured)


def fastest_attention(device: torch.device) -> AbstractContextManager[Any]:
    """The stock attention that kernel="auto" prefers, for what is compared with: no straw man."""
    if device.type != "cuda":
        return nullcontext()
    return in_order(preferred(device))


def traffic(shape: LayerShape, gathered: int) -> int:
    """Least bytes that move around the attention, forward and backward. Source: SPEC.md, "Cost"."""
    row = shape.dim * int(getattr(torch, shape.dtype).itemsize)
    q, kv = shape.heads * row, 2 * shape.groups * row
    k = kv // 2
    forward = shape.length * ((q + k) + (q + kv) + q) + gathered * ((q + kv) + q)
    backward = shape.length * (q + (q + kv)) + gathered * (q + (q + kv))
    return forward + backward


def _check(
    attention: Callable[..., Tensor], shape: LayerShape, config: LighthouseConfig, tokens: Sequence[Tensor]
) -> None:
    """Output and gradients against plain PyTorch on the same selection: of one group of heads, as each selects for itself."""
    grad = torch.randn_like(tokens[0])
    out, grads = _both(attention, tokens, grad)
    share = shape.heads // shape.groups
    found = [x[:, :, :heads].clone() for x, heads in zip((out, *grads), (share, share, 1, 1), strict=True)]
    del out, grads
    narrow = [x[:, :, :heads].detach() for x, heads in zip(tokens, (share, 1, 1), strict=True)]
    expected = _plain(narrow, grad[:, :, :share], pyramid_over(shape.length, config))
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        off = ((x.float() - y.float()).norm() / y.float().norm()).item()
        assert off < 0.02, f"{name} is {off:.1%} off plain PyTorch's: nothing is measured with a build that is wrong"


def _plain(tokens: Sequence[Tensor], grad: Tensor, pyramid: Pyramid) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().transpose(1, 2) for x in tokens)
    window_q, window_k = (reference.norm_scores(x, 1, pyramid) for x in (q, k))
    entries, slots = reference.choose_windows(window_q, window_k, pyramid)
    pooled = [reference.gather(x, entries, pyramid).requires_grad_() for x in (q, k, v)]
    inner = _inner(*pooled)
    out = reference.scatter(inner.detach(), slots, pyramid, is_causal=True)
    outer = reference.scatter_backward(grad.transpose(1, 2), entries, pyramid, is_causal=True)
    grads = [
        reference.gather_backward(g, slots, pyramid).transpose(1, 2) for g in torch.autograd.grad(inner, pooled, outer)
    ]
    return out.transpose(1, 2), *grads
