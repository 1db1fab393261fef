"""The fields schedule and clip_skip: what a body may say, what a recipe becomes, what files and errors say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import InvalidValue
from app.imaging import a1111
from app.jobs.body import MOST_SKIPPED, most_steps_of, read_body
from app.jobs.facts import facts, recipe_facts
from app.jobs.job import Job
from app.jobs.schema import body_schema
from app.request import Recipe
from app.samplers.grids import GRIDS
from app.samplers.table import compile_table, valid_grids, valid_samplers

CARDS = read_cards(Path(__file__).parents[2] / "models")
SDXL, SD3, DIT = CARDS["sdxl"], CARDS["sd3.5-medium"], CARDS["dit-xl-2-256"]
PAIRS = [(card, sampler) for card in (SDXL, SD3, DIT) for sampler in valid_samplers(card.schedule)]


def body(card: Card, **fields: Any) -> dict[str, Any]:
    return {"model": card.id, **({"class_label": 0} if card.draws_classes else {"prompt": "a"}), **fields}


def recipe(card: Card, **fields: Any) -> Recipe:
    card = card.model_copy(update={"labels": ("cat",)}) if card.draws_classes else card
    return read_body(body(card, **fields)).to_request(card, "id").recipe


def refusal(card: Card, **fields: Any) -> tuple[str, str | None]:
    with pytest.raises(InvalidValue) as error:
        recipe(card, **fields)
    return error.value.message, error.value.param


@pytest.mark.parametrize(("card", "sampler"), PAIRS, ids=[f"{card.id}-{sampler}" for card, sampler in PAIRS])
def test_a_schedule_is_taken_where_the_sampler_walks_it(card: Card, sampler: str) -> None:
    """By the check and by the JSON schema, with as many steps as are documented; the card's legs walk it."""
    card = card.model_copy(update={"labels": ("cat",)}) if card.draws_classes else card
    schema = Draft202012Validator(body_schema(card, (card.id,), True))
    most = most_steps_of(card)[sampler]
    for grid in GRIDS:
        asked = body(card, sampler=sampler, schedule=grid, num_inference_steps=most)
        assert schema.is_valid(asked) == (grid in valid_grids(sampler))
        if grid in valid_grids(sampler):
            made = read_body(asked).to_request(card, "id").recipe
            assert (made.grid, made.sampler, made.steps) == (grid, sampler, most)
            (table,) = card.legs(made).values()
            assert table is compile_table(card.schedule, sampler, most, tokens=1, grid=grid)
            assert not schema.is_valid(asked | {"num_inference_steps": most + 1})
        else:
            message, param = refusal(card, sampler=sampler, schedule=grid)
            assert param == "schedule" and f'"{grid}" does not go with {sampler}; karras, ' in message


def test_without_one_the_card_says() -> None:
    for absent in ({}, {"schedule": None}):
        assert recipe(SDXL, **absent).grid == ""


@pytest.mark.parametrize("name", ["Karras", "beta", "", "ddim_uniform"])
def test_another_schedule_is_refused(name: str) -> None:
    assert refusal(SDXL, schedule=name) == ("schedule: expects one of karras, exponential, sgm_uniform", "schedule")
    assert not Draft202012Validator(body_schema(SDXL, ("sdxl",), True)).is_valid(body(SDXL, schedule=name))


def test_lcm_draws_its_most_where_the_card_has_more_by_default() -> None:
    assert DIT.defaults.num_inference_steps > 50
    assert recipe(DIT, sampler="lcm").steps == 50
    assert "expects 1 to 50" in refusal(DIT, sampler="lcm", num_inference_steps=51)[0]
    assert recipe(SDXL, sampler="lcm", num_inference_steps=4).steps == 4


