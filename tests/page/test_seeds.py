"""Seeds and settings: a new seed each time, a locked one, the seed of a picture, and all settings of a picture."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.page.steps import button, draw, expect_no_window, field, kept, sent, stage
from tests.parts.browser import Visit

pytestmark = pytest.mark.slow


def test_each_picture_has_a_new_seed_until_the_seed_is_locked(visit: Visit) -> None:
    page = visit.page
    field(page, "Prompt").fill("a cat")
    assert sent(page)["seed"] != sent(page)["seed"]
    field(page, "Seed").fill("4294967295")
    expect(page.get_by_label("Lock seed")).to_be_checked()
    assert [sent(page)["seed"] for _ in range(2)] == [4294967295, 4294967295]
    page.get_by_label("Lock seed").uncheck()
    assert sent(page)["seed"] != 4294967295
    expect(kept(page)).to_have_count(5)


def test_use_this_seed_locks_that_of_the_picture(visit: Visit) -> None:
    page = visit.page
    draw(page, "a cat", Images=2)
    expect(kept(page)).to_have_count(2)
    first = sent(page)["seed"]
    expect(kept(page)).to_have_count(4)
    button(stage(page).get_by_role("figure").nth(1), "Open a cat, image 2").click()
    button(page.get_by_role("dialog"), "Use this seed").click()
    expect(field(page, "Seed")).to_have_value(str(first + 1))
    expect(page.get_by_label("Lock seed")).to_be_checked()
    assert sent(page)["seed"] == first + 1


def test_use_its_settings_brings_back_every_field(visit: Visit) -> None:
    page = visit.page
    field(page, "Sampler").select_option("flow_dpmpp_2m")
    page.get_by_label("wash", exact=True).check()
    fields = {"Steps": 3, "Guidance": 2.5, "Seed": 9, "Negative prompt": "dull", "Size": "64x64"}
    draw(page, "a red cat", **fields)
    expect(kept(page)).to_have_count(1)
    field(page, "Sampler").select_option("")
    page.get_by_label("wash", exact=True).uncheck()
    page.get_by_label("Lock seed").uncheck()
    for label in ("Prompt", *fields):
        field(page, label).fill("")
    kept(page).click()
    button(page.get_by_role("dialog"), "Use its settings").click()
    expect_no_window(page)
    for label, value in {"Prompt": "a red cat", **fields}.items():
        expect(field(page, label)).to_have_value(str(value))
    expect(field(page, "Sampler")).to_have_value("flow_dpmpp_2m")
    expect(page.get_by_label("wash", exact=True)).to_be_checked()
    expect(page.get_by_label("Lock seed")).to_be_checked()
