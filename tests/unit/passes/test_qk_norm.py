"""QK-norm: `norm` scores what queries and keys were before their norm, in every spelling, and nothing else where none is."""

import brute_force
import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, Model, inputs, passes_only
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.passes import CALLS, run_passes

B, H, G, N, D = 2, 4, 2, 64, 8
SELECT = torch.ops.lighthouse_fx.select.default
EXACT = {"rtol": 1e-9, "atol": 1e-11}
DATA = torch.float64


def positions(half=D // 2):
    angle = torch.outer(torch.arange(N, dtype=DATA), 0.7 ** torch.arange(half, dtype=DATA))
    return angle  # [N, D / 2]


# --- norms of [B, N, heads, D], by their spelling ----------------------------------------------------------------------


def written_out(x, weight):
    wide = x.double()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma(x, weight):
    wide = x.float().double()
    return ((wide * (wide.square().mean(-1, True) + 1e-6).rsqrt()) * (1.0 + weight.double())).type_as(x)


def centred(x, weight):
    middle = x - x.mean(-1, keepdim=True)
    return middle / torch.sqrt(middle.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight


NORMS = {
    "rms_norm": lambda x, weight: F.rms_norm(x, (D,), weight, 1e-6),
    "layer_norm": lambda x, weight: F.layer_norm(x, (D,), weight),
    "normalize": lambda x, weight: F.normalize(x, dim=-1) * weight,
    "written out": written_out,
    "gemma": gemma,
    "centred": centred,
    "divided": lambda x, weight: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6) * weight,
    "vector_norm": lambda x, weight: weight * (x / torch.linalg.vector_norm(x, dim=-1).unsqueeze(-1)),
    "squares": lambda x, weight: x * (x * x).sum(dim=-1, keepdim=True).add_(1e-6).rsqrt_() * weight,
    "power": lambda x, weight: x * (x.pow(2).mean(-1)[..., None] + 1e-6).pow(-0.5) * weight,
    "reciprocal": lambda x, weight: x * (1.0 / (x**2).mean(-1, keepdim=True).sqrt()) * weight,
    "twice": lambda x, weight: F.normalize(F.rms_norm(x, (D,), weight), dim=-1),
    "in place": lambda x, weight: F.rms_norm(x, (D,)).mul_(weight),
}


# --- rotary embeddings of [B, heads, N, D], by their spelling ----------------------------------------------------------


def rotate_half(x):
    cos, sin = (torch.cat([f(positions())] * 2, -1) for f in (torch.cos, torch.sin))
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def by_chunks(x):
    first, second = x.chunk(2, dim=-1)
    cos, sin = positions().cos(), positions().sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def interleaved(x):
    cos, sin = positions().cos(), positions().sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def unbound(x):
    cos, sin = positions().cos(), positions().sin()
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).reshape(x.shape)


def in_complex_numbers(x):
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(positions()), positions())
    return torch.view_as_real(turned).flatten(3).type_as(x)


def partial(x):
    turned, kept = x.split([4, 4], dim=-1)
    first, second = turned.chunk(2, -1)
    cos, sin = positions(2).cos(), positions(2).sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, kept], dim=-1)


ROTARY = {
    "none": lambda x: x,
    "rotate_half": rotate_half,
    "by chunks": by_chunks,
    "interleaved": interleaved,
    "unbound": unbound,
    "complex": in_complex_numbers,
    "partial": partial,
    "longer": lambda x: rotate_half(x) * 1.3,
}


class QKNorm(nn.Module):
    """Attention with a norm on queries and keys. `raw`: score by what comes before it, given to the functional form."""

    def __init__(self, norm, rotary, raw=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, heads * D, bias=False, dtype=DATA) for heads in (H, G, G))
        self.weight = nn.Parameter(torch.rand(D, dtype=DATA) + 0.5)
        self.norm, self.rotary, self.raw = norm, rotary, raw

    def forward(self, x):
        q, k, v = (project(x).view(*x.shape[:2], -1, D) for project in (self.q, self.k, self.v))
        raw = (q.transpose(1, 2), k.transpose(1, 2))
        q, k = (self.rotary(self.norm(x, self.weight).transpose(1, 2)) for x in (q, k))
        v = v.transpose(1, 2)
        if not self.raw:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return lighthouse_attention(
            q, k, v, is_causal=True, enable_gqa=True, config=CONFIG, score_query=raw[0], score_key=raw[1]
        )


