"""The cost model against measurements: those it was fitted to, those it was not, and cross-validation."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lighthouse_fx import LighthouseConfig
from lighthouse_fx.measure.cost import H100, measure_card, predict, predict_dense
from lighthouse_fx.measure.layer import LayerShape, measure_layer

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
SHAPE = LayerShape(length=98_304)


def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


FITTED = rows("layer")
OTHER_HEADS = rows("layer_grouped_heads") + rows("layer_narrow_heads")
# Stock attention alone on the same kind of card on another day, before there was a cost model, 8 heads of 128: tokens and
# milliseconds forward plus backward. Dense, and on the S entries of a layer.
ANOTHER_DAY = {
    8_192: 1.07, 16_384: 3.58, 32_768: 13.87, 65_536: 54.1, 98_304: 123.9, 131_072: 233.6, 262_144: 946, 524_288: 3745,
    4_608: 0.44, 9_216: 1.31, 10_240: 1.57, 12_288: 2.22, 18_432: 4.64, 24_576: 8.13, 40_960: 21.45,
}  # fmt: skip


def errors(row, card=H100):
    """How far off the model is in what was measured of a layer, as shares."""
    shape = LayerShape(**row["shape"])
    cost = predict(shape, LighthouseConfig.paper(topk=row["topk"]), card)
    found = {"layer": cost.milliseconds / row["layer"][1] - 1}
    found["attention on S"] = predict_dense(replace(shape, length=row["gathered"]), card) / row["inner"][1] - 1
    if row["dense"]:
        found["dense"] = predict_dense(shape, card) / row["dense"][1] - 1
    return found


def row_name(row):
    return "{length}-{heads}-{groups}-{dim}".format(**row["shape"])


@pytest.mark.parametrize("row", FITTED + OTHER_HEADS, ids=row_name)
def test_what_was_measured(row):
    assert max(map(abs, errors(row).values())) < (0.05 if row in FITTED else 0.061)
    shape = LayerShape(**row["shape"])
    assert predict(shape, LighthouseConfig.paper(topk=row["topk"]), H100).memory == pytest.approx(row["memory"], rel=0.01)


@pytest.mark.parametrize("row", rows("cost_model"), ids=row_name)
def test_other_heads_and_pyramids(row):
    """By benchmarks/cost_model.py; none of its lengths and pyramids was fitted to, the heads were in view."""
    shape, measured = LayerShape(**row["shape"]), row["measured"]
    cost = predict(shape, LighthouseConfig(**row["pyramid"]), H100)
    assert cost.milliseconds == pytest.approx(measured["milliseconds"], rel=0.085)
    assert predict_dense(shape, H100) == pytest.approx(measured["dense"], rel=0.071)
    assert cost.memory == pytest.approx(measured["memory"], rel=0.003)


@pytest.mark.parametrize(("length", "milliseconds"), ANOTHER_DAY.items())
def test_stock_attention_on_another_day(length, milliseconds):
    assert predict_dense(LayerShape(length=length), H100) == pytest.approx(milliseconds, rel=0.05)


# --- cross-validation -------------------------------------------------------------------------------------------------

PARAMETERS = ("attention", "half_length", "headroom", "start")


def loss(values, some):
    card = replace(H100, **dict(zip(PARAMETERS, values, strict=True)))
    return sum(error**2 for row in some for error in errors(row, card).values())


def fitted(some):
    """A card of the least squares of relative errors over some rows: random moves, each repeated while it helps."""
    draw = random.Random(0)
    values, step = [450e12, 2000.0, 1.3, 40e-6], 0.1
    best = loss(values, some)
    for _ in range(1500):
        factors = [math.exp(step * draw.gauss(0, 1)) for _ in values]
        step = max(0.95 * step, 2e-3)
        while (now := loss(tried := [v * f for v, f in zip(values, factors, strict=True)], some)) < best:
            values, best, step = tried, now, min(1.3 * step, 0.2)
    return replace(H100, **dict(zip(PARAMETERS, values, strict=True)))


def test_the_published_figures_are_the_fit():
    def typical(card):
        found = [error for row in FITTED for error in errors(row, card).values()]
        return math.sqrt(sum(error**2 for error in found) / len(found))

    assert typical(H100) < 1.05 * typical(fitted(FITTED)) < 0.03


@pytest.mark.parametrize("first", [0, 1])
def test_half_of_the_lengths_predict_the_other_half(first):
    card = fitted(FITTED[first::2])
    for row in FITTED[1 - first :: 2] + OTHER_HEADS:
        bound = 0.06 if row["shape"]["length"] >= 16_384 else 0.10
        assert max(map(abs, errors(row, card).values())) < bound, row_name(row)


# --- rates ------------------------------------------------------------------------------------------------------------


def test_rates_are_of_a_dtype():
    with pytest.raises(ValueError, match=r"dtype='float32'.*H100.*measure_card"):
        predict(replace(SHAPE, dtype="float32"), LighthouseConfig(), H100)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "fast"])
def test_a_rate_is_a_positive_number(value):
    with pytest.raises(ValueError, match=f"bandwidth={re.escape(repr(value))} is no rate"):
        replace(H100, bandwidth=value)


def test_card_of_this_machine():
    card = measure_card(torch.device("cpu"), "float32")
    assert card.dtypes == ("float32",)
    assert 1e8 < card.bandwidth < 1e13 and 1e8 < card.matmul < 1e14 and 1e7 < card.attention < 1e14
    assert card.share_of_rate(64) == 1, "a CPU needs no long sequence"


def test_a_local_branch_is_refused_not_ignored():
    config = LighthouseConfig(local_window=512)
    with pytest.raises(ValueError, match=r"local_window=512: the cost model knows no local branch.*give local_window=0"):
        predict(SHAPE, config, H100)
    with pytest.raises(ValueError, match="local_window=512: this measures a pyramid alone"):
        measure_layer(SHAPE, config, torch.device("cpu"), bandwidth=1.0)
