"""Cost curves: a cap that a bad moment spoiled heals by the forwards that run, and a busy neighbour spoils none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.costs import PATIENCE, WIDEST, Costs, Curve
from app.engine.row import default_key
from tests.parts.engine import Bench, Costly, FakeFamily, FakePool, card, request
from tests.parts.tiers import tiers

Cost = Callable[[int], float]

SEVEN = (1, 2, 4, 8, 16, 24, 28)
"""Steps of seven requests, every other one guided: 29 forwards at least, one more than the longest has."""

SPOILED = (
    {1: 0.98},
    {1: 0.02, 2: 0.9},
    {1: 0.02, 2: 0.024, 4: 0.9, 8: 1.7},
    {1: 0.5, 2: 1.4, 4: 2.9},
)
"""Profiles as a busy machine leaves them: the budget spent on one pass, or single widths that stood still."""


COLD = 2.5
"""How many times as long the first forward of a width takes, while libraries prepare kernels for its shape."""


def affine(passes: int) -> float:
    """A device on which width pays up to 16 passes and beyond."""
    return 0.015 + 0.004 * passes


def spoiled(folder: Path, family: FakeFamily, seconds: dict[int, float]) -> Costs:
    """Costs that read this for the family's default key."""
    measured, key = Costs(folder), default_key(family.card)
    measured.add(family, key, Curve(seconds))  # type: ignore[arg-type]
    measured.keep(key)
    (file,) = (folder / "profiles").iterdir()
    file.write_text(json.dumps(seconds))
    return Costs(folder)


def rounds(folder: Path, cost: Cost, seconds: dict[int, float], count: int, **changes: Any) -> list[int]:
    """Forwards that each round of the seven requests takes, all of a round there at once."""
    clock = [0.0]
    family = Costly(cost, clock, COLD)
    bench = Bench(FakePool(family), costs=spoiled(folder, family, seconds), clock=lambda: clock[0])
    found = []
    for turn in range(count):
        before = len(bench.forwards)
        bench.run([request(f"{turn}-{n}", steps=n, guided=n % 8 != 0, **changes) for n in SEVEN])
        found.append(len(bench.forwards) - before)
    assert len(bench.results) == len(SEVEN) * count
    return found


@pytest.mark.parametrize("seconds", SPOILED, ids=str)
def test_a_spoiled_profile_heals_within_two_rounds(tmp_path: Path, seconds: dict[int, float]) -> None:
    first, second = rounds(tmp_path, affine, seconds, 2)
    assert first < 60 and second <= 32


@pytest.mark.parametrize("seconds", SPOILED, ids=str)
def test_what_was_learned_outlives_a_restart(tmp_path: Path, seconds: dict[int, float]) -> None:
    rounds(tmp_path, affine, seconds, 2)
    family: Any = FakeFamily(card(limits={"num_inference_steps": 50, "sizes": {"min": 16, "max": 64}}))
    found = Costs(tmp_path).stored(family, default_key(family.card))
    assert found is not None and found.cap >= 8


@pytest.mark.parametrize("seed", tiers(zip(range(20), strict=True), lambda seed: seed < 4))
def test_a_neighbour_that_comes_and_goes_spoils_nothing(tmp_path: Path, seed: int) -> None:
    """Spells in which everything takes 2 to 30 times as long, and single forwards that stand still."""
    dice, left, factor = random.Random(seed), 0, 1.0

    def busy(passes: int) -> float:
        nonlocal left, factor
        if left == 0:
            left, factor = dice.randint(3, 60), dice.choice((1.0, 1.0, 2.0, 5.0, 30.0))
        left -= 1
        return affine(passes) * factor * dice.uniform(0.9, 1.1) * (20 if dice.random() < 0.02 else 1)

    found = rounds(tmp_path, busy, {1: 0.98}, 12)
    assert max(found[4:]) <= 40 and sorted(found[4:])[4] <= 32


