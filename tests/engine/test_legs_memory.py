"""Two models that refine each other's rows, in less memory than both take: nobody waits for ever."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.cards.card import Card
from app.errors import Cancelled
from app.pool.policy import PHASES
from app.pool.pool import Pool
from app.report import Memory
from tests.engine.test_edits import is_empty
from tests.engine.test_legs import alone, traffic
from tests.parts.close import SAME, close
from tests.parts.engine import Bench, load_all
from tests.parts.refined import PAIRS, pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def cards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    return pairs(tiny, tmp_path_factory.mktemp("refiners"))


@pytest.fixture(scope="module")
def roomy(cards: dict[str, Card]) -> Iterator[Pool]:
    pool = load_all(Pool(cards, "cpu", torch.float32))
    yield pool
    pool.close()


@pytest.fixture
def pools() -> Iterator[list[Pool]]:
    made: list[Pool] = []
    yield made
    for pool in made:
        pool.close()


@pytest.fixture(scope="module")
def network(roomy: Pool) -> int:
    """Bytes of the larger network, which no other phase exceeds: with less nothing is drawn."""
    sizes = {
        (name, phase): sum(one.bytes for one in roomy.components(name, phase))
        for name in roomy.cards
        for phase in PHASES
    }
    largest = max(sizes, key=lambda place: sizes[place])
    assert largest[0] in ("tiny-sdxl", PAIRS["tiny-sdxl"]) and largest[1] == "denoise"
    return sizes[largest]


def answered(bench: Bench) -> set[str]:
    return {name for name, _ in bench.results} | bench.failures.keys()


@pytest.mark.parametrize("factor", [1.0, 1.4, 2.0, 2.5])
@pytest.mark.parametrize("seed", range(2))
def test_all_are_answered_in_any_memory(
    roomy: Pool, cards: dict[str, Card], pools: list[Pool], network: int, factor: float, seed: int
) -> None:
    """Random requests of four models, most of them with a refiner, some of which are cancelled at random times."""
    budget, rng = int(factor * network), random.Random(f"{factor} {seed}")
    pools.append(Pool(cards, "cpu", torch.float32, budget=budget))
    bench, asked = Bench(pools[0]), traffic(cards, 36, seed=seed, most=7)
    for request in asked:
        bench.engine.submit(request)
        bench.turn(rng.choice((0, 0, 1, 5, 20)))
        time.sleep(rng.choice((0, 0, 0.01)))
        if rng.random() < 0.3:
            bench.engine.cancel(rng.choice(asked).id)
    bench.until(lambda: len(answered(bench)) == len(asked), 120, failing=True)
    bench.turn()
    assert all(isinstance(one.error, Cancelled) for one in bench.failures.values()) and is_empty(bench, pools[0])
    assert max(report.bytes["weights"] for report in bench.of(Memory)) <= budget
    ended = [request for request in asked if request.id not in bench.failures]
    assert sum(len(cards[one.recipe.model].legs(one.recipe)) == 2 for one in ended) >= 4
    for request in ended:
        close(bench.results[request.id, 0].latents, alone(roomy, request), SAME, of=request.recipe)
