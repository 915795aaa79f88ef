"""`nn.MultiheadAttention` and the layers made of it: what is rewritten, the numbers, and what stays as it is."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from graphs import only_call
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    CONFIG,
    FIELDS,
    HEADS,
    TOKENS,
    WIDTH,
    assert_same_gradients,
    attending,
    gradients,
    inputs,
    passes_only,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx.frontend.as_trained import AsTrained
from lighthouse_fx.passes import CALLS, run_passes

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Layer(nn.Module):
    """Attention of one `nn.MultiheadAttention`, which `call` calls."""

    def __init__(self, call, **fields):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **fields)
        self.call = call

    def forward(self, x):  # [B, N, WIDTH], or [N, B, WIDTH]
        return x + self.call(self.attention, x)


def mask_of(x, length, dtype=None):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype or x.dtype)


def plainly(attention, x, *, others=lambda x: (x, x), length=TOKENS, mask=None, **arguments):
    """The attention's output; `mask` makes one of a causal mask."""
    if mask is not None:
        arguments["attn_mask"] = mask(mask_of(x, length))
    return attention(x, *others(x), need_weights=False, **arguments)[0]


def every_head(mask):
    return mask.expand(2 * HEADS, -1, -1)


def hidden(mask):
    return mask == float("-inf")


# -> how it is called, of what module, and whether it is causal
FORMS = {
    "batch first": (plainly, {"batch_first": True}, False),
    "sequence first": (plainly, {}, False),
    "causal by its mask": (partial(plainly, mask=lambda m: m), {"batch_first": True}, True),
    "causal by its mask, sequence first": (partial(plainly, mask=lambda m: m), {}, True),
    "causal by its hint": (partial(plainly, mask=lambda m: m, is_causal=True), {"batch_first": True}, True),
    "causal by a mask for every head": (partial(plainly, mask=every_head), {"batch_first": True}, True),
    "causal by a mask of truth values": (partial(plainly, mask=hidden), {"batch_first": True}, True),
    "without bias": (plainly, {"batch_first": True, "bias": False}, False),
    "values of their own": (partial(plainly, others=lambda x: (x, 2 * x)), {"batch_first": True}, False),
    "keys and values of their own": (partial(plainly, others=lambda x: (x.sin(), 2 * x)), {}, False),
    "widths of their own": (partial(plainly, others=lambda x: (x[..., :20], x[..., 9:])), {"kdim": 20, "vdim": 23}, False),
}  # fmt: skip


def layer_of(name):
    torch.manual_seed(0)
    call, fields, causal = FORMS[name]
    x = inputs(dtype=torch.float64)
    layer = Layer(call, **fields).double()
    for parameter in layer.parameters():  # biases are zeros at first
        nn.init.normal_(parameter, std=0.2)
    return layer, x if fields.get("batch_first") else x.transpose(0, 1).contiguous(), causal


class Twin(nn.Module):
    """The eager layer, whose function of PyTorch attends by the functional form."""

    def __init__(self, layer, causal, **arguments):
        super().__init__()
        self.layer, self.causal, self.arguments, self.calls = layer, causal, arguments, 0

    def forward(self, x):
        with attending(self.attend):
            return self.layer(x)

    def attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        self.calls += 1
        assert self.causal == (is_causal or attn_mask is not None)
        return lighthouse_fx.lighthouse_attention(
            q, k, v, is_causal=self.causal, dropout_p=dropout_p, config=CONFIG, **self.arguments
        )


def assert_same_as_twin(layer, x, causal, backend=passes_only, **tolerance):
    rewritten = copy.deepcopy(layer)
    rewritten.forward = torch.compile(rewritten.forward, backend=backend, options=FIELDS, fullgraph=True)
    twin = Twin(layer, causal)
    prefixed = nn.Module()
    prefixed.layer = rewritten
    prefixed.forward = rewritten.forward
    assert_same_gradients(prefixed, twin, x, **tolerance)
    assert twin.calls == 1
    assert [(call.rewritten, call.is_causal) for call in lighthouse_fx.reports()[-1].calls] == [(True, causal)]