def uneven(x):
    """Tokens of very different lengths, so that a wrong score selects other windows."""
    return x * torch.exp(2 * torch.randn(*x.shape[:-1], 1, dtype=x.dtype))


def outcome(model, x):
    x = x.detach().clone().requires_grad_()
    out = model(x)
    return out, torch.autograd.grad(out.square().sum(), [x, *model.parameters()])


def assert_scored_raw(model, oracle, x, **compile_arguments):
    expected = outcome(oracle, x)
    found = outcome(torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True, **compile_arguments), x)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.rewritten and call.scorer == "norm" and call.scored == "query and key before their norms", call
    torch.testing.assert_close(found, expected, **EXACT)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def functional(q, k, v, **kwargs):
    return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=kwargs.pop("config", CONFIG), **kwargs)


class Selection(fx.Interpreter):
    """Runs a rewritten graph and keeps what `select` reads and gives."""

    def run_node(self, node):
        value = super().run_node(node)
        if node.target is SELECT:
            self.read, self.entries = self.fetch_args_kwargs_from_env(node)[0][:2], value[0]
        return value


def selection(function, *args, config=CONFIG):
    """What a compiled function's `select` reads and gives, and its AttentionCall."""
    kept = []

    def backend(gm, example_inputs):
        gm = run_passes(gm, example_inputs, config=config)

        def run(*inputs):
            kept.append(Selection(gm))
            return kept[-1].run(*inputs)

        (call,) = gm.meta[CALLS]
        kept.append(call)
        return run

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return kept[1], kept[0]


SPELLINGS = [(name, "rotate_half") for name in NORMS] + [("rms_norm", name) for name in ROTARY if name != "rotate_half"]


@pytest.mark.parametrize("norm, rotary", SPELLINGS)
def test_every_spelling_is_scored_before_the_norm(norm, rotary):
    model, oracle = QKNorm(NORMS[norm], ROTARY[rotary]), QKNorm(NORMS[norm], ROTARY[rotary], raw=True)
    oracle.load_state_dict(model.state_dict())
    assert_scored_raw(model, oracle, uneven(inputs(dtype=DATA)))


def test_selection_is_no_longer_arbitrary():
    """Tokens whose raw queries are large are selected; scored after the norm, only some of them are by chance."""
    planted = [9, 22, 37, 50]
    own = LighthouseConfig(**FIELDS, causal_selection=False)  # a window's own scores rank it, not those of the one before
    x = inputs(dtype=DATA)
    x[:, planted] *= 100
    model = QKNorm(NORMS["rms_norm"], rotate_half)
    found, call = selection(model, x, config=own)
    assert call.scored
    for row in found.entries.flatten(0, 1).tolist():
        assert set(planted) <= set(row)  # level 0 is the tokens
    model.rotary = lambda x: x.roll(1, dims=0).roll(-1, dims=0)  # not followed: the norm goes unseen
    arbitrary, call = selection(model, x, config=own)
    assert not call.scored
    assert any(not set(planted) <= set(row) for row in arbitrary.entries.flatten(0, 1).tolist())


# --- where heads are made ---------------------------------------------------------------------------------------------

