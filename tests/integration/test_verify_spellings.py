"""verify() of attention in every spelling: by hand, FlexAttention, flash-attn's functions, and beside what stays dense."""

import math

import pytest
import torch
import torch.nn.functional as F
from corpus import SPELLINGS
from flash_stand_in import stand_in
from graphs import damage
from small_models import CONFIG, FIELDS, HEADS, TOKENS, WIDTH, Model, causal, inputs, what_failed
from torch import nn
from torch.nn.attention import flex_attention as flexible

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, verify
from lighthouse_fx.passes import attention_call
from lighthouse_fx.passes.match import unfused
from lighthouse_fx.passes.rewrite import equal_heads

flash = pytest.fixture(scope="module")(stand_in)
REPLACED = "the attention it replaces"
NUMBERS = (torch.arange(TOKENS) // 24).expand(2, TOKENS).contiguous()


def repeated(q, k, v):
    return q, *(x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))


def written_out(q, k, v, dropout=0.0):
    q, k, v = repeated(q, k, v)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    weights = F.dropout(scores.masked_fill(later, -torch.inf).softmax(-1), dropout)
    return weights @ v


def by_einsum(q, k, v):
    """With tokens before heads, and an output that the model views."""
    q, k, v = (x.transpose(1, 2) for x in repeated(q, k, v))  # [B, N, H, D]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.3
    later = torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
    out = torch.einsum("bhij,bjhd->bihd", (scores + later).softmax(-1), v)
    return out.contiguous().view(*out.shape).transpose(1, 2)


@pytest.mark.parametrize("attend", [written_out, by_einsum])
@pytest.mark.parametrize("checkpointing", [None, "inside"])
def test_attention_by_hand(attend, checkpointing):
    found = verify(Model(2, attend, checkpointing), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [True, True] and not found.notes
    for layer in (0, 1):
        compared = {check.what for check in found.checks if check.where == f"layers.{layer}.attn"}
        assert compared == {REPLACED, "selection", "output", "gradients of q, k, v", "ops and their plain twins"}


def test_by_hand_inside_documents():
    with lighthouse_fx.documents(NUMBERS):
        found = verify(Model(1, written_out), inputs(), config=CONFIG)
        kept = verify(Model(2, written_out), inputs(), config=LighthouseConfig(**FIELDS, dense_layers=(1,)))
    assert found.passed and kept.passed, f"{found}{kept}"
    assert [call.inside_documents for call in kept.calls] == [True, True]


def test_attention_by_hand_that_stays_dense():
    found = verify(Model(2, by_einsum), inputs(), config=LighthouseConfig(**FIELDS, dense_layers=(1,)))
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [True, False]


def test_dropout_says_what_was_not_compared():
    found = verify(Model(1, lambda q, k, v: written_out(q, k, v, dropout=0.3)), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert REPLACED not in {check.what for check in found.checks}
    assert found.notes == ("layers.0.attn: the attention it replaces was not compared, as dropout makes it random",)
    assert "note: layers.0.attn" in str(found)


@pytest.mark.sweep
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_every_spelling_of_the_corpus(spelling):
    found = verify(Mixed(Model(1, lambda q, k, v: spelling.attend(*repeated(q, k, v))), Model(1)), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [spelling.outcome != "dense", True]
    assert spelling.outcome == "dense" or found.calls[0].is_causal is (spelling.outcome == "causal")


def test_a_mask_of_another_dtype_than_the_queries():
    """Its own dtype stays float32 in verify's run in float64, where PyTorch's fused kernel on a CPU reads it wrongly."""
    (additive,) = (spelling for spelling in SPELLINGS if spelling.name == "mask: additive")
    found = verify(Model(1, lambda q, k, v: additive.attend(*repeated(q, k, v))), inputs(), config=CONFIG)
    assert found.passed, str(found)


class Mixed(nn.Module):
    """Every layer spells its attention otherwise."""

    def __init__(self, *models):
        super().__init__()
        self.parts = nn.ModuleList(models)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_layers_of_different_spellings():
    window = lambda q, k, v: causal(q, k, v) + F.scaled_dot_product_attention(  # noqa: E731
        q, *repeated(q, k, v)[1:], attn_mask=torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-5)
    )
    heads = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=8, dropout=0.0, batch_first=True)
    found = verify(Mixed(Model(1, written_out), heads, Model(1, window), Model(1)), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls if call.query] == [True, True, True, False, True]


@pytest.mark.sweep
@pytest.mark.skipif(torch.__version__ < "2.12", reason="such traces count towards the recompile limit, as the report says")
def test_seven_times_in_one_process():
    class Broken(Model):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    for _ in range(7):
        found = verify(Broken(1, written_out), inputs(), config=CONFIG)
        assert found.passed and [call.rewritten for call in found.calls] == [True], str(found)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["Gemma 3", "Falcon, grouped heads"])
