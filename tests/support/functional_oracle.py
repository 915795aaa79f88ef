"""Eager models whose attention calls run as the functional form: the oracle of a rewritten model."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from small_models import attending
from torch.overrides import TorchFunctionMode

import lighthouse_fx
from lighthouse_fx import LighthouseConfig

SDPA = F.scaled_dot_product_attention


class Functional(TorchFunctionMode):
    """The oracle: attention calls of the eager model, those that shall be rewritten as the functional form."""

    def __init__(self, rewritten: Sequence[bool], groups: Sequence[int], config: LighthouseConfig) -> None:
        super().__init__()
        self.rewritten, self.groups, self.config, self.seen = rewritten, groups, config, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.multi_head_attention_forward:  # what it calls is not seen here
            with attending(functools.partial(self.called, SDPA)):
                return function(*args, **(kwargs or {}))
        return self.called(function, *args, **(kwargs or {}))

    def called(self, function, *args, **kwargs):
        if function is not SDPA:
            return function(*args, **(kwargs or {}))
        self.seen += 1
        if not self.rewritten[self.seen - 1]:
            return function(*args, **(kwargs or {}))
        return self.attend(self.groups[self.seen - 1], *args, **(kwargs or {}))

    def attend(self, groups, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        assert dropout_p == 0.0
        if attn_mask is not None:  # by its values, which the compiler does not see
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            assert torch.equal(seen, torch.ones_like(seen).tril())
            is_causal = True
        times = key.shape[1] // groups
        narrow = [x[:, ::times] for x in (key, value)]
        for x, wide in zip(narrow, (key, value), strict=True):
            assert torch.equal(x.repeat_interleave(times, dim=1), wide)
        return lighthouse_fx.lighthouse_attention(
            query, *narrow, is_causal=is_causal, scale=scale, enable_gqa=True, config=self.config
        )
