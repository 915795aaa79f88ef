"""Lighthouse attention written straight from SPEC.md: plain loops over windows, entries and tokens, slow on purpose.

Nothing here imports the package. An entry is a pair `(level, index)`, the window `[index*p^level, (index+1)*p^level)`.
Values are torch tensors of whatever dtype they come in (the tests give float64), so that autograd differentiates the
loops and every gradient has its oracle too. Scores are plain Python lists, one number per token.
"""

import math
from fractions import Fraction

import torch

LOWEST = torch.finfo(torch.float32).min


# --- the pyramid ------------------------------------------------------------------------------------------------------


def usual_quota(topk):
    """The divisor of `topk`, of at least 64 if there is one, nearest 128 on a log scale, ties to the smaller: in fractions."""
    divisors = [m for m in range(1, topk + 1) if topk % m == 0 and (m >= 64 or topk < 64)]
    return min(divisors, key=lambda m: (max(Fraction(m, 128), Fraction(128, m)), m))


def coarsest_windows(length, levels, pooling):
    return length // pooling ** (levels - 1)


def tiles(length, levels, pooling, topk, quota=None):
    """The coarsest windows of each tile, as ranges; some are empty where there are more tiles than windows."""
    coarse, count = coarsest_windows(length, levels, pooling), topk // (quota or usual_quota(topk))
    return [range(t * coarse // count, (t + 1) * coarse // count) for t in range(count)]


def gathered_length(length, levels, pooling, topk, quota=None):
    """`S`, from SPEC.md's formula: coarsest windows, tail, and `p` for each expanded window."""
    coarse = coarsest_windows(length, levels, pooling)
    expanded = 0
    for tile in tiles(length, levels, pooling, topk, quota):
        candidates = len(tile)
        for _ in range(levels - 1):
            of_level = min(candidates, quota or usual_quota(topk))
            expanded += of_level
            candidates = of_level * pooling
    return coarse + length - coarse * pooling ** (levels - 1) + pooling * expanded


def end(entry, pooling):
    level, index = entry
    return (index + 1) * pooling**level


def level_sizes(length, levels, pooling):
    """How many windows each level has: every token at level 0, the tail included."""
    coarse = coarsest_windows(length, levels, pooling)
    return [length if level == 0 else coarse * pooling ** (levels - 1 - level) for level in range(levels)]


def all_windows(length, levels, pooling):
    """Every window of the pyramid in the order in which the ops number them: level by level, tokens first."""
    return [
        (level, index) for level, size in enumerate(level_sizes(length, levels, pooling)) for index in range(size)
    ]


def to_numbers(selection, length, levels, pooling):
    """A selection as the ops have it: the window number in each slot, and the slot of each window or -1."""
    number = {window: i for i, window in enumerate(all_windows(length, levels, pooling))}
    entries = [number[entry] for entry in selection]
    slots = [-1] * len(number)
    for slot, window in enumerate(entries):
        slots[window] = slot
    return entries, slots


def to_tensors(selections, length, levels, pooling):
    """Selections `[batch][group]` as the two int32 tensors that the ops take."""
    pairs = [[to_numbers(selection, length, levels, pooling) for selection in row] for row in selections]
    entries = torch.tensor([[pair[0] for pair in row] for row in pairs], dtype=torch.int32)
    slots = torch.tensor([[pair[1] for pair in row] for row in pairs], dtype=torch.int32)
    return entries, slots


def from_tensor(entries, length, levels, pooling):
    """The op's `entries` `[B, G, S]` as selections `[batch][group]`."""
    windows = all_windows(length, levels, pooling)
    return [[[windows[number] for number in group] for group in row] for row in entries.tolist()]


# --- score and select -------------------------------------------------------------------------------------------------


def norm_scores(q, k):
    """Token scores `[batch][group][token]` of queries and keys: fp32 norms, the largest of the group's query heads."""

    def norm(row):
        return torch.linalg.vector_norm(row.float()).item()

    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    share = heads // groups
    s_q = [
        [[max(norm(q[b, g * share + r, t]) for r in range(share)) for t in range(length)] for g in range(groups)]
        for b in range(batch)
    ]
    s_k = [[[norm(k[b, g, t]) for t in range(length)] for g in range(groups)] for b in range(batch)]
    return s_q, s_k


def dilated_scores(q, k, v, dilation, is_causal, scale=None):
    """Token scores of the dilated scorer: attention twice inside each strided sub-sequence, norms of the outputs."""
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    share = heads // groups
    s_q = torch.zeros(batch, groups, length, dtype=torch.float64)
    s_k = torch.zeros(batch, groups, length, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // share
            for first in range(min(dilation, length)):
                tokens = list(range(first, length, dilation))
                queries, keys, values = (x.double()[tokens] for x in (q[b, h], k[b, g], v[b, g]))
                forth = attend(queries, keys, values, is_causal, scale)
                back = attend(keys, queries, values, is_causal, scale)
                for i, token in enumerate(tokens):
                    s_q[b, g, token] = max(s_q[b, g, token], forth[i].norm())
                    s_k[b, g, token] = max(s_k[b, g, token], back[i].norm())
    return s_q, s_k


def rank(scores, level, index, pooling, causal_selection):
    """By what a window is ranked: the largest score of its tokens, or if it is causal of the window before it."""
    if causal_selection and index == 0:
        return LOWEST
    first = (index - causal_selection) * pooling**level
    return max(scores[first : first + pooling**level])


def select(s_q, s_k, *, length, levels, pooling, topk, quota=None, keep_first=True, causal_selection=True):
    """The entries of one batch row and key/value head, in order, from its token scores."""
    quota = quota or usual_quota(topk)
    s_q = [score if score > LOWEST else LOWEST for score in s_q]  # NaN and -inf too
    s_k = [score if score > LOWEST else LOWEST for score in s_k]

    def query_score(level, index):
        if keep_first and index == 0:
            return math.inf
        return rank(s_q, level, index, pooling, causal_selection)

    def key_score(level, index):
        return rank(s_k, level, index, pooling, causal_selection)

    coarse = coarsest_windows(length, levels, pooling)
    entries = {(levels - 1, index) for index in range(coarse)}
    for tile in tiles(length, levels, pooling, topk, quota):
        candidates = list(tile)
        for level in range(levels - 1, 0, -1):
            if len(candidates) <= quota:
                expanded = candidates
            else:
                by_query = sorted(candidates, key=lambda index, level=level: (-query_score(level, index), index))
                expanded = by_query[: (quota + 1) // 2]
                others = [index for index in candidates if index not in expanded]
                by_key = sorted(others, key=lambda index, level=level: (-key_score(level, index), index))
                expanded = expanded + by_key[: quota // 2]
            candidates = [index * pooling + child for index in sorted(expanded) for child in range(pooling)]
            entries.update((level - 1, index) for index in candidates)
    entries.update((0, token) for token in range(coarse * pooling ** (levels - 1), length))
    return sorted(entries, key=lambda entry: (end(entry, pooling), entry[0]))


def select_all(s_q, s_k, **pyramid):
    """`select` for each batch row and key/value head of token scores `[batch][group][token]`."""
    return [[select(*group, **pyramid) for group in zip(*row, strict=True)] for row in zip(s_q, s_k, strict=True)]


# --- gather, attend, scatter ------------------------------------------------------------------------------------------


def gather(x, selection, pooling):
    """The mean of each entry's window: `[N, D]` -> `[S, D]`."""
    rows = []
    for level, index in selection:
        window = x[index * pooling**level : (index + 1) * pooling**level]
        rows.append(window.sum(0) / pooling**level)
    return torch.stack(rows)


def attend(q, k, v, is_causal, scale=None):
    """Softmax attention of `[S, D]` rows, one query at a time."""
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    rows = []
    for s in range(len(q)):
        seen = s + 1 if is_causal else len(q)
        logits = k[:seen] @ q[s] * scale
        weights = (logits - logits.max()).exp()
        rows.append(weights @ v[:seen] / weights.sum())
    return torch.stack(rows)


def reached(entry, length, pooling, is_causal):
    """The tokens that an entry's output is added to."""
    level, index = entry
    first = end(entry, pooling) - 1 if is_causal else index * pooling**level
    return range(first, min(first + pooling**level, length))


def scatter(out, selection, length, pooling, is_causal):
    """Add each entry's output to the tokens that it reaches: `[S, D]` -> `[N, D]`."""
    rows = [torch.zeros_like(out[0]) for _ in range(length)]
    for slot, entry in enumerate(selection):
        for token in reached(entry, length, pooling, is_causal):
            rows[token] = rows[token] + out[slot]
    return torch.stack(rows)


def per_head(function, x, selections, *args):
    """A function of `[tokens or slots, D]` and a selection, over the batch and the heads of `[B, Hx, ..., D]`."""
    share = x.shape[1] // len(selections[0])
    return torch.stack(
        [
            torch.stack([function(x[b, h], selections[b][h // share], *args) for h in range(x.shape[1])])
            for b in range(x.shape[0])
        ]
    )


def lighthouse(q, k, v, selections, *, pooling, is_causal, scale=None):
    """Lighthouse attention of `[B, H, N, D]` queries and `[B, G, N, D]` keys and values, given the selection."""
    length, share = q.shape[2], q.shape[1] // k.shape[1]
    pooled_q, pooled_k, pooled_v = (per_head(gather, x, selections, pooling) for x in (q, k, v))
    out = torch.stack(
        [
            torch.stack(
                [
                    attend(pooled_q[b, h], pooled_k[b, h // share], pooled_v[b, h // share], is_causal, scale)
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )
    return per_head(scatter, out, selections, length, pooling, is_causal)
