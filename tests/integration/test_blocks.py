"""`lighthouse_fx.compile`: the repeated blocks in place, some dense, and strict about it."""

import copy
import inspect
import io
import re
import warnings

import pytest
import torch
from small_models import (
    CONFIG,
    FIELDS,
    Block,
    Model,
    assert_same_gradients,
    functional,
    gradients,
    inputs,
    passes_only,
    twin,
)
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.frontend.blocks import repeated_blocks


def mixed_twin(model, dense):
    """The oracle of a model whose blocks are Lighthouse but for the dense ones."""
    oracle = twin(model, functional())
    for number in dense:
        oracle.layers[number].attn.attend = model.layers[number].attn.attend
    return oracle


@pytest.mark.usefixtures("float64_through_inductor")
def test_blocks_are_compiled_in_place_and_the_chosen_ones_stay_dense():
    model = Model(6).double()
    oracle = mixed_twin(model, (0, 1, 4, 5))
    before = len(lighthouse_fx.reports())
    assert lighthouse_fx.compile(model, CONFIG) is model
    x = inputs(dtype=torch.float64)
    assert_same_gradients(model, oracle, x, rtol=1e-10, atol=1e-12)
    assert len(lighthouse_fx.reports()) == before + 2  # one graph for equal blocks, dense ones and Lighthouse ones
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


def test_not_strict_says_nothing():
    model = lighthouse_fx.compile(Model(2), LighthouseConfig(topk=4096), dense_layers=(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(inputs()).sum().backward()


# --- blocks that silently stay dense ------------------------------------------------------------------------------------


class Numbered(Block):
    """A block whose code depends on its number, as that of transformers does with a cache: it needs a graph of its own."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return super().forward(x) + self.number / 1000


class Numbers(Model):
    def __init__(self, layers):
        super().__init__(0)
        self.layers = nn.ModuleList(map(Numbered, range(layers)))


class Limited:
    """Dynamo's recompile limit, as it may be given to `compile` (torch 2.12 on), or as it is for all."""

    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    argument = {"recompile_limit": 2} if known else {}

    def __enter__(self):
        self.patch = torch._dynamo.config.patch(recompile_limit=2)
        if not self.known:
            self.patch.__enter__()

    def __exit__(self, *error):
        if not self.known:
            self.patch.__exit__(*error)


@pytest.mark.skipif(not Limited.known, reason="torch.compile takes no recompile_limit before torch 2.12")
def test_blocks_that_differ_have_room_for_a_graph_each():
    model = lighthouse_fx.compile(Numbers(11), CONFIG, dense_layers=(0,), fullgraph=True)
    with lighthouse_fx.runtime.journal.watch() as calls:
        model(inputs()).sum().backward()
    assert [call.rewritten for call in calls] == [False] + [True] * 10


def test_strict_names_the_blocks_that_the_recompile_limit_left_dense():
    model = lighthouse_fx.compile(Numbers(5), CONFIG, dense_layers=(0,), **Limited.argument)
    with Limited(), pytest.raises(RuntimeError, match="3 Lighthouse blocks ran no rewritten") as error:
        model(inputs())
    text = str(error.value)
    assert "layers.2, layers.3, layers.4: " in text and "layers.1," not in text
    assert all(words in text for words in ("recompile_limit", "use_cache=False", "fullgraph=True"))


def test_a_later_step_that_is_dense_is_warned_of_once():
    model = lighthouse_fx.compile(Model(3), CONFIG, dense_layers=(0,), dynamic=False, **Limited.argument)
    with Limited(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tokens in (64, 80, 96, 112):
            model(inputs(tokens=tokens)).sum().backward()
    (said,) = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert "layers.1, layers.2: " in said and "recompile_limit" in said


def test_not_strict_warns_of_blocks_that_stay_dense_while_others_do_not():
    model = lighthouse_fx.compile(Numbers(5), CONFIG, dense_layers=(0,), strict=False, **Limited.argument)
    with Limited(), pytest.warns(RuntimeWarning, match=re.escape("layers.2, layers.3, layers.4: ")):
        model(inputs()).sum().backward()


def test_reasons_are_those_of_the_blocks_own_graphs():
    lighthouse_fx.compile(Model(2), LighthouseConfig(levels=9), dense_layers=(0,), strict=False)(inputs())
    model = lighthouse_fx.compile(Model(2), LighthouseConfig(levels=3, pooling=2, topk=64), dense_layers=(0,))
    with pytest.raises(RuntimeError, match="not worth it") as error:
        model(inputs())
    assert "coarsest window" not in str(error.value)


def test_frozen_blocks_need_no_rewriting():
    model = Model(3)
    model.layers[:2].requires_grad_(False)
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0,))(inputs()).sum().backward()


def test_copies_are_ordinary_models():
    model, x = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=(0,)), inputs()
    model(x).sum().backward()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), twin(model, None)(x), rtol=0, atol=0)


