"""Decoding between steps: in batches as wide as the key allows, and as soon as the step that finished a row is over."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from app.engine.costs import Curve, caps_of
from app.engine.row import Caps, Work
from app.pool.pool import Pool
from app.report import Tick
from app.request import ImageSpec, Prompt
from tests.families.plain import ask
from tests.parts.engine import Bench
from tests.parts.simulation import KEY, OTHER, Simulation, row


@pytest.mark.parametrize("decode", [1, 3, 8])
def test_decodes_are_bounded_and_never_a_step_late(decode: int) -> None:
    """Rows of two keys that finish at any time, many at once: no step runs while one waits to be decoded, and between
    two steps no more is decoded than the last one finished, so that those who run wait for no more than that."""
    dice = random.Random(decode)
    caps = {KEY: Caps(8, 8, decode, 32, 1.0), OTHER: Caps(4, 4, 1, 16, 1.0)}
    simulation, works = Simulation(caps.__getitem__), []
    for _ in range(400):
        if dice.random() < 0.3:
            simulation.add(*(row(dice.choice((1, 4, 4, 20)), key=dice.choice((KEY, OTHER))) for _ in range(6)))
        waiting = len(simulation.batcher.finished)
        work = simulation.turn()
        if work is None:
            continue
        assert (work.phase == "decode") == (waiting > 0), "what is finished is decoded first"
        works.append(work)
    decodes = [work for work in works if work.phase == "decode"]
    assert all(len(work.rows) <= caps[work.key].decode for work in decodes)
    assert len({work.key for work in decodes}) == 2 and all({one.key for one in w.rows} == {w.key} for w in decodes)
    assert max(len(work.rows) for work in decodes) >= min(decode, 6)
    assert all(len(burst) <= most for burst, most in bursts(works, decode))


def bursts(works: list[Work], decode: int) -> list[tuple[list[Work], int]]:
    """The decodes after each step, and the fewest batches that hold what it finished."""
    found: list[tuple[list[Work], int]] = []
    for place, work in enumerate(works):
        if work.phase == "denoise":
            after = []
            while place + 1 + len(after) < len(works) and works[place + 1 + len(after)].phase == "decode":
                after.append(works[place + 1 + len(after)])
            most = decode if work.key == KEY else 1
            found.append((after, -(-len(work.rows) // most)))
    return found


def test_the_cap_is_the_buckets_or_goes_with_the_area(tiny_pool: Pool) -> None:
    card = tiny_pool.cards["tiny-sd3"]

    def decode(side: int, deterministic: bool = False) -> int:
        return caps_of(Curve({8: 0.1}), card, (4, side, side), 1000, deterministic).decode

    assert [decode(side) for side in (8, 32, 64, 128, 256)] == [8, 8, 4, 1, 1]
    assert {decode(side, True) for side in (8, 128)} == {card.bucket.decode}


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_vae_sees_no_more_at_once(tiny_pool: Pool, deterministic: bool) -> None:
    """Ten images that finish together beside one that goes on: forwards of the VAE itself, counted."""
    family: Any = tiny_pool.family("tiny-sd3")
    seen: list[int] = []
    hook = family.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    ten = ask("tiny-sd3", Prompt("red"), steps=4, guidance=0.0, sampler="flow_euler", name="ten")
    ten = replace(ten, images=tuple(ImageSpec(Prompt("red"), seed) for seed in range(10)))
    long = ask("tiny-sd3", Prompt("red"), steps=12, guidance=0.0, sampler="flow_euler", name="long")
    bench = Bench(tiny_pool, deterministic=deterministic).run([ten, long])
    hook.remove()
    works = [report for report in bench.reports if isinstance(report, Tick)]
    rows = [tick.rows for tick in works if tick.phase == "decode"]
    assert sum(rows) == 11 and max(rows) <= 8 and max(seen) <= 8
    if deterministic:
        assert set(seen) == {family.card.bucket.decode}
    first = next(place for place, tick in enumerate(works) if tick.phase == "decode")
    assert any(tick.phase == "denoise" for tick in works[first:]), "the long one ran on"


@pytest.mark.parametrize(("deterministic", "padding"), [(False, 0), (True, 6)])
def test_a_tick_counts_the_padding_of_its_forward(tiny_pool: Pool, deterministic: bool, padding: int) -> None:
    """A guided image has two passes; in deterministic mode the card's bucket of eight is filled up."""
    guided = ask("tiny-sd3", Prompt("red"), steps=2, guidance=4.0, sampler="flow_euler")
    bench = Bench(tiny_pool, deterministic=deterministic).run([guided])
    assert [(tick.passes, tick.padding) for tick in bench.forwards] == [(2 + padding, padding)] * 2
