"""Drawing on the page: the whole way in every look, what is seen meanwhile, cancelling, and failures."""

from __future__ import annotations

import re

import httpx
import pytest
from playwright.sync_api import expect

from app.request import Prompt
from tests.page.conftest import Visits
from tests.page.steps import arrive, button, colour_of, draw, gallery, kept, stage
from tests.parts.browser import Look, Visit
from tests.parts.fake_worker import colour
from tests.parts.servers import ALICE, bearer
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow
EIGHT = [Look(width, dark, closed) for width in (390, 1280) for dark in (False, True) for closed in (False, True)]


def running(visit: Visit) -> int:
    """Images that the server has in its hands."""
    return int(httpx.get(f"{visit.url}/health", headers=bearer(ALICE)).json()["running"])


@pytest.mark.parametrize("look", EIGHT, ids=str)
def test_a_picture_is_drawn_seen_growing_kept_and_there_after_a_reload(visits: Visits, look: Look) -> None:
    visit = arrive(visits(look))
    page = visit.page
    draw(page, "!slow 1", Seed=5)
    progress = stage(page).get_by_role("progressbar")
    expect(progress).to_be_in_viewport()
    expect(stage(page).get_by_text(re.compile(r"step [1-7] of 8"))).to_be_visible()
    assert colour_of(stage(page).get_by_role("img", name="Preview of !slow 1")) == colour(Prompt("!slow 1"), 5)
    expect(kept(page)).to_have_count(1)
    expect(progress).to_have_count(0)
    expect(stage(page).get_by_text(re.compile(r"^8 steps in .* seed 5$"))).to_be_visible()
    visit.reload()
    expect(kept(page)).to_have_count(1)
    assert colour_of(kept(page, "Open !slow 1")) == colour(Prompt("!slow 1"), 5)
    expect(gallery(page).get_by_text("1 picture, kept in this browser")).to_be_visible()


def test_progress_counts_every_step_and_previews_follow(visit: Visit) -> None:
    """All values that the progress bar had, in order."""
    page = visit.page
    draw(page, "!slow 2", Steps=5)
    bar = stage(page).get_by_role("progressbar", name="Progress of !slow 2")
    values = bar.evaluate("""(bar) => new Promise((done) => {
      const seen = [bar.value];
      const look = () => { if (!bar.isConnected) done(seen); else {
        if (seen.at(-1) !== bar.value) seen.push(bar.value);
        requestAnimationFrame(look); } };
      look();
    })""")
    assert values == sorted(values) and len(values) >= 3 and set(values) <= {*range(6)}
    expect(kept(page)).to_have_count(1)


def test_several_images_of_a_request_each_have_their_own_progress(visit: Visit) -> None:
    draw(visit.page, "!slow 1", Images=3, Seed=1)
    for place in (1, 2, 3):
        name = f"Progress of !slow 1, image {place}"
        expect(stage(visit.page).get_by_role("progressbar", name=name)).to_be_visible()
    expect(kept(visit.page)).to_have_count(3)
    assert {colour_of(one) for one in kept(visit.page).all()} == {colour(Prompt("!slow 1"), seed) for seed in (1, 2, 3)}


def test_cancel_frees_the_server(visit: Visit) -> None:
    draw(visit.page, "!slow 600")
    expect(stage(visit.page).get_by_text("step 1 of 8")).to_be_visible()
    assert running(visit) == 1
    button(stage(visit.page), "Cancel").click()
    expect(stage(visit.page).get_by_text("cancelled", exact=True)).to_be_visible()
    eventually(lambda: running(visit) == 0)
    expect(stage(visit.page).get_by_role("progressbar")).to_have_count(0)
    draw(visit.page, "a cat")
    expect(kept(visit.page)).to_have_count(1)


def test_leaving_the_page_frees_the_server(visit: Visit) -> None:
    visit.expect("failed: .*/v1/models/tiny-sd3 net::ERR_ABORTED")  # a look at the model may be under way
    draw(visit.page, "!slow 600")
    eventually(lambda: running(visit) == 1)
    visit.page.reload()
    eventually(lambda: running(visit) == 0)


def test_a_failure_is_said_in_the_servers_words_and_can_be_tried_again(visit: Visit) -> None:
    page = visit.page
    draw(page, "!nan")
    expect(stage(page).get_by_role("alert").get_by_text("not finite")).to_be_visible()
    button(stage(page), "Try again").click()
    expect(stage(page).get_by_role("alert").get_by_text("not finite")).to_be_visible()
    draw(page, "a cat")
    expect(kept(page)).to_have_count(1)
    expect(stage(page).get_by_role("alert")).to_have_count(1)
    expect(gallery(page).get_by_text("1 picture")).to_be_visible()
