"""Real models from transformers whose attention is written out (attn_implementation="eager")."""

import pytest
import torch
from language_models import (
    FUSED,
    LAYERS,
    MODELS,
    assert_same,
    by_functional_form,
    layers,
    loss_and_gradients,
    tokens,
)
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]().double()
    model.set_attn_implementation("eager")
    return model


def test_compiled_whole(model):
    ids = tokens()
    run = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)
    found = loss_and_gradients(model, run, ids)
    report = lighthouse_fx.reports()[-1]
    assert report.rewritten == len(report.calls) == LAYERS, report.summary()
    assert all(call.is_causal for call in report.calls)
    assert_same(found, by_functional_form(model, ids, CONFIG), FUSED)  # Llama's softmax is in float32, ours is not


def test_nothing_square_is_left(model):
    (graph,) = lighthouse_fx.explain(model, input_ids=tokens(), config=CONFIG).graphs
    square = f"{tokens().shape[1]}, {tokens().shape[1]}]"
    assert any(data["shape"].endswith(square) for _, data in graph.before.nodes(data=True))
    assert not any(data["shape"].endswith(square) for _, data in graph.after.nodes(data=True))


def test_attention_maps_keep_it_dense(model):
    ids = tokens()
    report = lighthouse_fx.explain(model, input_ids=ids, output_attentions=True, config=CONFIG)
    assert report.rewritten == 0 and len(report.calls) == LAYERS
    assert all("attention weights" in call.reason for call in report.calls)


def test_layer_by_layer_the_mask_is_an_argument(model):
    for layer in layers(model):
        layer.compile(backend=passes_only, options=dict(FIELDS), fullgraph=True)
    ids = tokens()
    dense = loss_and_gradients(model, model, ids)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and "depends on the input" in call.reason
    model.set_attn_implementation("sdpa")
    for layer in layers(model):
        layer._compiled_call_impl = None
    assert_same(dense, loss_and_gradients(model, model, ids), FUSED)