def test_real_models(name):
    pytest.importorskip("transformers")
    from model_zoo import MODELS

    entry = MODELS[name]
    found = verify(entry.build().train(), entry.inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert tuple(call.rewritten for call in found.calls) == entry.whole


def test_two_runs_that_differ_are_an_error():
    runs = []

    def attend(q, k, v):
        runs.append(0)
        return written_out(q, k, v) if len(runs) == 1 else causal(q, k, v) + causal(k.repeat(1, 2, 1, 1), k, v)

    with pytest.raises(RuntimeError, match="verify a part of the model that runs the same calls each time"):
        verify(Model(1, attend), inputs(), config=CONFIG)


# --- FlexAttention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
def test_flex_attention(monkeypatch, documents):
    """On a CPU its front refuses to train; past that, verify is the same as on a GPU."""
    monkeypatch.setattr(flexible, "_validate_device", lambda *_: None)

    def mask(b, h, i, j):
        return (i >= j) & (NUMBERS[b, i] == NUMBERS[b, j]) if documents else i >= j

    blocks = flexible.create_block_mask(mask, 2, None, TOKENS, TOKENS, device="cpu")

    def attend(q, k, v):
        return flexible.flex_attention(q, k, v, block_mask=blocks, scale=0.3, enable_gqa=True)

    found = verify(Model(1, attend), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert REPLACED in {check.what for check in found.checks} and found.calls[0].inside_documents is documents


def test_flex_attention_without_gradients_is_dense_beside_the_others():
    blocks = flexible.create_block_mask(lambda b, h, i, j: i >= j, None, None, TOKENS, TOKENS, device="cpu")

    class Frozen(nn.Module):
        def forward(self, x):  # [B, N, WIDTH]
            with torch.no_grad():
                y = x.detach().unflatten(-1, (HEADS, -1)).transpose(1, 2)
                return x + flexible.flex_attention(y, y, y, block_mask=blocks).transpose(1, 2).flatten(2)

    found = verify(Mixed(Frozen(), Model(1)), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [False, True]


# --- flash-attn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn(flash, packed):
    borders = torch.tensor([0, 24, 29, 2 * TOKENS], dtype=torch.int32)
    others = borders.clone()

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if not packed:
            return flash.flash_attn_func(q, k, v, causal=True).transpose(1, 2)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash.flash_attn_varlen_func(*flat, borders, others, 2 * TOKENS, 2 * TOKENS, causal=True)
        return out.view(q.shape).transpose(1, 2)

    found = verify(Mixed(Model(1, attend), Model(1)), inputs(), config=CONFIG)
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [True, True]
    assert len(found.notes) == 1 and "flash-attn takes neither float32 nor float64" in found.notes[0]


class Fails:
    def __getattr__(self, name):
        raise RuntimeError("flash-attn takes no float64")


def test_what_flash_attn_itself_would_compute_is_computed_plainly(flash, monkeypatch):
    monkeypatch.setattr(flash, "F", Fails())

    def attend(q, k, v):
        return flash.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)

    found = verify(Model(3, attend), inputs(), config=LighthouseConfig(**FIELDS, dense_layers=(0,)))
    assert found.passed, str(found)
    assert [call.rewritten for call in found.calls] == [False, True, True]
    assert [note.partition(":")[0] for note in found.notes] == [f"layers.{n}.attn" for n in range(3)]
    assert "computed as plain attention" in found.notes[0] and "was not compared" in found.notes[1]


# --- wrong finds and rewrites ---------------------------------------------------------------------------------------------


def test_a_scale_that_was_read_wrongly_is_caught(monkeypatch):
    monkeypatch.setattr(unfused, "_factor", lambda node, source: 1.0)
    found = verify(Model(1, written_out), inputs(), config=CONFIG)
    assert what_failed(found) == {("layers.0.attn", REPLACED)} and not found.passed


def test_a_mask_that_was_not_looked_at_is_caught(monkeypatch):
    right = unfused._understood
    monkeypatch.setattr(
        unfused, "_understood", lambda *x, **y: attention_call.replace(right(*x, **y), mask=None, score_mask=None)
    )
    found = verify(Model(1, written_out), inputs(), config=CONFIG)
    assert what_failed(found) == {("layers.0.attn", REPLACED)} and not found.passed


def test_heads_that_are_not_equal_are_caught(monkeypatch):
    monkeypatch.setattr(equal_heads._Runs, "along", lambda *_: 2)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True)

    found = verify(Model(1, attend), inputs(), config=CONFIG)
    assert what_failed(found) == {("layers.0.attn", REPLACED)} and not found.passed


def test_exchanged_keys_and_values_are_caught(monkeypatch):
    def exchange(graph, inner):
        query, key, value, *rest = inner.args
        inner.args = (query, value, key, *rest)

    damage(monkeypatch, exchange)
    found = verify(Model(1, written_out), inputs(), config=CONFIG)
    assert ("layers.0.attn", "output") in what_failed(found) and ("layers.0.attn", REPLACED) not in what_failed(found)
