"""The local branch written straight from SPEC.md: plain loops over tokens and entries, slow on purpose. As `brute_force.py`."""

import math

import brute_documents
import brute_force
import torch


def attend(q, k, v, seen, scale):
    """One query `[D]` to rows `seen`: the output and the log-sum-exp of its scores."""
    logits = k[seen] @ q * scale
    return logits.softmax(0) @ v[seen], logits.logsumexp(0)


def in_window(token, length, window, is_causal):
    return range(max(0, token - window + 1), token + 1 if is_causal else min(length, token + window))


def local(q, k, v, window, *, is_causal, scale=None, numbers=None):
    """Each token in its window, and in its document: `[N, D]` -> a list of outputs and log-sum-exps."""
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    numbers = numbers or [0] * len(q)
    return [
        attend(q[t], k, v, [j for j in in_window(t, len(q), window, is_causal) if numbers[j] == numbers[t]], scale)
        for t in range(len(q))
    ]


def lighthouse(
    q, k, v, entries, *, pooling, levels, window, is_causal, scale=None, numbers=None, causal_selection=True
):
    """One head: a token's output is the mean of all that it is given, weighted by the softmax of the log-sum-exps."""
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    given = [[pair] for pair in local(q, k, v, window, is_causal=is_causal, scale=scale, numbers=numbers)]
    pooled_q, pooled_k, pooled_v = (brute_force.gather(x, entries, pooling) for x in (q, k, v))
    of = [0 if numbers is None else brute_documents.document(entry, numbers, pooling) for entry in entries]
    for slot, entry in enumerate(entries):
        if of[slot] is None:
            continue
        seen = [other for other in range(slot + 1 if is_causal else len(entries)) if of[other] == of[slot]]
        pair = attend(pooled_q[slot], pooled_k, pooled_v, seen, scale)
        for token in brute_force.reached(entry, len(q), pooling, is_causal):
            told = numbers is not None and causal_selection and brute_documents.divided_by_what_follows(
                token, entry, numbers, pooling, levels
            )
            if not told and (numbers is None or numbers[token] == of[slot]):
                given[token].append(pair)
    return torch.stack([mean(pairs) for pairs in given])


def mean(pairs):
    weights = torch.stack([lse for _, lse in pairs]).softmax(0)
    return sum(weight * out for weight, (out, _) in zip(weights, pairs, strict=True))


def per_head(function, q, k, v, *rest):
    """A function of one head's rows, and of one of each of `rest` `[batch][group]`, over batch and heads."""
    share = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    function(q[b, h], k[b, h // share], v[b, h // share], *(x[b][h // share] for x in rest))
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )
