"""The form is what the server says of a model: its fields, bounds, samplers, classes and LoRAs, sent as they are."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from app.request import ClassLabel, Prompt
from tests.page.steps import button, choose_model, colour_of, draw, field, form, kept, sent, stage
from tests.parts.browser import Visit
from tests.parts.fake_worker import colour
from tests.parts.servers import ALICE, bearer

pytestmark = pytest.mark.slow

LABELS = {
    "prompt": "Prompt", "negative_prompt": "Negative prompt", "num_inference_steps": "Steps", "n": "Images",
    "guidance_scale": "Guidance", "sampler": "Sampler", "schedule": "Schedule", "size": "Size", "seed": "Seed",
    "max_sequence_length": "Text length", "deadline": "Deadline", "priority": "Priority",
}  # fmt: skip
"""What a person reads beside the field of tiny-sd3."""
EDITS = {"strength", "resize", "mask_blur", "overlay"}


def model(visit: Visit, name: str) -> dict[str, Any]:
    return dict(httpx.get(f"{visit.url}/v1/models/{name}", headers=bearer(ALICE)).json())


def test_its_controls_are_the_fields_of_the_model(visit: Visit) -> None:
    """In the model's bounds, with its defaults. Not shown: what says how an answer comes, and what changes nothing."""
    facts = model(visit, "tiny-sd3")
    fields, limits = facts["fields"], facts["limits"]
    assert LABELS.keys() <= fields.keys() and fields.keys() >= EDITS
    form(visit.page).get_by_text("More fields").click()
    for label in LABELS.values():
        expect(field(visit.page, label)).to_be_visible()
    expect(field(visit.page, "Steps")).to_have_attribute("placeholder", str(facts["defaults"]["num_inference_steps"]))
    expect(field(visit.page, "Steps")).to_have_attribute("max", str(limits["num_inference_steps"]))
    expect(field(visit.page, "Guidance")).to_have_attribute("placeholder", "4")
    expect(field(visit.page, "Images")).to_have_attribute("max", str(limits["n"]))
    expect(field(visit.page, "Size")).to_have_attribute("placeholder", facts["defaults"]["size"])
    expect(field(visit.page, "Prompt")).to_have_attribute("maxlength", str(limits["prompt"]))


def test_samplers_are_those_of_the_chosen_model(visit: Visit) -> None:
    for name in ("tiny-sd3", "tiny-dit"):
        choose_model(visit.page, name)
        options = field(visit.page, "Sampler").get_by_role("option")
        expect(options).to_have_count(len(model(visit, name)["samplers"]))
        assert {*options.all_inner_texts()} == {*model(visit, name)["samplers"]}


def test_what_is_filled_in_is_what_is_sent_and_nothing_else(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill('"é" \\ 猫')
    field(page, "Sampler").select_option("flow_heun")
    for label, value in {"Steps": "3", "Guidance": "2.5", "Size": "64x32", "Images": "2", "Seed": "7"}.items():
        field(page, label).fill(value)
    field(page, "Negative prompt").fill("blurry")
    page.get_by_label("ink", exact=True).check()
    page.get_by_label("Weight of ink").fill("0.5")
    assert sent(page) == {
        "model": "tiny-sd3", "prompt": '"é" \\ 猫', "negative_prompt": "blurry", "sampler": "flow_heun",
        "num_inference_steps": 3, "guidance_scale": 2.5, "size": "64x32", "n": 2, "seed": 7,
        "loras": [{"name": "ink", "weight": 0.5}], "stream": True, "progress": True, "partial_images": 3,
    }  # fmt: skip
    expect(kept(page)).to_have_count(2)
    colours = {colour_of(one) for one in kept(page).all()}
    assert colours == {colour(Prompt('"é" \\ 猫'), seed) for seed in (7, 8)}


def test_a_value_outside_the_bounds_is_not_sent(visit: Visit) -> None:
    page, before = visit.page, len(visit.addresses)
    draw(page, "a cat", Steps=101)
    assert "100" in field(page, "Steps").evaluate("(input) => input.validationMessage")
    expect(field(page, "Steps")).to_be_focused()
    assert not [address for address in visit.addresses[before:] if "images" in address]
    field(page, "Steps").fill("2")
    assert sent(page)["num_inference_steps"] == 2


def test_what_only_the_server_can_refuse_is_shown_in_its_words(visit: Visit) -> None:
    visit.expect("status of 400 .*/v1/images/generations")
    draw(visit.page, "a cat", Size="33x33")
    expect(stage(visit.page).get_by_role("alert").filter(has_text="size").first).to_be_visible()


def test_classes_are_searched_by_name_and_number_and_drawn(visit: Visit) -> None:
    page = visit.page
    choose_model(page, "tiny-dit")
    label = field(page, "Class")
    with page.expect_response(re.compile(r"/classes\?q=pur$")) as found:
        label.press_sequentially("pur")
    assert [one["name"] for one in found.value.json()["data"]] == ["purple"]
    offered = page.get_by_role("option", name="7 purple", include_hidden=True)
    expect(offered).to_have_attribute("value", "purple")
    label.fill("purple")
    field(page, "Seed").fill("3")
    assert sent(page)["class_label"] == "purple"
    assert colour_of(kept(page, "Open purple")) == colour(ClassLabel(7), 3)
    label.fill("4")
    assert sent(page)["class_label"] == 4
    expect(kept(page)).to_have_count(2)


def test_a_class_that_there_is_not_is_refused_in_the_servers_words(visit: Visit) -> None:
    choose_model(visit.page, "tiny-dit")
    visit.expect("status of 400 .*/v1/images/generations")
    field(visit.page, "Class").fill("purpel")
    button(visit.page, "Draw").click()
    expect(stage(visit.page).get_by_role("alert").filter(has_text="purple").first).to_be_visible()


def test_another_model_keeps_the_words_and_takes_its_own_settings(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a cat")
    field(page, "Steps").fill("77")
    choose_model(page, "tiny-sd3-turbo")
    expect(field(page, "Steps")).to_have_attribute("placeholder", "4")
    expect(field(page, "Steps")).to_have_value("")
    expect(field(page, "Prompt")).to_have_value("a cat")
    assert sent(page)["model"] == "tiny-sd3-turbo"
    expect(kept(page)).to_have_count(1)
