"""Drawing on the page: the whole way in every look, what is seen meanwhile, cancelling, and failures."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from app.request import Prompt
from tests.page.conftest import Visits
from tests.page.steps import arrive, button, colour_of, draw, gallery, kept, stage
from tests.parts.browser import Look, Visit
from tests.parts.fake_worker import colour

pytestmark = pytest.mark.slow
EIGHT = [Look(width, dark, closed) for width in (390, 1280) for dark in (False, True) for closed in (False, True)]


@pytest.mark.parametrize("look", EIGHT, ids=str)
def test_a_picture_is_drawn_seen_growing_kept_and_there_after_a_reload(visits: Visits, look: Look) -> None:
    visit = arrive(visits(look))
    page = visit.page
    draw(page, "!slow 2", Seed=5)
    progress = stage(page).get_by_role("progressbar")
    expect(progress).to_be_visible()
    expect(stage(page).get_by_text(re.compile(r"step [1-7] of 8"))).to_be_visible()
    assert colour_of(stage(page).get_by_role("img", name="Preview of !slow 2")) == colour(Prompt("!slow 2"), 5)
    expect(kept(page)).to_have_count(1)
    expect(progress).to_have_count(0)
    expect(stage(page).get_by_text(re.compile(r"^8 steps in .* seed 5$"))).to_be_visible()
    page.reload()
    expect(kept(page)).to_have_count(1)
    assert colour_of(kept(page, "Open !slow 2")) == colour(Prompt("!slow 2"), 5)
    expect(gallery(page).get_by_text("1 picture, kept in this browser")).to_be_visible()


def test_cancel_stops_the_server_at_its_next_step(visit: Visit) -> None:
    page = visit.page
    visit.expect("ERR_ABORTED")
    draw(page, "!slow 600")
    expect(stage(page).get_by_text(re.compile("step 1 of 8"))).to_be_visible()
    button(stage(page), "Cancel").click()
    expect(stage(page).get_by_text("cancelled", exact=True)).to_be_visible()