# From a projection [B, N, heads * D] and the number of heads: (query or key [B, heads, N, D], what is scored)
LAYOUTS = {
    "all heads together": lambda x, heads: (F.rms_norm(x, (heads * D,)).view(B, N, heads, D).transpose(1, 2), split(x, heads)),
    "heads together, both ways": lambda x, heads: (
        F.rms_norm(x.view(B, N, heads, D), (heads, D)).flatten(2).unflatten(-1, (heads, D)).permute(0, 2, 1, 3), split(x, heads)
    ),
    "heads first": lambda x, heads: (F.normalize(split(x, heads), dim=-1), split(x, heads)),
    "tokens and sequences together": lambda x, heads: (
        F.rms_norm(x.reshape(B * N, heads, D), (D,)).view(B, N, heads, D).transpose(1, 2), split(x, heads)
    ),
    "features before heads": lambda x, heads: (
        F.normalize(x.view(B, N, D, heads).transpose(2, 3), dim=-1).swapaxes(1, 2),
        x.view(B, N, D, heads).permute(0, 3, 1, 2),
    ),
    "another dimension": lambda x, heads: (
        F.rms_norm(x.view(B, N, heads, 1, D), (D,)).squeeze(3).permute((0, 2, 1, 3)).contiguous(), split(x, heads)
    ),
    "features in two dimensions": lambda x, heads: (
        F.rms_norm(x.view(B, N, heads, 2, D // 2), (2, D // 2)).flatten(3).transpose(1, 2), split(x, heads)
    ),
    "indexed": lambda x, heads: (F.rms_norm(x[:, None].view(B, N, heads, D)[:, :, :], (D,)).transpose(-2, -3), split(x, heads)),
}  # fmt: skip


def split(x, heads):
    return x.view(B, N, heads, D).transpose(1, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    make = LAYOUTS[layout]
    q, k, v = (uneven(torch.randn(B, N, heads * D, dtype=DATA)).requires_grad_() for heads in (H, G, G))
    function = lambda q, k, v: attention(make(q * 1, H)[0], make(k * 1, G)[0], split(v, G))  # noqa: E731
    found, call = selection(function, q, k, v)
    assert call.scorer == "norm" and call.scored == "query and key before their norms"
    (query, scored_query), (key, scored_key) = make(q, H), make(k, G)
    torch.testing.assert_close(found.read[0].norm(dim=-1), scored_query.norm(dim=-1), **EXACT)
    torch.testing.assert_close(found.read[1].norm(dim=-1), scored_key.norm(dim=-1), **EXACT)
    out = torch.compile(function, backend=passes_only, options=FIELDS)(q, k, v)
    expected = functional(query, key, split(v, G), score_query=scored_query, score_key=scored_key)
    torch.testing.assert_close(out, expected, **EXACT)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)]
    torch.testing.assert_close(*grads, **EXACT)


@pytest.mark.parametrize("dynamic", [False, None])
def test_one_sequence_one_key_head_and_any_length(dynamic):
    """One key head in one sequence has the shape of the rotary table; lengths may be symbolic."""

    def function(q, k, v, cos):
        q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
        q, k = (F.rms_norm(x, (D,)).transpose(1, 2) for x in (q, k))
        return attention(q * cos, k * cos, v.transpose(1, 2))

    cos = torch.rand(1, 1, 128, D, dtype=DATA)
    compiled = torch.compile(function, backend=passes_only, options=FIELDS, dynamic=dynamic)
    for length in (N, 96, 128):  # from the second on, its number of tokens is symbolic
        q, k, v = (uneven(torch.randn(1, length, heads * D, dtype=DATA)).requires_grad_() for heads in (H, 1, 1))
        here = cos[:, :, :length]
        out = compiled(q, k, v, here)
        (call,) = lighthouse_fx.reports()[-1].calls
        assert call.scored == "query and key before their norms"
        raw_q, raw_k, heads_v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in (q, k, v))
        normed = (F.rms_norm(x, (D,)) * here for x in (raw_q, raw_k))
        torch.testing.assert_close(out, functional(*normed, heads_v, score_query=raw_q, score_key=raw_k), **EXACT)


def test_one_side_alone():
    q, k, v = (uneven(torch.randn(B, heads, N, D, dtype=DATA)).requires_grad_() for heads in (H, G, G))
    function = lambda q, k, v: attention(F.rms_norm(q, (D,)), k * 1, v)  # noqa: E731
    out = torch.compile(function, backend=passes_only, options=FIELDS)(q, k, v)
    assert lighthouse_fx.reports()[-1].calls[0].scored == "query before its norm"
    torch.testing.assert_close(out, functional(F.rms_norm(q, (D,)), k, v, score_query=q), **EXACT)


