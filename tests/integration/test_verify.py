"""verify(): right rewrites pass and leave the model alone; a wrong one is caught, whatever is wrong with it."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from graphs import damage
from small_models import CONFIG, FIELDS, HEADS, TOKENS, WIDTH, Model, inputs, what_failed
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, passes, verify
from lighthouse_fx.passes import CALLS
from lighthouse_fx.passes.attention_call import DOCUMENTS
from lighthouse_fx.passes.rewrite.lighthouse import rewrite_attention


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


@pytest.mark.parametrize("full", ["bool", "zeros", "one row"])
def test_a_mask_that_hides_nothing_is_bidirectional_attention(full):
    def attend(q, k, v):
        n = 1 if full == "one row" else TOKENS
        mask = torch.zeros(n, TOKENS, dtype=q.dtype) if full == "zeros" else torch.ones(n, TOKENS, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    found = verify(Model(1, attend), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert not found.calls[0].is_causal


# --- masks that are given -----------------------------------------------------------------------------------------------

ASSUME = LighthouseConfig(**FIELDS, assume_causal=True)


class Masked(nn.Module):
    """Its mask is an argument, or a buffer where none is given."""

    def __init__(self, mask=None):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("mask", mask)

    def forward(self, x, mask=None):
        q, k, v = self.project(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask if mask is None else mask)


def causal_mask(hidden, dtype=torch.float32):
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return torch.zeros(TOKENS, TOKENS, dtype=dtype).masked_fill(later, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("buffer", [False, True], ids=["argument", "buffer"])
def test_the_lowest_number_of_any_dtype_hides_a_key(dtype, buffer):
    mask = causal_mask(torch.finfo(dtype).min, dtype)
    arguments = (inputs(dtype=dtype),) if buffer else (inputs(dtype=dtype), mask)
    found = verify(Masked(mask if buffer else None).to(dtype), *arguments, config=ASSUME)
    assert found.passed, str(found)
    assert found.calls[0].assumed


@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float16).min, -3e38], ids=["-1e4", "float16", "-3e38"])
def test_another_mask_than_the_promised_one_is_an_error(hidden):
    with pytest.raises(ValueError, match="is not the causal mask"):
        verify(Masked(), inputs(), causal_mask(hidden), config=ASSUME)


# --- scored by what was before a norm -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """Queries and keys of very different lengths, made equal by norms."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.query_norm, self.key_norm = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        return F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v, is_causal=True)


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "gemma3"])
def test_models_with_norms_on_queries_and_keys(kind):
    pytest.importorskip("transformers")
    from language_models import tokens
    from qk_norm_models import LAYERS, MODELS

    ids = tokens()
    found = verify(MODELS[kind]().train(), ids, labels=ids, config=CONFIG)
    assert found.passed, str(found)
    assert [call.scored for call in found.calls] == ["query and key before their norms"] * LAYERS


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
def test_every_scorer_with_norms(scorer):
    found = verify(Normed(), inputs(), config=LighthouseConfig(**FIELDS, scorer=scorer, dilation=4))
    assert found.passed, str(found)
    assert found.calls[0].scorer == scorer


