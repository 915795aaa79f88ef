"""Packed documents written straight from what is promised (kernels/packed/attention.py): plain loops, slow on purpose.

As `brute_force.py`, of which it uses the parts that do not change. `numbers` is the list of the document of each token.
"""

import math

import torch
from brute_force import coarsest_windows, end, gather, rank, tiles, usual_quota


def window(entry, pooling):
    level, index = entry
    return range(index * pooling**level, (index + 1) * pooling**level)


def document(entry, numbers, pooling):
    """The document of an entry, None for a divided one."""
    found = {numbers[token] for token in window(entry, pooling)}
    return found.pop() if len(found) == 1 else None


def comes_first(entry, numbers, pooling):
    """Whether a window is expanded before all others: it begins a document, or the one before it is divided."""
    level, index = entry
    begins = any(token == 0 or numbers[token] != numbers[token - 1] for token in window(entry, pooling))
    return begins or (index > 0 and document((level, index - 1), numbers, pooling) is None)


def select(s_q, s_k, numbers, *, length, levels, pooling, topk, quota=None, causal_selection=True):
    """The entries of one batch row and key/value head: those of the longest document, of the others, then the divided ones."""
    quota = quota or usual_quota(topk)

    def score(tokens, entry):
        return math.inf if comes_first(entry, numbers, pooling) else rank(tokens, *entry, pooling, causal_selection)

    coarse = coarsest_windows(length, levels, pooling)
    entries = {(levels - 1, index) for index in range(coarse)}
    for tile in tiles(length, levels, pooling, topk, quota):
        candidates = list(tile)
        for level in range(levels - 1, 0, -1):
            if len(candidates) > quota:
                by_query = sorted(candidates, key=lambda index, level=level: (-score(s_q, (level, index)), index))
                expanded = by_query[: (quota + 1) // 2]
                others = [index for index in candidates if index not in expanded]
                by_key = sorted(others, key=lambda index, level=level: (-score(s_k, (level, index)), index))
                candidates = expanded + by_key[: quota // 2]
            candidates = [index * pooling + child for index in sorted(candidates) for child in range(pooling)]
            entries.update((level - 1, index) for index in candidates)
    entries.update((0, token) for token in range(coarse * pooling ** (levels - 1), length))
    longest = max(numbers, key=numbers.count)  # the first of several
    place = {longest: 0, None: 2}
    return sorted(
        entries, key=lambda entry: (place.get(document(entry, numbers, pooling), 1), end(entry, pooling), entry[0])
    )


def divided_by_what_follows(token, entry, numbers, pooling, levels):
    """Whether an entry lies in a coarser window which is expanded for nothing but a border behind the token."""
    for level in range(entry[0] + 1, levels):
        above = (level, entry[1] // pooling ** (level - entry[0]))
        tokens = window(above, pooling)
        if tokens[-1] >= len(numbers) // pooling ** (levels - 1) * pooling ** (levels - 1):
            continue  # the entry is of the tail
        begins = [t for t in tokens if t == 0 or numbers[t] != numbers[t - 1]]
        after_divided = above[1] > 0 and document((level, above[1] - 1), numbers, pooling) is None
        if begins and begins[0] > token and not after_divided:
            return True
    return False


def lighthouse(q, k, v, entries, numbers, *, pooling, levels, scale=None, causal_selection=True):
    """One head: `[N, D]` each. Only entries of one document attend, are attended to, and give tokens anything.

    In a causal selection, tokens before the border that a window was expanded for get nothing that lies in it.
    """
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    pooled_q, pooled_k, pooled_v = (gather(x, entries, pooling) for x in (q, k, v))
    documents = [document(entry, numbers, pooling) for entry in entries]
    rows = [torch.zeros_like(pooled_v[0]) for _ in range(len(q))]
    for slot, entry in enumerate(entries):
        if documents[slot] is None:
            continue
        seen = [other for other in range(slot + 1) if documents[other] == documents[slot]]
        weights = (pooled_k[seen] @ pooled_q[slot] * scale).softmax(0)
        out = weights @ pooled_v[seen]
        first = end(entry, pooling) - 1
        for token in range(first, min(first + pooling ** entry[0], len(q))):
            told = causal_selection and divided_by_what_follows(token, entry, numbers, pooling, levels)
            if numbers[token] == documents[slot] and not told:
                rows[token] = rows[token] + out
    return torch.stack(rows)
