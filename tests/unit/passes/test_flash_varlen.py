"""flash-attn's `flash_attn_varlen_func`: packed documents, with the stand-in of `flash_stand_in.py`."""

import types

import pytest
import torch
from flash_stand_in import stand_in
from graphs import D, G, H, N, assert_left, only_call, with_gradients
from small_models import CONFIG, FIELDS, HEADS, WIDTH, passes_only
from torch import nn
from torch.utils.checkpoint import checkpoint

import lighthouse_fx

flash = pytest.fixture(scope="module")(stand_in)
BORDERS = torch.tensor([0, 24, 24, 29, N], dtype=torch.int32)  # one document is empty
OTHERS = BORDERS.clone()  # of one tensor for both, Dynamo would break the graph
LONGEST = N - 29


def qkv(groups=H, tokens=N):
    return [torch.randn(tokens, h * D, dtype=torch.float64, requires_grad=True) for h in (H, groups, groups)]


def oracle(borders=BORDERS, **arguments):
    numbers = torch.arange(len(borders) - 1).repeat_interleave(borders.diff())[None]

    def function(q, k, v):
        q, k, v = (x.unflatten(-1, (-1, D))[None].transpose(1, 2) for x in (q, k, v))
        out = lighthouse_fx.lighthouse_attention(
            q, k, v, is_causal=True, enable_gqa=True, documents=numbers, config=CONFIG, **arguments
        )
        return out.transpose(1, 2)[0].reshape(-1, H * D)

    return function


def packed(flash, **arguments):
    def function(q, k, v, borders=BORDERS, others=OTHERS, longest=LONGEST):
        q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
        out = flash.flash_attn_varlen_func(q, k, v, borders, others, longest, longest, causal=True, **arguments)
        return out.view(-1, H * D)

    return function


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.parametrize("backend", ["lighthouse", passes_only], ids=["compiled", "passes"])
def test_it_is_the_functional_form_inside_documents(flash, backend):
    tensors = qkv(G)
    function = packed(flash, softmax_scale=0.3, deterministic=True)
    function = torch.compile(function, backend=backend, options=FIELDS, fullgraph=True)
    found, expected = with_gradients(function, tensors), with_gradients(oracle(scale=0.3), tensors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.rewritten and call.is_causal and call.inside_documents


def test_allowed_in_the_graph_with_one_tensor_for_both(flash):
    own = flash.flash_attn_varlen_func  # a copy, as what is allowed stays allowed
    copied = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__)
    allowed = torch.compiler.allow_in_graph(copied)

    def function(*tensors):
        q, k, v = (x.unflatten(-1, (-1, D)) for x in tensors)
        return allowed(q, k, v, BORDERS, BORDERS, LONGEST, LONGEST, 0.0, 0.3, True).view(-1, H * D)

    tensors = qkv()
    gm, call = only_call(function, *tensors)
    assert call.refusal is None and "flash_attn" not in str([node.target for node in gm.graph.nodes])
    torch._dynamo.reset()
    found = with_gradients(torch.compile(function, backend=passes_only, options=FIELDS), tensors)
    torch.testing.assert_close(found, with_gradients(oracle(scale=0.3), tensors), rtol=1e-10, atol=1e-12)


def test_borders_are_read_where_the_attention_is(flash):
    later = torch.tensor([0, 11, 11, 40, N], dtype=torch.int32)

    def function(q, k, v, borders):
        others = borders.clone()
        borders.copy_(later)
        others.copy_(later)
        out = packed(flash)(q, k, v, borders, others)
        borders.zero_()
        return out

    tensors = qkv()
    compiled = torch.compile(function, backend=passes_only, options=FIELDS, fullgraph=True)
    found = with_gradients(lambda *x: compiled(*x, BORDERS.clone()), tensors)
    assert lighthouse_fx.reports()[-1].rewritten == 1
    torch.testing.assert_close(found, with_gradients(oracle(later), tensors), rtol=1e-10, atol=1e-12)


def test_other_documents_and_lengths_need_no_graph_of_their_own(flash):
    compiled = torch.compile(packed(flash), backend=passes_only, options=FIELDS, fullgraph=True)
    for borders in (BORDERS, [0, 33, 80], [0, 7, 50, 55, 100], [0, 20, 21, 22, 23, 24, 96]):
        borders = torch.as_tensor(borders, dtype=torch.int32)
        tensors, longest = qkv(tokens=int(borders[-1])), int(borders.diff().max())
        found = with_gradients(lambda *x, b=borders, n=longest: compiled(*x, b, b.clone(), n), tensors)
        torch.testing.assert_close(found, with_gradients(oracle(borders), tensors), rtol=1e-10, atol=1e-12)
    assert [report.rewritten for report in lighthouse_fx.reports()] == [1, 1]  # one for these sizes, one for all


WRONG = {
    "not from 0": ({"borders": [1, 24, 24, 29, N]}, "does not rise from 0"),
    "not to the end": ({"borders": [0, 24, 24, 29, N - 1]}, "to the number of tokens"),
    "beyond the end": ({"borders": [0, 24, 24, 29, N + 1]}, "to the number of tokens"),
    "falling": ({"borders": [0, 29, 24, 24, N]}, "does not rise"),
    "not the keys'": ({"others": [0, 24, 25, 29, N]}, "cu_seqlens_q and cu_seqlens_k of flash_attn_varlen_func differ"),
    "a longer document": ({"longest": LONGEST - 1}, "max_seqlen of flash_attn_varlen_func is shorter"),
}


