"""FlexAttention: what its score_mod and mask_mod prove to be, and what must be left alone.

On a CPU flex_attention does not train, so Dynamo traces it here without gradients, and the tensors of that graph are then
declared to need them.
"""

import pytest
import torch
from graphs import B, D, G, H, N, with_gradients
from small_models import CONFIG, FIELDS, passes_only
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    flex_attention,
    or_masks,
)
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx.passes import CALLS, CONTEXT, PassContext, run_passes
from lighthouse_fx.runtime.document_inputs import allow_document_input, bind_documents, shape_of_documents

OPS = torch.ops.lighthouse_fx


def causal(b, h, i, j):
    return i >= j


def blocks(mask_mod, batch=None):
    return create_block_mask(mask_mod, batch, None, N, N, device="cpu")


def qkv(groups=H, dtype=torch.float32):
    return [torch.randn(B, h, N, D, dtype=dtype) for h in (H, groups, groups)]


def declare_gradients(gm):
    """As if the graph had been traced with gradients."""
    for part in gm.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            value = node.meta.get("example_value")
            for x in value if isinstance(value, tuple) else (value,):
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()


def flexed(function, *tensors):
    """Dynamo's graph after the passes, as it would be of tensors that need gradients; and as it was before."""
    graphs = []

    def backend(gm, example_inputs):
        gm = allow_document_input(gm)
        gm.meta[CONTEXT] = PassContext(packed=shape_of_documents())
        before = str(gm.graph)
        declare_gradients(gm)
        graphs.append((run_passes(gm, example_inputs, config=CONFIG), before))

        def run(*inputs):
            gm.meta["inputs"] = inputs
            return bind_documents(gm, gm, CONFIG)(*inputs)

        return run

    torch.compile(function, backend=backend)(*tensors)
    (found,) = graphs
    return found


def call_of(function, *tensors):
    gm, before = flexed(function, *(tensors or qkv()))
    (call,) = gm.meta[CALLS]
    if call.refusal is not None:
        assert str(gm.graph) == before  # the user's own
    return gm, call


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
    "causal": causal,
    "causal, the other way": lambda b, h, i, j: j <= i,
    "causal and full": and_masks(causal, lambda b, h, i, j: i.new_ones((), dtype=torch.bool)),
}


def numbered(batch=B):
    return (torch.arange(N) // 24).expand(batch, N).contiguous()


def compare(function, oracle, groups=H):
    """Outputs and gradients of the rewritten graph, in float64, with the functional form."""
    gm, call = call_of(function, *(given := qkv(groups)))
    assert call.refusal is None and call.is_causal is True
    assert not any("flex_attention" in str(node.target) for node in gm.graph.nodes)
    inputs = gm.meta["inputs"]
    places = [next(n for n, x in enumerate(inputs) if x is y) for y in given]
    tensors = [x.requires_grad_() for x in qkv(groups, torch.float64)]

    def rewritten(*tensors):
        arguments = list(inputs)
        for place, x in zip(places, tensors, strict=True):
            arguments[place] = x
        return gm(*arguments)[0]

    torch.testing.assert_close(with_gradients(rewritten, tensors), with_gradients(oracle, tensors), rtol=1e-9, atol=1e-12)
    return gm


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("size", [128, 16])
def test_a_causal_mask_mod_is_proved_and_its_blocks_are_checked(case, size):
    mask = create_block_mask(MASKS[case], None, None, N, N, device="cpu", BLOCK_SIZE=size)
    gm = compare(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True),
        lambda q, k, v: lighthouse_fx.lighthouse_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=True, config=CONFIG
        ),
        groups=G,
    )
    checks = [node for node in gm.graph.nodes if node.target is OPS.check_blocks.default]
    assert [node.args[8] for node in checks] == [False, True]  # the lists of the forward and of the backward


