"""FlexAttention: what its score_mod and mask_mod prove to be, and what must be left alone.

On a CPU flex_attention does not train, so Dynamo traces it here without gradients, and the tensors of that graph are then
declared to need them.
"""

import pytest
import torch
from small_models import CONFIG
from test_passes import B, D, G, H, N
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

import lighthouse_fx
from lighthouse_fx.passes import CALLS, run_passes

OPS = torch.ops.lighthouse_fx


def causal(b, h, i, j):
    return i >= j


def blocks(mask_mod, batch=None):
    return create_block_mask(mask_mod, batch, None, N, N, device="cpu")


def qkv(groups=H, dtype=torch.float32):
    return [torch.randn(B, h, N, D, dtype=dtype) for h in (H, groups, groups)]


def flexed(function, *tensors):
    """Dynamo's graph after the passes, as it would be of tensors that need gradients; and as it was before."""
    graphs = []

    def backend(gm, example_inputs):
        before = str(gm.graph)
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()
        graphs.append((run_passes(gm, example_inputs, config=CONFIG), before))
        return gm.forward

    torch.compile(function, backend=backend)(*tensors)
    (found,) = graphs
    return found


def call_of(function, *tensors):
    gm, before = flexed(function, *(tensors or qkv()))
    (call,) = gm.meta[CALLS]
    if call.refusal is not None:
        assert str(gm.graph) == before  # the user's own
    return gm, call


def with_gradients(function, tensors):
    out = function(*tensors)
    torch.manual_seed(1)
    return out, torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), tensors)


@pytest.mark.parametrize("groups", [H, G])
def test_without_masks_it_is_the_functional_form(groups):
    def function(q, k, v):
        return flex_attention(q, k, v, scale=0.3, enable_gqa=groups != H, kernel_options={"BLOCK_M": 64})

    gm, call = call_of(function, *qkv(groups))
    assert call.refusal is None and call.is_causal is False
    assert not any("flex_attention" in str(node.target) for node in gm.graph.nodes)
    tensors = [x.requires_grad_() for x in qkv(groups, torch.float64)]
    order = [name for node in gm.graph.find_nodes(op="placeholder") for name in "qkv" if f"_{name}_" in node.name]
    arguments = [dict(zip("qkv", range(3), strict=True))[name] for name in order]
    found = with_gradients(lambda *x: gm(*(x[n] for n in arguments))[0], tensors)

    def oracle(q, k, v):
        return lighthouse_fx.lighthouse_attention(q, k, v, scale=0.3, enable_gqa=True, config=CONFIG)

    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=1e-10, atol=1e-12)


MASKS = {
    "causal": (causal, True),
    "causal, the other way": (lambda b, h, i, j: j <= i, True),
    "causal and full": (and_masks(causal, lambda b, h, i, j: i.new_ones((), dtype=torch.bool)), True),
}


@pytest.mark.parametrize("case", ["causal", "causal, the other way", "causal and full"])
def test_a_causal_mask_mod_is_proved_but_its_blocks_are_not(case):
    mask = blocks(MASKS[case][0])
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    assert call.is_causal is True
    assert "made elsewhere" in call.refusal.reason and "is_causal=True" in call.refusal.remedy


@pytest.mark.slow
def test_blocks_that_the_graph_makes_are_not_proved_either():
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks(causal)))
    assert call.is_causal is True and "made elsewhere" in call.refusal.reason


def test_block_sparse_attention_is_not_taken_for_dense():
    # Every row of blocks sees the first block alone; its mask_mod says nothing of that.
    count, first = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    sparse = BlockMask.from_kv_blocks(count, first, BLOCK_SIZE=N)
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=sparse))
    assert "block_mask" in call.refusal.reason


def test_no_blocks_at_all_are_not_taken_for_all():
    def function(q, k, v):
        none = torch.zeros(1, 1, 1, dtype=torch.int32)
        sparse = BlockMask.from_kv_blocks(none, torch.zeros(1, 1, 1, 1, dtype=torch.int32), BLOCK_SIZE=1 << 30)
        return flex_attention(q, k, v, block_mask=sparse)

    _, call = call_of(function)
    assert "not those of all keys" in call.refusal.reason


def test_blocks_that_are_written_to_are_not_proved():
    def function(q, k, v):
        count = torch.ones(1, 1, 1, dtype=torch.int32)
        sparse = BlockMask.from_kv_blocks(count, torch.zeros(1, 1, 1, 1, dtype=torch.int32), BLOCK_SIZE=1 << 30)
        count.zero_()
        return flex_attention(q, k, v, block_mask=sparse)

    _, call = call_of(function)
    assert "changed in place" in call.refusal.reason


@pytest.mark.parametrize("order", [1, -1])
def test_documents_are_recognised(order):
    numbers = (torch.arange(N) // 24).expand(B, N).contiguous()

    def same(b, h, i, j):
        return numbers[b, i] == numbers[b, j]

    mask = blocks(and_masks(*[causal, same][::order]), B)
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    assert call.is_causal is True
    assert call.documents.op == "placeholder" and call.documents.meta["example_value"].shape == (B, N)
    assert "inside documents" in call.refusal.reason


TABLE = torch.arange(N)
OTHER = {
    "window": (and_masks(causal, lambda b, h, i, j: i - j < 9), "sliding window"),
    "prefix": (or_masks(causal, lambda b, h, i, j: j < 9), "not proved"),
    "one ahead": (lambda b, h, i, j: i + 1 >= j, "neither causal"),
    "strictly causal": (lambda b, h, i, j: i > j, "neither causal"),
    "some heads": (lambda b, h, i, j: (i >= j) & (h > 1), "not proved"),
    "a table": (lambda b, h, i, j: TABLE[i] >= TABLE[j], "depends on the input"),
    "positions swapped": (lambda b, h, i, j: j >= i, "neither causal"),
    "numbers of another row": (
        lambda b, h, i, j: (i >= j) & (TABLE.expand(B, N)[b, i] == TABLE.expand(B, N)[0, j]), "not proved"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_other_mask_mods_are_left(case):
    mask_mod, because = OTHER[case]
    mask = blocks(mask_mod, B)
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    assert because in call.refusal.reason


SCORES = {
    "soft-capping": lambda score, b, h, i, j: 20 * torch.tanh(score / 20),
    "alibi": lambda score, b, h, i, j: score + (j - i) * 0.5,
    "causal": lambda score, b, h, i, j: torch.where(i >= j, score, -float("inf")),
    "nothing of the score": lambda score, b, h, i, j: i * 1.0,
}


@pytest.mark.parametrize("case", SCORES)
def test_score_mods_are_left(case):
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, score_mod=SCORES[case]))
    assert "score_mod" in call.refusal.reason


def test_log_sum_exp_keeps_it_dense():
    def function(q, k, v):
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out + lse[..., None]

    _, call = call_of(function)
    assert "log-sum-exp" in call.refusal.reason


def test_without_gradients_the_users_graph_runs():
    report = lighthouse_fx.explain(flex_attention, *qkv(), config=CONFIG)
    (call,) = report.calls
    assert "needs no gradient" in call.reason