def wide(cost: Cost, seconds: dict[int, float], forwards: int) -> list[int]:
    """Widths of so many forwards when there is always more to do than fits."""
    curve, now, found = Curve(seconds), 0.0, []
    for _ in range(forwards):
        passes = curve.trial() or curve.cap
        now += cost(passes)
        curve.learn(passes, cost(passes), now)
        found.append(passes)
    return found


def test_width_that_does_not_pay_is_tried_ever_more_seldom() -> None:
    found = wide(lambda passes: 0.01 * passes, {1: 0.01}, 20 * PATIENCE)
    assert set(found) == {1, 2}
    tries = [place for place, passes in enumerate(found) if passes == 2]
    assert tries[2] < 10 and 5 <= len(tries) < 12
    assert max(later - earlier for earlier, later in pairwise(tries)) >= 4 * PATIENCE


def test_a_width_that_stopped_paying_is_dropped() -> None:
    """The profile is of a quiet day; since then a forward of 6 passes does not fit the cache any more."""

    def cliff(passes: int) -> float:
        return affine(passes) * (4 if passes > 5 else 1)

    curve, now, dice = Curve({passes: affine(passes) for passes in (1, 2, 4, 8, 16, 32)}), 0.0, random.Random(1)
    assert curve.cap >= 16
    for _ in range(300):
        passes = min(curve.cap, dice.randint(1, 40))  # what is ready comes and goes
        now += cliff(passes)
        curve.learn(passes, cliff(passes), now)
    assert curve.cap == 4


def test_width_that_always_pays_ends_at_the_widest() -> None:
    assert set(wide(lambda passes: 0.1, {1: 0.1}, 50)[30:]) == {WIDEST}


def test_a_trial_that_does_not_fit_in_memory_costs_no_row(tmp_path: Path) -> None:
    def small(passes: int) -> float:
        if passes > 4:
            raise torch.OutOfMemoryError("no room")
        return affine(passes)

    *_, last = rounds(tmp_path, small, {1: 0.02}, 8)
    assert last <= 60


def test_no_forward_is_tried_wider_where_a_deadline_is_near(tmp_path: Path) -> None:
    clock = [0.0]
    family = Costly(affine, clock, COLD)
    bench = Bench(FakePool(family), costs=spoiled(tmp_path, family, {1: 0.019}), clock=lambda: clock[0])
    bench.run([request(f"r{n}", steps=4, guided=False, deadline=0.34) for n in range(4)])
    assert set(family.widths) == {1} and not bench.failures
    bench.run([request(f"s{n}", steps=4, guided=False, deadline=clock[0] + 9.0) for n in range(4)])
    assert max(family.widths) > 1, "the control: with time enough it is tried"


def test_deterministic_mode_learns_nothing(tmp_path: Path) -> None:
    clock = [0.0]
    family = Costly(affine, clock, COLD)
    costs = spoiled(tmp_path, family, {1: 0.98})
    bench = Bench(FakePool(family), costs=costs, clock=lambda: clock[0], deterministic=True)
    bench.run([request(f"r{n}", steps=8) for n in range(40)])
    assert set(family.widths) == {family.card.bucket.passes}


def test_guided_rows_alone_heal_a_cap_of_one_pass(tmp_path: Path) -> None:
    """No forward of one pass ever runs, so nothing real corrects what the profile says of two."""
    clock = [0.0]
    family = Costly(affine, clock, COLD)
    bench = Bench(FakePool(family), costs=spoiled(tmp_path, family, {1: 0.02, 2: 0.9}), clock=lambda: clock[0])
    for turn in range(2):
        family.widths.clear()
        bench.run([request(f"{turn}-{n}", steps=8) for n in range(8)])
    assert len(family.widths) <= 9


def test_a_row_of_any_width_takes_part(tmp_path: Path) -> None:
    """Widths between the doublings teach too, and estimates grow with the width."""
    curve = Curve({1: 0.98})
    dice, now = random.Random(3), 0.0
    for _ in range(400):
        passes = dice.randint(1, 16)
        now += affine(passes)
        curve.learn(passes, affine(passes), now)
    for passes in range(1, 17):
        assert curve.cost(passes) == pytest.approx(affine(passes), rel=0.25)
    assert curve.cap >= 8