def test_a_scorer_of_the_calls_own():
    class Two(Normed):  # which of the two norms' inputs is to be scored, nobody can say
        def forward(self, x):
            q, k, v = self.project(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
            q = self.query_norm(q) + self.key_norm(q * torch.arange(TOKENS)[:, None])
            return F.scaled_dot_product_attention(q, self.key_norm(k), v, is_causal=True)

    found = verify(Two(), inputs(), config=CONFIG)
    assert found.calls[0].scorer == "dilated" and "instead of norm" in found.calls[0].scored
    assert found.passed, str(found)


# --- documents and stages -----------------------------------------------------------------------------------------------

NUMBERS = torch.stack([torch.arange(TOKENS) >= 37, torch.arange(TOKENS) // 20 > 1]).long()


@pytest.mark.parametrize("model", [Model, Normed, lambda: Model(checkpointing="inside")], ids=["plain", "norms", "checkpoints"])
def test_documents(model):
    with lighthouse_fx.documents(NUMBERS):
        found = verify(model(), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert {"selection", "ops and their plain twins"} <= {check.what for check in found.checks}
    assert all(call.rewritten for call in found.calls)


def test_documents_in_a_real_model():
    transformers = pytest.importorskip("transformers")
    from qk_norm_models import SIZES

    ids = torch.randint(0, 96, (2, TOKENS))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    with lighthouse_fx.documents(NUMBERS):
        found = verify(model, ids, labels=ids, config=CONFIG)
    assert found.passed, str(found)
    assert all(call.rewritten for call in found.calls)


def test_the_stages_configuration_is_verified():
    with lighthouse_fx.pretraining(topk=4):
        found = verify(Model(), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert found.calls[0].gathered == verify(Model(), inputs(), config=dataclasses.replace(CONFIG, topk=4)).calls[0].gathered
    assert found.calls[0].gathered != verify(Model(), inputs(), config=CONFIG).calls[0].gathered


# --- wrong rewrites -----------------------------------------------------------------------------------------------------


def scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7, enable_gqa=True)


@pytest.mark.parametrize("name", ["scale", "is_causal"])
def test_a_dropped_argument_is_caught(monkeypatch, name):
    def drop(graph, inner):
        given = {"is_causal": True, "scale": 0.7, "enable_gqa": True}
        inner.target, inner.args = F.scaled_dot_product_attention, inner.args[:3]
        inner.kwargs = {key: value for key, value in given.items() if key != name}

    damage(monkeypatch, drop)
    found = verify(Model(1, scaled), inputs(), config=CONFIG)
    assert not found.passed
    assert (found.calls[0].module, "output") in what_failed(found)
    assert ("whole model", "gradients of parameters") in what_failed(found)
    assert "FAILED" in str(found)


def test_exchanged_queries_and_keys_are_caught(monkeypatch):
    def exchange(graph, inner):
        query, key, *rest = inner.args
        inner.args = (key, query, *rest)

    damage(monkeypatch, exchange)

    def attend(q, k, v):  # as many keys as queries, so that nothing but the numbers is wrong
        k, v = k.contiguous(), v.contiguous()
        return F.scaled_dot_product_attention(q[:, :2], k, v, is_causal=True).repeat(1, 2, 1, 1)

    assert not verify(Model(1, attend), inputs(), config=CONFIG).passed


def test_a_gradient_that_is_cut_is_caught(monkeypatch):
    # The loss and all outputs are right here: only the gradients tell.
    def cut(graph, inner):
        with graph.inserting_before(inner):
            inner.args = (graph.call_method("detach", (inner.args[0],)), *inner.args[1:])

    damage(monkeypatch, cut)
    found = verify(Model(1), inputs(), config=CONFIG)
    assert not found.passed
    assert {what for _, what in what_failed(found)} == {"gradients of q, k, v", "gradients of parameters"}


def rewritten_as(monkeypatch, change):
    """The graph becomes another call's than the report tells."""

    def wrong(gm, example_inputs, *, config):
        calls = gm.meta[CALLS]
        gm.meta[CALLS] = tuple(map(change, calls))
        gm = rewrite_attention(gm, example_inputs, config=config)
        gm.meta[CALLS] = calls
        return gm

    monkeypatch.setattr(passes, "PIPELINE", [wrong if step is rewrite_attention else step for step in passes.PIPELINE])


SELECTIONS = {
    "another scorer": lambda call: dataclasses.replace(call, scorer="dilated"),
    "by values": lambda call: dataclasses.replace(call, score_query=call.value, score_key=call.value),
    "raw query and key exchanged": lambda call: dataclasses.replace(
        call, score_query=call.score_key or call.key, score_key=call.score_query or call.query
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("model", [Masked, Normed], ids=["plain", "norms"])
def test_a_wrong_selection_is_caught(monkeypatch, model, name):
    rewritten_as(monkeypatch, SELECTIONS[name])
    model = model(torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()) if model is Masked else model()
    found = verify(model, inputs(), config=ASSUME)
    assert not found.passed
    assert {what for _, what in what_failed(found)} == {"selection"}


def test_norms_that_are_scored_are_caught(monkeypatch):
    rewritten_as(monkeypatch, lambda call: dataclasses.replace(call, score_query=None, score_key=None))
    assert {what for _, what in what_failed(verify(Normed(), inputs(), config=CONFIG))} == {"selection"}


@pytest.mark.parametrize("op", ["select", "attention_in_documents", "scatter"])
def test_documents_that_one_op_does_not_get_are_caught(monkeypatch, op):
    def withhold(graph, inner):
        (node,) = graph.find_nodes(op="call_function", target=getattr(torch.ops.lighthouse_fx, op).default)
        (documents,) = (x for x in node.all_input_nodes if x.name == DOCUMENTS)
        with graph.inserting_before(node):
            alone = graph.call_function(torch.zeros_like, (documents,))
        node.replace_input_with(documents, alone)

    damage(monkeypatch, withhold)
    with lighthouse_fx.documents(NUMBERS):
        found = verify(Model(1), inputs(), config=CONFIG)
    assert not found.passed
    place, what = "layers.0.attn", "selection" if op == "select" else "output"
    assert (place, what) in what_failed(found)


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
    with lighthouse_fx.dense(), pytest.raises(ValueError, match=r"leave lighthouse_fx\.dense\(\)"):
        verify(Model(), inputs(), config=CONFIG)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model=.*give a torch\.nn\.Module"):
        verify(lambda x: x, inputs())
    with pytest.raises(TypeError, match="config='x' is a str: give a LighthouseConfig"):
        verify(Model(), inputs(), config="x")
