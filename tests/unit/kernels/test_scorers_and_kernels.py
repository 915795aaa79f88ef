"""The `gla` scorer, and the choice of the stock attention kernel, as far as a CPU shows them."""

import importlib.util
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels import sdpa
from lighthouse_fx.kernels.reference import scorers
from lighthouse_fx.passes.config import KERNELS

FIELDS = dict(levels=2, pooling=4, topk=4)


def inputs(length=64, dtype=torch.float32):
    return [torch.randn(1, heads, length, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def by_definition(q, k, v, scale):
    """Norms of `scale * sum over j <= i of decay^(i-j) (q_i . k_j) v_j`, with every pair of tokens."""
    age = torch.arange(q.shape[2], dtype=torch.float64)
    decay = (scorers.DECAY ** (age[:, None] - age)).tril()
    return ((q.double() @ k.double().mT * decay * scale) @ v.double()).norm(dim=-1)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_gla_scores(length):
    q, k, v = (x.detach() for x in inputs(length))
    found = scorers.token_scores(q, k, v, scorer="gla", dilation=1, is_causal=True, scale=0.3)
    wide_k, wide_v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    for score, (a, b) in zip(found, ((q, wide_k), (wide_k, q)), strict=True):
        expected = by_definition(a, b, wide_v, 0.3).unflatten(1, (2, 2)).amax(2)
        torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-5)


def test_gla_compiled_is_the_functional_form():
    config = LighthouseConfig(**FIELDS, scorer="gla")
    q, k, v = inputs()
    expected = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)
    other = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=LighthouseConfig(**FIELDS))
    assert not torch.allclose(expected, other)  # it selects other windows
    compiled = torch.compile(attention, backend="lighthouse", options={**FIELDS, "scorer": "gla"}, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), expected)


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="fla-core is installed")
def test_gla_on_a_gpu_names_the_extra():
    with pytest.raises(ImportError, match=r"lighthouse-fx\[gla\]"):
        scorers.require_fla()


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_kernel_that_a_cpu_has():
    q, k, v = inputs()
    expected = lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=LighthouseConfig(**FIELDS))
    compiled = torch.compile(attention, backend="lighthouse", options={**FIELDS, "kernel": "math"}, fullgraph=True)
    out = compiled(q, k, v)
    assert lighthouse_fx.reports()[-1].rewritten == 1
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
@pytest.mark.parametrize("form", ["compiled", "functional"])
def test_kernel_that_a_cpu_has_not_is_an_error(form, kernel):
    if form == "compiled":
        function = torch.compile(attention, backend="lighthouse", options={**FIELDS, "kernel": kernel})
    else:
        config = LighthouseConfig(**FIELDS, kernel=kernel)

        def function(q, k, v):
            return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)

    with pytest.raises(Exception, match=f"kernel='{kernel}' cannot attend"):
        function(*inputs())


def test_unknown_kernel():
    with pytest.raises(ValueError, match="kernel='fast' is not a known kernel: use one of 'auto', 'cudnn'"):
        LighthouseConfig(kernel="fast")


def test_configuration_names_every_kernel_there_is():
    assert ("auto", *sdpa._BACKENDS, "flash-attn") == KERNELS


@pytest.mark.parametrize("kernel, message", [
    ("flash-attn", r"pip install 'lighthouse-fx\[flash-attn\]'"),
    ("flash-attn-4", r"activate_flash_attention_impl\('FA4'\)"),
])
@pytest.mark.parametrize("form", ["compiled", "functional"])
def test_package_that_is_not_there_is_an_error(form, kernel, message):
    config = LighthouseConfig(**FIELDS, kernel=kernel)
    function = torch.compile(attention, backend="lighthouse", options={**FIELDS, "kernel": kernel})
    if form == "functional":
        function = partial(lighthouse_attention, is_causal=True, enable_gqa=True, config=config)
    if importlib.util.find_spec("flash_attn") is None or kernel == "flash-attn-4":
        with pytest.raises(Exception, match=message):
            function(*inputs())


# What `flash_attn.flash_attn_func` is, as far as a caller and a tracer can tell: the layout, the arguments' names, grouped
# heads as they are, and a torch.autograd.Function around two custom ops.
STAND_IN = """
import torch
import torch.nn.functional as F

def dense(q, k, v, scale, causal):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)

@torch.library.custom_op("stand_in_flash_attn::forward", mutates_args=())
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    return dense(q, k, v, scale, causal).contiguous()

@forward.register_fake
def _(q, k, v, scale, causal):
    return q.new_empty(q.shape)

@torch.library.custom_op("stand_in_flash_attn::backward", mutates_args=())
def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> list[torch.Tensor]:
    _, gradients = torch.func.vjp(lambda *x: dense(*x, scale, causal), q, k, v)
    return [x.contiguous() for x in gradients(grad)]

@backward.register_fake
def _(grad, q, k, v, scale, causal):
    return [x.new_empty(x.shape) for x in (q, k, v)]

class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout_p, scale, causal):
        assert dropout_p == 0.0
        ctx.save_for_backward(q, k, v)
        ctx.rest = q.shape[-1] ** -0.5 if scale is None else scale, causal
        return forward(q, k, v, *ctx.rest)

    @staticmethod
    def backward(ctx, grad):
        return *backward(grad, *ctx.saved_tensors, *ctx.rest), None, None, None

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return Attention.apply(q, k, v, dropout_p, softmax_scale, causal)
"""


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn itself is installed")
@pytest.mark.parametrize("form", ["compiled", "functional"])
def test_flash_attn_is_called_as_it_wants_to_be(form, tmp_path, monkeypatch):
    """Layout, arguments and gradients, with a stand-in: the package itself needs a GPU."""
    (tmp_path / "flash_attn.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    q, k, v = inputs()
    arguments = dict(is_causal=True, enable_gqa=True, scale=0.3)
    expected = lighthouse_attention(q, k, v, **arguments, config=LighthouseConfig(**FIELDS))
    options = {**FIELDS, "kernel": "flash-attn"}
    function = partial(lighthouse_attention, **arguments, config=LighthouseConfig(**options))
    if form == "compiled":
        function = torch.compile(
            partial(F.scaled_dot_product_attention, **arguments), backend="lighthouse", options=options, fullgraph=True
        )
    out = function(q, k, v)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    torch.testing.assert_close(*grads)
    del sys.modules["flash_attn"]
