"""The passes on Dynamo's graph: what is rewritten, into what, and what must be left alone, with its reason."""

import pytest
import torch
import torch.nn.functional as F
from graphs import OPS, B, D, G, H, N, assert_refused, gathered_heads, heads, only_call, targets, traced
from small_models import CONFIG, FIELDS, Block, Model, causal, inputs, passes_only
from torch import nn
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.passes import CALLS, run_passes
from lighthouse_fx.passes.match.sdpa import is_attention


def test_call_becomes_select_three_gathers_itself_and_scatter():
    gm, call = only_call(lambda q, k, v: causal(q, k, v) + 1, heads(), heads(G), heads(G))
    assert call.refusal is None
    found = [target for target in targets(gm) if "getitem" not in str(target)]
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    assert found[:6] == [OPS.select.default, *[OPS.gather.default] * 3, sdpa, OPS.scatter.default]
    assert len(found) == 7  # and the addition


@pytest.mark.parametrize("spelling", range(6))
def test_every_spelling_of_the_arguments(spelling):
    q, k, v = heads(), heads(), heads()
    sdpa = F.scaled_dot_product_attention
    calls = [
        lambda q, k, v: sdpa(q, k, v, None, 0.0, True),
        lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True),
        lambda q, k, v: sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=0.3),
        lambda q, k, v: sdpa(q, value=v, key=k, is_causal=True, enable_gqa=True),
        lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.3),
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    ]
    (gm,) = traced(calls[spelling], q, k, v)
    (call,) = gm.meta[CALLS]
    assert call.refusal is None
    assert call.is_causal is True
    scale = 0.3 if spelling in (2, 4) else None
    expected = lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, scale=scale, config=CONFIG)
    inputs = dict(zip("qkv", (q, k, v), strict=True))
    order = [inputs[name] for node in gm.graph.find_nodes(op="placeholder") for name in "qkv" if f"_{name}_" in node.name]
    (found,) = gm(*order)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_everything_else_about_the_call_carries_over():
    gm, _ = only_call(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, scale=0.5, enable_gqa=True, is_causal=True),
        heads(), heads(G), heads(G),
    )  # fmt: skip
    (inner,) = filter(is_attention, gm.graph.nodes)
    assert inner.args[3:] == (None, 0.25, True)  # no mask, dropout_p, is_causal
    assert dict(inner.kwargs) == {"scale": 0.5, "enable_gqa": True}


def test_bidirectional_call_is_rewritten():
    q, k, v = heads(), heads(), heads()
    gm, call = only_call(F.scaled_dot_product_attention, q, k, v)
    assert call.refusal is None and call.is_causal is False
    expected = lighthouse_fx.lighthouse_attention(q, k, v, config=CONFIG)
    torch.testing.assert_close(gm(q, k, v)[0], expected, rtol=0, atol=0)


# --- what must not be rewritten ---------------------------------------------------------------------------------------


def test_explicit_mask_is_left():
    mask = torch.rand(N, N) > 0.5
    refusal = assert_refused(
        lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m), heads(), mask, because="explicit attn_mask"
    )
    assert "is_causal=True" in refusal.remedy


def test_other_lengths_are_left():
    assert_refused(F.scaled_dot_product_attention, heads(), heads(tokens=32), heads(tokens=32), because="lengths differ")


def test_call_that_needs_no_gradient_is_left():
    frozen = heads(grad=False)
    assert_refused(F.scaled_dot_product_attention, frozen, frozen, frozen, because="needs no gradient")


def test_call_under_no_grad_inside_the_graph_is_left():
    def function(q):
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    assert_refused(function, heads(), because="needs no gradient")


def test_detached_arguments_are_left():
    assert_refused(
        lambda q: F.scaled_dot_product_attention(q.detach(), q.detach(), q.detach()), heads(), because="needs no gradient"
    )


def test_one_argument_with_gradient_is_enough():
    _, call = only_call(F.scaled_dot_product_attention, heads(grad=False), heads(grad=False), heads())
    assert call.refusal is None


def test_short_sequence_is_left():
    q = heads(tokens=9)
    refusal = assert_refused(F.scaled_dot_product_attention, q, q, q, because="not worth it")
    assert "topk" in refusal.remedy