@pytest.mark.parametrize("backend", ["lighthouse", passes_only], ids=["compiled", "passes"])
def test_borders_that_lie_are_an_error(flash, backend):
    compiled = torch.compile(packed(flash), backend=backend, options=FIELDS, fullgraph=True)
    compiled(*qkv())
    for given, says in WRONG.values():
        given = {name: x if name == "longest" else torch.tensor(x, dtype=torch.int32) for name, x in given.items()}
        if "borders" in given:
            given["others"] = given["borders"].clone()
        with pytest.raises(RuntimeError, match=says):
            compiled(*qkv(), **given)


OTHER = {
    "not causal": ({"causal": False}, "not causal"),
    "window": ({"window_size": (9, 0)}, "sliding window"),
    "soft-capping": ({"softcap": 30.0}, "soft-capping"),
    "alibi": ({"alibi_slopes": torch.ones(H)}, "ALiBi"),
    "pages": ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "paged keys and values"),
    "other numbers of borders": ({"cu_seqlens_k": torch.tensor([0, 24, N], dtype=torch.int32)}, "5 and 3 borders"),
    "int64": ({"cu_seqlens_k": BORDERS.long()}, "cu_seqlens_k is no int32 tensor"),
    "probabilities": ({"return_attn_probs": True}, "log-sum-exp"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_arguments_are_left(flash, case):
    arguments, because = OTHER[case]
    arguments = {"cu_seqlens_k": OTHERS, "causal": True} | arguments

    def function(*tensors):
        q, k, v = (x.unflatten(-1, (-1, D)) for x in tensors)
        out = flash.flash_attn_varlen_func(q, k, v, BORDERS, max_seqlen_q=N, max_seqlen_k=N, **arguments)
        return out[0] + out[1].sum() if isinstance(out, tuple) else out

    assert_left(function, qkv(), because)


def test_padded_heads_are_left(flash):
    def function(*tensors):
        q, k, v = (x.unflatten(-1, (-1, 4)) for x in tensors)
        return flash.flash_attn_varlen_func(q, k, v, BORDERS, OTHERS, N, N, causal=True)

    assert_left(function, qkv(), "pads the head dimension")


def test_one_tensor_given_twice_breaks_the_graph_and_says_what_to_do(flash):
    function = torch.compile(lambda *x: packed(flash)(*x, BORDERS, BORDERS), backend=passes_only, options=FIELDS)
    tensors = qkv()
    found = function(*tensors)
    calls = [call for report in lighthouse_fx.reports() for call in report.calls]
    if torch.__version__ < "2.12":  # it traces it
        assert [call.rewritten for call in calls] == [True]
        torch.testing.assert_close(found, oracle()(*tensors), rtol=1e-10, atol=1e-12)
        return
    torch.testing.assert_close(found, packed(flash)(*tensors, BORDERS, BORDERS), rtol=0, atol=0)
    assert calls and not any(call.rewritten for call in calls)
    assert "graph break" in calls[0].reason and "cu_seqlens_q.clone()" in calls[0].remedy


class Packed(nn.Module):
    def __init__(self, flash, checkpointed):
        super().__init__()
        self.flash, self.checkpointed = flash, checkpointed
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, x, borders, others):  # [N, WIDTH]
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(1)
        out = self.flash.flash_attn_varlen_func(q, k, v, borders, others, N, N, causal=True)
        return self.out(out.reshape(x.shape))

    def forward(self, x, borders, others):
        if self.checkpointed:
            return x + checkpoint(self.attend, x, borders, others, use_reentrant=False)
        return x + self.attend(x, borders, others)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_its_own_documents_hold_inside_the_context(flash, checkpointed, recwarn):
    model, x = Packed(flash, checkpointed), torch.randn(N, WIDTH)
    model.compile(backend=passes_only, options=FIELDS)
    alone = model(x, BORDERS, OTHERS)
    with lighthouse_fx.documents(torch.arange(N)[None] // 7):
        torch.testing.assert_close(model(x, BORDERS, OTHERS), alone, rtol=0, atol=0)
        alone.sum().backward()
        with lighthouse_fx.dense():  # flash-attn itself keeps inside its documents: nothing to warn of
            model(x, BORDERS, OTHERS)
    assert not [w for w in recwarn if "documents()" in str(w.message)]
    calls = [call for report in lighthouse_fx.reports() for call in report.calls]
    assert {call.rewritten for call in calls} == {True, False} and all(call.inside_documents for call in calls)


def test_a_model_of_transformers_that_is_given_borders(flash, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers import modeling_flash_attention_utils as utils

    functions = (flash.flash_attn_func, flash.flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    utils.lazy_import_flash_attention("flash_attention_2")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).double(), torch.randint(0, 96, (1, N))
    places = torch.cat([torch.arange(n) for n in BORDERS.diff()])[None]

    def functional(module, query, key, value, attention_mask, scaling, **_):
        out = lighthouse_fx.lighthouse_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True, documents=places - torch.arange(N), config=CONFIG
        )
        return out.transpose(1, 2), None

    def loss_and_gradients(implementation, call, **given):
        model.config._attn_implementation = implementation
        model.zero_grad()
        loss = call(ids, labels=ids, position_ids=places, **given).loss
        loss.backward()
        return [loss, *(p.grad.clone() for p in model.parameters())]

    transformers.AttentionInterface.register("functional", functional)
    expected = loss_and_gradients("functional", model)
    lengths = {"max_length_q": LONGEST, "max_length_k": LONGEST}
    compiled = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)
    found = loss_and_gradients(
        "flash_attention_2", compiled, cu_seq_lens_q=BORDERS, cu_seq_lens_k=OTHERS, **lengths
    )
    assert [report.rewritten for report in lighthouse_fx.reports()] == [2]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
