"""Reflow: the teacher's pairs, the times that the student learns at, and the card that its recipe writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_turbo import Point, draw_times, follow, read_pairs, straight, walk

from app.cards.cards import read_cards
from app.checkpoints.parts import build_family, build_parts
from app.cli.models import check_folder
from app.families.base import Family
from app.pool.pool import Pool
from app.request import Prompt
from tests.families.plain import ask, serve
from tests.parts.close import FORWARD, SAME, apart, close, furthest
from tests.parts.engine import load_all
from tests.parts.requests import passes
from tests.recipes.conftest import run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def family(made: Path, name: str) -> Family:
    cards = read_cards(made)
    return build_family(cards[name], build_parts(cards[name], cards, CPU, torch.float32), CPU, torch.float32)


def test_a_pair_ends_where_the_engine_does(made: Path) -> None:
    """The teacher's guided walk of the recipe, against the server's picture of the same noise."""
    cards = read_cards(made)
    card, teacher = cards["emoji-mmdit"], family(made, "emoji-mmdit")
    with torch.inference_mode():
        text = teacher.encode(passes([Prompt("a cat"), Prompt("")]), card.text.t5)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
        pair = (text["text"], text["pooled"])
        ours, other = (
            follow(teacher.network, walk(card.schedule, 3), noise, pair, scale)  # type: ignore[attr-defined]
            for scale in (4.0, 4.1)
        )
    options = {"steps": 3, "guidance": 4.0, "sampler": "flow_euler", "size": (128, 128), "seed": 3}
    question = ask("emoji-mmdit", Prompt("a cat"), text_length=card.text.t5, **options)
    pool = load_all(Pool({"emoji-mmdit": card}, "cpu", torch.float32))
    (theirs,) = serve(pool, question)
    pool.close()
    assert theirs.latents is not None
    close(ours[0], theirs.latents, SAME, furthest)
    apart(other[0], theirs.latents, SAME, furthest, of="another guidance:")


def test_pairs_are_kept_and_not_drawn_again(subjects: list[Any], made: Path) -> None:
    folder = made / "runs" / "turbo" / "pairs"
    noise, clean, captions = read_pairs(folder)
    assert noise.shape == clean.shape == (8, 16, 16, 16) and len(captions) == 8
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    options = ("--teacher", made / "emoji-mmdit", "--out", made / "emoji-mmdit-turbo", "--work", made / "runs/turbo")
    options += ("--subjects", 12, "--pairs", 12, "--draw", 4, "--steps", 2, "--batch", 4, "--minutes", 0.03)
    run("distill_turbo", subjects, *options, "--device", "cpu", "--threads", 1)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert len(read_pairs(folder)[2]) == 12 and np.array_equal(read_pairs(folder)[0][:8], noise)


def test_times_are_those_that_the_card_is_asked_at(made: Path) -> None:
    schedule = read_cards(made)["emoji-mmdit-turbo"].schedule
    times = draw_times(np.random.default_rng(0), schedule, 2000, 0.0)
    lines = [2 * each / (1 + each) for each in (1, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4)]  # shifted by 2, as its card says
    grid = {round(each, 4): float(np.isclose(times, each).mean()) for each in lines}
    assert abs(sum(grid.values()) - 1) < 1e-9 and all(share > 0.04 for share in grid.values())
    assert 0.47 < grid[1] < 0.57  # the first line of every number of steps
    anywhere = draw_times(np.random.default_rng(0), schedule, 2000, 1.0)
    assert len(np.unique(anywhere)) > 1900


def test_the_loss_is_least_on_the_straight_line() -> None:
    noise, clean = torch.randn(2, 3, 16, 16, 16)
    sigma = torch.tensor([1.0, 0.5, 0.25])[:, None, None, None]
    x = (1 - sigma) * clean + sigma * noise
    right = Point(sigma, x, noise, clean, noise - clean)
    assert straight(right) == 0
    wrong = Point(sigma, x, noise, clean, noise - clean + 2)
    close(right.guess, clean, FORWARD, furthest)
    apart(wrong.guess, clean, FORWARD, furthest)
    close(straight(wrong), 4.0, FORWARD)


def test_the_card_shares_all_but_the_network(made: Path) -> None:
    assert check_folder(made, 2)["emoji-mmdit-turbo"] == ("ok", "8 parts")
    card = read_cards(made)["emoji-mmdit-turbo"]
    assert (card.defaults.num_inference_steps, card.defaults.guidance_scale, card.schedule.spacing) == (4, 0, "flux")
    assert set(card.components) == {each.name for each in (made / "emoji-mmdit").iterdir() if each.is_dir()} - {
        "transformer", "scheduler"
    }  # fmt: skip
    assert not list((made / "emoji-mmdit-turbo").glob("[tv]*encoder*"))
    weights = [file.parent.name for file in card.folder.rglob("*.safetensors")]
    assert weights == ["transformer"]
