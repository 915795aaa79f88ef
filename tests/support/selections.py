"""What a selection's two tensors have to be."""

from itertools import pairwise

import brute_force
import torch


def assert_same(found, selections, length, levels, pooling):
    """Both tensors equal the brute force's, and the slots really are the inverse of the entries."""
    entries, slots = brute_force.to_tensors(selections, length, levels, pooling)
    assert found[0].dtype == found[1].dtype == torch.int32
    assert torch.equal(found[0], entries)
    assert torch.equal(found[1], slots)


def assert_valid(entries, slots, *, length, levels, pooling, topk, quota=None, keep_first=True, causal_selection=True):
    """A valid index set, whatever the scores were: in range, sorted, complete, closed under parents, inverse right."""
    windows = brute_force.all_windows(length, levels, pooling)
    coarse = brute_force.coarsest_windows(length, levels, pooling)
    assert entries.shape[2] == brute_force.gathered_length(length, levels, pooling, topk, quota)
    assert slots.shape[2] == len(windows)
    for row, inverse in zip(entries.flatten(0, 1).tolist(), slots.flatten(0, 1).tolist(), strict=True):
        assert all(0 <= number < len(windows) for number in row)
        present = [windows[number] for number in row]
        keys = [(brute_force.end(entry, pooling), entry[0]) for entry in present]
        assert all(first < second for first, second in pairwise(keys))  # strictly: no entry twice
        assert [inverse[number] for number in row] == list(range(len(row)))
        assert sum(slot != -1 for slot in inverse) == len(row)
        there = set(present)
        assert {(levels - 1, index) for index in range(coarse)} <= there
        assert {(0, token) for token in range(coarse * pooling ** (levels - 1), length)} <= there
        for level, index in there:
            if level < levels - 1 and index < coarse * pooling ** (levels - 1 - level):
                assert (level + 1, index // pooling) in there  # an expanded window stays in
                assert (level, index // pooling * pooling + (index + 1) % pooling) in there  # with all its children
        if keep_first and coarse:
            assert {(level, 0) for level in range(levels)} <= there