def test_sequence_shorter_than_a_coarsest_window_is_left():
    q = heads(tokens=3)
    refusal = assert_refused(F.scaled_dot_product_attention, q, q, q, because="fewer than one coarsest window of 4")
    assert "levels" in refusal.remedy


@pytest.mark.parametrize("share, rewritten", [(0.2, False), (1.0, True)])
def test_max_kept_decides(share, rewritten):
    q = heads()
    config = LighthouseConfig(**FIELDS, max_kept=share)
    _, call = only_call(F.scaled_dot_product_attention, q, q, q, config=config)
    assert (call.refusal is None) == rewritten


def test_three_dimensions_are_left():
    q = torch.randn(H, N, D, requires_grad=True)
    assert_refused(F.scaled_dot_product_attention, q, q, q, because="not 4 dimensions")


def test_broadcast_batch_is_left():
    q, k = heads(), torch.randn(1, H, N, D, requires_grad=True)
    assert_refused(F.scaled_dot_product_attention, q, k, k, because="batch sizes differ")


def test_other_value_head_dimension_is_rewritten():
    q, v = heads(), heads(size=5)
    gm, call = only_call(F.scaled_dot_product_attention, q, q, v)
    assert call.refusal is None
    expected = lighthouse_fx.lighthouse_attention(q, q, v, config=CONFIG)
    torch.testing.assert_close(gm(q, v)[0], expected, rtol=0, atol=0)


def test_functional_form_is_not_rewritten_twice():
    q = heads()
    (gm,) = traced(lambda q: lighthouse_fx.lighthouse_attention(q, q, q, is_causal=True, config=CONFIG), q)
    assert all("already Lighthouse" in call.refusal.reason for call in gm.meta[CALLS])
    assert targets(gm).count(OPS.select.default) == 1


def test_a_checkpoint_inside_vmap_is_left_for_the_transform():
    def attention(q):
        return checkpoint(lambda q: F.scaled_dot_product_attention(q, q, q), q, use_reentrant=False)

    q = torch.randn(3, B, H, N, D, requires_grad=True)
    for gm in traced(torch.vmap(attention), q):
        for call in gm.meta[CALLS]:
            assert call.refusal is not None and "torch.func transform" in call.refusal.reason


def test_inside_vmap_is_left():
    q = torch.randn(3, B, H, N, D, requires_grad=True)
    for gm in traced(torch.vmap(lambda q: F.scaled_dot_product_attention(q, q, q)), q):
        for call in gm.meta[CALLS]:
            assert call.refusal is not None and "torch.func" in call.refusal.reason


def test_inside_a_custom_autograd_function_is_left():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            return F.scaled_dot_product_attention(q, q, q)

        @staticmethod
        def backward(ctx, grad):
            return grad

    for gm in traced(lambda q: Function.apply(q) * 2, heads()):
        for call in gm.meta[CALLS]:
            assert call.refusal is not None


def test_node_metadata_is_carried_over():
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(run_passes(gm, example_inputs, config=CONFIG))
        return gm

    torch.compile(Model(1), backend=backend)(inputs())
    for node in graphs[0].graph.nodes:
        if "lighthouse_fx" in str(node.target):
            assert "attn" in str(node.meta["nn_module_stack"])
            assert "example_value" in node.meta


class Cross(nn.Module):
    """Decoder layers: self-attention, then attention to a memory of the same length."""

    def __init__(self, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(32, 32) for _ in range(5)]) for _ in range(layers))

    def forward(self, x, memory):
        for own, query, key, value, out in self.layers:
            x = x + self.attend(own(x), own(x), own(x), is_causal=True)
            x = x + out(self.attend(query(x), key(memory), value(memory)))
        return x

    def attend(self, *qkv, is_causal=False):
        q, k, v = (x.view(*x.shape[:2], H, D).transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


def test_cross_attention_of_equal_lengths_is_left():
    torch.compile(Cross(2), backend=passes_only, options=FIELDS)(inputs(), inputs())
    calls = lighthouse_fx.reports()[-1].calls
    assert [call.rewritten for call in calls] == [True, False, True, False]
    assert "cross-attention: its query is made of l_x_, its key of l_memory_" in calls[1].reason


def test_learned_queries_are_cross_attention():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.key = nn.Parameter(torch.randn(B, H, N, D)), nn.Linear(D, D)

        def forward(self, x):
            return F.scaled_dot_product_attention(self.queries * 1, self.key(x), x)

    assert_refused(Pooling(), heads(), because="its query is made of parameters alone, its key of l_x_")


def test_projections_made_outside_the_graph_are_no_cross_attention():
    class Core(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))
            self.register_buffer("cosine", torch.randn(N, D))

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q * self.scale * self.cosine, k * self.scale * self.cosine, v)

    _, call = only_call(Core(), heads(), heads(), heads())
    assert call.refusal is None


