"""What a person does on the page, and where they find it: by role, label and words alone."""

from __future__ import annotations

import json
import re
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.parts.browser import Visit
from tests.parts.servers import ALICE

PIXEL = """
async (image) => {
  await image.decode();
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
"""


def arrive(visit: Visit, key: str = ALICE) -> Visit:
    """Open the page, and enter the key where the server asks for one."""
    page = visit.open()
    if visit.look.closed:
        visit.expect("status of 401 .*/v1/models$")
        enter_key(page, key)
    expect(button(page, "Draw")).to_be_visible()
    return visit


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Continue").click()


def button(place: Page | Locator, name: str) -> Locator:
    return place.get_by_role("button", name=name, exact=True)


def form(page: Page) -> Locator:
    return page.get_by_role("form", name="What to draw")


def field(page: Page, label: str) -> Locator:
    """A control of the form."""
    return form(page).get_by_label(label, exact=True)


def stage(page: Page) -> Locator:
    """Where pictures are drawn."""
    return page.get_by_role("region", name="Drawing")


def gallery(page: Page) -> Locator:
    return page.get_by_role("region", name="Gallery")


def kept(page: Page, name: str | re.Pattern[str] = "") -> Locator:
    """The pictures of the gallery, or those with this name."""
    return gallery(page).get_by_role("button", name=name or re.compile("^Open ")).get_by_role("img")


def choose_model(page: Page, name: str) -> None:
    field(page, "Model").select_option(name)
    expect(field(page, "Model")).to_have_value(name)


def draw(page: Page, prompt: str, **fields: object) -> None:
    """Fill the prompt and fields by their labels, and press Draw."""
    for label, value in {"Prompt": prompt, **fields}.items():
        field(page, label).fill(str(value))
    button(page, "Draw").click()


def colour_of(image: Locator) -> tuple[int, ...]:
    """The colour of its first pixel, once it is there."""
    expect(image).to_be_visible()
    return tuple(image.evaluate(PIXEL))


def sent(page: Page, press: str = "Draw") -> dict[str, Any]:
    """The body that pressing this button sends."""
    with page.expect_request(lambda request: request.method == "POST") as waited:
        button(page, press).click()
    return dict(json.loads(waited.value.post_data or ""))
