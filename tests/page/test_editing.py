"""Starting from a picture: dropped, opened, pasted or from the gallery; a mask by brush; settings read from a file."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from app.request import Prompt
from tests.page.conftest import Visits
from tests.page.steps import (
    arrive,
    button,
    colour_of,
    drag,
    draw,
    drop,
    field,
    kept,
    paint,
    pixels,
    sent,
    source,
    stage,
)
from tests.parts.browser import Look, Visit
from tests.parts.edits import picture
from tests.parts.fake_worker import colour

pytestmark = pytest.mark.slow

PICTURE = picture(32, 32)


def file_of(array: np.ndarray, kind: str = "PNG") -> bytes:
    data = BytesIO()
    Image.fromarray(array).save(data, kind)
    return data.getvalue()


def opened(data: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(data))))


def start_from(page: Page, name: str = "cat.png", data: bytes | None = None) -> None:
    drop(page, name, "image/png", data or file_of(PICTURE))
    button(page.get_by_role("dialog", name=name), "Draw from this picture").click()
    expect(source(page)).to_be_visible()


def test_a_picture_that_is_dragged_in_is_drawn_from(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    (tmp_path / "cat.png").write_bytes(file_of(PICTURE))
    drag(page, tmp_path / "cat.png")
    button(page.get_by_role("dialog", name="cat.png"), "Draw from this picture").click()
    expect(source(page)).to_be_visible()
    field(page, "Prompt").fill("a dog")
    for label, value in {"Strength": "0.4", "Seed": "5"}.items():
        field(page, label).fill(value)
    with page.expect_request("**/v1/images/edits"):
        body = sent(page, "Draw from the picture")
    assert (opened(body.pop("image")) == PICTURE).all()
    assert (body["strength"], body["prompt"], body["seed"], body["progress"]) == (0.4, "a dog", 5, True)
    assert "mask_image" not in body and "mask" not in body
    assert colour_of(kept(page, "Open a dog")) == colour(Prompt("a dog"), 5)
    visit.reload()
    assert colour_of(kept(page, "Open a dog")) == colour(Prompt("a dog"), 5)


def test_a_picture_is_opened_by_its_button_too(visit: Visit, tmp_path: Path) -> None:
    """In each format that the server takes; another kind of file is refused in words."""
    page = visit.page
    for kind in ("PNG", "JPEG", "WEBP"):
        file = tmp_path / f"a.{kind.lower()}"
        file.write_bytes(file_of(PICTURE, kind))
        page.get_by_label("Open a picture").set_input_files(file)
        button(page.get_by_role("dialog"), "Draw from this picture").click()
        expect(source(page).get_by_text(file.name)).to_be_visible()
    button(source(page), "Remove the picture").click()
    expect(source(page)).to_have_count(0)
    drop(page, "notes.txt", "text/plain", b"words")
    expect(page.get_by_role("alert").get_by_text("notes.txt")).to_be_visible()
    button(page, "Dismiss").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_picture_of_the_gallery_is_edited(visit: Visit) -> None:
    page = visit.page
    draw(page, "a cat", Seed=5)
    expect(kept(page)).to_have_count(1)
    button(stage(page), "Edit").click()
    expect(source(page)).to_be_in_viewport()
    body = sent(page, "Draw from the picture")
    assert tuple(opened(body["image"])[0, 0]) == colour(Prompt("a cat"), 5)
    expect(kept(page)).to_have_count(2)


@pytest.mark.parametrize("look", [Look(390, dark=True, closed=True), Look(1280), Look(390)], ids=str)
def test_only_what_the_brush_painted_is_drawn_anew(visits: Visits, look: Look) -> None:
    """By finger on a phone, by mouse on a desktop: outside the mask the answer is the source, pixel for pixel."""
    page = arrive(visits(look)).page
    start_from(page)
    paint(page)
    field(page, "Prompt").fill("a dog")
    field(page, "Seed").fill("5")
    field(page, "Mask blur").fill("0")
    body = sent(page, "Draw from the picture")
    mask = opened(body["mask_image"])
    painted = (mask if mask.ndim == 2 else mask[..., 0]) > 127
    assert painted[16, 16] and not painted[0].any() and not painted[-1].any() and 0.02 < painted.mean() < 0.6
    expect(kept(page)).to_have_count(1)
    drawn = pixels(kept(page))
    assert (drawn[~painted] == PICTURE[~painted]).all() and (drawn[painted] == colour(Prompt("a dog"), 5)).all()


def test_a_mask_is_undone_and_cleared(visit: Visit) -> None:
    page = visit.page
    start_from(page)
    paint(page)
    button(source(page), "Undo").click()
    field(page, "Prompt").fill("a dog")
    assert "mask_image" not in sent(page, "Draw from the picture")
    paint(page)
    assert "mask_image" in sent(page, "Draw from the picture")
    button(source(page), "Clear mask").click()
    assert "mask_image" not in sent(page, "Draw from the picture")
    expect(kept(page)).to_have_count(3)


def downloaded(page: Page, folder: Path) -> bytes:
    with page.expect_download() as waited:
        button(stage(page), "Download").first.click()
    waited.value.save_as(folder / "a.png")
    return (folder / "a.png").read_bytes()


def test_parameters_are_read_back_from_a_dropped_picture(visits: Visits, look: Look, tmp_path: Path) -> None:
    """Drawn in one browser, dropped in another that never saw it."""
    page = arrive(visits(look)).page
    field(page, "Sampler").select_option("flow_dpmpp_2m")
    page.get_by_label("ink", exact=True).check()
    fields: dict[str, Any] = {"Steps": 3, "Guidance": 2.5, "Seed": 9, "Negative prompt": "dull", "Size": "64x64"}
    draw(page, "a red cat", **fields)
    expect(kept(page)).to_have_count(1)
    data = downloaded(page, tmp_path)
    other = arrive(visits(look)).page
    drop(other, "a.png", "image/png", data)
    dialog = other.get_by_role("dialog", name="a.png")
    expect(dialog.get_by_text("a red cat")).to_be_visible()
    button(dialog, "Use its settings").click()
    for label, value in {"Prompt": "a red cat", **fields}.items():
        expect(field(other, label)).to_have_value(str(value))
    expect(field(other, "Sampler")).to_have_value("flow_dpmpp_2m")
    expect(other.get_by_label("ink", exact=True)).to_be_checked()
    assert sent(other)["seed"] == 9
    assert colour_of(kept(other)) == colour(Prompt("a red cat"), 9)


def test_settings_of_a_model_that_is_not_here_are_used_as_far_as_they_go(visit: Visit) -> None:
    """A picture of another program, with A1111's text alone."""
    page = visit.page
    line = "Steps: 7, Sampler: Euler a, CFG scale: 6.5, Seed: 42, Size: 64x48, Model: other"
    text = f"an old barn\nNegative prompt: fog\n{line}"
    image = BytesIO()
    info = PngInfo()
    info.add_text("parameters", text)
    Image.fromarray(PICTURE).save(image, "PNG", pnginfo=info)
    drop(page, "barn.png", "image/png", image.getvalue())
    button(page.get_by_role("dialog"), "Use its settings").click()
    expected = {"Prompt": "an old barn", "Negative prompt": "fog", "Steps": "7", "Guidance": "6.5", "Seed": "42"}
    for label, value in expected.items():
        expect(field(page, label)).to_have_value(value)


def test_a_picture_without_parameters_offers_only_to_draw_from_it(visit: Visit) -> None:
    drop(visit.page, "cat.png", "image/png", file_of(PICTURE))
    dialog = visit.page.get_by_role("dialog", name="cat.png")
    expect(button(dialog, "Draw from this picture")).to_be_visible()
    expect(button(dialog, "Use its settings")).to_have_count(0)


def test_a_broken_picture_is_refused_in_words(visit: Visit) -> None:
    page = visit.page
    visit.expect("status of 400 .*/v1/images/edits", "failed: blob:")
    drop(page, "broken.png", "image/png", file_of(PICTURE)[:100])
    button(page.get_by_role("dialog"), "Draw from this picture").click()
    button(page, "Draw from the picture").click()
    expect(page.get_by_role("alert").first).to_be_visible()
