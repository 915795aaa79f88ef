"""Blocks that share a subgraph: each caller is judged and reported as its own, and equal ones are compiled once."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import FIELDS, causal, functional, inputs
from small_models import Block as Plain
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from lighthouse_fx import LighthouseConfig, backend, explain
from lighthouse_fx.passes.ir.subgraphs import regions

region = torch.compiler.nested_compile_region


class Method(Plain):
    @region
    def forward(self, x):
        return super().forward(x)


class Nested(Plain):
    """A region in a region."""

    @region
    def inner(self, x):
        return self.attn(self.norm(x))

    @region
    def forward(self, x):
        return x + self.inner(x)


class Checkpointed(Plain):
    """A checkpoint in a region."""

    @region
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Model(nn.Module):
    def __init__(self, block, attend=None):
        super().__init__()
        self.layers = nn.ModuleList(block(attend) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ByFunction(Model):
    """The region is a function of the block, so only the parameters that it is given tell whose it is."""

    def __init__(self, block=Plain, attend=None):
        super().__init__(block, attend)

    def forward(self, x):
        @region
        def run(layer, x):
            return layer(x)

        for layer in self.layers:
            x = run(layer, x)
        return x


MODELS = {
    "method": lambda: Model(Method),
    "nested": lambda: Model(Nested),
    "checkpoint": lambda: Model(Checkpointed),
    "function": ByFunction,
}


@pytest.fixture(autouse=True)
def compiled_graphs(monkeypatch):
    """The graphs that the compiler gets: AOTAutograd alone, as regions do not run without it."""
    graphs = []

    def compile_fx(gm, example_inputs, config_patches):
        graphs.append(gm)
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    return graphs


def oracle(model, rewritten):
    """The model without regions, some of its blocks in the functional form."""
    plain = Model(Plain)
    plain.load_state_dict(model.state_dict())
    for layer, on in zip(plain.layers, rewritten, strict=True):
        layer.attn.attend = functional() if on else causal
    return plain.double()


def which(model, run, x):
    """The blocks that ran as Lighthouse attention, told by the outputs and the gradients."""
    found = [y := run(x), *torch.autograd.grad(y.square().mean(), list(model.parameters()))]
    for rewritten in itertools.product((False, True), repeat=3):
        plain = oracle(model, rewritten)
        expected = [y := plain(x), *torch.autograd.grad(y.square().mean(), list(plain.parameters()))]
        if all(map(torch.allclose, found, expected)):
            return rewritten
    raise AssertionError("no choice of blocks computes this")


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_block_in_eval_mode_alone_is_dense(build):
    model, x = build().double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    for still in (None, 1, 0, None):
        model.train()
        if still is not None:
            model.layers[still].eval()
        assert which(model, run, x) == tuple(n != still for n in range(3))


@pytest.mark.parametrize("wanted", ["layers.1", 1, -2])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_block_in_dense_layers_alone_is_dense(build, wanted):
    model, x = build().double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend="lighthouse", options=FIELDS | {"dense_layers": (wanted,)})
    assert which(model, run, x) == (True, False, True)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_caller_is_listed(build):
    report = explain(build(), inputs(), config=LighthouseConfig(**FIELDS, dense_layers=(2,)))
    assert [call.module for call in report.calls] == [f"layers.{n}.attn" for n in range(3)]
    assert [call.rewritten for call in report.calls] == [True, True, False]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dense, subgraphs", [((), 1), ((1,), 2)])
def test_equal_subgraphs_are_compiled_once(compiled_graphs, build, dense, subgraphs):
    model, x = build().double(), inputs(dtype=torch.float64)
    run = torch.compile(model, backend="lighthouse", options=FIELDS | {"dense_layers": dense})
    assert which(model, run, x) == tuple(n not in dense for n in range(3))
    (gm,) = compiled_graphs
    own = build is MODELS["checkpoint"]  # Dynamo itself gives the first of these a subgraph of its own
    assert len([x for x in regions(gm) if x.callers and x.callers[0].region.gm is gm]) == subgraphs + own


def test_a_mask_that_all_share_is_checked_in_each():
    class Masked(Model):
        def forward(self, x, mask):
            @region
            def run(layer, x, mask):
                layer.attn.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
                return layer(x)

            for layer in self.layers:
                x = run(layer, x, mask)
            return x

    model, mask = Masked(Plain), torch.ones(inputs().shape[1], inputs().shape[1], dtype=torch.bool).tril()
    report = explain(model, inputs(), mask, config=LighthouseConfig(**FIELDS, assume_causal=True))
    assert [call.rewritten for call in report.calls] == [True] * 3
