"""Costs: caps come from measurements, and measurements are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.costs import Costs, Curve, caps_of, measuring
from app.request import Key
from tests.parts.engine import FakeFamily, card

KEY = Key("fake", 32, 32, 24)

DAMAGED = (
    "", "[]", "{}", '{"a": 1}', '{"1": null}', '{"1": 0}', '{"1": NaN}', '{"0": 1}', '{"-1": 1}',
    "[" * 200_000, '{"1": 1e-300}', '{"1": 1e300}', '{"1": 0.01, "1000000": 0.01}', '{"1": 0.01}' + " " * 100_000,
)  # fmt: skip
"""What anybody may have written into the folder of profiles."""


def measure(*given: Any, **options: Any) -> dict[int, float]:
    """A whole measurement, one width after the other."""
    *_, seconds = measuring(*given, **options)
    return seconds


def seconds_of(costs: Costs, family: Any, key: Key) -> dict[int, float]:
    """What is known of the key, or a whole measurement of it."""
    costs.recall(family, key)
    while key not in costs.caps:
        costs.measure(family, key)
    return costs.curves[key].widths


class Device:
    """A device whose forward takes `fixed + passes * each` seconds, up to a width where it stops being wide."""

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each = fixed, each
        self.now = 0.0

    def forward(self, passes: int) -> None:
        self.now += self.fixed + passes * self.each

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("fixed", "each", "cap"),
    [
        (0.0, 0.01, 1),  # a CPU: width pays nothing
        (0.010, 0.010, 16),  # cost per pass 20, 15, 12.5, 11.25, 10.6, ... 10.16 ms
        (0.100, 0.001, 64),  # launch-bound: wider is always better
    ],
)
def test_the_cap_is_where_width_stops_paying(fixed: float, each: float, cap: int) -> None:
    device = Device(fixed, each)
    seconds = measure(device.forward, budget=60, clock=device.clock)
    assert seconds[1] == pytest.approx(fixed + each)
    assert Curve(seconds).cap == cap


def test_a_disturbed_measurement_does_not_end_it() -> None:
    """Something else ran during every other call: the least of a few calls is what the device can do."""
    device = Device(0.010, 0.010)
    calls = 0

    def disturbed(passes: int) -> None:
        nonlocal calls
        calls += 1
        device.forward(passes)
        device.now += 0.5 * (calls % 2)

    seconds = measure(disturbed, budget=600, clock=device.clock)
    assert seconds[4] == pytest.approx(0.05)
    assert Curve(seconds).cap == 16


def test_a_width_that_does_not_fit_ends_the_measurement() -> None:
    device = Device(1.0, 0.01)

    def small(passes: int) -> None:
        if passes > 4:
            raise torch.OutOfMemoryError("no room")
        device.forward(passes)

    assert max(measure(small, budget=600, clock=device.clock)) == 4

    def none(passes: int) -> None:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        measure(none, budget=600)


def test_others_may_run_between_two_widths(tmp_path: Path) -> None:
    family, costs = FakeFamily(card()), Costs(tmp_path)
    assert not costs.recall(family, KEY)  # type: ignore[arg-type]
    for widths in ({1}, {1, 2}):
        costs.measure(family, KEY)  # type: ignore[arg-type]
        assert set(family.widths) == widths and not costs.caps, "one width a call"


def test_a_slow_device_is_measured_within_the_budget() -> None:
    device = Device(0.0, 2.0)
    measure(device.forward, budget=20, clock=device.clock)
    assert device.now <= 20


def test_deterministic_caps_are_the_cards_bucket() -> None:
    family_card = card(bucket={"passes": 12, "encode": 4, "decode": 2})
    caps = caps_of(Curve({1: 0.01, 16: 0.16}), family_card, (16, 8, 8), 1, deterministic=True)
    assert (caps.passes, caps.encode, caps.decode) == (12, 4, 2)


def test_large_images_are_decoded_one_at_a_time() -> None:
    assert caps_of(Curve({1: 0.01}), card(), (16, 128, 128), 1, deterministic=False).decode == 1
    assert caps_of(Curve({1: 0.01}), card(), (16, 8, 8), 1, deterministic=False).decode == 8


def test_a_profile_is_measured_once_and_read_again(tmp_path: Path) -> None:
    family = FakeFamily(card())
    first = seconds_of(Costs(tmp_path), family, KEY)
    forwards = len(family.widths)
    assert forwards > 0
    assert seconds_of(Costs(tmp_path), family, KEY) == pytest.approx(first)
    assert len(family.widths) == forwards
    seconds_of(Costs(tmp_path), family, Key("fake", 64, 32, 24))
    assert len(family.widths) > forwards, "another shape is another profile"


def test_a_size_near_a_measured_one_is_scaled_by_area(tmp_path: Path) -> None:
    family, costs = FakeFamily(card()), Costs(tmp_path)
    first = seconds_of(costs, family, Key("fake", 64, 64, 24))
    forwards = len(family.widths)
    near = seconds_of(costs, family, Key("fake", 64, 56, 12))
    assert near == {passes: pytest.approx(cost * 56 / 64) for passes, cost in first.items()}
    assert len(family.widths) == forwards
    seconds_of(costs, family, Key("fake", 32, 32, 24))
    assert len(family.widths) > forwards


def test_a_guess_is_not_scaled_again(tmp_path: Path) -> None:
    """Else a client would lead from size to size to times that have nothing to do with the measured ones."""
    family, costs = FakeFamily(card()), Costs(tmp_path)
    seconds_of(costs, family, Key("fake", 64, 64, 24))
    forwards = len(family.widths)
    seconds_of(costs, family, Key("fake", 64, 56, 24))
    assert len(family.widths) == forwards
    seconds_of(costs, family, Key("fake", 64, 48, 24))
    assert len(family.widths) > forwards, "48 is near 56, which is a guess, and not near 64"


def test_a_damaged_or_unwritable_profile_is_measured_again(tmp_path: Path) -> None:
    family = FakeFamily(card())
    seconds_of(Costs(tmp_path), family, KEY)
    (file,) = (tmp_path / "profiles").iterdir()
    for damage in DAMAGED:
        file.write_text(damage)
        assert min(seconds_of(Costs(tmp_path), family, KEY)) == 1
        assert json.loads(file.read_text())
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert min(seconds_of(Costs(blocked), family, KEY)) == 1


def test_in_deterministic_mode_the_rate_follows_the_machine_and_the_widths_stay(tmp_path: Path) -> None:
    """Admission goes by the rate; it may not stay for ever where a profile from a bad moment has put it."""
    family: Any = FakeFamily(card(bucket={"passes": 12, "encode": 4, "decode": 2}))
    costs = Costs(tmp_path, deterministic=True)
    costs.add(family, KEY, Curve({1: 1.0, 16: 16.0}))
    for now in range(300):
        costs.learn(KEY, 2, 0.24, float(now))  # two rows, and ten places of padding
    caps = costs.caps[KEY]
    assert caps.rate == pytest.approx(0.02, rel=0.01) and (caps.passes, caps.encode, caps.trial) == (12, 4, 0)
