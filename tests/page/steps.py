"""What a person does on the page, and where they find it: by role, label and words alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Locator, Page, expect

from tests.parts.browser import Visit
from tests.parts.servers import ALICE

PIXELS = """
async (image) => {
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0);
  return [width, height, ...context.getImageData(0, 0, width, height).data];
}
"""
TRANSFER = """
([name, type, encoded]) => {
  const transfer = new DataTransfer();
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
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
    """A control of the form. A list of choices is found by its role: the words of its label would have the choices."""
    choices = form(page).get_by_role("combobox", name=label, exact=True)
    return choices.or_(form(page).get_by_label(label, exact=True))


def stage(page: Page) -> Locator:
    """Where pictures are drawn."""
    return page.get_by_role("region", name="Drawing")


def gallery(page: Page) -> Locator:
    return page.get_by_role("region", name="Gallery")


def kept(page: Page, name: str | re.Pattern[str] = "") -> Locator:
    """The pictures of the gallery, or those with this name."""
    return gallery(page).get_by_role("button", name=name or re.compile("^Open ")).get_by_role("img")


def expect_no_window(page: Page) -> None:
    """A window that is closed has no role any more, but only once it has left the document another one can open."""
    expect(page.locator("dialog")).to_have_count(0)


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
    return tuple(int(level) for level in pixels(image)[0, 0])


def sent(page: Page, press: str = "Draw") -> dict[str, Any]:
    """The body that pressing this button sends."""
    with page.expect_request(lambda request: request.method == "POST") as waited:
        button(page, press).click()
    return dict(json.loads(waited.value.post_data or ""))


def source(page: Page) -> Locator:
    """The picture that the next one starts from."""
    return page.get_by_role("region", name="Picture to start from")


def drag(page: Page, file: Path) -> None:
    """Drag a file from outside to the page and let go, as the browser itself has it."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": data})


def drop(page: Page, name: str, kind: str, data: bytes) -> None:
    """What the page gets when a file with these bytes is dropped there."""
    encoded = base64.b64encode(data).decode()
    transfer = page.evaluate_handle(TRANSFER, [name, kind, encoded])
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


def paint(page: Page) -> None:
    """Draw a stroke with the brush through the middle of the source, by finger where there is touch."""
    canvas = source(page).get_by_role("application", name="Mask")
    expect(canvas.locator("..")).to_have_attribute("aria-busy", "false")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    spots = [(box["x"] + box["width"] * share, box["y"] + box["height"] / 2) for share in (0.4, 0.45, 0.5, 0.55, 0.6)]
    if not page.evaluate("navigator.maxTouchPoints"):
        page.mouse.move(*spots[0])
        page.mouse.down()
        for spot in spots[1:]:
            page.mouse.move(*spot)
        page.mouse.up()
        return
    session = page.context.new_cdp_session(page)
    for kind, touched in (("touchStart", spots[:1]), *(("touchMove", [spot]) for spot in spots[1:]), ("touchEnd", [])):
        points = [{"x": x, "y": y} for x, y in touched]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def pixels(image: Locator) -> np.ndarray:
    """uint8 [height, width, 3] of an image on the page, once it is there."""
    expect(image).to_be_visible()
    width, height, *data = image.evaluate(PIXELS)
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]
