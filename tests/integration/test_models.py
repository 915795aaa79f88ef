"""Many model families: what is rewritten and why the rest is not, the numbers, and docs/models.md, which this writes.

`make models` writes the page anew.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functional_oracle import Functional
from small_models import CONFIG, FIELDS, passes_only

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.frontend.blocks import repeated_blocks
from lighthouse_fx.report.report import AttentionRecord
from lighthouse_fx.runtime import journal

pytest.importorskip("transformers")
from model_zoo import LAYERS, MODELS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
WRITE = "LIGHTHOUSE_WRITE_MODELS"
SDPA = F.scaled_dot_product_attention
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
# One worker has all results for the page.
pytestmark = pytest.mark.xdist_group("models")
QUICK = ("Llama", "Gemma 3", "Falcon", "DeepSeek V3", "BERT", "nn.MultiheadAttention")
each_model = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in MODELS]
)


def options(name) -> dict[str, object]:
    return FIELDS | ({"scorer": "dilated", "dilation": 4} if MODELS[name].qk_norm else {})


@dataclass(frozen=True)
class Step:
    """One training step: the attention calls that ran, and its numbers."""

    calls: Sequence[AttentionRecord]
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]

    @property
    def rewritten(self):
        return tuple(call.rewritten for call in self.calls)


def model_and_inputs(name):
    pytest.importorskip(MODELS[name].package, reason=f"{MODELS[name].package} is not installed")
    torch.manual_seed(0)
    return MODELS[name].build().double().train(), MODELS[name].inputs()


def step(model, run: Callable, x) -> Step:
    with journal.watch() as calls:
        out = run(x)
    loss = (out if isinstance(out, torch.Tensor) else out[0]).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return Step(tuple(calls), loss.detach(), dict(zip(names, gradients, strict=True)))


@functools.cache
def whole(name) -> Step:
    torch._dynamo.reset()
    model, x = model_and_inputs(name)
    run = torch.compile(model, backend=passes_only, options=options(name), fullgraph=not MODELS[name].breaks)
    return step(model, run, x)


@functools.cache
def layer_by_layer(name) -> Step:
    torch._dynamo.reset()
    model, x = model_and_inputs(name)
    for layer in repeated_blocks(model).children():
        layer.compile(backend=passes_only, options=options(name), fullgraph=not MODELS[name].breaks)
    return step(model, model, x)


def by_functional_form(name, calls: Sequence[AttentionRecord]) -> Step:
    model, x = model_and_inputs(name)
    rewritten, groups = [call.rewritten for call in calls], [call.key[1] if call.key else 0 for call in calls]
    with Functional(rewritten, groups, LighthouseConfig(**options(name))) as oracle:
        found = step(model, model, x)
    assert oracle.seen == sum(bool(call.key) for call in calls)  # not the attention inside another function of PyTorch
    return found


def assert_same(found: Step, expected: Step) -> None:
    torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        other = found.gradients[name]
        if value is None or other is None:
            assert value is other, name
        else:
            torch.testing.assert_close(other, value, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE)


@each_model
def test_what_is_rewritten(name):
    for found, expected in ((whole(name), MODELS[name].whole), (layer_by_layer(name), MODELS[name].layers)):
        assert found.rewritten == expected, [call.reason for call in found.calls]
        assert all(bool(call.reason) != call.rewritten for call in found.calls)


@each_model
def test_loss_and_gradients_are_those_of_the_functional_form(name):
    for found in (whole(name), layer_by_layer(name)):
        assert_same(found, by_functional_form(name, found.calls))


@pytest.mark.parametrize("name", QUICK)
def test_explain_says_what_runs(name):
    model, x = model_and_inputs(name)
    report = lighthouse_fx.explain(model, x, config=LighthouseConfig(**options(name)))
    assert report.calls == whole(name).calls
    assert len(report.graphs) == 1


def test_layers_of_pytorch_itself_are_rewritten_in_their_blocks():
    # Dynamo skips modules of torch that have no hooks; the one that keeps blocks out of other graphs makes it look at them.
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0,))
    with lighthouse_fx.runtime.journal.watch() as calls:
        model(torch.randn(2, 64, 32)).sum().backward()
    assert [call.rewritten for call in calls] == [False, True, True]


def test_explain_says_why_it_finds_nothing():
    report = lighthouse_fx.explain(torch.nn.Linear(8, 8), torch.randn(2, 8), config=CONFIG)
    assert "no attention call was found" in str(report)


def test_the_oracle_is_another_function_than_dense_attention():
    found = whole("Llama")
    model, x = model_and_inputs("Llama")
    with pytest.raises(AssertionError):
        assert_same(found, step(model, model, x))


# --- docs/models.md ---------------------------------------------------------------------------------------------------

HEAD = """# Models

This page shows how the backend rewrites one training step of each model. The models are small configurations with
random weights, {layers} layers. They are called without `attention_mask` and `position_ids`, and are the unchanged
models of transformers {transformers} and litgpt {litgpt}. *Whole* is
`torch.compile(model, backend="lighthouse")`; *by layer* compiles each layer alone, as `lighthouse_fx.compile` does. Loss and
every gradient are compared in float64 with the eager model whose rewritten calls are `lighthouse_attention`. Each is one
graph (`fullgraph=True`) unless the last column says otherwise.

`tests/integration/test_models.py` generates this page (`make models`) and fails if it is no longer true.

| model | attentions | rewritten, whole | rewritten, by layer | what stays dense, and why |
|---|---|---|---|---|
"""


def page() -> str:

    versions = {package: metadata.version(package) for package in ("transformers", "litgpt")}
    return HEAD.format(**versions, layers=LAYERS) + "\n".join(map(row, MODELS)) + "\n"


def row(name) -> str:
    entire, layers = whole(name), layer_by_layer(name)
    cells = (
        name,
        len(entire.calls) or "none found",
        sum(entire.rewritten),
        sum(layers.rewritten),
        "; ".join(filter(None, (reasons(entire, layers), MODELS[name].note))) or "nothing",
    )
    return f"| {' | '.join(map(str, cells))} |"


def reasons(entire: Step, layers: Step) -> str:
    said = [list(dict.fromkeys(call.reason for call in s.calls if not call.rewritten)) for s in (entire, layers)]
    if said[0] == said[1]:
        return "; ".join(said[0])
    return "; ".join(f"{how}: {', '.join(why)}" for how, why in zip(("whole", "by layer"), said, strict=True) if why)


@pytest.mark.sweep
def test_the_page_is_what_was_found():
    for package in {entry.package for entry in MODELS.values()}:
        pytest.importorskip(package, reason=f"the page has rows of {package}, which is not installed")
    writes = f"transformers {metadata.version('transformers')}"
    if not os.environ.get(WRITE) and writes not in PAGE.read_text(encoding="utf-8"):
        pytest.skip(f"docs/models.md is of another version than {writes}")
    text = page()
    if os.environ.get(WRITE):
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "docs/models.md no longer holds: look why, then run `make models`"
