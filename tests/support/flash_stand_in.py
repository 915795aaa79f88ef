"""A stand-in for flash-attn, which cannot be built without a GPU, for `import flash_attn` in tests.

It has the signatures, custom operators and autograd functions of version 2.7, which are what Dynamo traces. Its forward is
exact, its backward gives zeros. A test file takes it by `flash = pytest.fixture(scope="module")(stand_in)`.
"""

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path

import pytest

STAND_IN = '''
import torch
import torch.nn.functional as F
from torch import Tensor

def _shapes(q):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1]), q.new_empty(0), q.new_empty(2, dtype=torch.int64)

@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
             window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
             ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), *_shapes(q.transpose(1, 2))

@_forward.register_fake
def _(q, *args):
    return torch.empty_like(q), *_shapes(q)

@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
            dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
            softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
            block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
            zero_tensors: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.full_like(q, torch.nan)  # as empty as flash-attn's own
    borders = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:])
    for begin_q, end_q, begin_k, end_k in borders:
        x, y, z = (x[None].transpose(1, 2) for x in (q[begin_q:end_q], k[begin_k:end_k], v[begin_k:end_k]))
        one = F.scaled_dot_product_attention(x, y, z, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        out[begin_q:end_q] = one.transpose(1, 2)[0]
    return out, *_packed_shapes(q)

@_varlen.register_fake
def _(q, *args, **kwargs):
    return torch.empty_like(q), *_packed_shapes(q)

def _packed_shapes(q):
    return q.new_empty(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(2, dtype=torch.int64)

class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                return_softmax, is_grad_enabled):
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** (-0.5)
        size = q.size(3)
        if size % 8:
            q, k, v = (F.pad(x, [0, 8 - size % 8]) for x in (q, k, v))
        out, lse, probabilities, state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, softmax_scale, causal=causal, window_size_left=window_size[0],
            window_size_right=window_size[1], softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0)
        if is_grad_enabled:
            ctx.save_for_backward(q, k, v, out, lse, state)
        result = out[..., :size]
        return result if not return_softmax else (result, lse, probabilities)

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, *_ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), *[None] * 9

class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
                window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled):
        if softmax_scale is None:
            softmax_scale = q.shape[-1] ** (-0.5)
        size = q.size(2)
        if size % 8:
            q, k, v = (F.pad(x, [0, 8 - size % 8]) for x in (q, k, v))
        out, lse, probabilities, state = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal=causal,
            window_size_left=window_size[0], window_size_right=window_size[1], softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0, block_table=block_table)
        if is_grad_enabled and any(x.requires_grad for x in (q, k, v)):
            ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, state)
        result = out[..., :size]
        return result if not return_softmax else (result, lse, probabilities)

    @staticmethod
    def backward(ctx, dout, *args):
        q, k, v, *_ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), *[None] * 14

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return FlashAttnFunc.apply(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                               deterministic, return_attn_probs, torch.is_grad_enabled())

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                     softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                     return_attn_probs, block_table, torch.is_grad_enabled())
'''


def stand_in():
    """The stand-in, as `import flash_attn` would give it."""
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn itself is installed, and its operators have the same names")
    spec, module = loaded()
    sys.modules["flash_attn"] = module
    if not hasattr(module, "flash_attn_func"):
        spec.loader.exec_module(module)
    yield module
    del sys.modules["flash_attn"]


@functools.cache
def loaded():
    """One module for all test files of a process: an operator can be registered only once."""
    path = Path(tempfile.mkdtemp()) / "flash_attn.py"
    path.write_text(STAND_IN)
    spec = importlib.util.spec_from_file_location("flash_attn", path)
    return spec, importlib.util.module_from_spec(spec)
