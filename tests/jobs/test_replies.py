"""What replies say beside the pixels: usage, stages, warnings, and the facts in the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.jobs.body import SKIPPING, read_body
from app.jobs.job import Estimate, Job
from app.jobs.replies import ImagesReply, effective, facts, stages, usage, warnings
from app.report import Result, Timings
from app.settings import Settings

TIMINGS = Timings(queue=1.0, encode=0.2, denoise=3.0, decode=0.1, steps=4, shared=2.0)


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(read_cards(settings.models), settings)


def asked(registry: Registry, **fields: object) -> Job:
    body = read_body({"prompt": "a", "seed": 1, **fields})
    card = registry.find(body.model)
    return Job(body.to_request(card, "id"), card, body)


def result(**fields: object) -> Result:
    return replace(Result("id", 0, 1, np.zeros((32, 32, 3), np.uint8), TIMINGS), **fields)  # type: ignore[arg-type]


def test_stages_are_those_of_the_slowest_image() -> None:
    slow = result(timings=replace(TIMINGS, queue=0.5, denoise=9.0, shared=3.0))
    told = stages([result(), slow], 0.012345678)
    assert (told.queue, told.denoise, told.decode, told.steps) == (1.0, 9.0, 0.1, 4)
    assert (told.shared, told.image_encode) == (2.5, 0.01235)


def test_stages_have_what_was_expected_once_a_request_was_accepted() -> None:
    told = stages([result()], 0.0, Estimate(wait=1.23456789, position=3, cost=0.5))
    assert (told.estimated_wait, told.queue_position, told.cost) == (1.23457, 3, 0.5)
    assert "cost" not in stages([result()], 0.0).model_dump(exclude_none=True)


def test_usage_adds_up_over_images(registry: Registry) -> None:
    assert usage([asked(registry, size="64x48").request.recipe] * 2).model_dump() == {
        "input_tokens": 48,
        "output_tokens": 24,
        "total_tokens": 72,
        "input_tokens_details": {"text_tokens": 48, "image_tokens": 0},
    }
    label = usage([asked(registry, model="tiny-label", class_label=1).request.recipe])
    assert (label.input_tokens, label.output_tokens) == (1, 4)


def test_a_warning_is_told_once(registry: Registry) -> None:
    cut = result(warnings=("the prompt was cut",))
    assert warnings(asked(registry), [cut, cut]) == ["the prompt was cut"]


@pytest.mark.parametrize("grid", [None, {"columns": 2}])
def test_what_a_jpeg_has_no_room_for_is_a_warning(registry: Registry, grid: dict[str, int] | None) -> None:
    """Two prompts are two requests in two files, and one in the file of their sheet."""
    card = registry.find(None)
    long = card.model_copy(update={"limits": card.limits.model_copy(update={"prompt": 3_000})})
    body = read_body({"prompt": ["🍎" * 3_000, "🍏" * 3_000], "grid": grid})
    job = Job(body.to_request(long, "id"), long, body)
    results = [result(), result(index=1)]
    (told,) = warnings(replace(job, format="jpeg"), results) or [""]
    assert bool(told) == bool(grid) and warnings(replace(job, format="webp"), results) == []


def test_the_size_is_that_of_the_file(registry: Registry) -> None:
    sheet = asked(registry, n=3, grid={"columns": 2})
    assert effective(sheet, 3)["size"] == "64x64"
    assert effective(sheet, 1)["size"] == "32x32"
    assert effective(asked(registry, n=3), 1)["size"] == "32x32"


def test_a_reply_repeats_every_parameter_that_was_used(registry: Registry) -> None:
    assert "max_sequence_length" in effective(asked(registry), 1)
    assert {*SKIPPING, "true_cfg_scale", *effective(asked(registry), 1)} <= ImagesReply.model_fields.keys()


def test_facts_of_one_image_among_several_have_its_own_seed(registry: Registry) -> None:
    job = asked(registry, prompt=["a", "b"])
    assert {**facts(job, [1])}.items() >= {"prompt": "b", "seed": 2}.items()
    assert "n" not in facts(job, [1]) and "grid" not in facts(job, [1])
