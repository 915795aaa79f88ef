"""`LighthouseConfig.recommended`: a pyramid for a length; what it is good for: docs/evidence.md."""

import pytest

from lighthouse_fx import LighthouseConfig
from lighthouse_fx.passes.check import pyramid_over


@pytest.mark.parametrize("length", [1, 7, 100, 101, 2048, 2050, 3000, 16_385, 50_000, 98_304])
@pytest.mark.parametrize("pooling", [4, 8])
def test_recommended_keeps_half_of_the_tokens(length, pooling):
    config = LighthouseConfig.recommended(length, pooling=pooling, scorer="dilated")
    assert (config.levels, config.pooling, config.scorer) == (2, pooling, "dilated")
    pyramid = pyramid_over(length, config)
    assert pyramid.gathered <= max(length, 8)
    assert length < 100 or pyramid.gathered <= config.max_kept * length  # so it is not left dense
    if length >= 2048:
        assert pyramid.gathered == pytest.approx(length * (1 / pooling + 1 / 2), rel=0.05)
        assert 64 <= pyramid.quota_ <= 256


@pytest.mark.parametrize(("length", "fields"), [(0, {}), (16.0, {}), (True, {}), (16, {"pooling": 1}), (16, {"width": 2})])
def test_recommended_of_bad_arguments(length, fields):
    with pytest.raises((TypeError, ValueError), match=next(iter(fields), "length")):
        LighthouseConfig.recommended(length, **fields)
