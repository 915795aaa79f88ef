"""verify(): right rewrites pass and leave the model alone; a wrong one is caught, whatever is wrong with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, Model, inputs
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, verify
from lighthouse_fx.passes import rewrite as rewriting


def what_failed(verification):
    return {(check.where, check.what) for check in verification.checks if not check.passed}


def test_a_right_rewrite_passes_and_every_quantity_is_compared():
    found = verify(Model(), inputs(), config=CONFIG)
    assert found.passed, str(found)
    names = [call.module for call in found.calls]
    assert len(names) == 2 and all(call.rewritten for call in found.calls)
    for dtype in ("float64", "float32"):
        compared = {(check.where, check.what) for check in found.checks if check.dtype == dtype}
        for name in names:
            assert {(name, "selection"), (name, "output"), (name, "gradients of q, k, v")} <= compared
        assert {("whole model", "loss"), ("whole model", "gradients of parameters")} <= compared
    assert found.entries > 0
    assert "passed" in str(found) and "2 of 2" in str(found)


def test_model_and_batch_stay_as_they_were():
    model, x = Model(), inputs().requires_grad_()
    model(x).sum().backward()
    state, grad, seen = copy.deepcopy(model.state_dict()), x.grad.clone(), torch.random.get_rng_state()
    parameter = next(model.parameters())
    before = parameter.grad.clone()
    assert verify(model, x, config=CONFIG).passed
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(x.grad, grad) and torch.equal(parameter.grad, before) and parameter.dtype == torch.float32
    assert torch.equal(torch.random.get_rng_state(), seen)


def test_options_of_a_compiled_model_are_found():
    model = torch.compile(Model(), backend="lighthouse", options=FIELDS)
    assert verify(model, inputs()).calls[0].gathered == verify(Model(), inputs(), config=CONFIG).calls[0].gathered


def test_checkpointed_layers():
    assert verify(Model(checkpointing="inside"), inputs(), config=CONFIG).passed


def test_a_layer_that_stays_dense_is_dense_on_both_sides():
    found = verify(Model(), inputs(), config=LighthouseConfig(**FIELDS, dense_layers=(0,)))
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [False, True]


@pytest.mark.parametrize("repeat", [False, True], ids=["mask", "mask and repeated heads"])
def test_a_mask_and_repeated_heads(repeat):
    def attend(q, k, v):
        n = torch.arange(q.shape[2])
        if repeat:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=n[None, :] <= n[:, None], scale=0.3, enable_gqa=True)

    found = verify(Model(1, attend), inputs(), config=CONFIG)
    assert found.passed, str(found)


# --- wrong rewrites -----------------------------------------------------------------------------------------------------


def without(name):
    right = rewriting._carried_over
    return lambda call: {key: value for key, value in right(call).items() if key != name}


def scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)


@pytest.mark.parametrize("name", ["scale", "is_causal"])
def test_a_dropped_argument_is_caught(monkeypatch, name):
    monkeypatch.setattr(rewriting, "_carried_over", without(name))
    found = verify(Model(1, scaled), inputs(), config=CONFIG)
    assert not found.passed
    assert (found.calls[0].module, "output") in what_failed(found)
    assert ("whole model", "gradients of parameters") in what_failed(found)
    assert "FAILED" in str(found)


def test_exchanged_queries_and_keys_are_caught(monkeypatch):
    right = rewriting._rewrite

    def wrong(call, config, index, *rest):
        graph = call.node.graph
        right(call, config, index, *rest)
        gathers = [n for n in graph.nodes if n.target is torch.ops.lighthouse_fx.gather.default]
        (inner,) = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        inner.args = (gathers[1], gathers[0], gathers[2])

    monkeypatch.setattr(rewriting, "_rewrite", wrong)

    def attend(q, k, v):  # as many keys as queries, so that nothing but the numbers is wrong
        k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q[:, :2], k, v, is_causal=True).repeat(1, 2, 1, 1)

    assert not verify(Model(1, attend), inputs(), config=CONFIG).passed


def test_a_gradient_that_is_cut_is_caught(monkeypatch):
    # The loss and all outputs are right here: only the gradients tell.
    right = rewriting._rewrite

    def wrong(call, config, index, *rest):
        graph = call.node.graph
        right(call, config, index, *rest)
        (inner,) = graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        with graph.inserting_before(inner):
            inner.args = (graph.call_method("detach", (inner.args[0],)), *inner.args[1:])

    monkeypatch.setattr(rewriting, "_rewrite", wrong)
    found = verify(Model(1), inputs(), config=CONFIG)
    assert not found.passed
    assert {what for _, what in what_failed(found)} == {"gradients of q, k, v", "gradients of parameters"}


# --- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Model().eval(), "eval"),
        (nn.Linear(32, 32), "no attention call was found"),
    ],
    ids=["eval", "no attention"],
)
def test_nothing_rewritten_is_an_error_with_the_reason(model, says):
    with pytest.raises(ValueError, match=r"model=\w+ has no attention call that is rewritten") as error:
        verify(model, inputs(), config=CONFIG)
    assert says in str(error.value)


def test_the_dense_stage_is_a_reason_too():
    with lighthouse_fx.dense(), pytest.raises(ValueError, match="leave lighthouse_fx"):
        verify(Model(), inputs(), config=CONFIG)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model=.*give a torch\.nn\.Module"):
        verify(lambda x: x, inputs())
    with pytest.raises(TypeError, match="config='x' is a str: give a LighthouseConfig"):
        verify(Model(), inputs(), config="x")
