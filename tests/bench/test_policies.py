"""The baselines do what they are named for, and draw the server's pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cards.cards import read_cards
from app.engine.row import Row
from app.pool.pool import Pool
from app.request import Prompt, Request
from tests.bench.policies import POLICIES, Single, Static, likeness
from tests.families.plain import ask
from tests.parts.close import SAME, apart, close
from tests.parts.engine import Bench, load_all
from tests.parts.simulation import Simulation, fixed, row
from tests.parts.tiny import write_sd3


def ran(policy: type[Static], *rows: Row, passes: int = 4) -> list[list[Row]]:
    """The forwards of these rows, all there from the start."""
    simulation = Simulation(fixed(passes))
    simulation.batcher = policy(fixed(passes))
    simulation.add(*rows)
    simulation.run()
    assert set(simulation.ended) == set(rows)
    return simulation.forwards


def batches(forwards: list[list[Row]]) -> list[list[Row]]:
    """Each run of equal forwards once."""
    return [rows for place, rows in enumerate(forwards) if place == 0 or rows != forwards[place - 1]]


def test_static_batches_are_of_the_oldest_rows_likeness_from_the_whole_line_and_run_to_their_end() -> None:
    a, b, c, d, e = row(3), row(5), row(3), row(5), row(3, guided=True)
    forwards = ran(Static, a, b, c, d, e)
    assert all(len({likeness(each) for each in rows}) == 1 for rows in forwards)
    assert batches(forwards) == [[a, c], [b, d], [e]]
    assert [len(rows) for rows in forwards] == [2] * 3 + [2] * 5 + [1] * 3


def test_a_static_batch_stays_within_the_cap_of_passes() -> None:
    guided = [row(2, guided=True) for _ in range(5)]
    assert batches(ran(Static, *guided)) == [guided[:2], guided[2:4], guided[4:]]


def test_nobody_joins_a_static_batch_and_who_leaves_is_not_replaced() -> None:
    simulation = Simulation(fixed(4))
    simulation.batcher = Static(fixed(4))
    first, leaving, late = row(4), row(4), row(4)
    simulation.add(first, leaving)
    for _ in range(3):
        simulation.turn()
    simulation.add(late)
    simulation.batcher.remove(leaving)
    simulation.run()
    assert batches(simulation.forwards) == [[first, leaving], [first], [late]]
    assert (simulation.ended[first], simulation.ended[late]) == (4, 8)


def test_single_is_first_come_first_served() -> None:
    rows = [row(6), row(2), row(2)]
    assert batches(ran(Single, *rows)) == [[each] for each in rows]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder: Path = tmp_path_factory.mktemp("models")
    write_sd3(folder / "tiny-sd3")
    pool = load_all(Pool(read_cards(folder), "cpu", torch.float32))
    yield pool
    pool.close()


def asked() -> list[Request]:
    cases = [(4, 1.0), (4, 1.0), (3, 4.0), (6, 4.0), (4, 1.0)]
    return [
        ask("tiny-sd3", Prompt("red"), steps=steps, guidance=scale, sampler="flow_euler", seed=seed, name=f"r{seed}")
        for seed, (steps, scale) in enumerate(cases)
    ]


def drawn(pool: Pool, policy: str) -> Bench:
    bench = Bench(pool, batcher=POLICIES[policy].batcher, runner=POLICIES[policy].runner).run(asked())
    assert not bench.failures and len(bench.results) == len(asked())
    return bench


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["static", "single"])
def test_every_order_of_work_draws_the_same_pictures(pool: Pool, policy: str) -> None:
    ours, theirs = drawn(pool, "continuous").results, drawn(pool, policy).results
    for name, result in ours.items():
        close(theirs[name].latents, result.latents, SAME)
    apart(theirs["r0", 0].latents, ours["r1", 0].latents, SAME, of="another seed:")


@pytest.mark.slow
def test_diffusers_draws_them_within_a_level(pool: Pool) -> None:
    ours, theirs = drawn(pool, "continuous").results, drawn(pool, "diffusers").results
    for name, result in ours.items():
        assert np.abs(theirs[name].pixels.astype(int) - result.pixels.astype(int)).max() <= 1


@pytest.mark.slow
def test_diffusers_in_bfloat16_draws_nearly_them(pool: Pool) -> None:
    ours, theirs = drawn(pool, "continuous").results, drawn(pool, "diffusers-bf16").results
    away = [np.abs(theirs[name].pixels.astype(int) - result.pixels.astype(int)).mean() for name, result in ours.items()]
    assert 0 < max(away) < 4  # of 255 levels


@pytest.mark.slow
def test_diffusers_draws_one_after_the_other_in_order(pool: Pool) -> None:
    bench = drawn(pool, "diffusers")
    assert [name for name, _ in bench.results] == [request.id for request in asked()]
    assert not bench.forwards
