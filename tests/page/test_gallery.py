"""The gallery: what stays after a reload, is opened, downloaded and deleted, and leaves no blob's address behind."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from app.request import Prompt
from tests.page.conftest import Visits
from tests.page.steps import arrive, button, colour_of, draw, expect_no_window, field, gallery, kept, stage
from tests.parts.browser import Look, Visit
from tests.parts.fake_worker import colour

pytestmark = pytest.mark.slow


def test_pictures_survive_a_reload_in_order_and_a_new_tab_has_them_too(visit: Visit) -> None:
    page = visit.page
    for number, prompt in enumerate(("first", "second"), 1):
        draw(page, prompt, Seed=5)
        expect(kept(page)).to_have_count(number)
    visit.reload()
    expect(kept(page)).to_have_count(2)
    expected = [colour(Prompt(prompt), 5) for prompt in ("second", "first")]
    assert [colour_of(one) for one in kept(page).all()] == expected
    other = visit.context.new_page()
    other.goto(visit.url)
    visit.expect("status of 401 .*/v1/models$")
    expect(kept(other)).to_have_count(2)


def test_a_picture_opens_large_with_its_settings_and_closes(visit: Visit) -> None:
    page = visit.page
    draw(page, "a cat", Seed=5, Steps=3)
    kept(page).click()
    dialog = page.get_by_role("dialog", name="a cat")
    assert colour_of(dialog.get_by_role("img", name="a cat")) == colour(Prompt("a cat"), 5)
    for words in ("Steps", "flow_euler", "tiny-sd3"):
        expect(dialog.get_by_text(words, exact=True)).to_be_visible()
    page.keyboard.press("Escape")
    expect_no_window(page)
    expect(gallery(page).get_by_role("button", name="Open a cat")).to_be_focused()
    kept(page).click()
    button(dialog, "Close").click()
    expect_no_window(page)


def test_a_download_is_the_servers_file_with_its_parameters(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    draw(page, "a cat", Seed=5, Size="48x32")
    with page.expect_download() as waited:
        button(stage(page), "Download").click()
    assert waited.value.suggested_filename == "instep-5.png"
    waited.value.save_as(tmp_path / "a.png")
    picture = Image.open(BytesIO((tmp_path / "a.png").read_bytes()))
    assert picture.size == (48, 32) and picture.getpixel((0, 0)) == colour(Prompt("a cat"), 5)
    assert json.loads(picture.info["instep"])["seed"] == 5 and "a cat" in picture.info["parameters"]


def test_what_is_deleted_stays_deleted(visit: Visit) -> None:
    page = visit.page
    draw(page, "a cat", Images=3)
    expect(kept(page)).to_have_count(3)
    kept(page).first.click()
    button(page.get_by_role("dialog"), "Delete").click()
    expect(kept(page)).to_have_count(2)
    visit.reload()
    expect(kept(page)).to_have_count(2)
    page.once("dialog", lambda asked: asked.dismiss())
    button(gallery(page), "Delete all").click()
    expect(kept(page)).to_have_count(2)
    page.once("dialog", lambda asked: asked.accept())
    button(gallery(page), "Delete all").click()
    expect(kept(page)).to_have_count(0)
    visit.reload()
    expect(gallery(page).get_by_text("Pictures that you draw stay here")).to_be_visible()


@pytest.mark.parametrize("look", [Look(390)], ids=str)
def test_200_pictures_with_previews_leave_no_addresses_of_blobs_behind(visits: Visits, look: Look) -> None:
    """Open are those of the images that are on the page, and none once they are gone."""
    page = (visit := arrive(visits(look))).page
    draw(page, "a cat", Images=10, Steps=4)
    for _ in range(19):
        field(page, "Prompt").press("Enter")
    expect(gallery(page).get_by_text("200 pictures")).to_be_visible(timeout=100_000)
    expect(stage(page).get_by_role("progressbar")).to_have_count(0)
    shown = page.get_by_role("img").filter(visible=True).count()
    assert 0 < shown < 150 and visit.blobs() == shown
    page.once("dialog", lambda asked: asked.accept())
    button(gallery(page), "Delete all").click()
    for one in stage(page).get_by_role("button", name="Take off the page").all()[::-1]:
        one.click()
    expect(page.get_by_role("img")).to_have_count(0)
    assert visit.blobs() == 0


def test_a_long_gallery_shows_more_when_asked(visits: Visits) -> None:
    page = arrive(visits(Look(390))).page
    for _ in range(3):
        draw(page, "a cat", Images=10, Steps=1)
    expect(gallery(page).get_by_text("30 pictures")).to_be_visible()
    expect(kept(page)).to_have_count(24)
    button(gallery(page), "Show more").click()
    expect(kept(page)).to_have_count(30)
    assert field(page, "Images").input_value() == "10"