@pytest.mark.parametrize("order", [1, -1])
def test_documents(order):
    numbers = numbered()

    def same(b, h, i, j):
        return numbers[b, i] == numbers[b, j]

    mask = create_block_mask(and_masks(*[causal, same][::order]), B, None, N, N, device="cpu", BLOCK_SIZE=16)
    compare(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask),
        lambda q, k, v: lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, documents=numbers, config=CONFIG),
    )
    numbers[1, 40] = 9  # the lists are still those of the documents as they were, and the numbers fall
    with pytest.raises(RuntimeError, match="numbers of documents fall"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    numbers[1, 40:] = 9
    with pytest.raises(ValueError, match="make the block_mask with create_block_mask"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


TABLE = torch.arange(N)
NUMBER = numbered(1)[0]
BEGINS = torch.tensor([0, 24, 48, N, N, N])  # of each document, and more that nobody reads
FIRST = BEGINS[numbered()]  # of each token's document
LAST = (FIRST + 23).clamp(max=N - 1)
ROW = LAST[0].int()
READ = {
    "torchtitan's for one row": lambda b, h, i, j: j >= BEGINS[NUMBER[i]],
    "torchtitan's for more rows": lambda b, h, i, j: i <= LAST[b, j],
    "firsts": lambda b, h, i, j: FIRST[b, i] <= j,
    "lasts of a row": lambda b, h, i, j: ROW[j] >= i,
    "numbers of a row": lambda b, h, i, j: NUMBER[i] == NUMBER[j],
    "numbers of numbers": lambda b, h, i, j: BEGINS[NUMBER[j]] == BEGINS[NUMBER[i]],
}


@pytest.mark.parametrize("case", READ)
def test_documents_read_from_tables(case):
    numbers, inside = numbered(), and_masks(causal, READ[case])
    shown = create_mask(inside, B, None, N, N, device="cpu")[:, 0]
    assert torch.equal(shown, (numbers[:, :, None] == numbers[:, None]).tril())
    mask = create_block_mask(inside, B, None, N, N, device="cpu", BLOCK_SIZE=16)
    compare(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask),
        lambda q, k, v: lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, documents=numbers, config=CONFIG),
    )


def test_documents_inside_a_checkpoint():
    """torchtitan's default. There Dynamo keeps the outputs of flex_attention that nobody uses."""
    mask = create_block_mask(and_masks(causal, READ["firsts"]), B, None, N, N, device="cpu", BLOCK_SIZE=16)

    def part(q, k, v):
        return flex_attention(q, k, v, block_mask=mask) * 2

    gm, call = call_of(lambda q, k, v: checkpoint(part, q, k, v, use_reentrant=False), *(tensors := qkv()))
    assert call.refusal is None
    assert not any("flex_attention" in str(node.target) for node in gm.wrap_body_0.graph.nodes)
    expected = lighthouse_fx.lighthouse_attention(*tensors, is_causal=True, documents=numbered(), config=CONFIG)
    torch.testing.assert_close(gm(*gm.meta["inputs"])[0], expected * 2)


def test_documents_of_other_lengths_need_one_more_graph():
    graphs = []

    def backend(gm, example_inputs):
        declare_gradients(gm)
        graphs.append(gm)
        return run_passes(gm, example_inputs, config=CONFIG)

    run = torch.compile(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask), backend=backend)
    for length in (N, N + 16, N + 32):
        last = (torch.arange(length) // 24 * 24 + 23).clamp(max=length - 1).expand(B, length).contiguous()
        inside = and_masks(causal, lambda b, h, i, j, last=last: i <= last[b, j])
        mask = create_block_mask(inside, B, None, length, length, device="cpu", BLOCK_SIZE=16)
        q, k, v = (torch.randn(B, H, length, D) for _ in range(3))
        expected = lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, documents=last, config=CONFIG)
        torch.testing.assert_close(run(q, k, v, mask), expected)
    assert len(graphs) == 2


NO_BORDERS = {
    "a window": (TABLE - 8).clamp(min=0),
    "a document in two pieces": torch.where(TABLE < 40, FIRST[0], 0),
    "not the first": FIRST[0] + TABLE.clamp(max=1),
    "later than the token": FIRST[0] + 24,
    "before the row": FIRST[0] - 1,
}


