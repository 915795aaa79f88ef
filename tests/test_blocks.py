"""`lighthouse_fx.compile`: the repeated blocks in place, some dense, and strict about it."""

import pytest
import torch
from small_models import CONFIG, FIELDS, Model, assert_same_gradients, functional, gradients, inputs, passes_only, twin
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig


def mixed_twin(model, dense):
    """The oracle of a model whose blocks are Lighthouse but for the dense ones."""
    oracle = twin(model, functional())
    for number in dense:
        oracle.layers[number].attn.attend = model.layers[number].attn.attend
    return oracle


def test_blocks_are_compiled_in_place_and_the_chosen_ones_stay_dense():
    model = Model(6).double()
    oracle = mixed_twin(model, (0, 1, 4, 5))
    before = len(lighthouse_fx.reports())
    assert lighthouse_fx.compile(model, CONFIG) is model
    x = inputs(dtype=torch.float64)
    assert_same_gradients(model, oracle, x, rtol=1e-10, atol=1e-12)
    assert len(lighthouse_fx.reports()) == before + 1  # one graph for equal blocks
    with torch.no_grad():
        dense = twin(model, None)
        torch.testing.assert_close(model(x), dense(x), rtol=1e-10, atol=1e-12)


def test_equal_blocks_share_one_graph():
    model = Model(5)
    before = len(lighthouse_fx.reports())
    for block in model.layers:
        block.compile(backend=passes_only, options=dict(FIELDS))
    gradients(model, inputs())
    assert len(lighthouse_fx.reports()) == before + 1


def test_explain_knows_what_compile_was_told():
    model = lighthouse_fx.compile(Model(4), CONFIG, dense_layers=(0, -1))
    report = lighthouse_fx.explain(model, inputs())
    assert [call.rewritten for call in report.calls] == [False, True, True, False]


def test_strict_raises_where_nothing_was_rewritten():
    model = lighthouse_fx.compile(Model(3), LighthouseConfig(levels=3, pooling=2, topk=64), dense_layers=(0,))
    with pytest.raises(RuntimeError, match="not worth it"):
        model(inputs())


def test_strict_waits_for_a_training_step():
    model = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=(0,))
    with torch.no_grad():
        model(inputs())
    with lighthouse_fx.dense():
        model(inputs()).sum().backward()
    model(inputs()).sum().backward()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_not_strict_says_nothing():
    model = lighthouse_fx.compile(Model(2), LighthouseConfig(topk=4096), dense_layers=(), strict=False)
    model(inputs()).sum().backward()


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "model, arguments, says",
    [
        (NoBlocks(), {}, "ModuleList"),
        (Model(4), {}, "keeps all 4 blocks dense"),
        (Model(2), {"dense_layers": (5,)}, "dense_layers has 5"),
        (Model(2), {"dense_layers": (-3,)}, "dense_layers has -3"),
    ],
)
def test_bad_models_and_layers(model, arguments, says):
    with pytest.raises(ValueError, match=says):
        lighthouse_fx.compile(model, CONFIG, **arguments)


def test_bad_config():
    with pytest.raises(TypeError, match="LighthouseConfig"):
        lighthouse_fx.compile(Model(2), {"levels": 3})


def test_the_list_with_the_most_parameters_is_the_models_blocks():
    model = Model(3)
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    assert lighthouse_fx.blocks.repeated_blocks(model) is model.layers
