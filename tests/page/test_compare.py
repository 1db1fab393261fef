"""Comparing side by side: one seed, one batch of requests, and what differs between them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app.request import Prompt
from tests.page.steps import button, choose_model, colour_of, draw, field, form, kept, stage
from tests.parts.browser import Visit
from tests.parts.fake_worker import colour

pytestmark = pytest.mark.slow


def compared(page: Page, field_name: str) -> list[dict[str, Any]]:
    """The requests that a comparison sends, less what all have in common; asserts that these are all in one batch."""
    with page.expect_request("**/v1/images/batch") as waited:
        form(page).get_by_role("button", name=re.compile(r"^Draw \d+ side by side$")).click()
    requests = json.loads(waited.value.post_data or "")["requests"]
    assert all(one["progress"] and one["n"] == 1 and one["seed"] == requests[0]["seed"] for one in requests)
    return [one[field_name] for one in requests]


def turn_on(page: Page, what: str) -> None:
    form(page).get_by_label("Compare side by side").check()
    field(page, "What differs").select_option(label=what)


def test_step_counts_are_compared_in_one_batch_with_one_seed(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("!slow 1")
    field(page, "Seed").fill("5")
    turn_on(page, "Steps")
    field(page, "Values, with commas between them").fill("1, 2, 8, 20")
    assert compared(page, "num_inference_steps") == [1, 2, 8, 20]
    expect(stage(page).get_by_role("figure")).to_have_count(4)
    expect(stage(page).get_by_role("progressbar", name="Progress of !slow 1, 20 steps")).to_be_visible()
    for label in ("1 step", "2 steps", "8 steps", "20 steps"):
        expect(stage(page).get_by_role("figure").get_by_text(label, exact=True)).to_be_visible()
    expect(kept(page)).to_have_count(4)
    assert {colour_of(one) for one in kept(page).all()} == {colour(Prompt("!slow 1"), 5)}


def test_guidances_are_compared(visit: Visit) -> None:
    field(visit.page, "Prompt").fill("a cat")
    turn_on(visit.page, "Guidance")
    field(visit.page, "Values, with commas between them").fill("0, 4.5")
    assert compared(visit.page, "guidance_scale") == [0, 4.5]
    expect(kept(visit.page)).to_have_count(2)


def test_samplers_are_compared(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a cat")
    turn_on(page, "Sampler")
    choices = form(page).get_by_role("group", name="Sampler")
    for box in choices.get_by_role("checkbox").all():
        box.set_checked(False)
    for name in ("flow_heun", "flow_dpmpp_2m"):
        choices.get_by_label(name, exact=True).check()
    assert compared(page, "sampler") == ["flow_heun", "flow_dpmpp_2m"]
    expect(kept(page)).to_have_count(2)


def test_models_are_compared_with_the_settings_that_both_take(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a cat")
    turn_on(page, "Model")
    choices = form(page).get_by_role("group", name="Model")
    expect(choices.get_by_label("tiny-dit")).to_have_count(0)
    for box in choices.get_by_role("checkbox").all():
        box.set_checked(False)
    for name in ("tiny-sd3", "tiny-sd3-turbo"):
        choices.get_by_label(name, exact=True).check()
    assert compared(page, "model") == ["tiny-sd3", "tiny-sd3-turbo"]
    expect(kept(page)).to_have_count(2)


def test_classes_are_compared_too(visit: Visit) -> None:
    page = visit.page
    choose_model(page, "tiny-dit")
    field(page, "Class").fill("red")
    turn_on(page, "Steps")
    field(page, "Values, with commas between them").fill("2, 3")
    assert compared(page, "num_inference_steps") == [2, 3]
    expect(kept(page)).to_have_count(2)


def test_one_that_fails_leaves_the_others(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("!nan 6")
    turn_on(page, "Steps")
    field(page, "Values, with commas between them").fill("3, 8")
    compared(page, "num_inference_steps")
    failed = stage(page).get_by_role("figure").filter(has_text="8 steps")
    expect(failed.get_by_role("alert").filter(has_text="not finite")).to_be_visible()
    expect(kept(page)).to_have_count(1)
    expect(stage(page).get_by_role("figure").filter(has_text="3 steps").get_by_role("img")).to_be_visible()


def test_a_schedule_is_left_out_where_a_sampler_does_not_take_it(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a fox")
    field(page, "Schedule").select_option("karras")
    turn_on(page, "Sampler")
    for name in ("flow_heun", "flow_dpmpp_2m"):
        page.get_by_label(name, exact=True).set_checked(True)
    page.get_by_label("flow_euler", exact=True).set_checked(False)
    with page.expect_request("**/v1/images/batch") as waited:
        form(page).get_by_role("button", name="Draw 2 side by side").click()
    requests = json.loads(waited.value.post_data or "")["requests"]
    assert {one["sampler"]: one.get("schedule") for one in requests} == {"flow_heun": "karras", "flow_dpmpp_2m": None}
    expect(kept(page)).to_have_count(2)


def test_only_schedules_of_the_sampler_are_compared(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a fox")
    turn_on(page, "Schedule")
    assert compared(page, "schedule") == ["karras", "exponential"]
    expect(kept(page)).to_have_count(2)
    field(page, "Sampler").select_option("flow_dpmpp_2m")
    form(page).get_by_role("button", name="Draw 0 side by side").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing to compare")


def test_more_than_a_batch_takes_is_refused_in_the_servers_words(visit: Visit) -> None:
    page = visit.page
    visit.expect("status of 400")
    field(page, "Prompt").fill("a fox")
    turn_on(page, "Steps")
    field(page, "Values, with commas between them").fill(", ".join(str(steps) for steps in range(1, 21)))
    form(page).get_by_role("button", name="Draw 20 side by side").click()
    expect(page.get_by_role("alert")).to_contain_text("at most 16 entries, not 20")


def test_the_settings_of_one_picture_end_a_comparison(visit: Visit) -> None:
    page = visit.page
    draw(page, "a fox")
    turn_on(page, "Steps")
    button(stage(page), "Use its settings").click()
    expect(button(page, "Draw")).to_be_visible()
