"""The cost model against the published measurements, the rule of `tune`, and both on the command line."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, tuning
from lighthouse_fx.bench import LayerShape
from lighthouse_fx.cli import main
from lighthouse_fx.cost import H100, measure_card, predict, predict_dense
from lighthouse_fx.passes.check import pyramid_over
from lighthouse_fx.tuning import candidates, shape_of, tune

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MEASURED = [
    row
    for name in ("layer", "layer_grouped_heads", "layer_narrow_heads")
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]
]
SHAPE = LayerShape(length=98_304)


def row_name(row):
    return "{length}-{heads}-{groups}-{dim}".format(**row["shape"])


@pytest.mark.parametrize("row", MEASURED, ids=row_name)
def test_cost_model_is_what_was_measured(row):
    shape = LayerShape(**row["shape"])
    cost = predict(shape, LighthouseConfig(topk=row["topk"]), H100)
    error = 0.10 if shape.length >= 16_384 else 0.20
    assert cost.milliseconds == pytest.approx(row["layer"][1], rel=error)
    assert cost.memory == pytest.approx(row["memory"], rel=0.02)
    if row["dense"]:
        assert predict_dense(shape, H100) == pytest.approx(row["dense"][1], rel=error)


def test_rates_are_of_a_dtype():
    with pytest.raises(ValueError, match=r"dtype='float32'.*H100.*measure_card"):
        predict(replace(SHAPE, dtype="float32"), LighthouseConfig(), H100)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "fast"])
def test_a_rate_is_a_positive_number(value):
    with pytest.raises(ValueError, match=f"bandwidth={re.escape(repr(value))} is no rate"):
        replace(H100, bandwidth=value)


def test_the_rule():
    found = tune(SHAPE, card=H100, measure=0)
    best = found.recommended
    assert best.milliseconds <= found.share * found.dense
    allowed = [c for c in found.candidates if c.milliseconds <= found.share * found.dense]
    assert len(allowed) > 5 and len(found.candidates) > len(allowed)
    most = max(round(c.kept, 2) for c in allowed)
    alike = [c for c in allowed if round(c.kept, 2) == most]
    assert len(alike) > 1, "otherwise this says nothing of ties"
    assert best in alike and best.config.levels == min(c.config.levels for c in alike)
    assert best.gathered == pyramid_over(SHAPE.length, best.config).gathered


def test_a_larger_share_keeps_more_and_less_memory_less():
    kept = [tune(SHAPE, share=share, card=H100, measure=0).recommended.kept for share in (0.05, 0.1, 0.3)]
    assert kept == sorted(set(kept))
    free = tune(SHAPE, share=0.3, card=H100, measure=0).recommended
    tight = tune(SHAPE, share=0.3, memory=free.memory - 1, card=H100, measure=0).recommended
    assert tight.kept < free.kept and tight.memory < free.memory


@pytest.mark.parametrize(
    ("shape", "arguments", "reason", "remedy"),
    [
        (replace(SHAPE, length=4096), {}, "no pyramid takes at most 10%", "share="),
        (SHAPE, {"memory": 10**6}, r"fits into 1,000,000 bytes", "memory="),
        (replace(SHAPE, length=3), {}, "too short for any pyramid", "longer sequence"),
    ],
)
def test_a_refusal_has_a_reason_and_a_remedy(shape, arguments, reason, remedy):
    found = tune(shape, card=H100, measure=0, **arguments)
    assert found.recommended is None
    assert re.search(reason, found.reason) and remedy in found.remedy
    assert "Stay dense" in str(found)
    if "share=" in found.remedy:  # the remedy is true
        share = float(re.search(r"share=([\d.]+)", found.remedy)[1])
        assert tune(shape, card=H100, measure=0, share=share).recommended
    if "memory=" in found.remedy:
        memory = int(re.search(r"memory=(\d+)", found.remedy)[1])
        assert tune(shape, card=H100, measure=0, memory=memory).recommended


@pytest.mark.parametrize("length", [1, 17, 64, 1030, 8192, 98_304])
def test_candidates_can_be_used(length):
    found = list(candidates(length))
    sizes = [(c.levels, pyramid_over(length, c).gathered) for c in found]
    assert len(sizes) == len(set(sizes))
    assert all(gathered <= c.max_kept * length for (_, gathered), c in zip(sizes, found, strict=True))
    if length >= 64:
        assert found and (found[0].levels, found[0].pooling) == (3, 4)


ARGUMENTS = [
    ("share", 0, ValueError, "such as 0.1"),
    ("share", True, ValueError, "such as 0.1"),
    ("memory", 0, ValueError, "number of bytes"),
    ("memory", 2.5, ValueError, "number of bytes"),
    ("card", "H100", TypeError, "lighthouse_fx.cost.H100"),
    ("measure", -1, ValueError, "0 to predict only"),
]


@pytest.mark.parametrize(("name", "value", "error", "remedy"), ARGUMENTS)
def test_arguments(name, value, error, remedy):
    with pytest.raises(error, match=f"{name}={re.escape(repr(value))}.*{re.escape(remedy)}"):
        tune(SHAPE, **{"card": H100, "measure": 0, name: value})


@pytest.mark.parametrize(
    ("field", "value"), [("length", 0), ("heads", -1), ("dim", 1.5), ("groups", 3), ("dtype", "int8")]
)
def test_shapes(field, value):
    with pytest.raises(ValueError, match=f"{field}={re.escape(repr(value))}"):
        tune(replace(SHAPE, **{field: value}), card=H100, measure=0)


def test_shape_of_a_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    described = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(described).to(torch.bfloat16)
    assert shape_of(model, 4096) == LayerShape(length=4096, heads=4, groups=2, dim=8, dtype="bfloat16")
    described.save_pretrained(tmp_path)
    assert main(["tune", "98304", "--predict", "--model", str(tmp_path)]) == 0
    assert "4/2 heads of 8, bfloat16" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model=Linear.*LayerShape"):
        shape_of(nn.Linear(2, 2), 4096)


def test_command_predicts(tmp_path, capsys):
    picture = tmp_path / "a" / "tuning.png"
    assert main(["tune", "98304", "--predict", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    best = tune(SHAPE, card=H100, measure=0).recommended.config
    assert f"levels={best.levels}, pooling={best.pooling}, topk={best.topk}" in printed
    assert printed.count("recommended") == 1 and picture.read_bytes().startswith(b"\x89PNG")
    assert main(["tune", "98304", "--predict", "--attention-tflops", "560", "--memory", "0.001"]) == 1
    assert "Stay dense" in capsys.readouterr().out


@pytest.mark.slow
def test_measured():
    shape = LayerShape(length=512, heads=2, groups=1, dim=16, dtype="float32")
    told = []
    found = lighthouse_fx.tune(shape, share=1.0, device="cpu", measure=2, progress=told.append)
    tried = [c for c in found.candidates if c.measured]
    assert len(tried) == 2 and len(told) == 3 and found.dense_measured
    assert sum(c.measured.dense is not None for c in tried) == 1, "dense attention is measured once"
    fast = [c for c in tried if c.measured.layer[1] <= found.dense]
    if fast:
        assert found.recommended in fast, "only what was measured is recommended"
    else:
        assert found.recommended is None and "no pyramid takes at most 100%" in found.reason


def test_out_of_memory_is_a_failure_of_the_candidate(monkeypatch):
    def measure_layer(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "measure_layer", measure_layer)
    found = tune(SHAPE, card=H100, measure=2, device="cpu")
    assert [c.failure for c in found.candidates if c.failure] == ["out of memory"] * 2
    assert found.recommended is None and "no pyramid could be measured" in found.reason
    assert str(found).count("out of memory") == 2


def test_card_of_this_machine():
    card = measure_card(torch.device("cpu"), "float32")
    assert card.dtypes == ("float32",)
    assert 1e8 < card.bandwidth < 1e13 and 1e8 < card.matmul < 1e14 and 1e7 < card.attention < 1e14
