"""Activation checkpointing: inside and around the compiled region, and the reentrant kind that must be refused."""

import pytest
import torch
from small_models import FIELDS, Model, assert_same_gradients, functional, gradients, inputs, passes_only, twin
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lighthouse_fx

STRICT = {"rtol": 1e-10, "atol": 1e-12}


class Around(nn.Module):
    """Checkpoints a compiled model."""

    def __init__(self, model, compiled, use_reentrant=False):
        super().__init__()
        self.model = model
        self.compiled = [compiled]
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.compiled[0], x, use_reentrant=self.use_reentrant)


@pytest.mark.usefixtures("float64_through_inductor")
def test_inside_the_compiled_region():
    model = Model(2, checkpointing="inside").double()
    run = torch.compile(model, backend="lighthouse", options=FIELDS, fullgraph=True)
    assert_same_gradients(run, twin(model, functional()), inputs(dtype=torch.float64), **STRICT)
    assert lighthouse_fx.reports()[-1].rewritten == 2


@pytest.mark.usefixtures("float64_through_inductor")
def test_around_the_compiled_region():
    model = Model(2).double()
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    x = inputs(dtype=torch.float64)
    _, expected = gradients(twin(model, functional()), x)
    _, found = gradients(Around(model, run), x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name if name == "input" else f"model.{name}"], value, **STRICT)
    assert lighthouse_fx.reports()[-1].rewritten == 2


def test_reentrant_around_the_compiled_region_is_refused():
    model = Model(1)
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    x = inputs().requires_grad_()
    around = Around(model, run, use_reentrant=True)
    for _ in range(2):  # at the compilation, and from the compiled graph
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            around(x)
    with torch.no_grad():  # plain evaluation is no checkpoint
        run(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        around(x)


def test_reentrant_in_the_dense_stage_is_fine():
    model = Model(1)
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    with lighthouse_fx.dense():
        Around(model, run, use_reentrant=True)(inputs().requires_grad_()).sum().backward()


def test_reentrant_is_fine_where_the_recomputation_is_dense_too():
    x = inputs().requires_grad_()
    model = Model(1).eval()
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    Around(model, run, use_reentrant=True)(x).sum().backward()
    model.train()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):  # by the same graph: without gradients no mode matters
        Around(model, run, use_reentrant=True)(x)
    torch._dynamo.reset()
    run = torch.compile(model, backend="lighthouse", options={**FIELDS, "topk": 64})  # not worth it
    Around(model, run, use_reentrant=True)(x).sum().backward()
    with lighthouse_fx.pretraining(topk=8), pytest.raises(RuntimeError, match="use_reentrant=False"):
        Around(model, run, use_reentrant=True)(x)


@pytest.mark.parametrize(
    "forward, backward",
    [
        (lambda: lighthouse_fx.pretraining(keep_first=False), lighthouse_fx.pretraining),
        (lighthouse_fx.dense, lighthouse_fx.pretraining),
        (lighthouse_fx.pretraining, lighthouse_fx.dense),
    ],
)
def test_backward_of_a_checkpoint_in_another_stage_is_refused(forward, backward):
    model, x = Model(1), inputs().requires_grad_()
    around = Around(model, torch.compile(model, backend="lighthouse", options=FIELDS))
    with forward():
        out = around(x).sum()
    with backward(), pytest.raises(RuntimeError, match=r"call backward\(\) inside the same"):
        out.backward()


def test_backward_of_a_checkpoint_in_a_stage_that_means_the_same():
    model, x = Model(1), inputs().requires_grad_()
    around = Around(model, torch.compile(model, backend="lighthouse", options=FIELDS))
    with lighthouse_fx.pretraining(topk=FIELDS["topk"]):
        out = around(x).sum()
    out.backward()


def test_policy_may_save_the_selection():
    """Selection is deterministic, so recomputing it is right, and saving its small index tensors is cheaper."""
    saved = []

    def policy(context, op, *args, **kwargs):
        keep = op is torch.ops.lighthouse_fx.select.default
        saved.append(keep)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    model = Model(1).double()
    oracle = twin(model, functional())
    x = inputs(dtype=torch.float64).requires_grad_()
    out = checkpoint(
        oracle, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    (found,) = torch.autograd.grad(out.sum(), x)
    (expected,) = torch.autograd.grad(oracle(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert any(saved)
