"""Small models and backends that the tests share."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lighthouse_fx import LighthouseConfig
from lighthouse_fx.backend import rewrite, split_options
from lighthouse_fx.runtime import journal
from lighthouse_fx.runtime.document_inputs import bind_documents, warn_of_unaware_calls
from lighthouse_fx.runtime.wrappers import record_runs

FIELDS = {"levels": 3, "pooling": 2, "topk": 8}
CONFIG = LighthouseConfig(**FIELDS)
TOKENS, WIDTH, HEADS = 64, 32, 4


class Attention(nn.Module):
    """Grouped-query causal attention; `attend` is the function under it."""

    def __init__(self, attend=None, heads=HEADS, groups=2, width=WIDTH):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.project = nn.Linear(width, (heads + 2 * groups) * self.size)
        self.out = nn.Linear(width, width)
        self.attend = attend or causal

    def forward(self, x):  # [B, N, width]
        batch, length, width = x.shape
        qkv = self.project(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.groups, self.groups], dim=1)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, attend=None):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(attend)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    """`checkpointing`: None, "inside" (each block is checkpointed by the model, non-reentrant)."""

    def __init__(self, layers=2, attend=None, checkpointing=None):
        super().__init__()
        self.layers = nn.ModuleList(Block(attend) for _ in range(layers))
        self.checkpointing = checkpointing

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        return x


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def functional(config=CONFIG):
    """The same attention by the functional form, for models that are the oracle of a rewritten one."""
    from lighthouse_fx import lighthouse_attention

    return lambda q, k, v: lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=config)


def twin(model, attend):
    """A copy of a model with another attention function and the same parameters."""
    copy = type(model)(len(model.layers), attend, model.checkpointing)
    copy.load_state_dict(model.state_dict())
    return copy.to(next(model.parameters()).dtype)


@contextmanager
def attending(attend):
    """`F.multi_head_attention_forward` attends by this function, which itself calls PyTorch's attention."""
    stock = F.scaled_dot_product_attention

    def call(*args, **kwargs):
        with mock.patch.object(F, "scaled_dot_product_attention", stock):
            return attend(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", call):
        yield


def inputs(batch=2, tokens=TOKENS, dtype=torch.float32):
    return torch.randn(batch, tokens, WIDTH, dtype=dtype)


def passes_only(gm, example_inputs, *, options=None):
    """The backend without Inductor: guards, passes and records, then the rewritten graph as it stands. Fast to compile."""
    config = split_options(options or {})[0]
    report, gm, _ = rewrite(gm, example_inputs, config)
    journal.add(report)
    return record_runs(warn_of_unaware_calls(bind_documents(gm, gm, config), report.calls), report.calls)


def gradients(model, x):
    """The loss and the gradients of input and parameters."""
    x = x.detach().clone().requires_grad_()
    loss = model(x).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, [x, *parameters])
    clean = [name.removeprefix("_orig_mod.") for name in names]
    return loss.detach(), dict(zip(["input", *clean], found, strict=True))


def assert_same_gradients(model, oracle, x, **tolerance):
    loss, found = gradients(model, x)
    expected_loss, expected = gradients(oracle, x)
    torch.testing.assert_close(loss, expected_loss, **tolerance)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def what_failed(verification):
    return {(check.where, check.what) for check in verification.checks if not check.passed}
