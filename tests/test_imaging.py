"""Pixels survive every door; the fast PNG writer is held to Pillow's decoder, its twin."""

from __future__ import annotations

import json
from importlib.metadata import version
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from app.imaging import FORMATS, GENERATED, LONGEST, Format, a1111, encode_image, grid, left_out, sheet_size
from tests.parts.pictures import LEFT_OUT, PACKET, REQUEST, TOOL, TYPE, chunks, properties, segments

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


HOSTILE = {
    "markup": '</rdf:li><!-- & <x a="1">\' &amp; &#0; ]]> <?xpacket end="w"?>',
    "controls": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "no XML": "\ud83c lone, \udf4e lone, \ufffe \uffff \0",
    "scripts": "苹果 🍎 Äpfel \u202e right to left \U0010ffff",
    "a segment": "x" * 70_000,
    "many segments": "🍎" * 30_000,
}
"""Prompts that end fields, documents or segments of files whose writer does not look."""


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
    for format in ("jpeg", "webp"):
        comment = comment_of(encode_image(picture(8, 8), format, None, {**FACTS, "prompt": "a\0b"}))
        assert comment == image.text["parameters"]


def comment_of(data: bytes) -> str:
    """The EXIF UserComment, without the character code before it."""
    comment = Image.open(BytesIO(data)).getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("facts", [{}, FACTS], ids=["preview", "image"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_file_says_that_a_model_made_it(format: str, facts: dict) -> None:
    data = encode_image(picture(8, 8), format, None, facts)
    told = properties(data)
    assert told[TYPE] == GENERATED == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    assert told[TOOL] == f"Instep {version('instep')}"
    assert set(told) - {TYPE, TOOL} == ({REQUEST} if facts and format != "png" else set())
    image = Image.open(BytesIO(data))
    image.load()
    xmp = image.info["xmp"]
    assert GENERATED in (xmp.decode() if isinstance(xmp, bytes) else xmp)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_lossy_file_has_the_request_and_says_what_it_left_out(format: str, kind: str) -> None:
    facts = {**FACTS, "prompt": HOSTILE[kind], "negative_prompt": HOSTILE[kind][::-1]}
    data = encode_image(picture(8, 8), format, None, facts)
    told = properties(data)
    without = {"a segment": ["prompt", "negative_prompt"], "many segments": ["prompt", "negative_prompt"]}.get(kind, [])
    without = without if format == "jpeg" else []
    assert json.loads(told[REQUEST]) == {name: value for name, value in facts.items() if name not in without}
    assert told.get(LEFT_OUT, "") == ", ".join(without) and left_out(format, facts) == without
    assert (told[TYPE], told[TOOL]) == (GENERATED, f"Instep {version('instep')}")
    assert comment_of(data).endswith("Size: 64x48, Model: tiny")
    assert Image.open(BytesIO(data)).convert("RGB").size == (8, 8)


def jpeg_of(prompt: str) -> bytes:
    return encode_image(picture(8, 8), "jpeg", None, {**FACTS, "prompt": prompt})


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_whole_request_survives_in_a_png(kind: str) -> None:
    facts = {**FACTS, "prompt": HOSTILE[kind]}
    data = encode_image(picture(8, 8), "png", None, facts)
    assert [key for key, _ in chunks(data)].index(b"IDAT") == len(chunks(data)) - 2
    image = Image.open(BytesIO(data))
    image.load()
    assert json.loads(image.text["instep"]) == facts
    assert image.text["parameters"].endswith("Model: tiny") and properties(data)[TYPE] == GENERATED


@pytest.mark.parametrize("over", [0, 1])
def test_a_packet_at_the_end_of_a_segment(over: int) -> None:
    """The longest packet that a JPEG segment holds by the specification, and one byte more."""
    empty = [body for _, body in segments(jpeg_of("")) if body.startswith(PACKET)]
    data = jpeg_of("x" * (65_502 + over - len(empty[0]) + len(PACKET)))
    told = properties(data)
    assert json.loads(told[REQUEST]).keys() == FACTS.keys() - ({"prompt"} if over else set())
    assert told.get(LEFT_OUT) == ("prompt" if over else None)
    assert all(len(body) <= 65_533 for _, body in segments(data))


def test_the_longest_facts_are_left_out_first_and_no_more_than_need_be() -> None:
    long = {**FACTS, "prompt": "x" * 40_000, "negative_prompt": "y" * 50_000}
    assert left_out("jpeg", long) == ["negative_prompt"]
    assert left_out("jpeg", {**long, "negative_prompt": "&" * 10_000}) == ["negative_prompt"], "in XML & is 5 letters"
    assert left_out("png", long) == left_out("webp", long) == left_out("jpeg", FACTS) == []


@pytest.mark.parametrize("letter", ["x", "🍎"])
def test_a_comment_that_is_too_long_loses_prompt_and_no_parameter(letter: str) -> None:
    comment = comment_of(jpeg_of(letter * 40_000))
    prompt, line = comment.split("\n")
    assert set(prompt) == {letter} and 63_000 < len(prompt.encode("utf-16-be")) < 64_000
    assert line == a1111(FACTS).split("\n")[-1]


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
    assert comment_of(high) == a1111(FACTS) and b"\x92\x86\x00\x07" in high  # EXIF: of type UNDEFINED
    assert np.abs(np.asarray(image, np.int16) - pixels).mean() < np.abs(decoded(low) - pixels).mean()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(data)), np.int16)


def test_grid_places_row_by_row_and_leaves_black() -> None:
    cells = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = grid(cells, 2)
    assert sheet.shape == (4, 6, 3)
    assert [int(sheet[y, x, 0]) for y, x in ((0, 0), (1, 2), (0, 3), (2, 0), (3, 5))] == [10, 10, 20, 30, 0]


def test_grid_is_never_wider_than_its_pictures() -> None:
    assert grid([np.zeros((2, 3, 3), np.uint8)] * 2, 9).shape == (2, 6, 3)


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (2, 9), (3, 2), (4, 1), (5, 3)])
def test_a_sheets_size_is_known_before_it_is_made(count: int, columns: int) -> None:
    height, width, _ = grid([np.zeros((2, 3, 3), np.uint8)] * count, columns).shape
    assert sheet_size(count, columns, 3, 2) == (width, height)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_side_ends_where_the_format_does(format: Format) -> None:
    longest = LONGEST[format]
    assert decoded(encode_image(np.zeros((1, longest, 3), np.uint8), format, None, {})).shape == (1, longest, 3)
    with pytest.raises((OSError, ValueError)):
        encode_image(np.zeros((1, longest + 1, 3), np.uint8), format, None, {})


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_where_there_are_no_files_in_memory_the_bytes_are_the_same(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = encode_image(picture(64, 64), format, None, FACTS)
    monkeypatch.setattr("app.imaging.sys.platform", "darwin")
    assert encode_image(picture(64, 64), format, None, FACTS) == here