@pytest.mark.parametrize("case", NO_BORDERS)
@pytest.mark.parametrize("holds", ["first", "last"])
def test_tables_that_hold_no_borders_of_documents_raise(case, holds):
    """In one row of two."""
    table = NO_BORDERS[case] if holds == "first" else N - 1 - NO_BORDERS[case].flip(0)
    table = torch.stack([torch.zeros_like(table) if holds == "first" else torch.full_like(table, N - 1), table])
    reads = {"first": lambda b, h, i, j: j >= table[b, i], "last": lambda b, h, i, j: i <= table[b, j]}[holds]
    mask = create_block_mask(and_masks(causal, reads), B, None, N, N, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(RuntimeError, match=f"the {holds} token of each token's document is not that.*dense_layers"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


def test_tables_of_numbers_that_fall_raise():
    numbers = numbered()
    mask = create_block_mask(
        and_masks(causal, lambda b, h, i, j: numbers[b, i] == numbers[b, j]), B, None, N, N, device="cpu"
    )
    numbers[1, 50:] = 0
    with pytest.raises(RuntimeError, match="numbers of documents fall"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


def test_documents_of_lists_that_know_of_none():
    """Lists that show more than mask_mod are right as long as no block is full; the causal mask's are not."""
    numbers = numbered()
    inside = and_masks(causal, lambda b, h, i, j: numbers[b, i] == numbers[b, j])
    lists = create_block_mask(causal, B, None, N, N, device="cpu", BLOCK_SIZE=16)
    mask = BlockMask.from_kv_blocks(*lists.as_tuple()[2:6], BLOCK_SIZE=16, mask_mod=inside)
    with pytest.raises(ValueError, match="listed as what it is not"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    partial = torch.arange(4, dtype=torch.int32).expand(B, 1, 4, 4).contiguous()
    mask = BlockMask.from_kv_blocks(torch.full((B, 1, 4), 4, dtype=torch.int32), partial, BLOCK_SIZE=16, mask_mod=inside)
    compare(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask),
        lambda q, k, v: lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, documents=numbers, config=CONFIG),
    )


def test_documents_given_from_outside():
    """The lists are checked for mask_mod's own mask, which is causal; attention then stays inside documents."""
    numbers, tensors = numbered(), qkv()
    mask = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    with lighthouse_fx.documents(numbers):
        found = []
        call_of(lambda q, k, v: found.append(flex_attention(q, k, v, block_mask=mask)) or found[0], *tensors)
    expected = lighthouse_fx.lighthouse_attention(*tensors, is_causal=True, documents=numbers, config=CONFIG)
    torch.testing.assert_close(found[0], expected)


def test_norms_before_it_are_seen():
    """Of queries and keys that all are of one length, the `norm` scorer reads what they were before."""
    mask = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)

    def function(q, k, v):
        q, k = (torch.nn.functional.rms_norm(x, (D,)) for x in (q, k))
        return flex_attention(q, k, v, block_mask=mask)

    q, k, v = qkv()
    gm, call = call_of(function, q, k, v)
    assert call.scored == "query and key before their norms"
    expected = lighthouse_fx.lighthouse_attention(
        *(torch.nn.functional.rms_norm(x, (D,)) for x in (q, k)),
        v, is_causal=True, config=CONFIG, score_query=q, score_key=k,
    )  # fmt: skip
    torch.testing.assert_close(gm(*gm.meta["inputs"])[0], expected)


def test_a_mask_mod_that_writes_hides_norms():
    """What holds one may write to all its arguments, and the second attention reads them later."""

    def function(q, k, v):
        q, k = (torch.nn.functional.rms_norm(x, (D,)) for x in (q, k))

        def mask_mod(b, h, i, j):
            k.mul_(2)
            return i >= j

        return flex_attention(q, k, v, block_mask=blocks(mask_mod)) + flex_attention(q, k, v)

    gm, _ = flexed(function, *qkv())
    writing, clean = gm.meta[CALLS]
    assert "depends on mul_" in writing.refusal.reason
    assert clean.refusal is None and clean.scored == ""


OWN = {
    "longer than the tokens": (N + 8, "the documents are of [2, 72] tokens"),
    "as they are": (N, "gradient"),
}


@pytest.mark.parametrize("case", OWN)
def test_documents_of_its_own_are_not_warned_of_where_it_stays_dense(case, recwarn):
    length, because = OWN[case]
    numbers = (torch.arange(length) // 24).expand(B, length).contiguous()
    mask = blocks(lambda b, h, i, j: (i >= j) & (numbers[b, i] == numbers[b, j]), B)
    function = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), backend=passes_only, options=FIELDS)
    with lighthouse_fx.documents(numbered()):
        function(*qkv())
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and because in call.reason and call.inside_documents
    assert not [w for w in recwarn if "documents()" in str(w.message)]


def test_causal_attention_without_documents_that_stays_dense_is_warned_of():
    mask = blocks(lambda b, h, i, j: (i >= j) & (i - j < 9))
    function = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), backend=passes_only, options=FIELDS)
    with lighthouse_fx.documents(numbered()), pytest.warns(UserWarning, match="ignores it"):
        function(*qkv())


def test_full_attention_given_lists_is_left():
    mask = blocks(lambda b, h, i, j: i >= i)
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    assert call.is_causal is False and "made elsewhere" in call.refusal.reason


def test_documents_that_are_not_causal_are_left():
    numbers = numbered()
    mask = blocks(lambda b, h, i, j: numbers[b, i] == numbers[b, j], B)
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))
    assert "made elsewhere" in call.refusal.reason


@pytest.mark.slow
def test_blocks_that_the_graph_makes():
    compare(
        lambda q, k, v: flex_attention(q, k, v, block_mask=blocks(causal)),
        lambda q, k, v: lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, config=CONFIG),
    )