@pytest.mark.parametrize("name", FORMS)
def test_numbers_and_gradients_are_those_of_the_functional_form(name):
    assert_same_as_twin(*layer_of(name), **EXACT)


@pytest.mark.parametrize("name", FORMS)
def test_left_dense_it_is_what_it_was(name):
    layer, x, _ = layer_of(name)
    with lighthouse_fx.dense():
        gm_before = []

        def backend(gm, example_inputs):
            gm_before.append(str(gm.graph))
            gm = run_passes(gm, example_inputs, config=lighthouse_fx.LighthouseConfig(levels=3, topk=10_000))
            assert gm.meta[CALLS][0].refusal is not None
            assert str(gm.graph) == gm_before[0]
            return gm

        run = torch.compile(layer, backend=backend, fullgraph=True)
        assert torch.equal(run(x), layer(x))
    assert gm_before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["causal by its hint", pytest.param("keys and values of their own", marks=pytest.mark.sweep)]
)
def test_through_inductor(name):
    layer, x, causal = layer_of(name)
    assert_same_as_twin(layer.float(), x.float(), causal, "lighthouse", rtol=1e-4, atol=1e-4)


REFUSED = {
    "weights are returned": (lambda a, x: a(x, x, x)[0], {}, "returns the attention weights", "need_weights=False"),
    "padding": (
        lambda a, x: plainly(a, x, key_padding_mask=torch.zeros(2, TOKENS, dtype=x.dtype)), {}, "key_padding_mask", "documents",
    ),
    "a key of zeros": (plainly, {"add_zero_attn": True}, "a key of zeros", "scaled_dot_product_attention"),
    "a key of its own": (plainly, {"add_bias_kv": True}, "a key of its own", "scaled_dot_product_attention"),
    "no batch": (lambda a, x: plainly(a, x[0])[None], {}, "without a batch", "x[None]"),
    "a window": (
        partial(plainly, mask=lambda m: m + m.T.roll(-5, 1)), {}, "attn_mask", "",
    ),
    "another sequence": (lambda a, x: plainly(a, x, others=lambda x: (x[:, 3:], x[:, 3:])), {}, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_dense_says_why(name):
    call, fields, because, remedy = REFUSED[name]
    torch.manual_seed(0)
    layer, x = Layer(call, batch_first=True, **fields), inputs()
    gm, found = only_call(layer, x)
    assert found.refusal is not None and because in found.refusal.reason and remedy in found.refusal.remedy
    assert [node.target for node in gm.graph.nodes].count(F.multi_head_attention_forward) == 1
    assert not any(node.target is F.linear or "lighthouse" in str(node.target) for node in gm.graph.nodes)
    run = torch.compile(layer, backend=passes_only, options=FIELDS)
    assert_same_gradients(run, layer, x, rtol=0, atol=0)


def test_cross_attention_stays_dense():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x, memory):
            return self.attention(x, memory, memory, need_weights=False)[0]

    _, found = only_call(Cross(), inputs(), inputs())
    assert "cross-attention" in found.refusal.reason


def test_attention_to_another_sequence_of_the_same_input_stays_dense():
    layer = Layer(partial(plainly, others=lambda x: (memory := x.sin(), memory)), batch_first=True)
    _, found = only_call(layer, inputs())
    assert "cross-attention" in found.refusal.reason


class Encoder(nn.Module):
    """A part of a model, compiled as a whole."""

    def __init__(self):
        super().__init__()
        kind = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(kind, 2)

    def forward(self, x):
        return self.encoder(x, mask_of(x, x.shape[1]), is_causal=True)


def test_the_fast_path_without_gradients_is_listed_and_named_to_documents():
    model, x = Encoder().eval(), inputs()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    numbers = (torch.arange(TOKENS) >= 30).int().expand(2, -1).contiguous()
    with torch.no_grad(), lighthouse_fx.documents(numbers), pytest.warns(UserWarning, match="ignores it"):
        run(x)
    calls = lighthouse_fx.reports()[-1].calls
    assert len(calls) == 2 and all("fast path" in call.reason for call in calls)


def test_budget_control_and_validation_look_behind_the_fast_path():
    model, x = Encoder(), inputs()
    as_trained = AsTrained(model.eval(), CONFIG)
    before = torch.backends.mha.get_fastpath_enabled()
    as_trained(x)
    assert [call.rewritten for call in as_trained.calls] == [True, True]
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_verify_of_an_output_that_is_written_to():
    def added(attention, x):
        out = plainly(attention, x, mask=lambda m: m, is_causal=True)
        out += x
        return out

    torch.manual_seed(0)
    verification = lighthouse_fx.verify(Layer(added, batch_first=True), inputs(), config=CONFIG)
    assert verification.passed and "ops and their plain twins" in str(verification)


def test_the_hint_is_taken_on_trust_as_pytorch_takes_it():
    """PyTorch reads no mask where it is told is_causal=True, so neither does what replaces it."""
    call = partial(plainly, mask=lambda m: m.T, is_causal=True)
    torch.manual_seed(0)
    layer, x = Layer(call, batch_first=True).double(), inputs(dtype=torch.float64)
    layer_causal = Layer(partial(plainly, mask=lambda m: m), batch_first=True).double()
    layer_causal.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), layer_causal(x), **EXACT)
    assert_same_as_twin(layer, x, True, **EXACT)


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_in_a_model(batch_first):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            kind = partial(nn.TransformerEncoderLayer, WIDTH, HEADS, 48, dropout=0.0, batch_first=batch_first)
            self.layers = nn.ModuleList(kind() for _ in range(2))

        def forward(self, x):
            mask = mask_of(x, TOKENS)
            for layer in self.layers:
                x = checkpoint(layer, x, mask, None, True, use_reentrant=False)
            return x

    torch.manual_seed(0)
    model, x = Encoder().double(), inputs(dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    report = lighthouse_fx.explain(model, x, config=CONFIG)
    assert [call.module for call in report.calls if call.rewritten] == ["layers.0.self_attn", "layers.1.self_attn"]
    verification = lighthouse_fx.verify(model, x, config=CONFIG)
    assert verification.passed and "the attention it replaces" in str(verification)


def test_verify_sees_an_argument_that_is_read_wrong(monkeypatch):
    from lighthouse_fx.passes.match import mha

    projected = mha._projected
    monkeypatch.setattr(mha, "_projected", lambda *args: projected(*args)[::-1])  # key and query swapped with value
    layer, x, _ = layer_of("causal by its hint")
    assert not lighthouse_fx.verify(layer, x, config=CONFIG).passed


def test_dropout_is_that_of_the_functional_form_given_a_seed():
    torch.manual_seed(0)
    layer, x = Layer(plainly, batch_first=True, dropout=0.3).double(), inputs(dtype=torch.float64)
    run = torch.compile(layer, backend=passes_only, options=FIELDS, fullgraph=True)
    found = []
    for function in (run, Twin(layer, False)):
        torch.manual_seed(7)
        found.append(function(x))
    torch.testing.assert_close(*found, **EXACT)
    torch.manual_seed(8)
    assert not torch.equal(run(x), found[0])


def test_under_autocast_it_computes_in_bfloat16():
    torch.manual_seed(0)
    layer, x, _ = layer_of("causal by its hint")
    layer, x = layer.float(), x.float()

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.layer.call(self.layer.attention, x)

    run = torch.compile(Cast(), backend=passes_only, options=FIELDS, fullgraph=True)
    out = run(x)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.rewritten and call.dtype == "bfloat16" and out.dtype == torch.bfloat16
    for mask in (hidden, lambda m: m):  # of the input's dtype, which is another
        layer.call = partial(plainly, mask=mask)
        torch.testing.assert_close(torch.compile(Cast(), backend=passes_only, options=FIELDS, fullgraph=True)(x), out)
        assert lighthouse_fx.reports()[-1].rewritten == 1
    layer.call = partial(plainly, mask=lambda m: m.bfloat16(), is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twin = Twin(layer, True)
        expected = twin(x) - x
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0.02, atol=0.02)
    out.float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_inside_documents_rewritten_and_dense():
    numbers = (torch.arange(TOKENS) >= 30).int().expand(2, -1).contiguous()
    layer, x, causal = layer_of("causal by its hint")
    twin = Twin(layer, causal, documents=numbers)
    run = torch.compile(layer, backend=passes_only, options=FIELDS, fullgraph=True)
    with lighthouse_fx.documents(numbers):
        torch.testing.assert_close(run(x), twin(x), **EXACT)
        with lighthouse_fx.dense():
            found = run(x)
    for part in (slice(30), slice(30, TOKENS)):
        layer.call = partial(plainly, mask=lambda m: m, is_causal=True, length=len(range(TOKENS)[part]))
        torch.testing.assert_close(found[:, part], layer(x[:, part]), **EXACT)


@settings(max_examples=8, deadline=None)
@given(length=st.integers(34, 150), batch=st.integers(1, 3), batch_first=st.booleans())
def test_any_length(length, batch, batch_first):
    torch._dynamo.reset()
    torch.manual_seed(length)
    call = partial(plainly, mask=lambda m: m, is_causal=True, length=length)
    layer = Layer(call, batch_first=batch_first).double()
    x = torch.randn(*((batch, length) if batch_first else (length, batch)), WIDTH, dtype=torch.float64)
    run = torch.compile(layer, backend=passes_only, options={**FIELDS, "topk": 4}, fullgraph=True)
    found = run(x)
    assert lighthouse_fx.reports()[-1].rewritten == 1
    config = lighthouse_fx.LighthouseConfig(**{**FIELDS, "topk": 4})
    form = partial(lighthouse_fx.lighthouse_attention, config=config)
    with attending(lambda q, k, v, mask, dropout_p, is_causal: form(q, k, v, is_causal=is_causal)):
        torch.testing.assert_close(found, layer(x), **EXACT)


def test_dynamic_length_has_one_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.layer(x, mask_of(x, x.shape[1]), is_causal=True)

    torch.manual_seed(0)
    model = Model().double()
    run = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True, dynamic=True)
    before = len(lighthouse_fx.reports())
    for length in (64, 70, 131):
        x = inputs(tokens=length, dtype=torch.float64)
        torch.testing.assert_close(run(x), Twin(model, True)(x), **EXACT)
    assert [report.rewritten for report in lighthouse_fx.reports()[before:]] == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_encoder_layers(dynamic):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            kind = partial(nn.TransformerEncoderLayer, 256, 4, 256, dropout=0.0, batch_first=True)
            self.layers = nn.ModuleList(kind() for _ in range(2))
            self.weight = nn.Parameter(torch.randn(256))  # the squares of a norm's output have no gradient to speak of

        def forward(self, x):
            mask = mask_of(x, x.shape[1]).to(x.device)
            for layer in self.layers:
                x = layer(x, mask, is_causal=True)
            return x * self.weight

    torch.manual_seed(0)
    model = Model().to("cuda", torch.bfloat16)
    run = torch.compile(model, backend="lighthouse", options=FIELDS | {"topk": 64}, fullgraph=True, dynamic=dynamic)
    form = partial(lighthouse_fx.lighthouse_attention, config=lighthouse_fx.LighthouseConfig(**FIELDS | {"topk": 64}))
    for length in (2048, 1999):
        x = torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16)
        found = gradients(run, x)
        with attending(lambda q, k, v, mask, dropout_p, is_causal: form(q, k, v, is_causal=is_causal)):
            expected = gradients(model, x)
        assert lighthouse_fx.reports()[-1].rewritten == 2
        torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0.01)
        for name, value in expected[1].items():
            assert (found[1][name] - value).norm() < 0.1 * value.norm(), name


def test_evaluation_is_dense():
    layer, x, _ = layer_of("causal by its hint")
    run = torch.compile(layer, backend=passes_only, options=FIELDS, fullgraph=True)
    assert not torch.equal(run(x), layer(x))
    layer.eval()
    torch.testing.assert_close(run(x), layer(x), **EXACT)
    layer.train()
    with torch.no_grad():
        torch.testing.assert_close(run(x), layer(x), **EXACT)
