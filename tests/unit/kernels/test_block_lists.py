"""`check_blocks`: right lists of blocks pass, of create_block_mask and others; whatever is wrong by a brute force raises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lighthouse_fx.kernels import REVISION
from lighthouse_fx.kernels.packed.attention import starts_of

CHECK = torch.ops.lighthouse_fx.check_blocks.default


def causal_in(numbers):
    if numbers is None:
        return lambda b, h, i, j: i >= j
    return lambda b, h, i, j: (i >= j) & (numbers[b, i] == numbers[b, j])


def mask_of(numbers, length):
    """bool `[B or 1, N, N]`"""
    lower = torch.ones(1, length, length, dtype=torch.bool).tril()
    return lower if numbers is None else lower & (numbers[:, :, None] == numbers[:, None, :])


def check(lists, numbers, length, sizes, *, by_key=False):
    starts = None if numbers is None else starts_of(numbers)
    return CHECK(*lists, starts, length, *sizes, by_key, "layer", REVISION)


def is_right(lists, numbers, length, sizes, *, by_key):
    """The same, pair of blocks by pair of blocks, from the mask itself."""
    mask, (queries, keys) = mask_of(numbers, length), sizes
    rows, columns = -(-length // queries), -(-length // keys)
    count, indices, full_count, full_indices = lists
    for batch in range(max(len(mask), len(count))):
        seen = mask[batch % len(mask)]
        for head in range(count.shape[1]):
            for row in range(columns if by_key else rows):
                named = [
                    [] if c is None else x[batch % len(c), head, row, : c[batch % len(c), head, row]].tolist()
                    for c, x in ((count, indices), (full_count, full_indices))
                ]
                for other in range(rows if by_key else columns):
                    i, j = (other, row) if by_key else (row, other)
                    block = seen[i * queries : (i + 1) * queries, j * keys : (j + 1) * keys]
                    listed = [names.count(other) for names in named]
                    if (block.any() and sum(listed) != 1) or (listed[1] and not block.all()):
                        return False
    return True


def passes(lists, numbers, length, sizes, *, by_key):
    try:
        return check(lists, numbers, length, sizes, by_key=by_key).item() == 0
    except ValueError as error:
        assert "create_block_mask" in str(error)
        return False


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 41),
    sizes=st.tuples(st.sampled_from([1, 4, 5, 8, 64]), st.sampled_from([1, 4, 6, 8, 64])),
    documents=st.sampled_from([None, 1, 3, 9]),
    heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 999),
)
def test_brute_force(length, sizes, documents, heads, seed):
    torch.manual_seed(seed)
    numbers = None if documents is None else torch.randint(documents, (2, length)).sort(-1).values
    batch = None if documents is None else 2
    made = create_block_mask(causal_in(numbers), batch, heads, length, length, device="cpu", BLOCK_SIZE=sizes)
    values = made.as_tuple()
    for lists, by_key in ((values[2:6], False), (values[6:10], True)):
        assert passes(lists, numbers, length, sizes, by_key=by_key)
        for _ in range(4):  # one number of the lists changes
            lie = [x.clone() for x in lists]
            changed = lie[torch.randint(4, ()).item()].view(-1)
            place = torch.randint(len(changed), ()).item()
            changed[place] = torch.randint(max(1, lie[1].shape[-1]), ()).item()
            assert passes(lie, numbers, length, sizes, by_key=by_key) == is_right(lie, numbers, length, sizes, by_key=by_key)


def test_what_the_lists_mean_is_what_to_dense_says():
    """Every pair that a right set of lists shows, in its own words."""
    numbers = torch.tensor([[0] * 13 + [1] * 24])
    made = create_block_mask(causal_in(numbers), 1, None, 37, 37, device="cpu", BLOCK_SIZE=8)
    check(made.as_tuple()[2:6], numbers, 37, (8, 8))
    blocks = mask_of(numbers, 40 - 3)
    padded = torch.nn.functional.pad(blocks, (0, 3, 0, 3)).view(5, 8, 5, 8).transpose(1, 2).flatten(2).any(-1)
    assert torch.equal(made.to_dense()[0, 0].bool(), padded)


def test_full_blocks_may_be_listed_as_partial_and_hidden_ones_too():
    every = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    four = torch.full((1, 1, 4), 4, dtype=torch.int32)
    check((four, every, None, None), None, 30, (8, 8))


LIES = {
    "left out": (torch.tensor([1, 1]), torch.tensor([[0, 0], [0, 0]]), "block 1 of queries and block 1 of keys"),
    "listed twice": (torch.tensor([1, 2]), torch.tensor([[0, 0], [0, 0]]), "block 1 of queries"),
    "beyond the end": (torch.tensor([1, 2]), torch.tensor([[0, 0], [0, 7]]), "more blocks than there are"),
    "before the first": (torch.tensor([1, 2]), torch.tensor([[0, 0], [0, -1]]), "more blocks than there are"),
    "more than there is room for": (torch.tensor([1, 3]), torch.tensor([[0, 0], [0, 1]]), "more blocks than there are"),
    "a row too few": (torch.tensor([1]), torch.tensor([[0, 0]]), "for 1 rows of blocks, and there are 2"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies(name):
    count, indices, because = LIES[name]
    with pytest.raises(ValueError, match=because):
        check((count[None, None].int(), indices[None, None].int(), None, None), None, 16, (8, 8))


def test_a_block_listed_as_full_that_is_not():
    one, zero = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    made = BlockMask.from_kv_blocks(0 * one, zero, one, zero, BLOCK_SIZE=16)
    with pytest.raises(ValueError, match="listed as what it is not"):
        check(made.as_tuple()[2:6], None, 16, (16, 16))


@pytest.mark.slow
def test_inductor_does_not_remove_it():
    lists = create_block_mask(causal_in(None), None, None, 40, 40, device="cpu", BLOCK_SIZE=8).as_tuple()[2:6]
    lists = [x.clone() for x in lists]
    run = torch.compile(lambda x, *lists: x + CHECK(*lists, None, x.shape[0], 8, 8, False, "layer", REVISION), fullgraph=True)
    assert torch.equal(run(torch.arange(40), *lists), torch.arange(40))
    lists[0][0, 0, 2] = 0
    with pytest.raises(ValueError, match="block 2 of queries and block 2 of keys"):
        run(torch.arange(40), *lists)


def test_opcheck():
    made = create_block_mask(causal_in(None), None, None, 40, 40, device="cpu", BLOCK_SIZE=8).as_tuple()
    starts = torch.zeros(1, 40, dtype=torch.int32)
    torch.library.opcheck(CHECK, (*made[2:6], starts, 40, 8, 8, False, "layer", REVISION))
    made = create_block_mask(causal_in(None), None, None, 40, 40, device="cpu", BLOCK_SIZE=64).as_tuple()
    torch.library.opcheck(CHECK, (*made[6:8], None, None, None, 40, 64, 64, True, "layer", REVISION))
