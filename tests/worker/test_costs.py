"""What an image is estimated to cost: measured rates, encode and decode as they come."""

from dataclasses import replace

import pytest

from app.report import ModelState, Tick
from app.request import Key
from app.worker.admission import DEFAULT_RATE, OUTLIER, PACE, Kind, Rates


def measured(**rates: float) -> Rates:
    costs = Rates()
    costs.hear(ModelState("fake", "ready", rates=rates))
    return costs


def tick(phase: str, seconds: float, rows: int = 1, size: int = 32) -> Tick:
    return Tick("fake", phase, rows, rows, 0, 16, seconds, 1, 0, size, size)


def test_an_image_is_its_passes_and_one_each_for_what_was_not_seen():
    costs = measured(**{"32x32": 0.5})
    assert costs.image(Kind("", Key("fake", 32, 32, 24), 4)) == pytest.approx((4 + 2) * 0.5)
    assert costs.measured("fake") and not costs.measured("other")
    assert costs.image(Kind("", Key("other", 32, 32, 24), 10)) == pytest.approx(12 * DEFAULT_RATE)


def test_a_rate_of_an_unmeasured_size_goes_by_area():
    costs = measured(**{"32x32": 1.0, "64x64": 5.0})
    assert costs.rate("fake", 32, 32) == 1.0
    assert costs.rate("fake", 48, 32) == pytest.approx(1.5)
    assert costs.rate("fake", 128, 64) == pytest.approx(10.0)


def test_rates_are_added_and_outlive_an_eviction():
    costs = measured(**{"32x32": 1.0})
    costs.hear(ModelState("fake", "absent"))
    costs.hear(ModelState("fake", "ready", rates={"64x64": 4.0}))
    assert (costs.rate("fake", 32, 32), costs.rate("fake", 64, 64)) == (1.0, 4.0)


def test_encode_and_decode_are_learned_by_image_and_size():
    costs = measured(**{"32x32": 1.0, "64x64": 1.0})
    for _ in range(200):
        costs.hear(tick("encode", 0.8, rows=4))
        costs.hear(tick("decode", 3.0))
    assert costs.image(Kind("", Key("fake", 32, 32, 24), 10)) == pytest.approx(0.2 + 10 + 3.0, rel=1e-3)
    assert costs.image(Kind("", Key("fake", 64, 64, 24), 10)) == pytest.approx(12.0)


def test_a_pass_takes_what_the_engine_has_learned():
    costs = measured(**{"32x32": 1.0})
    costs.hear(replace(tick("denoise", 50.0, rows=11), rate=2.5))
    assert costs.rate("fake", 32, 32) == 2.5 and costs.rate("fake", 64, 32) == 5.0
    costs.hear(tick("denoise", 50.0, rows=16))
    assert costs.rate("fake", 32, 32) == 2.5


def test_one_slow_decode_moves_little_and_many_move_it_all_the_way():
    costs = measured(**{"32x32": 1.0})
    costs.hear(tick("decode", 1000.0))
    assert costs.image(Kind("", Key("fake", 32, 32, 24), 0)) == pytest.approx(1.0 + 1.0 + PACE * (OUTLIER - 1))
    for _ in range(200):
        costs.hear(tick("decode", 1000.0))
    assert costs.image(Kind("", Key("fake", 32, 32, 24), 0)) == pytest.approx(1001.0, rel=1e-3)


def test_the_nearest_of_many_sizes_is_found():
    """Beside a plain search over all of them: every size that was ever asked for has a rate."""
    areas = [(16 * n, 16 * (n % 7 + 1)) for n in range(1, 60)]
    costs = measured(**{f"{w}x{h}": 1e-3 * w + h for w, h in areas})
    known = {w * h: 1e-3 * w + h for w, h in areas}
    for width in range(8, 1200, 56):
        nearest = min(sorted(known), key=lambda area: abs(area - 40 * width))
        assert costs.rate("fake", width, 40) == pytest.approx(known[nearest] * 40 * width / nearest)
