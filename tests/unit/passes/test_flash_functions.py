"""flash-attn's functions, called by a model itself.

flash-attn cannot be built without a GPU, so this is tried with a stand-in, `flash_stand_in.py`.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from flash_stand_in import stand_in
from graphs import B, D, G, H, N, assert_left, only_call, with_gradients
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx

flash = pytest.fixture(scope="module")(stand_in)


def qkv(groups=H, size=D):
    return [torch.randn(B, N, h, size, dtype=torch.float64, requires_grad=True) for h in (H, groups, groups)]


def in_layout(attend):
    """A function of `[B, H, N, D]` as one of `[B, N, H, D]`, flash-attn's."""
    return lambda *tensors: attend(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)


def in_graph(flash):
    own = flash.flash_attn_func  # a copy, as what is allowed stays allowed
    return torch.compiler.allow_in_graph(types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [H, G])
def test_it_is_the_functional_form(flash, causal, groups):
    def function(q, k, v):
        out = flash.flash_attn_func(q, k, v, softmax_scale=0.3, causal=causal, deterministic=True)
        return out.view(B, N, H * D)  # which needs flash-attn's layout in memory

    def oracle(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = lighthouse_fx.lighthouse_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True, config=CONFIG)
        return out.transpose(1, 2).reshape(B, N, H * D)

    tensors = qkv(groups)
    gm, call = only_call(function, *tensors)
    assert call.refusal is None and call.is_causal is causal
    assert "autograd_function_apply" not in str(gm.graph)
    torch._dynamo.reset()

    def backend(gm, example_inputs):
        return lighthouse_fx.passes.run_passes(gm, example_inputs, config=CONFIG)

    found = with_gradients(torch.compile(function, backend=backend, fullgraph=True), tensors)
    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-10, atol=1e-12)


def test_default_scale(flash):
    _, call = only_call(lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True), *qkv())
    assert call.refusal is None and call.scale == D**-0.5


def test_allowed_in_the_graph(flash):
    function = in_graph(flash)
    gm, call = only_call(lambda q, k, v: function(q, k, v, 0.0, 0.3, True), *qkv())
    assert call.refusal is None and call.is_causal is True and call.scale == 0.3
    assert "flash_attn" not in str([node.target for node in gm.graph.nodes])
    _, call = only_call(lambda q, k, v: function(q, k, v, causal=True, window_size=(9, 0)), *qkv())
    assert "sliding window" in call.refusal.reason


OTHER = {
    "window": ({"causal": True, "window_size": (9, 0)}, "sliding window"),
    "window without mask": ({"window_size": (9, 9)}, "sliding window"),
    "soft-capping": ({"softcap": 30.0}, "soft-capping"),
    "alibi": ({"alibi_slopes": torch.ones(H)}, "ALiBi"),
    "probabilities": ({"return_attn_probs": True}, "log-sum-exp"),
    "negative scale": ({"softmax_scale": -1.0}, "softmax_scale is -1.0"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_arguments_are_left(flash, case):
    arguments, because = OTHER[case]

    def function(q, k, v):
        out = flash.flash_attn_func(q, k, v, **arguments)
        return out[0] + out[1].sum() if isinstance(out, tuple) else out

    assert_left(function, qkv(), because)


def test_padded_heads_are_left(flash):
    assert_left(lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True), qkv(size=12), "pads the head dimension")


def test_other_lengths_are_left(flash):
    q, k, v = qkv()
    assert_left(lambda q, k, v: flash.flash_attn_func(q, k[:, 1:], v[:, 1:]), [q, k, v], "lengths differ")


def test_one_tensor_given_twice(flash):
    """torch 2.13 breaks the graph there, and its parts see the operator alone, whose backward is not theirs to change."""
    function = torch.compile(lambda q, v: flash.flash_attn_func(q, q, v, causal=True) * 2, backend=passes_only, options=FIELDS)
    before = len(lighthouse_fx.reports())
    q, _, v = qkv()
    found = with_gradients(function, [q, v])
    calls = [call for report in lighthouse_fx.reports()[before:] for call in report.calls]
    if len(calls) == 1 and calls[0].rewritten:
        oracle = in_layout(lambda q, v: lighthouse_fx.lighthouse_attention(q, q, v, is_causal=True, config=CONFIG) * 2)
        return torch.testing.assert_close(found, with_gradients(oracle, [q, v]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], flash.flash_attn_func(q, q, v, causal=True) * 2, rtol=0, atol=0)
    assert calls and not any(call.rewritten for call in calls)
    assert "graph break" in calls[0].reason


def test_outputs_that_nothing_takes(flash):
    def function(q, k, v):
        return flash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0]

    gm, call = only_call(function, *(tensors := qkv()))
    assert call.refusal is None and call.is_causal is True
    oracle = in_layout(lambda *x: lighthouse_fx.lighthouse_attention(*x, is_causal=True, config=CONFIG))
    torch.testing.assert_close(gm(*tensors)[0], oracle(*tensors), rtol=1e-10, atol=1e-12)


def test_without_gradients_it_is_left(flash):
    frozen = [x.detach() for x in qkv()]
    assert_left(lambda q, k, v: flash.flash_attn_func(q, k, v, causal=True), frozen, "without gradients")


def test_a_function_of_another_package_is_left():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=not causal)

    other = torch.compiler.allow_in_graph(flash_attn_func)
    assert_left(lambda q, k, v: other(q, k, v, causal=True), qkv(), "is called directly")