@pytest.mark.parametrize(
    ("card", "name", "end"),
    [
        (SDXL, "DPM++ 2M Karras", 'did you mean "dpmpp_2m" with "schedule": "karras"?'),
        (SDXL, "DPM++ 2M SDE Exponential", 'did you mean "dpmpp_2m_sde" with "schedule": "exponential"?'),
        (SDXL, "dpmpp_2m_k", 'did you mean "dpmpp_2m" with "schedule": "karras"?'),
        (SDXL, "Euler a SGM Uniform", 'did you mean "euler_ancestral" with "schedule": "sgm_uniform"?'),
        (SDXL, "DPM++ 2M", 'did you mean "dpmpp_2m"?'),
        (SDXL, "Euler a", 'did you mean "euler_ancestral"?'),
        (SDXL, "K_EULER", 'did you mean "euler"?'),
        (SDXL, "LCM", 'did you mean "lcm"?'),
        (SDXL, "DPMSolverMultistepScheduler", 'did you mean "dpmpp_2m"?'),
        (SDXL, "EulerAncestralDiscreteScheduler", 'did you mean "euler_ancestral"?'),
        (SD3, "DPM++ 2M Karras", 'did you mean "flow_dpmpp_2m_sd3" with "schedule": "karras"?'),
        (SD3, "DPM++ 2M", 'did you mean "flow_dpmpp_2m"?'),
        (SD3, "euler", 'did you mean "flow_euler"?'),
        (SDXL, "PLMS", "dpmpp_2m and ddim are like it"),
        (SDXL, "PNDMScheduler", "dpmpp_2m and ddim are like it"),
        (SDXL, "DPM++ SDE Karras", "dpmpp_2m_sde is the nearest"),
        (SDXL, "nothing of the kind", f"expects one of {', '.join(valid_samplers(SDXL.schedule))}"),
        (SDXL, "x" * 30_000, f"expects one of {', '.join(valid_samplers(SDXL.schedule))}"),
    ],
)
def test_a_sampler_of_another_name_is_told(card: Card, name: str, end: str) -> None:
    message, param = refusal(card, sampler=name)
    assert param == "sampler" and message.startswith("sampler: expects one of ") and message.endswith(end)


def test_no_hint_names_what_is_not_taken() -> None:
    names = [*(name for one in (SDXL, SD3) for name in valid_samplers(one.schedule)), "DPM++ 2M", "K_HEUN", "DDIM", "a"]
    hinted = 0
    for card in (SDXL, SD3):
        for name in [f"{name}{end}" for name in names for end in (" Karras", "_k", " SGM Uniform", "Exponential")]:
            if found := re.search(
                r'did you mean "(\w+)"(?: with "schedule": "(\w+)")?\?$', refusal(card, sampler=name)[0]
            ):
                assert recipe(card, sampler=found[1], schedule=found[2]).grid == found[2]
                hinted += 1
    assert hinted > 50


def test_clip_skip_is_of_models_that_read_clip() -> None:
    assert recipe(SDXL).clip_skip == 0
    assert recipe(SDXL, clip_skip=1).clip_skip == 1 and recipe(SDXL, clip_skip=MOST_SKIPPED).clip_skip == 11
    for outside in (-1, MOST_SKIPPED + 1):
        assert refusal(SDXL, clip_skip=outside) == ("clip_skip: expects 0 to 11", "clip_skip")
    for card in (SD3, DIT):
        message, param = refusal(card, clip_skip=1)
        assert param == "clip_skip" and message.startswith(f"clip_skip: {card.id} ")
        assert "clip_skip" not in body_schema(card, (card.id,), True)["properties"]


def job(**fields: Any) -> Job:
    asked = read_body(body(SDXL, seed=7, **fields))
    return Job(asked.to_request(SDXL, "id"), SDXL, asked)


def test_a_file_has_both_and_makes_the_same_again() -> None:
    """A1111 counts the last layer that is read, so that its 1 skips none."""
    made = job(sampler="dpmpp_2m", schedule="karras", clip_skip=1, num_inference_steps=20)
    found = facts(made, [0])
    assert (found["schedule"], found["clip_skip"]) == ("karras", 1)
    again = read_body(found).to_request(SDXL, "id")
    assert (again.recipe, again.images) == (made.request.recipe, made.request.images)
    line = a1111(found).splitlines()[-1]
    assert line.startswith("Steps: 20, Sampler: dpmpp_2m, Schedule type: Karras, ") and ", Clip skip: 2" in line
    assert "Schedule type: SGM Uniform" in a1111(facts(job(schedule="sgm_uniform", sampler="euler"), [0]))


def test_a_file_without_them_says_nothing_of_them() -> None:
    found = facts(job(), [0])
    assert not {"schedule", "clip_skip"} & (found.keys() | recipe_facts(job(clip_skip=0).request.recipe).keys())
    assert "Schedule type" not in a1111(found) and "Clip skip" not in a1111(found)