# --- dense layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dense, rewritten",
    [
        ((), [0, 1, 2, 3]),
        ((0,), [1, 2, 3]),
        ((0, -1), [1, 2]),
        ((-2,), [0, 1, 3]),
        (("layers.2",), [0, 1, 3]),
        (("*.attn",), []),
        (("layers.[01]", 3), [2]),
    ],
)
def test_dense_layers(dense, rewritten):
    torch.compile(Model(4), backend=passes_only, options={**FIELDS, "dense_layers": dense})(inputs())
    calls = lighthouse_fx.reports()[-1].calls
    assert [number for number, call in enumerate(calls) if call.rewritten] == rewritten
    assert all("dense_layers" in call.reason for call in calls if not call.rewritten)


class ByStarredArguments(Model):
    """As a decorator of the whole forward makes it, that of transformers for example."""

    def forward(*args, **kwargs):
        return Model.forward(*args, **kwargs)


class Holder:
    """No module: it has models in a list and a dict."""

    def __init__(self):
        self.models, self.by_name = [Model(4)], {"lm": Model(4)}

    def from_list(self, x):
        return self.models[0](x)

    def from_dict(self, x):
        return self.by_name["lm"](x)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Model(4)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "run, prefix",
    [
        (Model(4), ""),
        (ByStarredArguments(4), ""),
        (Model(4).forward, ""),
        (Holder().from_list, ""),
        (Holder().from_dict, ""),
        (Wrapper(), "module."),
    ],
)
@pytest.mark.parametrize("dense, rewritten", [((0, -1), [1, 2]), (("*layers.1",), [0, 2, 3])])
def test_layers_are_known_however_the_model_is_called(run, prefix, dense, rewritten):
    torch.compile(run, backend=passes_only, options={**FIELDS, "dense_layers": dense})(inputs())
    calls = lighthouse_fx.reports()[-1].calls
    assert [call.module for call in calls] == [f"{prefix}layers.{n}.attn" for n in range(4)]
    assert [number for number, call in enumerate(calls) if call.rewritten] == rewritten


@pytest.mark.parametrize(
    "model, modules",
    [
        (lambda: nn.Sequential(*(Block() for _ in range(4))), ["0.attn", "1.attn", "2.attn", "3.attn"]),
        (
            lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())),
            ["0.0.attn", "0.1.attn", "1.0.attn", "1.1.attn"],
        ),
        (lambda: nn.Sequential(nn.Linear(32, 32), Model(4)), [f"1.layers.{n}.attn" for n in range(4)]),
    ],
)
def test_layers_in_lists_of_lists_are_counted_through(model, modules):
    torch.compile(model(), backend=passes_only, options={**FIELDS, "dense_layers": (0, -1)})(inputs())
    calls = lighthouse_fx.reports()[-1].calls
    assert [call.module for call in calls] == modules
    assert [call.rewritten for call in calls] == [False, True, True, False]


@pytest.mark.parametrize("wanted", [17, -5, "layer.2", "model.layers.1"])
def test_an_entry_of_dense_layers_that_matches_nothing_is_reported(wanted):
    with pytest.warns(UserWarning, match="matches nothing: there are 4 layers in 'layers', 0 to 3") as caught:
        torch.compile(Model(4), backend=passes_only, options={**FIELDS, "dense_layers": (wanted, 1)})(inputs())
    assert repr(wanted) in str(caught[0].message)
    assert [call.rewritten for call in lighthouse_fx.reports()[-1].calls] == [True, False, True, True]


