"""The key: asked for by the page, kept in this tab alone, and forgotten."""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Visits
from tests.page.steps import arrive, button, draw, enter_key, field, kept
from tests.parts.browser import Look
from tests.parts.servers import ALICE, BOB

pytestmark = pytest.mark.slow

STORED = """() => JSON.stringify({
  session: { ...sessionStorage }, local: { ...localStorage }, cookie: document.cookie, url: location.href,
})"""
CLOSED = (Look(390, dark=True, closed=True), Look(1280, closed=True))


def stored(page: Page) -> str:
    return str(page.evaluate(STORED))


@pytest.mark.parametrize("look", CLOSED, ids=str)
def test_the_page_is_open_and_asks_for_the_key(visits: Visits, look: Look) -> None:
    visit = visits(look)
    visit.expect("status of 401 .*/v1/models$")
    page = visit.open()
    assert httpx.get(f"{visit.url}/v1/models").status_code == 401
    box = page.get_by_label("API key")
    expect(box).to_be_focused()
    expect(box).to_have_attribute("type", "password")
    enter_key(page, "sk-wrong-0123456789")
    expect(page.get_by_role("alert").get_by_text("does not know this key")).to_be_visible()
    box.fill(ALICE)
    page.keyboard.press("Enter")
    draw(page, "a cat")
    expect(kept(page)).to_have_count(1)


@pytest.mark.parametrize("look", CLOSED, ids=str)
def test_the_key_is_kept_in_this_tab_alone(visits: Visits, look: Look) -> None:
    """That no request has it in its address holds in every test here, by the fixture `visits`."""
    visit = arrive(visits(look))
    assert stored(visit.page).count(ALICE) == 1 and f'"session":{{"instep-key":"{ALICE}"}}' in stored(visit.page)
    visit.page.reload()
    expect(button(visit.page, "Draw")).to_be_visible()
    other = visit.context.new_page()
    other.goto(visit.url)
    expect(other.get_by_label("API key")).to_be_visible()
    assert ALICE not in stored(other)
    button(visit.page, "Forget the key").click()
    expect(visit.page.get_by_label("API key")).to_be_visible()
    assert ALICE not in stored(visit.page)


def test_a_key_sees_its_own_models_alone(visits: Visits) -> None:
    page = arrive(visits(Look(390, closed=True)), BOB).page
    expect(field(page, "Model").get_by_role("option")).to_have_text(["tiny-dit"])
    field(page, "Class").fill("red")
    button(page, "Draw").click()
    expect(kept(page)).to_have_count(1)


def test_pictures_and_previews_leave_nothing_in_the_sessions_storage(visits: Visits) -> None:
    page = arrive(visits(Look(390, closed=True))).page
    draw(page, "a cat", Images=3)
    expect(kept(page)).to_have_count(3)
    assert len(stored(page)) < 300