def test_norm_after_the_rotary_embedding():
    """What it normalises is turned already, which changes no length."""
    q, k, v = (uneven(torch.randn(B, heads, N, D, dtype=DATA)).requires_grad_() for heads in (H, G, G))
    function = lambda q, k, v: attention(*(F.rms_norm(rotate_half(x), (D,)) for x in (q, k)), v)  # noqa: E731
    out = torch.compile(function, backend=passes_only, options=FIELDS)(q, k, v)
    assert lighthouse_fx.reports()[-1].calls[0].scored == "query and key before their norms"
    normed = (F.rms_norm(rotate_half(x), (D,)) for x in (q, k))
    torch.testing.assert_close(out, functional(*normed, v, score_query=q, score_key=k), **EXACT)


def test_raw_may_be_written_to_before_it_is_normalised():
    def function(q, k, v):
        q = q * 1
        q += 0.5
        return attention(F.rms_norm(q, (D,)), k, v)

    q, k, v = (uneven(torch.randn(B, heads, N, D, dtype=DATA)).requires_grad_() for heads in (H, G, G))
    found, call = selection(function, q, k, v)
    assert call.scored == "query before its norm"
    torch.testing.assert_close(found.read[0], q + 0.5, **EXACT)


# --- where no norm makes the lengths ----------------------------------------------------------------------------------


def overwritten(x, y, weight):
    x = F.rms_norm(x, (D,))
    x.copy_(y)
    return x * 2


def statistic_overwritten(x, y, weight):
    length = x.pow(2).mean(-1, keepdim=True)
    length.copy_(y.abs().amax(-1, keepdim=True))
    return x * length.rsqrt()


def along_equally_many_tokens(x, y, weight):
    blocks = x.unflatten(2, (-1, D))  # [B, heads, N / D, D tokens, D]
    return (blocks / blocks.norm(dim=-2).unsqueeze(-1)).flatten(2, 3)


