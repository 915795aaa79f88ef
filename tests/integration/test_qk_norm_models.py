"""Qwen3, OLMo 2 and Gemma 3 from transformers: whole, layer by layer and checkpointed, scored by their raw projections."""

import language_models
import pytest
import torch
from language_models import assert_same, loss_and_gradients, tokens
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx

pytest.importorskip("transformers")
from qk_norm_models import LAYERS, MODELS, D

# What the norms are given: [B, N, heads, D], [B, N, heads * D] and [B, heads, N, D]
AS_HEADS = {
    "qwen3": lambda x: x.transpose(1, 2),
    "olmo2": lambda x: x.unflatten(-1, (-1, D)).transpose(1, 2),
    "gemma3": lambda x: x,
}


@pytest.fixture(params=MODELS)
def model(request):
    model = MODELS[request.param]().double()
    model.name = request.param
    with torch.no_grad():  # tokens of very different lengths, so that a wrong score selects other windows
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[0] *= 30
            layer.self_attn.k_proj.weight[0] *= 30
    return model


def by_functional_form(model, ids, raw=True):
    """The eager model with its attention replaced by the functional form, given what the norms were given."""
    given = {}
    norms = [norm for layer in model.model.layers for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)]
    hooks = [norm.register_forward_pre_hook(lambda norm, args: given.update({norm: args[0]})) for norm in norms]

    def scored(module):
        return [AS_HEADS[model.name](given[norm]) if raw else None for norm in (module.q_norm, module.k_norm)]

    try:
        return language_models.by_functional_form(model, ids, CONFIG, scored)
    finally:
        for hook in hooks:
            hook.remove()


def assert_scored_raw(calls, count):
    assert [(call.rewritten, call.scorer, call.scored) for call in calls] == [
        (True, "norm", "query and key before their norms")
    ] * count, calls


def test_compiled_whole(model):
    ids = tokens()
    found = loss_and_gradients(model, torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True), ids)
    assert_scored_raw(lighthouse_fx.reports()[-1].calls, LAYERS)
    assert_same(found, by_functional_form(model, ids))
    assert not torch.allclose(found[0], by_functional_form(model, ids, raw=False)[0], rtol=1e-6)


def test_compiled_layer_by_layer(model):
    ids = tokens()
    expected = by_functional_form(model, ids)
    before = len(lighthouse_fx.reports())
    for layer in model.model.layers:
        layer.compile(backend=passes_only, options=dict(FIELDS), fullgraph=True)
    found = loss_and_gradients(model, model, ids)
    for report in lighthouse_fx.reports()[before:]:
        assert_scored_raw(report.calls, 1)
    assert_same(found, expected)


def test_checkpointed(model):
    ids = tokens()
    expected = by_functional_form(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = loss_and_gradients(model, torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True), ids)
    assert_scored_raw(lighthouse_fx.reports()[-1].calls, LAYERS)
    assert_same(found, expected)