def test_block_sparse_attention_raises():
    # Every row of blocks sees the first block alone; its mask_mod says nothing of that.
    count, first = torch.ones(1, 1, 4, dtype=torch.int32), torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    sparse = BlockMask.from_kv_blocks(count, first, BLOCK_SIZE=16, mask_mod=causal)
    with pytest.raises(ValueError, match=r"block 1 of queries and block 1 of keys.* keep the attention dense"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=sparse))


def test_lists_of_the_backward_that_lie_raise():
    mask = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    mask.q_num_blocks[0, 0, 1] = 0
    with pytest.raises(ValueError, match="block 1 of queries and block 1 of keys"):
        call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask))


def test_lists_that_change_are_checked_anew():
    mask = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    tensors = qkv()
    gm, _ = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *tensors)
    gm(*gm.meta["inputs"])
    mask.kv_num_blocks[0, 0, 1] = 0
    with pytest.raises(ValueError, match="block 1 of queries and block 1 of keys"):
        gm(*gm.meta["inputs"])


def test_lists_of_fewer_rows_than_the_batch_are_left():
    """FlexAttention takes them in turn."""
    mask = blocks(causal, 2)
    tensors = [torch.randn(4, H, N, D) for _ in range(3)]
    _, call = call_of(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *tensors)
    assert "have not the batch and heads" in call.refusal.reason


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


HALF = FIRST[0] / 2
SQUARE, LONGER, MORE = torch.zeros(N, N, dtype=torch.int32), numbered().repeat(1, 2), numbered(2 * B)
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
    "firsts of keys": (lambda b, h, i, j: (i >= j) & (j >= FIRST[b, j]), "depends on the input"),
    "firsts, not by keys": (lambda b, h, i, j: (i >= j) & (i >= FIRST[b, i]), "depends on the input"),
    "lasts of queries": (lambda b, h, i, j: (i >= j) & (j <= LAST[b, i]), "depends on the input"),
    "firsts that are not causal": (lambda b, h, i, j: j >= FIRST[b, i], "neither causal"),
    "lasts that are not causal": (lambda b, h, i, j: i <= LAST[b, j], "neither causal"),
    "more than a first": (lambda b, h, i, j: (i >= j) & (j > FIRST[b, i]), "depends on the input"),
    "two tables": (lambda b, h, i, j: (i >= j) & (NUMBER[i] == ROW[j]), "depends on the input"),
    "firsts and lasts": (lambda b, h, i, j: (i >= j) & (j >= FIRST[b, i]) & (i <= LAST[b, j]), "two kinds of documents"),
    "a table read by keys and queries": (lambda b, h, i, j: (i >= j) & (j >= SQUARE[i, j]), "depends on the input"),
    "a table by batch and number": (lambda b, h, i, j: (i >= j) & (i <= LAST[b, NUMBER[i]]), "depends on the input"),
    "a table with more than a token reads": (lambda b, h, i, j: (i >= j) & (j >= BEGINS[NUMBER[i] + 1]), "depends on"),
    "fractions": (lambda b, h, i, j: (i >= j) & (j >= HALF[i]), "depends on the input"),
    "a longer table": (lambda b, h, i, j: (i >= j) & (LONGER[b, i] == LONGER[b, j]), "documents are of [2, 128]"),
    "a table of more rows": (lambda b, h, i, j: (i >= j) & (MORE[b, i] == MORE[b, j]), "documents are of [4, 64]"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("spelled", ["numbers", "torchtitan's for one row", "torchtitan's for more rows"])
def test_a_gpu_trains_with_it(spelled):
    numbers, number, begins, last = numbered().cuda(), NUMBER.cuda(), BEGINS.cuda(), LAST.cuda()
    spellings = {
        "numbers": lambda b, h, i, j: numbers[b, i] == numbers[b, j],
        "torchtitan's for one row": lambda b, h, i, j: j >= begins[number[i]],
        "torchtitan's for more rows": lambda b, h, i, j: i <= last[b, j],
    }
    inside = and_masks(causal, spellings[spelled])
    mask = create_block_mask(inside, B, None, N, N, device="cuda", BLOCK_SIZE=16)
    tensors = [x.cuda().bfloat16().requires_grad_() for x in qkv()]
    run = torch.compile(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), backend="lighthouse", options=FIELDS)
    found = with_gradients(run, tensors)
    assert lighthouse_fx.reports()[-1].rewritten == 1

    def oracle(q, k, v):
        return lighthouse_fx.lighthouse_attention(q, k, v, is_causal=True, documents=numbers, config=CONFIG)

    torch.testing.assert_close(found, with_gradients(oracle, tensors), rtol=2e-2, atol=2e-2)
