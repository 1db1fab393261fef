"""An engine takes other cards while requests are open: each is drawn by the card that was there when it came."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import Cancelled, DeadlineExceeded
from app.pool.pool import Pool
from app.report import ModelState
from app.request import ClassLabel, ImageSpec, Request
from tests.parts.engine import Bench
from tests.parts.requests import flat
from tests.parts.tiny import write_dit

Cards = dict[str, Card]


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    for name in ("tiny-dit", "tiny-dit-v"):  # the second has all its parts from the first
        shutil.copytree(tiny / name, tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def pool(models: Path) -> Iterator[Pool]:
    pool = Pool(read_cards(models), "cpu", torch.float32)
    yield pool
    pool.close()


def ask(name: str, model: str = "tiny-dit", steps: int = 8, **delivery: Any) -> Request:
    images = (ImageSpec(ClassLabel(3), 5),)
    return flat(name, model, images, 32, 32, "ddim", steps, 4.0, 0, **delivery)


def drawn(bench: Bench, *requests: Request) -> list[np.ndarray]:
    for request in requests:
        bench.engine.submit(request)
    bench.until(lambda: all((request.id, 0) in bench.results for request in requests))
    return [bench.results[request.id, 0].pixels for request in requests]


def begun(bench: Bench, request: Request) -> None:
    """Submit, and go on until a step of it is done."""
    bench.engine.submit(request)
    bench.until(lambda: bench.forwards)


def new_weights(models: Path) -> None:
    """Other weights in the same folder, as a careful user replaces them: by a new folder."""
    write_dit(models.parent / "new", seed=77)
    os.rename(models / "tiny-dit", models.parent / "old")
    os.rename(models.parent / "new", models / "tiny-dit")


def test_what_is_open_ends_as_it_began_and_what_comes_later_waits(pool: Pool, models: Path) -> None:
    bench = Bench(pool, deterministic=True)
    long, short = drawn(bench, ask("long", steps=40), ask("short"))
    bench.reports.clear()
    begun(bench, ask("open", steps=40))
    new_weights(models)
    bench.engine.reload(read_cards(models), "info")
    later, before = drawn(bench, ask("later"), ask("open 2", steps=40))[0], bench.results["open", 0].pixels
    assert np.array_equal(before, long) and not np.array_equal(later, short)
    order = [request for request, _ in bench.results]
    assert order[0] == "open", "what came after the reload waits for what was open"
    fresh = Pool(read_cards(models), "cpu", torch.float32)
    assert np.array_equal(drawn(Bench(fresh, deterministic=True), ask("fresh"))[0], later)
    fresh.close()


def test_models_that_share_parts_get_the_new_ones_each_when_it_is_free(pool: Pool, models: Path) -> None:
    bench = Bench(pool, deterministic=True)
    long, other = drawn(bench, ask("long", steps=40), ask("other", "tiny-dit-v"))
    bench.reports.clear()
    begun(bench, ask("open", steps=40))
    new_weights(models)
    bench.engine.reload(read_cards(models), "info")
    (fresh,) = drawn(bench, ask("fresh", "tiny-dit-v"))
    bench.until(lambda: ("open", 0) in bench.results)
    assert np.array_equal(bench.results["open", 0].pixels, long) and not np.array_equal(fresh, other)
    drawn(bench, ask("last"))
    bench.until(lambda: pool.bytes["weights"] == pool.size("tiny-dit"))  # one copy, shared again


def test_words_and_defaults_load_nothing_again(pool: Pool, models: Path) -> None:
    bench = Bench(pool)
    drawn(bench, ask("a"))
    cards = read_cards(models, "mine=tiny-dit")
    family = pool.family("tiny-dit")
    defaults = cards["tiny-dit"].defaults.model_copy(update={"num_inference_steps": 3})
    cards["tiny-dit"] = cards["tiny-dit"].model_copy(update={"defaults": defaults, "license": "mit"})
    bench.engine.reload(cards, "info")
    bench.run()
    assert pool.family("tiny-dit") is family and pool.cards["tiny-dit"] == cards["tiny-dit"]
    assert not [state for state in bench.of(ModelState) if state.state == "absent"]


def test_a_card_that_is_new_is_drawn_with_at_once(pool: Pool, models: Path) -> None:
    bench, cards = Bench(pool), read_cards(models)
    begun(bench, ask("open", steps=40))
    cards["more"] = cards["tiny-dit-v"].model_copy(update={"id": "more"})
    bench.engine.reload(cards, "info")
    bench.engine.load("more")
    drawn(bench, ask("a", "more"))


def test_a_model_that_is_gone_leaves_once_it_is_free(pool: Pool, models: Path) -> None:
    """Its card stays for requests that another engine process began."""
    bench = Bench(pool)
    begun(bench, ask("open", steps=40))
    bench.engine.reload({}, "info")
    bench.until(lambda: ("open", 0) in bench.results and pool.bytes["weights"] == 0)
    drawn(bench, ask("again"))


def test_who_waits_may_leave_be_late_or_see_the_end(pool: Pool, models: Path) -> None:
    bench = Bench(pool)
    begun(bench, ask("open", steps=200))
    new_weights(models)
    bench.engine.reload(read_cards(models), "info")
    for request in (ask("gone"), ask("late", deadline=time.monotonic() + 0.001), ask("last")):
        bench.engine.submit(request)
    bench.engine.cancel("gone")
    time.sleep(0.002)
    bench.turn(2)
    assert isinstance(bench.failures["gone"].error, Cancelled)
    assert isinstance(bench.failures["late"].error, DeadlineExceeded)
    bench.engine.stop()
    bench.engine.run()
    assert {"open", "last"} <= bench.failures.keys() and not bench.results


def test_a_reload_that_is_taken_back_lets_everybody_go_on(pool: Pool, models: Path) -> None:
    bench = Bench(pool, deterministic=True)
    (short,) = drawn(bench, ask("short"))
    begun(bench, ask("open", steps=40))
    cards = read_cards(models)
    schedule = cards["tiny-dit"].schedule.model_copy(update={"prediction": "v"})
    bench.engine.reload({**cards, "tiny-dit": cards["tiny-dit"].model_copy(update={"schedule": schedule})}, "info")
    bench.engine.submit(ask("later"))
    bench.turn(2)
    bench.engine.reload(cards, "info")
    bench.until(lambda: ("later", 0) in bench.results)
    assert np.array_equal(bench.results["later", 0].pixels, short)


def test_a_model_that_failed_is_tried_again_at_once(pool: Pool, models: Path) -> None:
    bench = Bench(pool)
    os.rename(models / "tiny-dit" / "vae", models / "vae")
    bench.engine.load("tiny-dit")
    bench.until(lambda: pool.failure("tiny-dit"))
    os.rename(models / "vae", models / "tiny-dit" / "vae")
    bench.engine.reload(read_cards(models), "info")
    drawn(bench, ask("a"))


def test_the_level_of_the_log_is_that_of_the_reload(pool: Pool, models: Path) -> None:
    before = logging.getLogger().level
    Bench(pool).engine.reload(read_cards(models), "error")
    level = logging.getLogger().level
    logging.getLogger().setLevel(before)
    assert level == logging.ERROR
