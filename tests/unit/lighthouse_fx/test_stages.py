"""`pretraining()` and `dense()`: nesting, restoring, and how often a model recompiles."""

import pytest
import torch
from small_models import CONFIG, FIELDS, Model, assert_same_gradients, functional, inputs, passes_only, twin

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, dense, pretraining
from lighthouse_fx.runtime import stage


def graphs():
    return len(lighthouse_fx.reports())


@pytest.fixture
def model():
    return Model(1)


@pytest.fixture
def run(model):
    return torch.compile(model, backend=passes_only, options=FIELDS)


def rewritten(run, x):
    """Whether a training step runs rewritten attention."""
    with lighthouse_fx.runtime.journal.watch() as calls:
        run(x).sum().backward()
    return any(call.rewritten for call in calls)


def test_outside_both_the_backends_own_options_hold(run, model):
    assert_same_gradients(run, twin(model, functional()), inputs(), rtol=1e-5, atol=1e-6)
    assert lighthouse_fx.reports()[-1].rewritten == 1


def test_dense_is_dense(run, model):
    with dense():
        x = inputs()
        torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert "dense stage" in lighthouse_fx.reports()[-1].calls[0].reason


def test_pretraining_overrides_single_fields(run, model):
    with pretraining(topk=4, pooling=4):
        expected = LighthouseConfig(levels=3, pooling=4, topk=4)
        assert_same_gradients(run, twin(model, functional(expected)), inputs(), rtol=1e-5, atol=1e-6)


def test_pretraining_with_a_config_replaces_all(run, model):
    config = LighthouseConfig(levels=2, pooling=4, topk=4)
    with pretraining(config):
        assert_same_gradients(run, twin(model, functional(config)), inputs(), rtol=1e-5, atol=1e-6)


def test_config_with_overrides():
    with pretraining(CONFIG, topk=16):
        assert stage.current.resolve(LighthouseConfig()) == LighthouseConfig(levels=3, pooling=2, topk=16)


def test_each_new_state_compiles_once_and_going_back_reuses(run):
    x = inputs()
    states = [lambda: pretraining(topk=8), dense, lambda: pretraining(topk=4)]
    before = graphs()
    for _ in range(3):
        run(x)
        for state in states:
            with state():
                run(x)
                run(x)
    assert graphs() == before + 4


def test_recompilation_names_the_stage(run, caplog):
    x = inputs()
    run(x)
    torch._logging.set_logs(recompiles=True)
    try:
        with caplog.at_level("DEBUG", logger="torch._dynamo.guards"), dense():
            run(x)
    finally:
        torch._logging.set_logs()
    assert "stage.key" in caplog.text


def test_contexts_nest(run):
    x = inputs()
    assert rewritten(run, x)
    with dense():
        assert not rewritten(run, x)
        with pretraining():
            assert rewritten(run, x)
            with dense():
                assert not rewritten(run, x)
            assert rewritten(run, x)
        assert not rewritten(run, x)
    assert rewritten(run, x)


def test_contexts_restore_on_exceptions():
    for context in (dense, pretraining):
        with pytest.raises(ZeroDivisionError), context():
            raise ZeroDivisionError
        assert stage.current.kind == "default"


def test_contexts_are_decorators_and_can_be_used_again():
    @dense()
    def validate(depth=1):
        assert stage.current.kind == "dense"
        return validate(depth - 1) if depth else "done"

    assert validate() == validate() == "done"
    assert stage.current.kind == "default"


def test_a_decorated_function_that_raises_restores():
    @pretraining(topk=3)
    def fail():
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert stage.current.kind == "default"


def test_a_context_may_be_entered_while_it_is_on():
    on = dense()
    with on, pretraining(), on:
        assert stage.current.kind == "dense"
    assert stage.current.kind == "default"


def test_contexts_left_in_another_order():
    first, second = dense(), pretraining(topk=3)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stage.current.fields == (("topk", 3),)
    second.__exit__(None, None, None)
    assert stage.current.kind == "default" and stage.key == "pretraining()"


def test_functions_that_run_later_are_not_decorated():
    def generator():
        yield

    async def coroutine(): ...

    async def asynchronous_generator():
        yield

    for function in (generator, coroutine, asynchronous_generator):
        for context in (dense, pretraining):
            with pytest.raises(TypeError, match="with statement inside"):
                context()(function)


def test_stages_that_mean_the_same_share_a_graph(run):
    x = inputs()
    before = graphs()
    run(x)
    with pretraining():
        run(x)
    with pretraining(dense_layers=["nothing"]):
        run(x)
    with pretraining(dense_layers=("nothing",)):
        run(x)
    assert graphs() == before + 2


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(32, 32), lambda: Model(1).eval(), lambda: Model(1, masked)])
def test_graphs_without_attention_to_rewrite_are_the_same_in_every_stage(make):
    run, x = torch.compile(make(), backend=passes_only, options=FIELDS), inputs()
    before = graphs()
    for state in (pretraining, dense, lambda: pretraining(topk=3)):
        with state():
            run(x)
    assert graphs() == before + 1


def masked(q, k, v):
    """A sliding window, which no stage can assume to be causal."""
    mask = q.new_ones(q.shape[2], q.shape[2]).tril().triu(-3).bool()
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_no_grad_validation_is_one_graph_in_every_stage(run):
    x = inputs()
    before = graphs()
    with torch.no_grad():
        run(x)
        with dense():
            run(x)
        with pretraining(topk=4):
            run(x)
    assert graphs() == before + 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"levels": 0}, "levels=0"),
        ({"topkk": 1}, "topkk=1"),
        ({"scorer": "x"}, "scorer='x'"),
        ({"pooling": 1.5}, "pooling=1.5"),
        ({"quota": 7, "topk": 8}, "quota=7 does not divide topk=8"),
        ({"levels": 99}, "levels=99"),
        ({"pooling": 2**20, "levels": 3}, "levels=3"),
    ],
)
def test_bad_fields_raise_at_the_call(arguments, says):
    with pytest.raises((TypeError, ValueError), match=says):
        pretraining(**arguments)


@pytest.mark.parametrize("arguments", [{"quota": 7}, {"topk": 8}, {"levels": 20}, {"pooling": 2**20}])
def test_fields_that_may_be_right_for_some_backend_are_taken(arguments):
    with pretraining(**arguments):
        assert stage.current.fields == tuple(arguments.items())


def test_bad_config_raises_at_the_call():
    with pytest.raises(TypeError, match="LighthouseConfig"):
        pretraining({"levels": 3})


def test_stage_entered_inside_a_compiled_function_is_refused_or_breaks_the_graph():
    model = Model(1)

    def inside(x):
        with dense():
            return model(x)

    x = inputs()
    with pytest.raises(RuntimeError):
        torch.compile(inside, backend=passes_only, options=FIELDS, fullgraph=True)(x)
    torch._dynamo.reset()
    # Without fullgraph the context runs eagerly, and what is inside it is compiled for the dense stage.
    torch.testing.assert_close(torch.compile(inside, backend=passes_only, options=FIELDS)(x), model(x), rtol=0, atol=0)
