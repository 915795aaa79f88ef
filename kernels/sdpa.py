"""The attention over the gathered sub-sequence: which of the stock kernels runs it.

`lighthouse_fx::attention` is `scaled_dot_product_attention` with a choice of kernel. It is a composite op: AOTAutograd sees
through it to the one aten op that was chosen, so the choice holds forward and backward and is part of the compiled graph.
"flash" is PyTorch's own FlashAttention 2, or what `torch.nn.attention.activate_flash_attention_impl` has put in its place.
"flash-attn" calls the package of that name; "flash-attn-4" insists that flash-attn 4 has been put in that place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .torch_private import sdp_priority_order, set_sdp_priority_order

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "flash-attn-4": SDPBackend.FLASH_ATTENTION,
}
_ALLOWED: dict[str, Callable[[], bool]] = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}
_HOPPER = (9, 0)

_library = torch.library.Library("lighthouse_fx", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, float dropout_p, bool is_causal, float? scale, bool enable_gqa, "
    "str kernel) -> Tensor"
)


def preferred(device: torch.device) -> list[SDPBackend]:
    """Stock kernels for a CUDA device, the fastest first, those that take anything last. Source: ANCHORS.md, Speed.

    A kernel that the user has switched off (`sdpa_kernel`, `torch.backends.cuda.enable_...`) is not among them.
    """
    return [_BACKENDS[name] for name in _order(device)]


def _order(device: torch.device) -> list[str]:
    first = ("cudnn", "flash") if torch.cuda.get_device_capability(device) >= _HOPPER else ("flash", "cudnn")
    return [name for name in (*first, "efficient", "math") if _ALLOWED[name]()]


@contextmanager
def in_order(kernels: list[SDPBackend]) -> Iterator[None]:
    """Stock attention by the first of these kernels that can, as `sdpa_kernel(kernels, set_priority=True)`.

    Where one of the others is switched off, PyTorch leaves its order behind; here it is what it was.
    """
    before = sdp_priority_order()
    try:
        with sdpa_kernel(kernels, set_priority=True):
            yield
    finally:
        set_sdp_priority_order(before)


def resolved(device: torch.device, kernel: str) -> str:
    """What `kernel` means on a device now: "auto" on CUDA becomes the order of preference, "cudnn,flash,...".

    A graph says this rather than "auto", so that a compile cache does not serve what the user has switched off since.
    """
    return ",".join(_order(device)) if kernel == "auto" and device.type == "cuda" else kernel


def has_choice(device: torch.device, kernel: str) -> bool:
    """Whether there is a kernel to choose: otherwise plain `scaled_dot_product_attention` says it all."""
    return kernel != "auto" or device.type == "cuda"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    kernel: str,
) -> Tensor:
    def run() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if not has_choice(query.device, kernel):
        return run()
    kernel = resolved(query.device, kernel)
    require_package(kernel)
    if kernel == "flash-attn":
        return _by_flash_attn(query, key, value, dropout_p, is_causal, scale)
    try:
        with in_order([_BACKENDS[name] for name in kernel.split(",")]):
            return run()
    except RuntimeError as error:
        raise RuntimeError(
            f"kernel={kernel!r} cannot attend to queries {list(query.shape)} of {query.dtype} on {query.device}: "
            f"use kernel='auto', which takes the fastest that can ({error})"
        ) from error


def _by_flash_attn(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """The package's function, which takes and gives `[B, S, H, D]`, and grouped heads as they are."""
    from flash_attn import flash_attn_func

    tokens = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = flash_attn_func(*tokens, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal)
    return out.transpose(1, 2)


def require_package(kernel: str) -> None:
    """Raise unless the package that a kernel is from can be used, and load it: a graph out of a warm cache does not.

    Raises:
        ImportError, RuntimeError: naming the extra, and what else there is to do.
    """
    if kernel == "flash-attn":
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "kernel='flash-attn' needs that package: pip install 'lighthouse-fx[flash-attn]', or use kernel='flash', "
                "PyTorch's own FlashAttention 2"
            ) from error
    if kernel == "flash-attn-4" and torch.nn.attention.current_flash_attention_impl() != "FA4":
        raise RuntimeError(
            "kernel='flash-attn-4' needs that package in the place of PyTorch's FlashAttention: "
            "pip install 'lighthouse-fx[flash-attn-4]', then call "
            "torch.nn.attention.activate_flash_attention_impl('FA4') before compiling"
        )


_library.impl("attention", _attention, "CompositeImplicitAutograd")
attention = torch.ops.lighthouse_fx.attention.default
