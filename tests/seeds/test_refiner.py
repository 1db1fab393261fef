"""A base and its refiner through HTTP in mixed traffic against diffusers' two pipelines: final latents, with controls.

One real server with its real engine process; everything is asked for at once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cards.cards import read_cards
from app.request import Guidance, Recipe, Refiner
from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.parts.close import SAME, apart, close
from tests.parts.edits import as_field, half_mask, picture
from tests.parts.servers import Server
from tests.parts.tiny_unets import write_unets
from tests.seeds.refined import refined_latent
from tests.seeds.test_mixed import Answer, ask_all, keep_latents
from tests.seeds.upstream import Body

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # in diffusers
]

GREEN, EMPTY, ABSENT = {"negative_prompt": "green dog"}, {"negative_prompt": ""}, {"negative_prompt": None}
SIZES = {"original_size": "512x384", "crop": [7, 31], "target_size": "1023x640"}
START: Body = {"image": as_field(picture(40, 24))}
MASKED: Body = {**START, "mask_image": as_field(half_mask(40, 24))}


def body_of(steps: int, switch: float, sampler: str = "euler", **fields: Any) -> Body:
    facts = {"model": "tiny-sdxl", "prompt": "a red apple on a blue background", "size": "40x24", "guidance_scale": 5.0}
    refiner = {"model": "tiny-refiner", "switch_at": switch}
    return {**facts, "seed": 11, "num_inference_steps": steps, "sampler": sampler, "refiner": refiner, **fields}


CASES: dict[str, Body] = {
    "23 and 7": body_of(30, 0.8, **GREEN),
    "absent": body_of(10, 0.5, **ABSENT),
    "empty": body_of(10, 0.5, **EMPTY),
    "sizes": body_of(8, 0.6, size="24x64", **GREEN, **SIZES),
    "unguided": body_of(10, 0.7, guidance_scale=1.0, size="64x24"),
    "ddim": body_of(20, 0.8, "ddim", **GREEN),
    "ddim early": body_of(10, 0.25, "ddim", size="24x56"),
    "dpmpp_2m": body_of(16, 0.8, "dpmpp_2m", **GREEN),
    "dpmpp_2m early": body_of(12, 0.4, "dpmpp_2m", size="56x40", **EMPTY),
    "noise of steps": body_of(10, 0.6, "euler_ancestral", **GREEN),
    "picture": body_of(20, 0.8, strength=0.6, **GREEN, **START),
    "picture, ddim": body_of(20, 0.7, "ddim", strength=0.5, **START),
    "picture, refiner alone": body_of(20, 0.7, strength=0.2, **GREEN, **START),
    "masked": body_of(20, 0.8, strength=0.6, **GREEN, **MASKED),
    "masked, dpmpp_2m": body_of(20, 0.6, "dpmpp_2m", strength=0.7, **MASKED),
}
CONTROLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *(("23 and 7", {"refiner": {"model": "tiny-refiner", "switch_at": switch}}, {}) for switch in (0.765, 0.83)),
    ("ddim early", {}, {"aesthetic_score": 2.5, "negative_aesthetic_score": 6.0}),
    ("ddim early", {}, {"aesthetic_score": 24, "negative_aesthetic_score": 24}),
    ("absent", EMPTY, {}),
    ("empty", ABSENT, {}),
    ("sizes", {"original_size": "384x512"}, {}),
    ("sizes", {}, {"original_size": (512, 384)}),
    ("sizes", {}, {"crops_coords_top_left": (7, 31)}),
    ("noise of steps", {"seed": 12}, {}),
    ("picture", {"refiner": {"model": "tiny-refiner", "switch_at": 0.75}}, {}),
    ("masked", {"mask_image": as_field(half_mask(40, 24)[::-1].copy())}, {}),
]
"""What is asked of diffusers in place of a case: other fields of the body, other arguments of the second pipeline. The
first two switch one step too late and too early; a score of 24 is the base's time ids."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refined") / "models"
    write_unets(folder)
    return folder


def near(number: int, seed: int) -> Body:
    """A request that shares forwards with a case: plain, of the refiner alone from a picture, or switched elsewhere."""
    body = list(CASES.values())[number]
    facts = {"prompt": "moon and stars", "seed": seed, "num_inference_steps": 9 + seed, "sampler": "euler_ancestral"}
    alone = {"model": "tiny-refiner", "strength": 0.4, "image": as_field(picture(*map(int, body["size"].split("x"))))}
    changes: Body = ({}, alone, {"refiner": {"model": "tiny-refiner", "switch_at": 0.3}})[seed]
    kept = {name: value for name, value in body.items() if name not in ("image", "mask_image", "strength", "refiner")}
    return {**kept, **facts, **changes}


@pytest.fixture(scope="module")
def answers(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Every case, among others of its size, asked for at once."""
    bodies = {f"case-{number}": body for number, body in enumerate(CASES.values())}
    bodies |= {f"near-{number}-{seed}": near(number, seed) for number in range(len(CASES)) for seed in range(3)}
    cache = tmp_path_factory.mktemp("cache")
    facts = {"devices": "cpu", "dtype": "float32", "threads": 1, "port": 0, "drain": 5, "max_wait": 1e6}
    server = Server(Settings(models=models, cache=cache, **facts), WORKER)
    kept = keep_latents(server.supervisor)
    with server:
        replies = ask_all(server.url, bodies)
    results = {name.rpartition("-")[0]: result for name, result in kept.items()}
    return {name: Answer(replies[f"case-{number}"], results[f"case-{number}"]) for number, name in enumerate(CASES)}


@cache
def theirs(folder: Path, name: str) -> torch.Tensor:
    return refined_latent(folder, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_of_the_two_pipelines(models: Path, answers: dict[str, Answer], name: str) -> None:
    close(answers[name].latent, theirs(models, name), SAME)
    assert answers[name].reply["refiner"] == CASES[name]["refiner"]


def test_the_traffic_was_mixed(answers: dict[str, Answer]) -> None:
    assert sum(answer.result.timings.shared > 1 for answer in answers.values()) >= len(CASES) // 2


@pytest.mark.parametrize("number", range(len(CONTROLS)), ids=lambda number: str(CONTROLS[number]))
def test_faults_are_told_from_the_two_pipelines(models: Path, answers: dict[str, Answer], number: int) -> None:
    name, changes, wrong = CONTROLS[number]
    apart(answers[name].latent, refined_latent(models, {**CASES[name], **changes}, **wrong), SAME)


def test_30_steps_at_0_8_are_23_lines_and_7(models: Path, answers: dict[str, Answer]) -> None:
    recipe = Recipe("tiny-sdxl", 40, 24, "euler", 30, Guidance(5.0), 24, refiner=Refiner("tiny-refiner", 0.8))
    for card in (read_cards(models)["tiny-sdxl"], read_cards(Path("models"))["sdxl"]):
        assert [table.lines for table in card.legs(recipe).values()] == [23, 7]
    assert answers["23 and 7"].reply["timings"]["steps"] == 30
