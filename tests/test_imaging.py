"""Pixels survive every door; the fast PNG writer is held to Pillow's decoder, its twin."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.errors import InvalidValue
from app.imaging import a1111, encode_image, grid

FACTS = {
    "prompt": "a red apple",
    "negative_prompt": "worm",
    "num_inference_steps": 4,
    "sampler": "flow_euler",
    "guidance_scale": 1.5,
    "seed": 2**63 - 1,
    "size": "64x48",
    "model": "tiny",
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Half smooth, half noise: both ends of what deflate and filters meet."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 2, 3])
    noise = rng.integers(0, 256, (height, width, 3))
    return np.where(np.arange(width)[None, :, None] < width // 2, ramp, noise).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (48, 64), (333, 129)])
def test_png_decodes_to_the_same_pixels_as_pillows(shape: tuple[int, int]) -> None:
    pixels = picture(*shape)
    twin = BytesIO()
    Image.fromarray(pixels).save(twin, "png")
    ours = Image.open(BytesIO(encode_image(pixels, "png", None, FACTS)))
    assert (ours.mode, ours.format) == ("RGB", "PNG")
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(Image.open(twin)))
    np.testing.assert_array_equal(np.asarray(ours), pixels)


def test_png_of_a_view_that_is_not_contiguous() -> None:
    pixels = picture(40, 40)[::2, 1::3]
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(encode_image(pixels, "png", None, {})))), pixels)


@pytest.mark.parametrize("prompt", ["a red apple", "Äpfel", "苹果 🍎", "two\nlines, Steps: 9"])
def test_text_chunks_survive(prompt: str) -> None:
    facts = {**FACTS, "prompt": prompt}
    image = Image.open(BytesIO(encode_image(picture(8, 8), "png", None, facts)))
    image.load()
    assert json.loads(image.text["instep"]) == facts
    assert image.text["parameters"] == a1111(facts)
    assert f"Seed: {2**63 - 1}" in image.text["parameters"]


def test_nul_in_a_prompt_does_not_end_the_text() -> None:
    image = Image.open(BytesIO(encode_image(picture(8, 8), "png", None, {**FACTS, "prompt": "a\0b"})))
    image.load()
    assert image.text["parameters"].startswith("a\ufffdb\n")
    assert json.loads(image.text["instep"])["prompt"] == "a\0b"


def test_a1111_line() -> None:
    assert a1111(FACTS) == (
        "a red apple\nNegative prompt: worm\n"
        "Steps: 4, Sampler: flow_euler, CFG scale: 1.5, Seed: 9223372036854775807, Size: 64x48, Model: tiny"
    )


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_lossy_formats_follow_the_quality_and_keep_the_facts(format: str) -> None:
    pixels = picture(64, 64)
    low, default, high = (encode_image(pixels, format, quality, FACTS) for quality in (10, None, 100))
    assert len(low) < len(default) < len(high)
    image = Image.open(BytesIO(high))
    assert image.format == format.upper()
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[8:].decode("utf-16-be") == a1111(FACTS)
    assert np.abs(np.asarray(image, np.int16) - pixels).mean() < np.abs(decoded(low) - pixels).mean()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)), np.int16)


def test_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidValue, match="png, jpeg, webp"):
        encode_image(picture(2, 2), "gif", None, {})


def test_grid_places_row_by_row_and_leaves_black() -> None:
    cells = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = grid(cells, 2)
    assert sheet.shape == (4, 6, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (1, 2), (0, 3), (2, 0), (3, 5))] == [10, 10, 20, 30, 0]


def test_grid_is_never_wider_than_its_pictures() -> None:
    assert grid([np.zeros((2, 3, 3), np.uint8)] * 2, 9).shape == (2, 6, 3)
