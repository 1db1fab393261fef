"""Several models in less memory than they take: every request is answered, with the image that it has alone."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_card, read_cards
from app.engine.costs import Costs
from app.errors import CheckpointError
from app.pool.policy import PHASES
from app.pool.pool import RETRY_AFTER, Pool
from app.report import Evicted, Memory, ModelState
from app.request import ClassLabel, ImageSpec, Prompt, Request
from tests.parts.edits import edited
from tests.parts.engine import Bench, load_all
from tests.parts.requests import changed, flat
from tests.parts.waiting import Clock

MODELS = ("tiny-dit", "tiny-sd3", "copy")


@pytest.fixture(scope="module")
def cards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    """Three models that share nothing: the third has files of its own."""
    cards = read_cards(tiny)
    folder = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(tiny / "tiny-sd3", folder)
    cards["copy"] = read_card(folder / "card.toml").model_copy(update={"id": "copy", "aliases": ()})
    return {model: cards[model] for model in MODELS}


@pytest.fixture(scope="module")
def largest(cards: dict[str, Card]) -> tuple[int, int]:
    """Bytes of the largest model, and of its largest phase."""
    pool = load_all(Pool(cards, "cpu", torch.float32))
    models = pool.models
    whole = max(model.bytes for model in models.values())
    phase = max(sum(one.bytes for one in model.components((p,))) for model in models.values() for p in PHASES)
    pool.close()
    return whole, phase


def ask(model: str, number: int, guided: bool) -> Request:
    condition = ClassLabel(number % 10) if model == "tiny-dit" else Prompt(f"red {number}")
    sampler = "ddim" if model == "tiny-dit" else "flow_euler"
    return flat(
        id=f"{model}-{number}", model=model, images=(ImageSpec(condition, number),), width=32, height=32,
        sampler=sampler, steps=3 + number % 5, guided=guided, guidance=4.0, text_length=24, keep_latents=True,
    )  # fmt: skip


def requests(count: int) -> list[Request]:
    return [ask(MODELS[number % 3], number, number % 2 == 0) for number in range(count)]


class Bounded(Bench):
    """A bench that turns until every request is answered, also while models load."""

    def answer(self, asked: list[Request], seconds: float = 100.0) -> Bounded:
        for request in asked:
            self.engine.submit(request)
        self.wait(len(asked), seconds)
        return self

    def wait(self, count: int, seconds: float = 100.0) -> None:
        before = len(self.results)
        self.until(lambda: len(self.results) - before >= count, seconds)


@pytest.fixture
def bound(cards: dict[str, Card]) -> Iterator[list[Pool]]:
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.close()


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plain(cards: dict[str, Card], asked: list[Request]) -> dict[tuple[str, int], np.ndarray]:
    pool = load_all(Pool(cards, "cpu", torch.float32))
    results = {key: one.pixels for key, one in Bench(pool).run(asked).results.items()}
    pool.close()
    return results


@pytest.mark.slow
def test_sixty_alternating_requests_for_three_models_in_the_memory_of_one(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    """At 1.3 times the largest model: all answered, evictions told, weights within the budget, memory flat."""
    budget = int(1.3 * largest[0])
    bound.append(Pool(cards, "cpu", torch.float32, budget=budget))
    bench = Bounded(bound[0])
    asked = requests(60)
    sizes = []
    for start in range(0, 60, 3):  # three at a time, one for each model: every three are two evictions or more
        bench.answer(asked[start : start + 3])
        sizes.append(resident())
    evictions = [report for report in bench.reports if isinstance(report, Evicted)]
    assert len({report.model for report in evictions}) == 3 and len(evictions) >= 40
    told = [report.bytes for report in bench.reports if isinstance(report, Memory)]
    assert told and all(held.get("weights", 0) <= budget for held in told)
    # If what left were kept, these ten rounds would keep some 25 times the largest model.
    assert sizes[-1] - sizes[9] < 8 * largest[0]
    expected = plain(cards, asked)
    for key, pixels in expected.items():
        assert np.abs(bench.results[key].pixels.astype(int) - pixels.astype(int)).max() <= 1, key


def test_a_crowd_for_three_models_at_once(cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]) -> None:
    """Nobody waits for ever: the models take turns while requests for each are there."""
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[0]))
    bench = Bounded(bound[0]).answer(requests(60))
    done = [report.model for report in bench.reports if type(report).__name__ == "Tick" and report.phase == "decode"]  # type: ignore[attr-defined]
    assert len([model for model, _ in itertools.groupby(done)]) >= 3
    assert {key[0] for key in bench.results} == {request.id for request in requests(60)}


def test_a_model_whose_parts_fit_one_at_a_time(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    """Encoders, network and VAE come in turn, and the pictures are the same."""
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[1]))
    asked = [changed(ask("tiny-sd3", number, number % 2 == 0), previews=1) for number in range(12)]
    bench = Bounded(bound[0]).answer(asked)
    assert not bound[0].fits("tiny-sd3")
    expected = plain(cards, asked)
    for key, pixels in expected.items():
        assert np.abs(bench.results[key].pixels.astype(int) - pixels.astype(int)).max() <= 1, key
    moved = {report.part for report in bench.reports if isinstance(report, Evicted)}
    assert {"transformer", "vae", "text_encoder"} <= moved


def test_edits_in_a_model_whose_parts_fit_one_at_a_time(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    """The VAE comes for the sources, leaves for encoders and network, and comes back; plain rows share the forwards."""
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[1]))
    asked = [ask("tiny-sd3", number, number % 2 == 0) for number in range(12)]
    asked = [one if number % 3 == 0 else edited(one, 0.6, number % 3 == 1, number) for number, one in enumerate(asked)]
    bench = Bounded(bound[0])
    for start in range(0, 12, 4):
        for request in asked[start : start + 4]:
            bench.engine.submit(request)
        bench.turn(5)
    bench.until(lambda: len(bench.results) == 12)
    assert not bound[0].fits("tiny-sd3") and max(tick.rows for tick in bench.forwards) >= 4
    expected = plain(cards, asked)
    for key, pixels in expected.items():
        assert np.abs(bench.results[key].pixels.astype(int) - pixels.astype(int)).max() <= 1, key
    assert all(report.bytes.get("weights", 0) <= largest[1] for report in bench.of(Memory))


def test_rows_keep_coming_to_a_model_in_parts_and_to_another(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[1]))
    bench = Bounded(bound[0])
    for start in range(0, 36, 6):
        for request in requests(36)[start : start + 6]:
            bench.engine.submit(request)
        bench.turn(3)
    bench.wait(36)
    assert not bench.failures


def test_more_rows_than_slots_for_a_model_whose_parts_take_turns(
    cards: dict[str, Card], bound: list[Pool], largest: tuple[int, int]
) -> None:
    """Finished rows wait for the VAE and keep their slots meanwhile: no row is given one that is not there."""
    pool = load_all(Pool(cards, "cpu", torch.float32))
    parts = max(sum(one.bytes for one in pool.models["tiny-dit"].components((phase,))) for phase in PHASES)
    pool.close()
    bound.append(Pool(cards, "cpu", torch.float32, budget=parts))
    asked = [ask("tiny-dit", number, number % 2 == 0) for number in range(150)]
    assert len(Bounded(bound[0]).answer(asked).results) == 150


def test_a_started_row_is_not_starved_by_another_models_traffic(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[0]))
    bench = Bounded(bound[0])
    bench.answer([ask("tiny-sd3", 1000, True), ask("tiny-dit", 1000, True)])
    waiting = {ask("tiny-dit", number, True).id for number in range(0, 120, 20)}
    for number in range(120):
        bench.engine.submit(ask("tiny-dit" if number % 20 == 0 else "tiny-sd3", number, True))
        bench.turn(2)
    done = {key[0] for key in bench.results}
    while not waiting <= done:
        assert len(done) < 2000, "the others go on, and these wait"
        bench.engine.submit(ask("tiny-sd3", 2000 + len(done), True))
        bench.wait(1)
        done = {key[0] for key in bench.results}


def test_an_unload_waits_for_the_requests_there(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool]
) -> None:
    bound.append(Pool(cards, "cpu", torch.float32))
    bench = Bounded(bound[0])
    for number in range(6):
        bench.engine.submit(ask("tiny-sd3", number, True))
    bench.turn(3)
    bench.engine.unload("tiny-sd3")
    bench.wait(6)
    assert not [report for report in bench.reports if isinstance(report, Evicted)]
    bench.until(lambda: any(report.state == "absent" for report in bench.of(ModelState)))
    assert bench.reports[-1] == Memory({"weights": 0, "parked": 0, "budget": sys.maxsize, "slots": 0, "text": 0})


def test_a_model_that_fails_in_the_middle_of_its_measurement_comes_back_whole(
    cards: dict[str, Card], bound: list[Pool], tmp_path: Path
) -> None:
    """Nothing that was learned of the old files is used for the new ones."""
    clock = Clock()
    bound.append(Pool(cards, "cpu", torch.float32, clock=clock))
    costs = Costs(tmp_path)
    bench = Bounded(bound[0], costs=costs)
    bench.engine.submit(ask("tiny-dit", 1, True))
    bench.until(lambda: costs.measuring)
    bound[0].fail("tiny-dit", CheckpointError("the disk is gone"))
    bench.turn(2)
    assert isinstance(bench.failures["tiny-dit-1"].error, CheckpointError) and not costs.measuring
    bench.reports.clear()
    clock.now = RETRY_AFTER + 1
    bench.answer([ask("tiny-dit", 2, True)])


@pytest.mark.slow
@pytest.mark.parametrize("phases", [False, True])
def test_edits_of_three_models_in_little_memory(
    cards: dict[str, Card], largest: tuple[int, int], bound: list[Pool], phases: bool
) -> None:
    """Nobody waits for ever, whatever part of which model has to come or go. phases: a model never fits as a whole."""
    bound.append(Pool(cards, "cpu", torch.float32, budget=largest[phases]))
    asked = [
        edited(one, 0.6, number % 2 == 0, number % 7) if number % 4 else one for number, one in enumerate(requests(60))
    ]
    bench = Bounded(bound[0])
    for start in range(0, 60, 5):
        for request in asked[start : start + 5]:
            bench.engine.submit(request)
        bench.turn(4)
    bench.until(lambda: len(bench.results) == 60)
    for key, pixels in plain(cards, asked).items():
        assert np.abs(bench.results[key].pixels.astype(int) - pixels.astype(int)).max() <= 1, key
