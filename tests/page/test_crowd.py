"""Many requests at once, with the real worker and the models that come with Instep where a test has no other."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Visits
from tests.page.steps import arrive, button, draw, field, form, kept, stage
from tests.parts.browser import Look, Visit
from tests.parts.servers import Server

pytestmark = pytest.mark.slow

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 28, 40, 50)
TALLY = re.compile(r"^12 images in (\d+) forwards$")


def test_twelve_requests_at_once_show_live_progress_and_share_forwards(visits: Visits, studio: Server) -> None:
    """From 1 to 50 steps, 190 in all, which one after another take at least 190 forwards."""
    page = arrive(visits(Look(1280), studio.url)).page
    field(page, "Prompt").fill("red apple")
    form(page).get_by_label("Compare side by side").check()
    field(page, "What differs").select_option(label="Steps")
    field(page, "Values, with commas between them").fill(", ".join(map(str, STEPS)))
    form(page).get_by_role("button", name="Draw 12 side by side").click()
    expect(stage(page).get_by_role("figure")).to_have_count(12)
    longest = stage(page).get_by_role("figure").filter(has=page.get_by_text("50 steps", exact=True))
    expect(longest.get_by_text(re.compile(r"step \d+ of 50"))).to_be_visible()
    expect(longest.get_by_role("img", name="Preview of red apple")).to_be_visible()
    expect(kept(page)).to_have_count(12)
    tally = stage(page).get_by_text(TALLY)
    expect(tally).to_be_visible()
    found = TALLY.match(tally.inner_text())
    assert found and 50 <= int(found[1]) < sum(STEPS) / 2


def test_what_there_is_no_connection_for_waits_its_turn(visit: Visit) -> None:
    """Four are drawn at once, as a browser has few connections, and eight more follow. With the fake worker."""
    page = visit.page
    for _ in range(4):
        draw(page, "!slow 600")
    for steps in STEPS[:8]:
        draw(page, "a cat", Steps=steps)
    expect(stage(page).get_by_text("waiting for a connection")).to_have_count(8)
    button(stage(page), "Cancel").first.click()
    expect(stage(page).get_by_text("cancelled", exact=True)).to_have_count(1)
    for _ in range(4):
        button(stage(page), "Cancel").last.click()
    expect(kept(page)).to_have_count(7)
    expect(stage(page).get_by_text(re.compile(r"^7 images in \d+ forwards$"))).to_be_visible()


def test_the_place_in_the_queue_and_the_wait_are_shown(visits: Visits, studio: Server) -> None:
    """Behind sixteen long images, another one waits; the numbers are those of its `accepted` event."""
    visit = arrive(visits(Look(1280), studio.url))
    page = visit.page
    draw(page, "pizza", Steps=250, Images=16)
    expect(stage(page).get_by_text(re.compile(r"step \d+ of 250")).first).to_be_visible()
    draw(page, "rocket", Steps=250, Images=16)
    line = re.compile(r"^1 before it in the queue, about \d+ s$")
    expect(stage(page).get_by_text(line).first).to_be_visible()
    for _ in range(2):
        button(stage(page), "Cancel").first.click()
    expect(button(stage(page), "Cancel")).to_have_count(0)
