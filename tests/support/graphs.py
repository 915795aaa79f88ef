"""Dynamo's graphs after the passes, and what became of the attention in them."""

import torch
import torch.nn.functional as F
from small_models import CONFIG

from lighthouse_fx import passes
from lighthouse_fx.passes import CALLS, run_passes
from lighthouse_fx.passes.match.sdpa import is_attention
from lighthouse_fx.passes.rewrite.lighthouse import rewrite_attention

B, H, G, N, D = 2, 4, 2, 64, 8
OPS = torch.ops.lighthouse_fx


def traced(function, *args, config=CONFIG, **kwargs):
    """Dynamo's graphs of a function after the passes."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(run_passes(gm, example_inputs, config=config))
        return gm

    torch.compile(function, backend=backend)(*args, **kwargs)
    return graphs


def only_call(function, *args, config=CONFIG, **kwargs):
    """What became of the only attention call of a function."""
    (gm,) = traced(function, *args, config=config, **kwargs)
    (call,) = gm.meta[CALLS]
    return gm, call


def heads(count=H, tokens=N, size=D, grad=True, dtype=torch.float32):
    return torch.randn(B, count, tokens, size, dtype=dtype, requires_grad=grad)


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def assert_refused(function, *args, because, config=CONFIG, **kwargs):
    before = function(*args, **kwargs)
    gm, call = only_call(function, *args, config=config, **kwargs)
    assert call.refusal is not None
    assert because in call.refusal.reason
    assert not any("lighthouse_fx" in str(target) for target in targets(gm) if target not in (OPS.gather.default,))
    torch.testing.assert_close(function(*args, **kwargs), before, rtol=0, atol=0)
    return call.refusal


def gathered_heads(gm):
    return [n.meta["example_value"].shape[1] for n in gm.graph.nodes if n.target is OPS.gather.default]


def assert_left(function, tensors, because):
    graphs = []

    def untouched(gm, _):
        graphs.append(str(gm.graph))
        return gm

    torch.compile(function, backend=untouched)(*tensors)
    torch._dynamo.reset()
    gm, call = only_call(function, *tensors)
    assert call.refusal is not None and because in call.refusal.reason, call.refusal
    assert str(gm.graph) == graphs[0]  # the user's own


def with_gradients(function, tensors):
    out = function(*tensors)
    torch.manual_seed(1)
    return out, torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype, device=out.device)).sum(), tensors)


def attend(q, mask):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def by_arange(n=N):
    positions = torch.arange(n)
    return positions[:, None] >= positions[None, :]


def damage(monkeypatch, change):
    """Let a change follow the pass that rewrites: it is given the rewritten graph and its inner SDPA, if any."""

    def wrong(gm, example_inputs, *, config):
        gm = rewrite_attention(gm, example_inputs, config=config)
        change(gm.graph, next(filter(is_attention, gm.graph.nodes), None))
        gm.recompile()
        return gm

    monkeypatch.setattr(passes, "PIPELINE", [wrong if step is rewrite_attention else step for step in passes.PIPELINE])
