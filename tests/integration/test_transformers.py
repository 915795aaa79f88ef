"""Real models from transformers: every layer rewritten, whole and layer by layer, gradients as by the functional form."""

import pytest
import torch
from language_models import (
    EXACT,
    FUSED,
    LAYERS,
    MODELS,
    TOKENS,
    assert_same,
    by_functional_form,
    layers,
    llama,
    loss_and_gradients,
    tokens,
)
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


def test_compiled_whole(model):
    ids = tokens()
    run = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)
    found = loss_and_gradients(model, run, ids)
    report = lighthouse_fx.reports()[-1]
    assert report.rewritten == len(report.calls) == LAYERS, report.summary()
    assert all(call.is_causal for call in report.calls)
    assert_same(found, by_functional_form(model, ids, CONFIG))


def test_the_mask_leaves_the_graph(model):
    report = lighthouse_fx.explain(model, input_ids=tokens(), config=CONFIG)
    (graph,) = report.graphs
    square = f"{TOKENS}, {TOKENS}]"
    assert any(data["shape"].endswith(square) for _, data in graph.before.nodes(data=True))
    assert not any(data["shape"].endswith(square) for _, data in graph.after.nodes(data=True))
    assert not any(data["target"] in ("diff", "cumsum", "le") for _, data in graph.after.nodes(data=True))


def test_compiled_layer_by_layer(model):
    ids = tokens()
    expected = by_functional_form(model, ids, CONFIG)
    before = len(lighthouse_fx.reports())
    for layer in layers(model):
        layer.compile(backend=passes_only, options=dict(FIELDS), fullgraph=True)
    found = loss_and_gradients(model, model, ids)
    (report,) = lighthouse_fx.reports()[before:]  # one graph for all layers
    assert report.rewritten == len(report.calls) == 1, report.summary()
    assert_same(found, expected)


@pytest.mark.sweep
@pytest.mark.usefixtures("float64_through_inductor")
def test_through_inductor_with_checkpointing():
    model = llama().double()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens()
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    found = loss_and_gradients(model, run, ids)
    assert lighthouse_fx.reports()[-1].rewritten == LAYERS
    assert_same(found, by_functional_form(model, ids, CONFIG), FUSED)


def test_inference_is_the_dense_model(model):
    ids = tokens()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(input_ids=ids).logits, model(input_ids=ids).logits, **EXACT)
    assert lighthouse_fx.reports()[-1].rewritten == 0


def test_attention_mask_of_the_user_is_not_taken_for_causal(model):
    ids = tokens()
    report = lighthouse_fx.explain(model, input_ids=ids, attention_mask=torch.ones_like(ids), config=CONFIG)
    assert report.rewritten == 0
    assert all("attention_mask" in call.reason and "attention_mask" in call.remedy for call in report.calls)


def test_default_convenience():
    model = llama()
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0, -1))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    report = lighthouse_fx.explain(model, input_ids=ids)
    assert [call.rewritten for call in report.calls] == [False, True, False]
    assert [call.module for call in report.calls] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
