"""Keys and values as models put them together: one head for all queries, written into an empty tensor, repeated.

How repeated heads are undone is tested with the passes; here it is what that saves.
"""

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, TOKENS, WIDTH, inputs, passes_only
from torch import nn
from torch.utils import _pytree as pytree

import lighthouse_fx
from lighthouse_fx.passes import PIPELINE
from lighthouse_fx.passes.rewrite.equal_heads import undo_equal_heads
from lighthouse_fx.passes.rewrite.repeat_kv import undo_repeated_heads

HEADS, SIZE = 8, 8
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def heads(count, size=SIZE):
    return torch.randn(2, count, TOKENS, size, dtype=torch.float64, requires_grad=True)


def run_compiled(function, *args):
    """The result, and the report of the one graph."""
    before = len(lighthouse_fx.reports())
    out = torch.compile(function, backend=passes_only, options=FIELDS, fullgraph=True)(*args)
    (report,) = lighthouse_fx.reports()[before:]
    return out, report


# --- one head for all queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_head_of_keys_and_values_serves_all_queries_without_enable_gqa(is_causal):
    given = heads(HEADS), heads(1), heads(1, size=12)
    out, report = run_compiled(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=is_causal), *given)
    assert report.rewritten == 1
    expected = lighthouse_fx.lighthouse_attention(*given, is_causal=is_causal, enable_gqa=True, config=CONFIG)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    found, wanted = (torch.autograd.grad(x.square().sum(), given) for x in (out, expected))
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("query", "key", "value", "because"),
    [
        (HEADS, 1, HEADS, "key has 1 heads and value 8"),
        (HEADS, HEADS, 1, "key has 8 heads and value 1"),
        (1, HEADS, HEADS, "query has 1 heads"),
    ],
)
def test_other_broadcasts_of_heads_stay_dense(query, key, value, because):
    given = heads(query), heads(key), heads(value)
    out, report = run_compiled(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), *given)
    assert because in report.calls[0].reason
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*given, is_causal=True), rtol=0, atol=0)


# --- written into an empty tensor -------------------------------------------------------------------------------------


class Latent(nn.Module):
    """Half of each query and key is turned by an input of the graph; the keys are written into an empty tensor.

    `memory`: what the unturned half of the keys is made of, if not of x.
    """

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, turn, memory=None):
        memory = x if memory is None else memory
        projected = self.query(x), self.key(memory), self.value(x)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in projected)
        queries = torch.cat([q[..., :4], q[..., 4:] * turn[:, None]], dim=-1)
        keys = k.new_empty(k.shape)
        keys[..., :4].copy_(k[..., :4])
        keys[..., 4:] = k[..., 4:] * turn[:, None]
        return F.scaled_dot_product_attention(queries, keys, v, is_causal=True)


def test_keys_written_into_an_empty_tensor_are_made_of_what_was_written():
    model, x, turn = Latent().double(), inputs(dtype=torch.float64), torch.randn(2, TOKENS, 4, dtype=torch.float64)
    _, report = run_compiled(model, x, turn)
    assert report.rewritten == 1, report.summary()


def test_cross_attention_is_seen_through_writes():
    model, x, turn = Latent(), inputs(), torch.randn(2, TOKENS, 4)
    _, report = run_compiled(model, x, turn, inputs())
    (call,) = report.calls
    assert call.reason == "cross-attention: its query is made of l_turn_, l_x_, its key of l_memory_, l_turn_"


# --- repeated ---------------------------------------------------------------------------------------------------------


class Repeating(nn.Module):
    """Two heads of keys and values, repeated for eight heads of queries."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, (HEADS + 4) * SIZE)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (-1, SIZE)).transpose(1, 2).split([HEADS, 2, 2], dim=1)
        k, v = (y[:, :, None].expand(-1, -1, HEADS // 2, -1, -1).flatten(1, 2) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def memory(passes):
    """Bytes of all tensors in the graph after these passes, and bytes that its run keeps for the backward pass."""
    graphs, kept = [], {}

    def backend(gm, example_inputs):
        for step in passes:
            gm = step(gm, example_inputs, config=CONFIG)
        graphs.append(gm)
        return gm

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x  # alive as long as the result, so that no address comes twice

    torch._dynamo.reset()
    model, x = Repeating(), inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert out.requires_grad
    values = [x for node in graphs[0].graph.nodes for x in pytree.tree_leaves(node.meta.get("example_value"))]
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in values if isinstance(x, torch.Tensor)}
    return sum(storages.values()), sum(kept.values())


def test_undoing_repeated_heads_saves_their_memory():
    without = [step for step in PIPELINE if step not in (undo_repeated_heads, undo_equal_heads)]
    assert len(without) == len(PIPELINE) - 2
    (made, kept), (repeated_made, repeated_kept) = memory(PIPELINE), memory(without)
    wide = 2 * HEADS * TOKENS * SIZE * 4  # bytes of the repeated keys, [2, HEADS, TOKENS, SIZE] in float32
    assert made < repeated_made - 2 * wide  # those, the values, and the wider tensors gathered from them
    assert kept < 0.7 * repeated_kept