LOOK_ALIKES = {
    "no norm": lambda x, y, weight: rotate_half(x) * weight,
    "cubed": lambda x, y, weight: x * x.pow(2).mean(-1, keepdim=True),
    "root of a root": lambda x, y, weight: x / x.pow(2).mean(-1, keepdim=True).sqrt().sqrt(),
    "length of another": lambda x, y, weight: x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True)),
    "its other dimension": lambda x, y, weight: x / x.norm(dim=2, keepdim=True),
    "along equally many tokens": along_equally_many_tokens,
    "along tokens": lambda x, y, weight: F.normalize(x, dim=2),
    "along tokens and features": lambda x, y, weight: F.layer_norm(x, (N, D)),
    "sum of magnitudes": lambda x, y, weight: F.normalize(x, p=1, dim=-1),
    "mean, not of squares": lambda x, y, weight: x * (x.abs().mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "length again": lambda x, y, weight: F.normalize(x, dim=-1) * x.norm(dim=-1, keepdim=True),
    "learned length": lambda x, y, weight: x * x.pow(2).mean(-1, True).mul(y.norm(dim=-1, keepdim=True)).rsqrt(),
    "gate": lambda x, y, weight: F.rms_norm(x, (D,)) * y.sigmoid(),
    "residual": lambda x, y, weight: F.rms_norm(x, (D,)) + y,
    "beside what has no norm": lambda x, y, weight: torch.cat([F.rms_norm(x[..., :4], (4,)), y[..., 4:]], -1),
    "projected again": lambda x, y, weight: F.rms_norm(x, (D,)) @ torch.diag(weight),
    "rolled": lambda x, y, weight: F.rms_norm(x, (D,)).roll(1, dims=2),
    "overwritten": overwritten,
    "statistic overwritten": statistic_overwritten,
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_otherwise_query_and_key_are_scored_as_they_are(name):
    make = LOOK_ALIKES[name]
    leaves = [uneven(torch.randn(B, heads, N, D, dtype=DATA)).requires_grad_() for heads in (H, G, H, G)]
    weight = torch.rand(D, dtype=DATA)

    def function(q, k, other_q, other_k):
        return attention(make(q * 1, other_q, weight), make(k * 1, other_k, weight), other_k)

    found, call = selection(function, *leaves)
    assert call.refusal is None and call.scorer == "norm"
    assert call.score_query is None and call.score_key is None and "norms" not in call.scored
    q, k, other_q, other_k = leaves
    torch.testing.assert_close(found.read, [make(q * 1, other_q, weight), make(k * 1, other_k, weight)], **EXACT)


@pytest.mark.parametrize("scored", [True, False])
def test_a_norm_before_the_projections_is_none_of_theirs(scored):
    """As in Llama. Without projections, it is their norm."""
    project = nn.Linear(32, 32, dtype=DATA) if not scored else nn.Identity()

    def function(x):
        x = F.layer_norm(x, (32,))
        q, k = (split(project(x), H) for _ in range(2))
        return attention(q, k, k)

    _, call = selection(function, inputs(dtype=DATA).requires_grad_())
    assert call.scored == ("query and key before their norms" if scored else "")


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_other_scorers_attend_with_queries_and_keys_as_they_are(scorer):
    config = LighthouseConfig(**FIELDS, scorer=scorer)
    q, k, v = (torch.randn(B, heads, N, D, dtype=DATA, requires_grad=True) for heads in (H, G, G))
    function = lambda q, k, v: attention(F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v)  # noqa: E731
    out = torch.compile(function, backend=passes_only, options={**FIELDS, "scorer": scorer})(q, k, v)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert (call.scorer, call.scored) == (scorer, "")
    torch.testing.assert_close(out, functional(F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v, config=config), **EXACT)


def test_graph_that_begins_after_the_norm_says_so():
    q, k, v = (torch.randn(B, heads, N, D, requires_grad=True) for heads in (H, G, G))
    report = lighthouse_fx.explain(attention, q, k, v, config=CONFIG)
    assert report.calls[0].scorer == "norm"
    assert report.calls[0].scored == "as they enter the graph: a norm before it is not seen"


# --- where there is a norm, but nothing to score ----------------------------------------------------------------------


def changed(x):
    out = F.rms_norm(x, (D,))
    x.mul_(2)
    return out


def shifted(x):
    x = F.rms_norm(x, (D,))
    return torch.cat([x[:, :, 1:], x[:, :, :1]], 2)


def divided_in_place(x):
    return x.div_(x.norm(dim=-1, keepdim=True))


UNUSABLE = {
    "changed afterwards": (changed, "changed in place afterwards"),
    "normalised in place": (divided_in_place, "changed in place afterwards"),
    "two norms": (
        lambda x: torch.cat([F.rms_norm(x[..., :4], (4,)), F.rms_norm(x[..., 4:], (4,))], -1), "made of several norms"
    ),
    "other tokens": (shifted, "could not be followed"),
    "part of it": (lambda x: F.rms_norm(torch.cat([x, x], 1), (D,))[:, : x.shape[1]], "could not be followed"),
    "repeated": (lambda x: F.rms_norm(x[:, :1], (D,)).expand(x.shape), "could not be followed"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_otherwise_the_scorer_is_one_that_knows_no_lengths(name):
    make, because = UNUSABLE[name]
    q, k, v = (torch.randn(B, heads, N, D, dtype=DATA, requires_grad=True) for heads in (H, G, G))
    function = lambda q, k, v: attention(make(q * 1), make(k * 1), v)  # noqa: E731
    out = torch.compile(function, backend=passes_only, options=FIELDS)(q, k, v)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.scorer == "dilated" and because in call.scored and "query: " in call.scored and "key: " in call.scored
    config = LighthouseConfig(**FIELDS, scorer="dilated")
    torch.testing.assert_close(out, functional(make(q * 1), make(k * 1), v, config=config), **EXACT)


# --- checkpointing ----------------------------------------------------------------------------------------------------


def test_norm_inside_a_checkpoint():
    model, oracle = (QKNorm(NORMS["rms_norm"], rotate_half, raw=raw) for raw in (False, True))
    oracle.load_state_dict(model.state_dict())
    x = uneven(inputs(dtype=DATA))
    found = outcome(
        torch.compile(Checkpointed(model), backend=passes_only, options=FIELDS, fullgraph=True), x
    )
    assert lighthouse_fx.reports()[-1].calls[0].scored == "query and key before their norms"
    torch.testing.assert_close(found, outcome(oracle, x), **EXACT)


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.slow
def test_through_inductor():
    model, oracle = (QKNorm(NORMS["written out"], rotate_half, raw=raw) for raw in (False, True))
    oracle.load_state_dict(model.state_dict())
    x = uneven(inputs(dtype=DATA))
    found = outcome(torch.compile(model, backend="lighthouse", options=FIELDS, fullgraph=True), x)
    assert lighthouse_fx.reports()[-1].calls[0].scored == "query and key before their norms"
    torch.testing.assert_close(found, outcome(oracle, x), rtol=1e-8, atol=1e-10)


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_norm_outside_a_checkpoint():
    def function(q, k, v):
        return checkpoint(attention, F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v, use_reentrant=False)

    q, k, v = (torch.randn(B, heads, N, D, dtype=DATA, requires_grad=True) for heads in (H, G, G))
    out = torch.compile(function, backend=passes_only, options=FIELDS)(q, k, v)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert call.scorer == "dilated" and "outside this checkpointed part" in call.scored
    config = LighthouseConfig(**FIELDS, scorer="dilated")
    torch.testing.assert_close(out, functional(F.rms_norm(q, (D,)), F.rms_norm(k, (D,)), v, config=config), **EXACT)


# --- the functional form and the report -------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_functional_form_selects_by_what_it_is_given():
    q, k, v = (torch.randn(B, heads, N, D, dtype=DATA, requires_grad=True) for heads in (H, G, G))
    raw_q, raw_k = (uneven(torch.randn(B, N, heads, size, dtype=DATA)).transpose(1, 2) for heads, size in ((H, 5), (G, 3)))
    raw_q.requires_grad_()
    out = functional(q, k, v, score_query=raw_q, score_key=raw_k)
    pyramid = dict(length=N, levels=3, pooling=2, topk=8, quota=None, keep_first=True)
    selections = brute_force.select_all(*brute_force.norm_scores(raw_q.detach(), raw_k), **pyramid)
    expected = brute_force.lighthouse(q, k, v, selections, pooling=2, is_causal=True)
    torch.testing.assert_close(out, expected, **EXACT)
    assert not torch.allclose(out, functional(q, k, v))
    found = torch.autograd.grad(out.sum(), (q, k, v, raw_q), allow_unused=True)
    assert found[3] is None
    torch.testing.assert_close(found[:3], torch.autograd.grad(expected.sum(), (q, k, v)), **EXACT)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(score_query=3), TypeError, "score_query=3 is a int: give a tensor with the rows of query"),
        (dict(score_key=torch.randn(B, H, N, D)), ValueError, r"score_key has shape \[2, 4, 64, 8\], and key \[2, 2, 64, 8\]"),
        (dict(score_query=torch.randn(B, H, N)), ValueError, r"score_query has shape \[2, 4, 64\]"),
        (dict(score_query=torch.ones(B, H, N, D, dtype=torch.int64)), TypeError, "score_query has dtype torch.int64"),
        (
            dict(score_query=torch.randn(B, H, N, D), config=LighthouseConfig(**FIELDS, scorer="gla")),
            ValueError, "score_query was given and the scorer is 'gla'.*leave score_query out",
        ),
        (dict(score_key=torch.randn(B, G, N, D, device="meta")), ValueError, "score_key is on meta and key on cpu"),
    ],
)  # fmt: skip
def test_wrong_scores_are_named(wrong, error, message):
    q, k, v = (torch.randn(B, heads, N, D) for heads in (H, G, G))
    with pytest.raises(error, match=message):
        functional(q, k, v, **wrong)


def test_report_says_what_is_scored():
    report = lighthouse_fx.explain(QKNorm(NORMS["rms_norm"], rotate_half), inputs(dtype=DATA), config=CONFIG)
    assert "norm: query and key before their norms" in " ".join(str(report).split())
    assert report.to_dict()["calls"][0]["scored"] == "query and key before their norms"
    plain = lighthouse_fx.explain(Model(1), inputs(), config=CONFIG)
    assert plain.calls[0].scorer == "norm" and plain.calls[0].scored == ""
    assert "scores" not in [column.header for column in plain.table().columns]
