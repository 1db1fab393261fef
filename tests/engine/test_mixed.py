"""Same request, same image, whatever shares the batch: on real networks of both families."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import Cancelled
from app.pool.pool import Pool
from app.request import ClassLabel, ImageSpec, Prompt, Request
from app.samplers.table import valid_pairs, valid_samplers
from tests.parts.close import BFLOAT16, SAME, apart, close
from tests.parts.engine import Bench, FakeCosts, load_all
from tests.parts.requests import changed, flat

WORDS = ("a red apple", "two dogs", "", "the sun over a house at night", "cat")


def ask(card: Card, number: int, rng: random.Random, **changes: Any) -> Request:
    """A random request that the card allows; its id tells which model it is for."""
    labels = bool(card.labels)
    condition = ClassLabel(number % len(card.labels)) if labels else Prompt(rng.choice(WORDS), rng.choice(("", "blue")))
    samplers = valid_samplers(card.schedule)
    width, height = (32, 32) if labels else rng.choice(((32, 32), (64, 32), (16, 48)))
    guided = rng.random() < 0.5
    facts: dict[str, Any] = {
        "id": f"{card.id}-{number}", "model": card.id, "images": (ImageSpec(condition, 1000 + number),),
        "width": width, "height": height, "sampler": samplers[number % len(samplers)],
        "steps": rng.choice((1, 2, 4, 7, 10, 20, 50)), "guided": guided, "guidance": rng.uniform(1.5, 7.5),
        "text_length": 24, "keep_latents": True,
    }  # fmt: skip
    return flat(**{**facts, **changes})


def traffic(cards: dict[str, Card], count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    models = sorted(cards)
    return [ask(cards[models[number % len(models)]], number // len(models), rng) for number in range(count)]


def run_mixed(pool: Pool, requests: list[Request], seed: int, cancel_every: int = 0, **bench: Any) -> Bench:
    """Requests arrive at random ticks; one of every so many is cancelled, waiting or running, before it can end."""
    rng = random.Random(seed)
    mixed = Bench(pool, costs=FakeCosts(passes=24), **bench)
    size = cancel_every or len(requests)
    for start in range(0, len(requests), size):
        group = rng.sample(requests[start : start + size], len(requests[start : start + size]))
        for request in group:
            mixed.engine.submit(request)
            mixed.turn(rng.randrange(4) if request is not group[-1] or not cancel_every else 0)
        if cancel_every:
            # An image takes an encode, its lines and a decode: after that many turns less one it cannot have ended.
            mixed.turn(rng.randrange(min(group[-1].recipe.steps + 2, 10)))
            mixed.engine.cancel(group[-1].id)
    return mixed.run()


def cancelled(mixed: Bench) -> set[str]:
    return {name for name, failure in mixed.failures.items() if isinstance(failure.error, Cancelled)}


@pytest.mark.slow
def test_mixed_traffic_equals_each_request_alone(tiny_pool: Pool) -> None:
    requests = traffic(tiny_pool.cards, 108, seed=6)
    mixed = run_mixed(tiny_pool, requests, seed=40, cancel_every=3)
    assert max(tick.rows for tick in mixed.forwards) >= 4, "the traffic never shared a forward"
    gone = cancelled(mixed)
    assert gone == set(mixed.failures) and len(gone) >= len(requests) // 3
    ended = [request for request in requests if request.id not in gone]
    assert {(name, 0) for name in gone}.isdisjoint(mixed.results) and len(mixed.results) == len(ended)
    pairs = {(request.recipe.sampler, tiny_pool.cards[request.recipe.model].schedule.prediction) for request in ended}
    assert pairs == set(valid_pairs())
    for request in ended:
        alone = Bench(tiny_pool).run([request]).results[request.id, 0]
        close(mixed.results[request.id, 0].latents, alone.latents, SAME, of=request)


def test_the_comparison_would_see_a_neighbour_leak(tiny_pool: Pool) -> None:
    """The control: another seed, another prompt or another guidance is far outside the tolerance."""
    card = tiny_pool.cards["tiny-sd3"]
    rng = random.Random(1)
    base = ask(card, 0, rng, steps=10, guided=True, guidance=4.0)
    latents = []
    for changes in ({}, {"guidance": 4.1}, {"steps": 11}, {"images": (ImageSpec(Prompt("two cats"), 1000),)}):
        request = changed(base, **changes)
        latents.append(Bench(tiny_pool).run([request]).results[base.id, 0].latents)
    for other in latents[1:]:
        apart(other, latents[0], SAME)


@pytest.mark.slow
def test_bfloat16_in_a_mixed_batch_stays_near_itself_alone(tiny: Path) -> None:
    pool = load_all(Pool(read_cards(tiny), "cpu", torch.bfloat16))
    requests = [request for request in traffic(pool.cards, 42, seed=8) if request.recipe.steps <= 10]
    assert len(requests) >= 30
    mixed = run_mixed(pool, requests, seed=9, cancel_every=3)
    gone = cancelled(mixed)
    assert gone == set(mixed.failures) and len(gone) >= len(requests) // 3
    ended = [request for request in requests if request.id not in gone]
    pixels = {request.id: mixed.results[request.id, 0].pixels for request in ended}
    for request in ended:
        close(pixels[request.id], Bench(pool).run([request]).results[request.id, 0].pixels, BFLOAT16, of=request)
    first, *others = (request for request in ended if request.recipe.width == request.recipe.height == 32)
    apart(pixels[others[0].id], pixels[first.id], BFLOAT16, of="another request:")
    pool.close()


def test_deterministic_mode_is_bit_equal_alone_in_traffic_and_after_a_restart(tiny: Path) -> None:
    cards = {name: card for name, card in read_cards(tiny).items() if name in ("tiny-dit", "tiny-sd3")}
    rng = random.Random(2)
    chosen = [
        ask(card, number, rng, steps=6, width=32, height=32, guided=number % 2 == 0)
        for card in cards.values()
        for number in range(6)
    ]
    seen: list[dict[tuple[str, int], Any]] = []
    for _ in range(2):
        pool = load_all(Pool(cards, "cpu", torch.float32))
        mixed = run_mixed(pool, chosen, seed=len(seen), deterministic=True)
        assert max(tick.rows for tick in mixed.forwards) >= 4
        assert {tick.passes for tick in mixed.forwards} == {8}
        seen.append(mixed.results)
        seen.append({})
        for request in chosen:
            seen[-1] |= Bench(pool, deterministic=True).run([request]).results
        pool.close()
    for name, first in seen[0].items():
        for other in seen[1:]:
            np.testing.assert_array_equal(other[name].pixels, first.pixels)
            np.testing.assert_array_equal(other[name].latents, first.latents)
