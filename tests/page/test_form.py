"""The form is what the server says of a model: its fields, bounds, samplers, classes and LoRAs, sent as they are."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Request, expect

from tests.page.steps import button, choose_model, form
from tests.parts.browser import Visit
from tests.parts.servers import ALICE, bearer

pytestmark = pytest.mark.slow


def model(visit: Visit, name: str) -> dict[str, Any]:
    return dict(httpx.get(f"{visit.url}/v1/models/{name}", headers=bearer(ALICE)).json())


def sent(page: Page, press: str = "Draw") -> dict[str, Any]:
    """The body that pressing this button sends."""
    with page.expect_request(lambda request: request.method == "POST") as waited:
        button(page, press).click()
    request: Request = waited.value
    return dict(json.loads(request.post_data or ""))


def test_samplers_bounds_and_defaults_are_the_models(visit: Visit) -> None:
    for name in ("tiny-sd3", "tiny-dit"):
        choose_model(visit.page, name)
        facts = model(visit, name)
        sampler = form(visit.page).get_by_label("Sampler", exact=True)
        expect(sampler.get_by_role("option")).to_have_count(len(facts["samplers"]))
        assert set(sampler.get_by_role("option").all_inner_texts()) == set(facts["samplers"])
        steps = form(visit.page).get_by_label("Steps", exact=True)
        defaults, limits = facts["defaults"], facts["limits"]
        expect(steps).to_have_attribute("placeholder", str(defaults["num_inference_steps"]))
        expect(steps).to_have_attribute("max", str(limits["num_inference_steps"]))
        expect(form(visit.page).get_by_label("Images", exact=True)).to_have_attribute("max", str(limits["n"]))
        expect(form(visit.page).get_by_label("Size", exact=True)).to_have_attribute("placeholder", defaults["size"])


def test_every_field_of_a_model_has_a_control(visit: Visit) -> None:
    """But for those that say how an answer comes, and those of OpenAI's that change nothing."""
    facts = model(visit, "tiny-sd3")
    form(visit.page).get_by_text("More fields").click()
    labels = [text.strip().lower() for text in form(visit.page).locator("label, legend, summary").all_inner_texts()]
    for name in ("schedule", "max_sequence_length", "deadline", "priority"):
        assert name in facts["fields"], sorted(facts["fields"])
    assert {"prompt", "negative prompt", "steps", "guidance", "sampler", "schedule", "size", "images", "seed"} <= {
        label.splitlines()[0] for label in labels if label
    }
