"""Kinds of models and training: each rewritten call has the outputs and gradients of the functional form."""

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CONFIG,
    FIELDS,
    HEADS,
    WIDTH,
    Model,
    assert_same_gradients,
    functional,
    inputs,
    passes_only,
    twin,
)
from torch import nn

from lighthouse_fx import explain, lighthouse_attention, verify

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def lighthouse(model, **arguments):
    return torch.compile(model, backend=passes_only, options=FIELDS, **arguments)


class SelfAttention(nn.Module):
    """Attention over one projection each; `attend` is the function under it, values have heads of `size_v`."""

    def __init__(self, attend, size_v=WIDTH // HEADS):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS * size_v)
        self.out = nn.Linear(HEADS * size_v, WIDTH)
        self.attend = attend

    def forward(self, x):  # [B, N, width]
        q, k, v = (p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def pair(*, is_causal=True, dropout_p=0.0, **arguments):
    """A model with SDPA and the same one with the functional form, in float64."""
    by_sdpa = SelfAttention(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p), **arguments
    )
    oracle = SelfAttention(
        lambda q, k, v: lighthouse_attention(q, k, v, is_causal=is_causal, dropout_p=dropout_p, config=CONFIG), **arguments
    )
    oracle.load_state_dict(by_sdpa.state_dict())
    return by_sdpa.double(), oracle.double()


def rewritten(model, *args):
    return [call.rewritten for call in explain(model, *args, config=CONFIG).calls]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("size_v", [4, 12], ids=["narrow values", "wide values"])
def test_bidirectional_attention_and_values_of_another_width(is_causal, size_v):
    model, oracle = pair(is_causal=is_causal, size_v=size_v)
    x = inputs(dtype=torch.float64)
    assert rewritten(model, x) == [True]
    assert_same_gradients(lighthouse(model), oracle, x, **EXACT)


# --- dropout ------------------------------------------------------------------------------------------------------------


def test_dropout_is_that_of_the_functional_form_given_a_seed():
    model, oracle = pair(dropout_p=0.5)
    x = inputs(dtype=torch.float64)
    compiled = lighthouse(model)

    def run(function):
        torch.manual_seed(3)
        return function(x)

    torch.testing.assert_close(run(compiled), run(oracle), **EXACT)
    torch.testing.assert_close(run(compiled), run(compiled), rtol=0, atol=0)
    assert not torch.equal(compiled(x), compiled(x)), "another seed drops something else"


def test_dropout_leaves_the_mean_alone():
    q, k, v = (torch.randn(1, 1, 64, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    found = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3),
        backend=passes_only,
        options=FIELDS,
    )
    runs = torch.stack([found(q, k, v).detach() for _ in range(400)])
    expected = lighthouse_attention(q, k, v, is_causal=True, config=CONFIG).detach()
    error = runs.std(0) / 400**0.5
    assert ((runs.mean(0) - expected).abs() < 6 * error + 1e-9).all() and error.max() > 0


# --- what trains --------------------------------------------------------------------------------------------------------


def assert_same_of_trained(model, oracle, x):
    """Loss, and the gradients of what trains and of nothing else."""
    for one in (model, oracle):
        one.zero_grad()
        one(x).square().mean().backward()
    expected = {name: p.grad for name, p in oracle.named_parameters()}
    assert any(grad is not None for grad in expected.values())
    for name, p in model.named_parameters():
        grad = expected[name.removeprefix("_orig_mod.")]
        assert (p.grad is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


@pytest.mark.parametrize("trains", ["q", "k", "v", "qv", "out"])
def test_partly_frozen(trains):
    model, oracle = pair()
    for one in (model, oracle):
        for name, p in one.named_parameters():
            p.requires_grad_(name.split(".")[0] in (["out"] if trains == "out" else list(trains)))
    x = inputs(dtype=torch.float64)
    # With only the projection after it training, nothing flows through the attention: it is dense.
    (call,) = explain(model, x, config=CONFIG).calls
    assert call.rewritten == (trains != "out"), call.reason
    if call.rewritten:
        assert_same_of_trained(lighthouse(model), oracle, x)


class Adapted(nn.Module):
    """A frozen linear layer with a trained low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_low_rank_adapters_on_q_and_v():
    model, oracle = pair()
    for one in (model, oracle):
        torch.manual_seed(1)
        one.requires_grad_(False)
        one.q, one.v = Adapted(one.q).double(), Adapted(one.v).double()
    x = inputs(dtype=torch.float64)
    assert rewritten(model, x) == [True]
    assert_same_of_trained(lighthouse(model), oracle, x)
    assert verify(model, x, config=CONFIG).passed


@pytest.mark.parametrize("whole", [True, False], ids=["one module twice", "shared weights"])
def test_shared_layers(whole):
    def share(model):
        if whole:
            model.layers[1] = model.layers[0]
        else:
            model.layers[1].attn.project.weight = model.layers[0].attn.project.weight
        return model

    model = Model().double()
    oracle = share(twin(model, functional()))
    model = share(model)
    oracle.load_state_dict(model.state_dict())
    x = inputs(dtype=torch.float64)
    assert rewritten(model, x) == [True, True]
    assert_same_gradients(lighthouse(model), oracle, x, **EXACT)
    assert verify(model, x, config=CONFIG).passed


# --- precision, lengths, graph breaks -----------------------------------------------------------------------------------


def test_autocast_to_bfloat16():
    model, oracle = (one.float() for one in pair())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (call,) = explain(model, inputs(), config=CONFIG).calls
        assert call.rewritten and call.dtype == "bfloat16"
        assert_same_gradients(lighthouse(model), oracle, inputs(), rtol=2e-2, atol=1e-3)


def test_dynamic_lengths_are_one_frame():
    model, oracle = pair()
    frames = []

    def counting(gm, example_inputs):
        frames.append(gm)
        return passes_only(gm, example_inputs, options=FIELDS)

    compiled = torch.compile(model, backend=counting, dynamic=True)
    for tokens in (64, 80, 101, 128):
        assert_same_gradients(compiled, oracle, inputs(tokens=tokens, dtype=torch.float64), **EXACT)
    assert len(frames) == 1


class Broken(Model):
    """Breaks the graph between its layers."""

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)


def test_parts_between_graph_breaks_are_rewritten_each():
    model = Broken().double()
    x = inputs(dtype=torch.float64)
    report = explain(model, x, config=CONFIG)
    assert [[call.rewritten for call in graph.calls] for graph in report.graphs if graph.calls] == [[True], [True]]
    assert_same_gradients(lighthouse(model), twin(model, functional()), x, **EXACT)
    assert verify(model, x, config=CONFIG).passed