# --- arguments ----------------------------------------------------------------------------------------------------------


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "model, arguments, says",
    [
        (NoBlocks(), {}, "ModuleList"),
        (Model(4), {"dense_layers": (0, 1, -2, -1)}, "keeps all 4 blocks dense"),
        (Model(2), {"dense_layers": (5,)}, "dense_layers has 5"),
        (Model(2), {"dense_layers": (-3,)}, "dense_layers has -3"),
        (Model(4), {"dense_layers": ("layer.1",)}, "dense_layers has 'layer.1', and the model has 4 blocks, layers.0 to"),
        (Model(4), {"dense_layers": ("layers.1.attn",)}, "dense_layers has 'layers.1.attn'"),
        (Model(4), {"dense_layers": (), "mode": "fastest"}, "mode='fastest'.*'max-autotune'"),
    ],
)
def test_bad_models_and_layers(model, arguments, says):
    with pytest.raises(ValueError, match=says):
        lighthouse_fx.compile(model, CONFIG, **arguments)


@pytest.mark.parametrize(
    "model, arguments, says",
    [
        (lambda x: x, {}, "function: give a Module"),
        (Model(4), {"dense_layers": 1.5}, "dense_layers=1.5"),
        (Model(4), {"backend": "inductor"}, "backend='inductor'"),
    ],
)
def test_arguments_of_the_wrong_type(model, arguments, says):
    with pytest.raises(TypeError, match=says):
        lighthouse_fx.compile(model, CONFIG, **arguments)


@pytest.mark.parametrize("dense_layers", [(1, -1), ("layers.[13]",), [1, "layers.3"]])
@pytest.mark.parametrize("in_config", [True, False])
def test_dense_layers_by_number_and_name_as_argument_and_in_the_config(dense_layers, in_config):
    config = LighthouseConfig(**FIELDS, dense_layers=dense_layers if in_config else ())
    model = lighthouse_fx.compile(Model(4), config, **({} if in_config else {"dense_layers": dense_layers}))
    assert [call.rewritten for call in lighthouse_fx.explain(model, inputs()).calls] == [True, False, True, False]


def test_one_dense_layer_needs_no_tuple():
    model = lighthouse_fx.compile(Model(3), CONFIG, dense_layers=2)
    assert [call.rewritten for call in lighthouse_fx.explain(model, inputs()).calls] == [True, True, False]


def test_dense_layers_given_twice():
    with pytest.raises(ValueError, match="give one of them"):
        lighthouse_fx.compile(Model(4), LighthouseConfig(dense_layers=(0,)), dense_layers=(1,))


def test_mode_and_options_go_together():
    seen = []
    options = {"post_grad_custom_post_pass": lambda graph: seen.append(torch._inductor.config.coordinate_descent_tuning)}
    mode = "max-autotune-no-cudagraphs"
    model = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=(0,), mode=mode, options=options)
    model(inputs()).sum().backward()
    assert seen and all(seen)


def test_bad_config():
    with pytest.raises(TypeError, match="LighthouseConfig"):
        lighthouse_fx.compile(Model(2), {"levels": 3})


def test_the_list_with_the_most_parameters_is_the_models_blocks():
    model = Model(3)
    model.extra = nn.ModuleList([nn.Linear(2, 2)])
    assert repeated_blocks(model) is model.layers


def test_blocks_may_lie_in_a_dict_of_numbers():
    model = Model(3)
    model.parts = nn.ModuleDict({"only": nn.ModuleDict({str(n): block for n, block in enumerate(model.layers)})})
    blocks, model.layers = model.parts["only"], model.layers[:1]
    assert repeated_blocks(model) is blocks


@pytest.mark.parametrize(
    "options, said",
    [({"topk": 4}, "options has topk=4, a field of LighthouseConfig"), ({"max_autotun": True}, "did you mean max_autotune")],
)
def test_bad_options(options, said):
    with pytest.raises(TypeError, match=said):
        lighthouse_fx.compile(Model(4), CONFIG, dense_layers=(0,), options=options)
