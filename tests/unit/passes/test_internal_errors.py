"""An exception that no pass foresees: logged with its traceback, raised in tests, and never taken for the user's graph."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import FIELDS, HEADS, WIDTH, inputs, passes_only
from torch import nn

import lighthouse_fx
from lighthouse_fx.passes.match import mha, unfused
from lighthouse_fx.passes.provenance import inputs as provenance
from lighthouse_fx.passes.rewrite import equal_heads, qk_norm

PACKAGE = Path(lighthouse_fx.passes.__file__).parent


class Attention(nn.Module):
    """Attention in a spelling of choice."""

    def __init__(self, attend):
        super().__init__()
        self.project, self.attend = nn.Linear(WIDTH, 3 * WIDTH), attend
        self.multi_head = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        if self.attend is None:
            return self.multi_head(x, x, x, need_weights=False)[0]
        return self.attend(*self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0))


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def unfused_attention(q, k, v):
    return (q @ k.mT * 0.3).softmax(-1) @ v


def fails(*args, **kwargs):
    raise ZeroDivisionError("on purpose")


FAILURES = {
    "query and key": (provenance, "step_back", sdpa, False),
    "by hand": (unfused, "_follow_scores", unfused_attention, False),
    "nn.MultiheadAttention": (mha, "_as_call", None, False),
    "a norm": (qk_norm, "normalised", sdpa, True),
    "equal heads": (equal_heads, "memories", lambda q, k, v: sdpa(q, *(x[:, :1].expand_as(q) for x in (k, v))), True),
}


@pytest.mark.parametrize("name", FAILURES)
def test_it_is_logged_and_the_attention_left_as_it_is(name, monkeypatch, caplog):
    module, function, attend, rewritten = FAILURES[name]
    monkeypatch.setattr(module, function, fails)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    model, x = Attention(attend), inputs()
    before = len(lighthouse_fx.reports())
    out = torch.compile(model, backend=passes_only, options=FIELDS)(x)
    (call,) = lighthouse_fx.reports()[before:][0].calls
    assert call.rewritten == rewritten
    if not rewritten:
        assert "internal error" in call.reason and "ZeroDivisionError: on purpose" in call.reason
        assert "report" in call.remedy
        torch.testing.assert_close(out, model(x), rtol=0, atol=0)
    assert "internal error" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("name", FAILURES)
def test_it_is_raised_in_tests(name, monkeypatch):
    module, function, attend, _ = FAILURES[name]
    monkeypatch.setattr(module, function, fails)
    with pytest.raises(Exception, match="ZeroDivisionError: on purpose"):
        torch.compile(Attention(attend), backend=passes_only, options=FIELDS)(inputs())


def test_no_pass_swallows_an_exception():
    for file in PACKAGE.rglob("*.py"):
        for handler in re.findall(r"except Exception.*\n.*\n", file.read_text()):
            assert "internal_error(error, " in handler, f"{file}: {handler}"
