"""The leak from the future: models that leak a known amount by construction, causal ones, and oracles written out."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, WIDTH, Model, causal, functional
from torch import nn

import lighthouse_fx
from lighthouse_fx import FutureLeak, documents, future_leak, lighthouse_attention, validate
from lighthouse_fx.evaluation.future_leak_result import LIMIT, Leak

N = 64
PLACES = N - 1 - N // 8  # at which a row can be cut


class Language(nn.Module):
    def __init__(self, attend=causal):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = Model(2, attend)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids):
        return 20 * self.head(self.blocks(self.embed(ids)))


class Peeks(nn.Module):
    """Tells the next token by looking at it: its logit is `sure` above all others. `asked` are the rows that it was given."""

    def __init__(self, sure):
        super().__init__()
        self.sure, self.asked = sure, []

    def forward(self, ids):
        self.asked.append(ids)
        return self.sure * F.one_hot(ids.roll(-1, dims=1), 256).double()


def disjoint_rows():
    """Two rows without a token in common."""
    return torch.stack([torch.randint(128, (N + 1,)), torch.randint(128, 256, (N + 1,))])


def with_attention(model, attend):
    other = Language(attend).double()
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def written_out(call, rows, other, places, reach):
    """Rises of the loss, `[cuts, reach]`, one row and one cut at a time."""
    found = []
    for n, at in places:
        row = rows[n : n + 1]
        changed = torch.cat([row[:, : at + 1], other[n : n + 1, at + 1 :]], dim=1)
        before, after = (call(ids[:, :-1])[0].log_softmax(-1) for ids in (row, changed))
        seen = [at - distance for distance in range(reach)]
        found.append([float(before[i, row[0, i + 1]] - after[i, row[0, i + 1]]) for i in seen])
    return torch.tensor(found, dtype=torch.float64)


# --- a known leak, and none -------------------------------------------------------------------------------------------


def test_a_model_that_reads_one_token_ahead_leaks_as_much_as_it_is_sure():
    found = future_leak(Peeks(3.0), disjoint_rows(), cuts=10, reach=3)
    first, *others = found.dense
    assert first.mean == pytest.approx(3.0, abs=1e-6) and first.error == pytest.approx(0, abs=1e-6) and first.cuts == 10
    assert [(leak.distance, leak.mean) for leak in others] == [(1, 0.0), (2, 0.0)], "one token ahead, and no further"
    assert found.lighthouse is None and found.reading == "leaks"
    assert "no attention call is rewritten" in str(found) and "leaks; the loss of a token rises by +3.0000" in str(found)


def test_attention_that_reads_one_token_ahead_leaks():
    ahead = torch.ones(N, N, dtype=torch.bool).tril(1)
    model = Language(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=ahead, enable_gqa=True)).double()
    rows = disjoint_rows()
    found = future_leak(model, rows, cuts=2 * PLACES, reach=2)
    places = [(n, at) for n in range(2) for at in range(N // 8, N - 1)]
    expected = written_out(model, rows, rows.flip(0), places, 2)
    for leak in found.dense:
        assert leak.mean == pytest.approx(expected[:, leak.distance].mean().item(), abs=1e-5)
        assert leak.error == pytest.approx(expected[:, leak.distance].std().item() / len(places) ** 0.5, abs=1e-5)
    assert found.dense[0].mean != 0 and found.dense[0].error > 0


def test_causal_attention_leaks_nothing():
    found = future_leak(Language().double(), disjoint_rows(), cuts=12, config=CONFIG)
    assert [(leak.mean, leak.error) for leak in found.dense] == [(0.0, 0.0)] * 8
    assert found.dense[0].reading == "none seen"


# --- as it trains -----------------------------------------------------------------------------------------------------


def test_lighthouse_attention_is_measured_as_it_trains():
    model = Language().double()
    rows = disjoint_rows()
    oracle = with_attention(model, functional())
    with lighthouse_fx.dense():  # the stage does not matter
        found = future_leak(model, rows.int(), cuts=2 * PLACES, config=CONFIG, reach=2, batch=2)
    places = [(n, at) for n in range(2) for at in range(N // 8, N - 1)]
    expected = written_out(oracle, rows, rows.flip(0), places, 2)
    assert expected.abs().max() > 1e-3, "otherwise this shows nothing: the choice of windows sees later tokens"
    for leak in found.lighthouse:
        assert leak.mean == pytest.approx(expected[:, leak.distance].mean().item(), abs=1e-5)
        assert leak.error == pytest.approx(expected[:, leak.distance].std().item() / len(places) ** 0.5, abs=1e-5)
    assert [call.rewritten for call in found.calls] == [True] * 2 and model.training
    assert found.config == CONFIG and found.length == N


def test_the_seed_decides_the_places():
    model, rows = Language(), disjoint_rows()
    one, same, other = (future_leak(model, rows, cuts=8, config=CONFIG, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.lighthouse != other.lighthouse


# --- packed rows ------------------------------------------------------------------------------------------------------


def test_packed_rows_are_cut_at_the_last_tokens_of_documents():
    model, rows = Language().double(), disjoint_rows()
    ids = torch.tensor([[0] * 18 + [1] * 22 + [2] * 24, [0] * 1 + [1] * 40 + [2] * 23])
    ends = [(0, 16), (0, 38), (0, 62), (1, 39), (1, 62)]  # a document of one token has no end that could be cut

    def inside(n):
        def attend(q, k, v):
            documents = ids[n : n + 1]
            return lighthouse_attention(q, k, v, is_causal=True, enable_gqa=True, config=CONFIG, documents=documents)

        return with_attention(model, attend)

    with documents(ids):
        found = future_leak(model, rows, cuts=12, config=CONFIG, reach=2)
    assert found.at_documents and "the last tokens of documents" in str(found)
    rise = {(n, at): written_out(inside(n), rows, rows.flip(0), [(n, at)], 2) for n, at in ends}
    # Six rounds of both rows: each of the first row's ends twice, of the second's three times.
    expected = torch.cat([value.repeat(2 if n == 0 else 3, 1) for (n, _), value in rise.items()])
    assert expected.abs().max() > 1e-3, "otherwise this shows nothing"
    for leak in found.lighthouse:
        assert leak.cuts == 12
        assert leak.mean == pytest.approx(expected[:, leak.distance].mean().item(), abs=1e-5)
        assert leak.error == pytest.approx(expected[:, leak.distance].std().item() / 12**0.5, abs=1e-5)


def test_what_follows_the_last_token_of_a_document_is_replaced():
    model, rows = Peeks(2.0), disjoint_rows()[:1]
    with documents(cu_seqlens=torch.tensor([0, 9, 20, N])):
        future_leak(model, rows, cuts=3, other=disjoint_rows()[1:])
    changed = {int((ids != rows[:, :-1]).nonzero()[0, 1]) for ids in model.asked if not torch.equal(ids, rows[:, :-1])}
    assert changed == {8, 19, N - 1}, "the last token of each document, and all after it"


def test_documents_of_another_shape():
    some = documents(torch.tensor([[0] * 4 + [1] * 4]))
    with some, pytest.raises(ValueError, match=r"tokens has shape \[2, 65\] inside documents\(\) of \[1, 8\]"):
        future_leak(Language(), disjoint_rows())


# --- readings and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "error", "reading"),
    [
        (0.0, 0.0, "none seen"),
        (0.01, 0.004, "none seen"),
        (1.2, 0.1, "leaks"),
        (0.03, 0.02, "unclear"),
        (0.0, LIMIT, "unclear"),
        (math.nan, math.nan, "unclear"),
    ],
)
def test_reading(mean, error, reading):
    leak = Leak(distance=0, mean=mean, error=error, cuts=96)
    assert leak.reading == reading and leak.most == pytest.approx(mean + 2 * error, nan_ok=True)


def test_a_single_row_is_continued_with_its_other_half():
    model, row = Peeks(1.0), torch.arange(N + 1)[None]
    future_leak(model, row, cuts=2)
    changed = next(ids for ids in model.asked if not torch.equal(ids, row[:, :-1]))
    at = int((changed != row[:, :-1]).nonzero()[0, 1])
    assert torch.equal(changed[0, at:], row[0].roll(N // 2)[at:-1])


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"cuts": 1}, ValueError, "cuts=1: give an integer of at least 2"),
        ({"cuts": 2.0}, TypeError, "cuts=2.0 is a float"),
        ({"reach": 0}, ValueError, "reach=0"),
        ({"batch": True}, TypeError, "batch=True is a bool"),
        ({"config": "paper"}, TypeError, "config='paper' is a str"),
        ({"tokens": torch.zeros(2, 9)}, TypeError, "tokens has dtype torch.float32"),
        ({"tokens": torch.zeros(9, dtype=torch.long)}, ValueError, r"tokens has shape \[9\]"),
        ({"other": torch.zeros(1, 5, dtype=torch.long)}, ValueError, r"other is of shape \[1, 5\]"),
        ({"tokens": torch.zeros(2, 9, dtype=torch.long)}, ValueError, "other is the same text"),
        ({"model": len}, TypeError, "model="),
    ],
)
def test_errors_name_the_argument(arguments, kind, words):
    given = {"model": Peeks(1.0), "tokens": disjoint_rows()} | arguments
    with pytest.raises(kind, match=words):
        future_leak(given.pop("model"), given.pop("tokens"), **given)


# --- in validate ------------------------------------------------------------------------------------------------------


def test_validate_measures_the_leak(tmp_path):
    model, rows = Language(), disjoint_rows()
    found = validate(model, rows, config=CONFIG, leak_cuts=6, check_inference=False)
    assert isinstance(found.leak, FutureLeak) and found.leak.lighthouse[0].cuts == 6 and found.passed
    questions = {finding.question: finding for finding in found.findings}
    assert questions["Is dense attention free of leaks from the future?"].answer == "yes"
    assert "Is Lighthouse attention free of leaks from the future?" in questions
    assert "rise of the loss where all that follows is replaced" in str(found)
    pytest.importorskip("matplotlib")
    saved = json.loads(found.save(tmp_path)[0].read_text())
    assert saved["leak"]["dense"][0] == {"distance": 0, "mean": 0.0, "error": 0.0, "cuts": 6}


def test_a_model_whose_dense_attention_leaks_does_not_pass():
    found = validate(Peeks(3.0), disjoint_rows(), leak_cuts=4, check_inference=False)
    assert not found.passed
    answers = {finding.question: finding.answer for finding in found.findings}
    assert answers["Is dense attention free of leaks from the future?"] == "no"
    assert validate(Peeks(3.0), disjoint_rows(), check_inference=False).leak is None, "it is off unless asked for"

