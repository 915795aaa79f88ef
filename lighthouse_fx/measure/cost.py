"""What one attention layer costs, predicted from its shape and a card's rates: milliseconds and bytes, without a GPU.

Attention is floating-point operations (SPEC.md, "Cost") at the rate that stock attention reaches: it rises with the length,
until the card's power holds it, and falls for narrow heads. What Lighthouse adds around it is the least traffic at the speed
of a copy, and the start of its kernels. An H100's figures for that are fitted to benchmarks/results/layer.json, how the
rate falls for narrow heads to its neighbour layer_narrow_heads.json, how it rises with the heads to cost_model.json.
tests/unit/lighthouse_fx/test_cost_model.py compares the model with those; docs/choosing_a_pyramid.md says how far off it is,
and what was fitted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from lighthouse_fx.arguments import is_number
from lighthouse_fx.passes.config import LighthouseConfig
from lighthouse_fx.passes.pyramid import pyramid_over

from . import timing
from .layer import LayerShape, fastest_attention, traffic

_HALVES = ("bfloat16", "float16")
_BACKWARD = 3.5  # forward plus backward over forward; source: SPEC.md, "Cost"
# The exponentials of a score take as long as this many dimensions of its two products; fitted to heads of 64 and 128.
_SOFTMAX_DIMS = 43
_DIMS_AT_ONCE = 64
_REFERENCE_DIM, _REFERENCE_HEADS = 128, 8
_HEADS_COUNT = 0.2  # twice the heads reach a rate at a length that is this power of two shorter; fitted to 16 and 32 heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The rates of a device, in one of `dtypes`.

    Attributes:
        matmul: floating-point operations a second of a large matrix product.
        attention: the same of stock causal attention, forward plus backward, heads of 128, a very long sequence.
        bandwidth: bytes a second of a large copy, read plus written.
        half_length: the length at which attention of 8 heads reaches half of the rate that it would reach if power did not
            hold it;
        headroom: that rate, over `attention`.
        start: seconds that the kernels around the attention of a layer take to start.
    """

    name: str
    matmul: float
    attention: float
    bandwidth: float
    half_length: float = 3350
    headroom: float = 1.145
    start: float = 80e-6
    dtypes: tuple[str, ...] = _HALVES

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "bandwidth"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < math.inf:
                usual = getattr(H100, name)
                raise ValueError(f"{name}={value!r} is no rate: give a positive number a second, such as {usual:g}")


    def share_of_rate(self, length: int, heads: int = _REFERENCE_HEADS) -> float:
        """How much of its rate attention reaches at a length; more heads fill the card earlier."""
        filled: float = length * (heads / _REFERENCE_HEADS) ** _HEADS_COUNT
        return min(1.0, self.headroom * filled / (filled + self.half_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Forward plus backward of one layer: milliseconds, and the most bytes that it adds, output and gradients included."""

    milliseconds: float
    memory: int


def predict(shape: LayerShape, config: LighthouseConfig, card: Card) -> Cost:
    """The cost of a Lighthouse layer.

    Raises:
        ValueError: the card's rates are not of the layer's dtype, or there is a local branch, which is not in the model.
    """
    if config.local_window:
        raise ValueError(
            f"local_window={config.local_window}: the cost model knows no local branch. Measure such a layer with "
            "benchmarks/local_branch.py, or give local_window=0"
        )
    gathered = int(pyramid_over(shape.length, config).gathered)
    around = traffic(shape, gathered) / card.bandwidth + card.start
    return Cost(
        milliseconds=_attention(shape, gathered, card) + 1000 * around,
        memory=_memory(shape, config, gathered),
    )


def predict_dense(shape: LayerShape, card: Card) -> float:
    """Milliseconds of dense attention, forward plus backward."""
    return _attention(shape, shape.length, card)


def _attention(shape: LayerShape, length: int, card: Card) -> float:
    if shape.dtype not in card.dtypes:
        raise ValueError(
            f"dtype={shape.dtype!r}: the rates of {card.name} are for {' and '.join(card.dtypes)}: "
            "give a Card of that dtype, or measure one with measure_card(device, dtype)"
        )
    flops = _BACKWARD * 2 * length**2 * shape.dim * shape.heads
    computed = -(-shape.dim // _DIMS_AT_ONCE) * _DIMS_AT_ONCE
    narrow = (1 + _SOFTMAX_DIMS / _REFERENCE_DIM) / ((computed + _SOFTMAX_DIMS) / shape.dim)
    return 1000 * flops / (card.attention * narrow * card.share_of_rate(length, shape.heads))


def _memory(shape: LayerShape, config: LighthouseConfig, gathered: int) -> int:
    """The larger of two moments: the backward of the attention, and the last full gradient being written."""
    size = int(getattr(torch, shape.dtype).itemsize)
    q, kv = shape.heads * shape.dim * size, 2 * shape.groups * shape.dim * size
    accumulated = q * max(4 // size, 1)  # the attention sums the gradient of its queries in float32
    # With grouped heads the kernels write gradients of keys and values for every query head, and sum them afterwards.
    repeated = 2 * q + 8 * shape.heads if shape.groups < shape.heads else 0
    # Saved q, k, v and output, then the gradients of all four.
    in_attention = shape.length * q + gathered * (4 * q + 2 * kv + accumulated + repeated)
    at_the_end = shape.length * (2 * q + kv) + gathered * q
    indices = 4 * shape.groups * (gathered + int(pyramid_over(shape.length, config).size))
    return max(in_attention, at_the_end) + indices


def measure_card(device: torch.device, dtype: str = "bfloat16") -> Card:
    """Measure a device's rates by a large matrix product, stock attention and a copy; seconds."""
    on_gpu = device.type == "cuda"
    side, length, heads = (8192, 16_384, 8) if on_gpu else (1024, 1024, 2)
    torch_dtype = getattr(torch, dtype)
    a, b = (torch.randn(side, side, dtype=torch_dtype, device=device) for _ in range(2))
    torch.mm(a, b)
    matmul = 2 * side**3 / (timing.milliseconds(lambda: torch.mm(a, b), device) / 1000)
    shape = (1, heads, length, _REFERENCE_DIM)
    q, k, v, grad = (torch.randn(shape, dtype=torch_dtype, device=device, requires_grad=i < 3) for i in range(4))

    def attention() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    with fastest_attention(device):
        attention()
        seconds = timing.milliseconds(attention, device) / 1000
    rate = _BACKWARD * 2 * length**2 * _REFERENCE_DIM * heads / seconds
    rates = Card(
        name=torch.cuda.get_device_name(device) if on_gpu else "this CPU",
        matmul=matmul,
        attention=rate,
        bandwidth=timing.copy_bandwidth(device),
        dtypes=_HALVES if on_gpu and dtype in _HALVES else (dtype,),
    )
    if not on_gpu:
        return replace(rates, half_length=0, headroom=1.0, start=0.0)
    return replace(rates, attention=rate / rates.share_of_rate(length, heads))


# Matrix product: the data sheet, without sparsity. Copy: as measured. Attention: fitted, see above.
H100 = Card(name="H100", matmul=989e12, attention=545e12, bandwidth=3.0e12)
