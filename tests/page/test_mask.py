"""The brush for a mask, app/page/mask.js, painted with the mouse, with a finger and by keys."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from tests.page.modules import opened
from tests.parts.edits import half_mask, picture
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow

SHOW = """
async ({ file, mask, width }) => {
  const { MaskEditor } = await import("/page/mask.js");
  const { html } = await import("/page/html.js");
  const { render } = await import("/page/lib/preact.js");
  const blob = (text) => text && new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
  const place = document.body.appendChild(document.createElement("div"));
  place.style.width = `${width}px`;
  Object.assign(window, { changes: [], value: blob(mask), picture: blob(file) });
  window.draw = () => render(html`<${MaskEditor} picture=${picture} value=${value} onChange=${changed} />`, place);
  window.changed = (mask) => {
    changes.push(mask);
    value = mask;
    draw();
  };
  window.blobOf = blob;
  window.place = place;
  window.gone = () => render(null, place);
  draw();
}
"""
LAST = """
async () => {
  const bytes = new Uint8Array(await changes.at(-1).arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}
"""


def encoded(pixels: np.ndarray) -> str:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return b64encode(out.getvalue()).decode()


class Editor:
    """The editor of a picture on a page, shown this wide, and the masks that it has sent."""

    def __init__(self, page: Page, pixels: np.ndarray, mask: np.ndarray | None = None, width: int = 300) -> None:
        self.page = page
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.evaluate(SHOW, {"file": encoded(pixels), "mask": None if mask is None else encoded(mask), "width": width})
        expect(page.locator(".mask-stage")).to_have_attribute("aria-busy", "false")
        self.canvas = page.get_by_label("Mask", exact=True)
        self.box = self.canvas.bounding_box() or {}

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def spot(self, across: float, down: float) -> tuple[float, float]:
        return self.box["x"] + across * self.box["width"], self.box["y"] + down * self.box["height"]

    def paint(self, *spots: tuple[float, float]) -> None:
        """A stroke with the mouse through these spots, as shares of the picture."""
        before = self.sent()
        self.page.mouse.move(*self.spot(*spots[0]))
        self.page.mouse.down()
        for spot in spots[1:]:
            self.page.mouse.move(*self.spot(*spot))
        self.page.mouse.up()
        self.wait(before)

    def press(self, name: str) -> None:
        before = self.sent()
        self.button(name).click()
        self.wait(before)

    def sent(self) -> int:
        return int(self.page.evaluate("changes.length"))

    def wait(self, before: int) -> None:
        self.page.wait_for_function("(count) => changes.length > count", arg=before)

    def mask(self) -> np.ndarray | None:
        """The last mask: bool [height, width]."""
        if self.page.evaluate("changes.at(-1)") is None:
            return None
        with Image.open(BytesIO(b64decode(self.page.evaluate(LAST)))) as file:
            assert file.format == "PNG"
            levels = np.asarray(file.convert("L"))
        assert {*np.unique(levels).tolist()} <= {0, 255}
        return levels == 255

    def painted(self) -> np.ndarray:
        mask = self.mask()
        assert mask is not None
        return mask


@pytest.fixture
def editor(tab: Page) -> Iterator[Editor]:
    editor = Editor(tab, picture(120, 80))
    yield editor
    assert editor.faults == []


def disc(width: int, height: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def alike(one: np.ndarray, other: np.ndarray, share: float = 0.1) -> bool:
    """Whether two masks differ in no more than this share of the smaller one."""
    return bool((one != other).sum() <= share * min(one.sum(), other.sum()))


def test_a_click_paints_a_disc_as_large_as_the_brush_says(editor: Editor) -> None:
    editor.page.get_by_label("Brush size").fill("20")
    editor.paint((0.5, 0.25))
    assert editor.painted().shape == (80, 120)
    assert alike(editor.painted(), disc(120, 80, 60, 20, 10), 0.15)


def test_a_stroke_has_no_gaps(editor: Editor) -> None:
    editor.page.get_by_label("Brush size").fill("6")
    editor.paint((0.1, 0.5), (0.9, 0.5), (0.9, 0.9))
    mask = editor.painted()
    assert mask[40, 12:108].all() and mask[40:72, 108].all()
    assert not mask[:35].any() and not mask[46:, :100].any()


def test_erase_invert_undo_and_clear(editor: Editor) -> None:
    expect(editor.button("Clear mask")).to_be_disabled()
    expect(editor.button("Undo")).to_be_disabled()
    editor.page.get_by_label("Brush size").fill("20")
    editor.paint((0.2, 0.5), (0.8, 0.5))
    line = editor.painted()
    editor.button("Erase").click()
    expect(editor.button("Erase")).to_have_attribute("aria-pressed", "true")
    editor.paint((0.5, 0.5))
    hole = editor.painted()
    assert line[40, 60] and not hole[40, 60] and alike(line & ~hole, disc(120, 80, 60, 40, 10), 0.15)
    editor.press("Invert")
    assert np.array_equal(editor.painted(), ~hole)
    for wanted in (hole, line):
        editor.press("Undo")
        assert np.array_equal(editor.painted(), wanted)
    editor.press("Clear mask")
    assert editor.mask() is None
    editor.press("Undo")
    assert np.array_equal(editor.painted(), line)
    editor.press("Undo")
    assert editor.mask() is None
    expect(editor.button("Undo")).to_be_disabled()


def test_an_inverted_nothing_is_everything(editor: Editor) -> None:
    editor.press("Invert")
    assert editor.painted().all()
    editor.press("Invert")
    assert editor.mask() is None


def test_the_last_thirty_strokes_can_be_undone(editor: Editor) -> None:
    for one in range(33):
        editor.paint((0.02 + 0.03 * one, 0.5))
    presses = 0
    while editor.button("Undo").is_enabled():
        editor.press("Undo")
        presses += 1
    assert presses == 30
    mask = editor.painted()
    assert mask[40, 2] and mask[40, 9] and not mask[:, 30:].any()


def test_it_is_painted_by_keys_alone(editor: Editor) -> None:
    editor.page.get_by_label("Brush size").fill("8")
    editor.canvas.focus()
    before, keys = editor.sent(), editor.page.keyboard
    keys.down(" ")
    for _ in range(5):
        keys.press("ArrowRight")
    keys.up(" ")
    editor.wait(before)
    mask = editor.painted()
    assert mask[40, 60:70].all() and not mask[40, 80:].any() and not mask[40, :50].any()
    before = editor.sent()
    keys.press("Control+z")
    editor.wait(before)
    assert editor.mask() is None
    for _ in range(200):
        keys.press("Shift+ArrowUp")
    before = editor.sent()
    keys.press(" ")
    editor.wait(before)
    assert editor.painted()[0, 70] and not editor.painted()[10:].any()


@pytest.mark.parametrize("width", [60, 300, 900])
@pytest.mark.parametrize("ratio", [1, 2])
def test_any_scale_and_pixel_ratio(browser: Browser, site: str, width: int, ratio: int) -> None:
    with browser.new_context(device_scale_factor=ratio, viewport={"width": 1200, "height": 1200}) as context:
        editor = Editor(opened(context, site), picture(120, 80), width=width)
        assert abs(editor.box["width"] - width) <= 1 and abs(editor.box["height"] - width * 80 / 120) <= 1
        editor.page.get_by_label("Brush size").fill("30")
        editor.paint((0.25, 0.5), (0.25, 0.5))
        assert alike(editor.painted(), disc(120, 80, 30, 40, 15), 0.15)


def test_a_finger_paints_and_does_not_scroll(browser: Browser, site: str) -> None:
    with browser.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 600}) as context:
        page = opened(context, site)
        editor = Editor(page, picture(120, 80))
        page.evaluate("document.body.style.height = '3000px'")
        session = context.new_cdp_session(page)
        before = editor.sent()

        def touch(kind: str, *spots: tuple[float, float]) -> None:
            points = [{"x": x, "y": y, "id": one} for one, (x, y) in enumerate(spots)]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        touch("touchStart", editor.spot(0.5, 0.9))
        touch("touchStart", editor.spot(0.5, 0.9), editor.spot(0.1, 0.1))  # a second finger paints nothing
        for step in range(1, 9):
            touch("touchMove", editor.spot(0.5, 0.9 - step / 10), editor.spot(0.1, 0.1 + step / 20))
        touch("touchEnd")
        editor.wait(before)
        mask = editor.painted()
        assert mask[10:70, 60].all() and not mask[:, :40].any()
        assert page.evaluate("scrollY") == 0


def test_a_large_picture_gets_a_mask_of_its_size(tab: Page) -> None:
    editor = Editor(tab, np.zeros((2100, 3000, 3), np.uint8))
    editor.paint((0.5, 0.5))
    assert editor.painted().shape == (2100, 3000) and editor.painted()[1050, 1500]


def test_a_tiny_picture(tab: Page) -> None:
    editor = Editor(tab, picture(16, 16))
    editor.page.get_by_label("Brush size").fill("4")
    editor.paint((0.5, 0.5))
    assert editor.painted().shape == (16, 16) and 8 <= editor.painted().sum() <= 16


def test_a_mask_from_before_is_taken_over(tab: Page) -> None:
    mask = half_mask(120, 80)
    editor = Editor(tab, picture(120, 80), mask)
    editor.press("Invert")
    assert np.array_equal(editor.painted(), mask == 0)
    tab.evaluate("(text) => { value = blobOf(text); draw(); }", encoded(255 - mask))
    editor.page.wait_for_timeout(200)
    editor.press("Invert")
    assert np.array_equal(editor.painted(), mask == 255)


def test_another_picture_begins_anew(editor: Editor) -> None:
    editor.paint((0.5, 0.5))
    editor.page.evaluate("(text) => { picture = blobOf(text); value = null; draw(); }", encoded(picture(40, 60)))
    expect(editor.page.locator(".mask-picture")).to_have_attribute("width", "40")
    expect(editor.button("Undo")).to_be_disabled()
    editor.press("Invert")
    assert editor.painted().shape == (60, 40)


def test_an_editor_that_is_gone_sends_nothing(editor: Editor) -> None:
    x, y = editor.spot(0.5, 0.5)
    editor.page.mouse.move(x, y)
    editor.page.mouse.down()
    editor.page.evaluate("() => { addEventListener('lostpointercapture', gone); }")
    editor.page.mouse.up()
    eventually(lambda: editor.page.locator(".mask-editor").count() == 0)
    editor.page.wait_for_timeout(300)
    assert editor.sent() == 0


def test_a_file_that_is_no_picture(tab: Page) -> None:
    faults: list[Any] = []
    tab.on("pageerror", lambda error: faults.append(error))
    tab.evaluate(SHOW, {"file": b64encode(b"junk").decode(), "mask": None, "width": 300})
    expect(tab.get_by_role("alert")).to_contain_text("cannot show")
    tab.evaluate("(text) => { picture = blobOf(text); draw(); }", encoded(picture(40, 60)))
    expect(tab.get_by_label("Mask", exact=True)).to_be_visible()
    assert faults == []


@pytest.mark.parametrize("level", [0, 90, 128, 255])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_painted_part_shows_on_any_picture(tab: Page, level: int, scheme: Any) -> None:
    tab.emulate_media(color_scheme=scheme)
    editor = Editor(tab, np.full((80, 120, 3), level, np.uint8))

    def shown() -> np.ndarray:
        return np.asarray(Image.open(BytesIO(editor.canvas.screenshot())).convert("L")).astype(int)

    before = shown()
    editor.paint((0.5, 0.5))
    editor.page.mouse.move(0, 0)
    assert (abs(shown() - before) > 40).sum() > 100, json.dumps(editor.box)