def test_negative_layer_numbers_count_from_the_models_end_across_graph_breaks():
    class Broken(Model):
        def forward(self, x):
            x = self.layers[1](self.layers[0](x))
            torch._dynamo.graph_break()
            return self.layers[3](self.layers[2](x))

    before = len(lighthouse_fx.reports())
    torch.compile(Broken(4), backend=passes_only, options={**FIELDS, "dense_layers": (-1,)})(inputs())
    calls = [call for report in lighthouse_fx.reports()[before:] for call in report.calls]
    assert [call.rewritten for call in calls] == [True, True, True, False]


def test_layer_number_that_no_graph_shows_keeps_the_call_dense():
    block = Model(1).layers[0]
    torch.compile(block, backend=passes_only, options={**FIELDS, "dense_layers": (0,)})(inputs())
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten
    assert "lighthouse_fx.compile" in call.remedy


# --- repeated heads ---------------------------------------------------------------------------------------------------

REPEATS = {
    "expand": lambda x: x[:, :, None, :, :].expand(B, G, H // G, N, D).reshape(B, H, N, D),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, H // G, -1, -1).flatten(1, 2),
    "short index": lambda x: x[:, :, None].expand(B, G, H // G, N, D).contiguous().view(B, H, N, D),
    "repeat_interleave": lambda x: x.repeat_interleave(H // G, dim=1),
    "function": lambda x: torch.repeat_interleave(x, repeats=H // G, dim=-3).contiguous(),
}


@pytest.mark.parametrize("spelling", REPEATS)
def test_repeated_heads_are_undone(spelling):
    repeat = REPEATS[spelling]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    tensors = heads(), heads(G), heads(G)
    gm, call = only_call(attention, *tensors)
    assert call.refusal is None
    assert gathered_heads(gm) == [H, G, G]
    names = {str(target) for target in targets(gm)} | {n.target for n in gm.graph.nodes if n.op == "call_method"}
    assert not names & {"expand", "reshape", "flatten", "view", "contiguous", "repeat_interleave"}
    out = torch.compile(attention, backend=passes_only, options=FIELDS)(*tensors)
    expected = lighthouse_fx.lighthouse_attention(*tensors, is_causal=True, enable_gqa=True, config=CONFIG)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected)]
    torch.testing.assert_close(*grads)


NOT_REPEATS = {
    "whole blocks of heads": lambda x: x.repeat(1, H // G, 1, 1),
    "tokens": lambda x: x[:, :, :, None].expand(B, G, N, H // G, D).reshape(B, H, N, D),
    "another order": lambda x: x[:, None].expand(B, H // G, G, N, D).reshape(B, H, N, D),
}


@pytest.mark.parametrize("spelling", NOT_REPEATS)
def test_other_copies_of_heads_are_not_undone(spelling):
    repeat = NOT_REPEATS[spelling]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    tensors = heads(), heads(G), heads(G)
    gm, call = only_call(attention, *tensors)
    assert call.refusal is None and gathered_heads(gm) == [H, H, H]
    out = torch.compile(attention, backend=passes_only, options=FIELDS)(*tensors)
    q, k, v = tensors
    expected = lighthouse_fx.lighthouse_attention(q, repeat(k), repeat(v), is_causal=True, config=CONFIG)
    torch.testing.assert_close(out, expected)


def test_repeated_heads_that_are_used_elsewhere_stay():
    def attention(q, k, v):
        keys = k.repeat_interleave(H // G, dim=1)
        return F.scaled_dot_product_attention(q, keys, v.repeat_interleave(H // G, dim=1), is_causal=True) + keys

    gm, _ = only_call(attention, heads(), heads(G), heads(G))
    assert gathered_heads(gm) == [H, G, G]
    assert sum(node.target == "repeat_interleave" for node in gm.graph.nodes) == 1


def test_only_keys_repeated_is_not_undone():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(H // G, dim=1), v, is_causal=True)

    gm, _ = only_call(attention, heads(), heads(G), heads())
    assert gathered_heads(gm) == [H, H, H]
