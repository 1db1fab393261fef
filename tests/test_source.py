"""Files of strangers to the pixels and the mask that images start from: kinds, orientation, geometry, soft edges."""

from __future__ import annotations

import base64
import json
import math
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from app.errors import InvalidValue, RequestError
from app.source import FIELDS_LIMIT, PADDING, PARTS, PIXELS, folded, look, read_source, unpack
from tests.parts.pictures import chunks

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HALVES = np.arange(64) < 32
"""True in the left half of a line."""


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """The PNG with one chunk more, behind its head."""
    return png[:33] + chunk(kind, body) + png[33:]


def bare_png(width: int, height: int, *, depth: int = 8, colour: int = 2, body: bytes = b"") -> bytes:
    """A PNG that says this of itself, with this in its only IDAT."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def noise(height: int = 48, width: int = 64, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def saved(picture: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, format, **options)
    return out.getvalue()


def read(
    folder: Path, image: bytes, mask: bytes | None = None, size: tuple[int, int] = (64, 48), *, by_white: bool = False,
    resize: str = "crop", blur: float = 0,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """The pixels and the mask of images of this size (width, height)."""
    (folder / "image").write_bytes(image)
    if mask is not None:
        (folder / "mask").write_bytes(mask)
    source = read_source(folder / "image", folder / "mask" if mask else None, by_white, *size, resize, blur)
    pixels = np.frombuffer(source.pixels, np.uint8).reshape(size[1], size[0], 3)
    return pixels, None if source.mask is None else np.frombuffer(source.mask, np.uint8).reshape(size[1], size[0])


def refused(folder: Path, image: bytes, mask: bytes | None = None) -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        read(folder, image, mask)
    return caught.value


RGB = noise()
RGBA = np.dstack([RGB, np.where(HALVES, 0, 255).repeat(48).reshape(64, 48).T.astype(np.uint8)])
GREY = noise(channels=1)
DEEP = np.random.default_rng(1).integers(0, 65536, (48, 64)).astype(np.uint16)


def deep_colours() -> bytes:
    """A PNG with 16 bits a channel, whose upper 8 are RGB."""
    wide = (RGB.astype(np.uint16) << 8 | 0x5A).astype(">u2")
    return bare_png(64, 48, depth=16, body=b"".join(b"\0" + line.tobytes() for line in wide))


PALETTE = Image.fromarray(RGB).quantize(16)
CMYK = Image.fromarray(RGB).convert("CMYK")
FILES = {
    "RGB": (saved(RGB), RGB),
    "RGB in WebP": (saved(RGB, "WEBP", lossless=True), RGB),
    "grey": (saved(GREY), GREY[..., None].repeat(3, 2)),
    "black and white": (saved(Image.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0)[..., None].repeat(3, 2)),
    "16 bits of grey": (saved(DEEP), (DEEP >> 8)[..., None].repeat(3, 2)),
    "16 bits of colours": (deep_colours(), RGB),
    "palette": (saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "grey with opaque alpha": (saved(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (64, 48), 255)])),
                               GREY[..., None].repeat(3, 2)),
    "a broken profile": (saved(RGB, icc_profile=b"no profile"), RGB),
    "a profile that does not inflate": (with_chunk(saved(RGB), b"iCCP", b"name\0\0not deflated"), RGB),
    "broken EXIF": (with_chunk(saved(RGB), b"eXIf", b"MM\0*\xff\xff\xff\xff"), RGB),
    "text": (with_chunk(saved(RGB), b"zTXt", b"k\0\0" + zlib.compress(b"a" * 100_000)), RGB),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_its_pixels(tmp_path: Path, name: str) -> None:
    data, expected = FILES[name]
    pixels, mask = read(tmp_path, data)
    np.testing.assert_array_equal(pixels, expected)
    assert mask is None
    assert look(tmp_path / "image") == (64, 48)


@pytest.mark.parametrize("colour", [(200, 30, 40), (0, 0, 0), (255, 255, 255), (20, 200, 90)])
@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpegs_have_their_colours(tmp_path: Path, mode: str, colour: tuple[int, int, int]) -> None:
    """CMYK as Adobe's programs write it, which is inverted; Pillow writes it so too."""
    data = saved(Image.new("RGB", (64, 48), colour).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.new("RGB", (64, 48), colour).convert(mode).convert("RGB"))
    pixels, _ = read(tmp_path, data)
    assert np.abs(pixels.astype(int) - expected).max() <= 3


def test_a_camera_s_second_picture_in_a_jpeg_is_left_out(tmp_path: Path) -> None:
    data = saved(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))], quality=95)
    pixels, _ = read(tmp_path, data)
    alone, _ = read(tmp_path, saved(RGB, "JPEG", quality=95))
    np.testing.assert_array_equal(pixels, alone)


def test_transparency_of_every_kind_is_white_where_there_is_a_mask(tmp_path: Path) -> None:
    clear = np.where(HALVES[None, :, None], 255, RGB)
    grey_clear = np.where(HALVES[None, :, None], 255, GREY[..., None].repeat(3, 2))
    alpha = Image.fromarray(np.ascontiguousarray(RGBA[..., 3]))
    white = saved(Image.new("L", (64, 48), 255))
    key = saved(Image.fromarray(np.where(HALVES[None, :, None], 7, np.maximum(RGB, 8)).astype(np.uint8)),
                transparency=(7, 7, 7))  # fmt: skip
    indices = np.where(HALVES[None, :], 0, 1).repeat(48, 0).astype(np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([9, 9, 9, 10, 20, 30])
    for data, expected in (
        (saved(RGBA), clear),
        (saved(RGBA, "WEBP", lossless=True, exact=True), clear),
        (saved(Image.merge("LA", [Image.fromarray(GREY), alpha])), grey_clear),
        (key, np.where(HALVES[None, :, None], 255, np.maximum(RGB, 8))),
        (saved(palette, transparency=b"\0\xff"), np.where(HALVES[None, :, None], 255, [10, 20, 30])),
    ):
        pixels, mask = read(tmp_path, data, white)
        np.testing.assert_array_equal(pixels, expected.repeat(48 // len(expected), 0))
        assert mask is not None and (mask == 255).all()


def test_without_a_mask_what_is_transparent_is_repainted_from_its_own_colours(tmp_path: Path) -> None:
    pixels, mask = read(tmp_path, saved(RGBA))
    np.testing.assert_array_equal(pixels, RGB)
    assert mask is not None
    np.testing.assert_array_equal(mask, np.where(HALVES[None, :], 255, 0).repeat(48, 0))


def test_a_picture_that_is_nowhere_quite_transparent_has_no_mask(tmp_path: Path) -> None:
    faint = np.dstack([RGB, np.full((48, 64), 200, np.uint8)])
    pixels, mask = read(tmp_path, saved(faint))
    assert mask is None
    np.testing.assert_allclose(pixels, RGB * (200 / 255) + 255 * (55 / 255), atol=1)


TURNS = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright.transpose(1, 0, 2), 2),
    8: lambda upright: np.rot90(upright, -1),
}
"""How a camera stores what is upright, by EXIF's orientation (EXIF 2.3, table 6)."""


@pytest.mark.parametrize(("orientation", "format"), [*product(TURNS, ("PNG", "WEBP")), (6, "JPEG"), (7, "JPEG")])
def test_every_orientation_is_turned_upright(tmp_path: Path, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(noise(6, 8), np.ones((8, 8, 1), np.uint8))
    stored = np.ascontiguousarray(TURNS[orientation](blocks))
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    pixels, _ = read(tmp_path, saved(stored, format, exif=exif, **options))
    np.testing.assert_allclose(pixels, blocks, atol=8 if format == "JPEG" else 0)
    assert look(tmp_path / "image") == (64, 48)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_is_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, _ = read(tmp_path, saved(RGB, exif=exif))
    np.testing.assert_array_equal(pixels, RGB)
    assert look(tmp_path / "image") == (64, 48)


def animated(format: str) -> bytes:
    return saved(Image.fromarray(RGB), format, save_all=True, append_images=[Image.new("RGB", (64, 48))])


def bomb_text() -> bytes:
    return with_chunk(saved(RGB), b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))


BROKEN = {
    "nothing": b"",
    "words": b"this is no picture",
    "a GIF": saved(Image.fromarray(RGB), "GIF"),
    "a BMP": saved(RGB, "BMP"),
    "a TIFF": saved(RGB, "TIFF"),
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "half a PNG": saved(RGB)[: len(saved(RGB)) // 2],
    "half a JPEG": saved(RGB, "JPEG")[:2000],
    "half a WebP": saved(RGB, "WEBP")[:1000],
    "a head alone": saved(RGB)[:33],
    "a wrong checksum": saved(RGB)[:60] + b"\xff\xff" + saved(RGB)[62:],
    "no pixels": bare_png(64, 48),
    "no size": bare_png(0, 48),
    "an APNG": animated("PNG"),
    "an animated WebP": animated("WEBP"),
    "too many pixels": bare_png(8193, 8192),
    "a side too long": bare_png(32_769, 1),
    "a bomb of pixels": bare_png(60_000, 60_000),
    "a bomb of text": bomb_text(),
    "a WebP of 268 megapixels": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_file_that_cannot_be_read_is_one_error_that_names_its_field(tmp_path: Path, name: str, field: str) -> None:
    data = BROKEN[name]
    error = refused(tmp_path, data) if field == "image" else refused(tmp_path, saved(RGB), data or b" ")
    assert (error.code, error.param) == ("invalid_value", field)
    assert error.message.startswith(f"{field}: ") and "\n" not in error.message
    words = (
        "animated" if "an A" in name or "animated" in name else "pixels" if "pixels" in name or "side" in name else ""
    )
    assert name == "no pixels" or words in error.message


def test_a_header_is_read_without_a_pixel(tmp_path: Path) -> None:
    """The size is known although the pixels are broken; so a bomb is refused by its header."""
    (tmp_path / "image").write_bytes(bare_png(8192, 8192))
    assert PIXELS == 8192 * 8192 and look(tmp_path / "image") == (8192, 8192)
    (tmp_path / "image").write_bytes(bare_png(8193, 8192))
    with pytest.raises(InvalidValue, match="8193 x 8192"):
        look(tmp_path / "image")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_invalid_value_or_a_picture(tmp_path: Path, data: st.DataObject) -> None:
    file = bytearray(data.draw(st.sampled_from([saved(RGBA), saved(RGB, "JPEG"), saved(RGBA, "WEBP"), saved(PALETTE)])))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.integers(len(file) // 2, len(file))) :]
    try:
        pixels, _ = read(tmp_path, bytes(file))
    except InvalidValue as error:
        assert error.param == "image"
    else:
        assert pixels.shape == (48, 64, 3)


WHITE_LEFT = np.where(HALVES[None, :], 255, 0).repeat(48, 0).astype(np.uint8)
LEFT, RIGHT = WHITE_LEFT, 255 - WHITE_LEFT
OPAQUE = np.full((48, 64), 255, np.uint8)
MASKS = {
    "white is repainted": (WHITE_LEFT, False, LEFT),
    "white is repainted, in colours": (np.dstack([WHITE_LEFT] * 3), False, LEFT),
    "white is repainted, with an opaque alpha": (np.dstack([WHITE_LEFT] * 3 + [OPAQUE]), False, LEFT),
    "transparent is repainted": (np.dstack([WHITE_LEFT] * 3 + [WHITE_LEFT]), False, RIGHT),
    "white is always repainted in mask_image": (np.dstack([OPAQUE] * 3 + [WHITE_LEFT]), True, LEFT),
    "mask_image without alpha": (WHITE_LEFT, True, LEFT),
    "127 is kept and 128 repainted": (np.where(WHITE_LEFT == 255, 128, 127).astype(np.uint8), False, LEFT),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_by_both_conventions(tmp_path: Path, name: str) -> None:
    mask, by_white, expected = MASKS[name]
    pixels, found = read(tmp_path, saved(RGB), saved(mask), by_white=by_white)
    np.testing.assert_array_equal(pixels, RGB)
    assert found is not None
    np.testing.assert_array_equal(found, expected)


def test_a_mask_of_another_size_is_scaled_to_the_picture(tmp_path: Path) -> None:
    small = np.where(np.arange(16) < 8, 255, 0)[None].repeat(9, 0).astype(np.uint8)
    _, mask = read(tmp_path, saved(RGB), saved(small))
    assert mask is not None
    np.testing.assert_array_equal(mask, LEFT)


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_a_mask_that_repaints_nothing_is_an_error(tmp_path: Path, resize: str) -> None:
    with pytest.raises(InvalidValue, match="mask: it repaints nothing of 64x48 pixels"):
        read(tmp_path, saved(RGB), saved(np.zeros((48, 64), np.uint8)), resize=resize)


def rectangle(width: int, height: int) -> np.ndarray:
    """Red, with a green frame of a tenth of each side."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 1] = 255
    picture[height // 10 : -(height // 10), width // 10 : -(width // 10)] = (255, 0, 0)
    return picture


def test_crop_covers_and_keeps_the_centre(tmp_path: Path) -> None:
    wide = noise(64, 101)
    pixels, _ = read(tmp_path, saved(wide), size=(64, 64))
    np.testing.assert_array_equal(pixels, wide[:, 18:82])  # cut, not blurred
    pixels, _ = read(tmp_path, saved(rectangle(200, 100)), size=(64, 64))
    assert (pixels[32, [0, 63]] == (255, 0, 0)).all() and (pixels[[0, 63], 32] == (0, 255, 0)).all()


def test_stretch_shows_all_of_it(tmp_path: Path) -> None:
    pixels, _ = read(tmp_path, saved(rectangle(200, 100)), size=(64, 64), resize="stretch")
    assert (pixels[[0, 63, 32, 32], [32, 32, 0, 63]] == (0, 255, 0)).all() and (pixels[32, 32] == (255, 0, 0)).all()


@pytest.mark.parametrize("masked", [False, True])
def test_pad_shows_all_of_it_and_repaints_what_is_beside_where_there_is_a_mask(tmp_path: Path, masked: bool) -> None:
    corner = np.zeros((100, 200), np.uint8)
    corner[:50, :100] = 255
    pixels, mask = read(tmp_path, saved(rectangle(200, 100)), saved(corner) if masked else None, (64, 64), resize="pad")
    assert (pixels[[*range(16), *range(48, 64)]] == PADDING).all()
    assert (pixels[[16, 47], 32] == (0, 255, 0)).all() and (pixels[32, [0, 63]] == (0, 255, 0)).all()
    if masked:
        assert mask is not None and (mask[:16] == 255).all() and (mask[48:] == 255).all()
        assert (mask[16:32, :32] == 255).all() and (mask[32:48] == 0).all() and (mask[16:48, 32:] == 0).all()
    else:
        assert mask is None


def test_resizing_is_lanczos(tmp_path: Path) -> None:
    pixels, _ = read(tmp_path, saved(noise(96, 128)))
    twin = Image.fromarray(noise(96, 128)).resize((64, 48), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels, np.asarray(twin))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), across=st.integers(1, 40), down=st.integers(1, 40),
    resize=st.sampled_from(["crop", "stretch", "pad"]),
)  # fmt: skip
def test_any_shape_fits_any_size(tmp_path: Path, width: int, height: int, across: int, down: int, resize: str) -> None:
    """A picture of one colour stays that, and its mask covers all, whatever the shapes."""
    image = saved(np.full((height, width, 3), (10, 200, 30), np.uint8))
    white = saved(np.full((down, across), 255, np.uint8))
    pixels, mask = read(tmp_path, image, white, (across, down), resize=resize)
    assert mask is not None and (mask == 255).all()
    own = (pixels == (10, 200, 30)).all(-1)
    assert own.all() if resize != "pad" else own.any() and (pixels[~own] == PADDING).all()


def distances(masked: np.ndarray) -> np.ndarray:
    """From each pixel to the nearest one that is kept, as a plain double loop."""
    kept = np.argwhere(~masked)
    places = np.argwhere(np.ones_like(masked))
    far = [np.sqrt(((kept - place) ** 2).sum(1)).min() if len(kept) else math.inf for place in places]
    return np.array(far).reshape(masked.shape)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_soft_edge_lies_inside_the_mask(tmp_path: Path, data: st.DataObject) -> None:
    """Exactly 0 outside, above 0 inside, 255 where every kept pixel is farther than the blur, and rising in between."""
    height, width = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    blur = data.draw(st.one_of(st.just(0.0), st.floats(0.01, 12)))
    dice = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    masked = dice.random((height, width)) < data.draw(st.sampled_from([0.05, 0.5, 0.9, 0.98, 1.0]))
    masked[0, 0] = True
    image, mask = saved(noise(height, width)), saved(np.where(masked, 255, 0).astype(np.uint8))
    _, soft = read(tmp_path, image, mask, (width, height), blur=blur)
    assert soft is not None
    far = distances(masked)
    np.testing.assert_array_equal(soft > 0, masked)
    assert (soft[masked & (far > blur)] == 255).all()
    ramp = masked & (far <= blur)
    np.testing.assert_allclose(soft[ramp], 255 * far[ramp] / (blur + 1), atol=1)
    assert (soft[ramp] < 255).all()


FIELDS = {"n", "stream", "grid", "class_label", "strength"}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("prompt", "123"), ("n", "2")], {"prompt": "123", "n": 2}),
        ([("stream", "true")], {"stream": True}),
        ([("stream", "False")], {"stream": False}),
        ([("strength", "0.5"), ("n", "")], {"strength": 0.5, "n": None}),
        ([("n", "two")], {"n": "two"}),
        ([("prompt[]", "a"), ("prompt[]", "7")], {"prompt": ["a", "7"]}),
        ([("class_label[]", "3"), ("class_label[]", "apple")], {"class_label": [3, "apple"]}),
        ([("class_label", "[3, 4]")], {"class_label": [3, 4]}),
        ([("grid[columns]", "2")], {"grid": {"columns": 2}}),
        ([("grid", '{"columns": 2}')], {"grid": {"columns": 2}}),
        ([("n", "[" * 100_000)], {"n": "[" * 100_000}),
        ([("n", "NaN"), ("strength", "1e999")], {"n": "NaN", "strength": "1e999"}),
    ],
)
def test_the_text_of_a_form_has_the_types_of_json(pairs: list[tuple[str, str]], expected: dict[str, Any]) -> None:
    assert folded(pairs, FIELDS) == expected


@pytest.mark.parametrize("pairs", [[("n", "1"), ("n", "1")], [("grid[a]", "1")] * 2, [("n", "1"), ("n[]", "2")]])
def test_a_field_that_comes_twice_is_an_error(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidValue, match="came twice"):
        folded(pairs, FIELDS)


PNG = saved(RGB)
CODED = base64.b64encode(PNG).decode()


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """parts: what follows `form-data; `, and the content."""
    lines = (b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (head.encode(), body) for head, body in parts)
    return b"".join(lines) + end


@pytest.mark.parametrize(
    "order",
    [
        ["name=ink", "weight=0.5", "name=wash", "weight=1"],
        ["name=ink", "name=wash", "weight=0.5", "weight=1"],
    ],
)
def test_a_list_of_objects_may_come_in_two_orders(order: list[str]) -> None:
    """Object by object, or key by key as OpenAI's client sends it."""
    pairs = [(f"loras[][{name}]", value) for name, _, value in (one.partition("=") for one in order)]
    loras = [{"name": "ink", "weight": 0.5}, {"name": "wash", "weight": 1}]
    assert folded([("prompt", "a"), *pairs], {"loras"}) == {"prompt": "a", "loras": loras}


@pytest.mark.parametrize("others", [[("loras[][weight]", "1")], [("loras[]", "1")], [("loras", "[]")]])
def test_a_list_of_objects_that_is_not_clear_is_an_error(others: list[tuple[str, str]]) -> None:
    pairs = [("loras[][name]", "ink"), ("loras[][name]", "wash"), *others]
    with pytest.raises(InvalidValue, match=r"^loras: gives no list of objects with the same keys"):
        folded(pairs, {"loras"})


def unpacked(folder: Path, body: bytes, kind: str = "multipart/form-data; boundary=b") -> tuple[Any, dict[str, bytes]]:
    (folder / "body").write_bytes(body)
    text, files = unpack(folder / "body", kind, FIELDS)
    assert sorted(folder.iterdir()) == sorted(files.values()), "UPLOAD_MEMORY counts a body once"
    return json.loads(text), {name: file.read_bytes() for name, file in files.items()}


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_a_form_has_fields_and_files(tmp_path: Path, name: str) -> None:
    body = form(
        ("name=prompt", "a \u82f9\u679c".encode()),
        (f'name="{name}"; filename="a.png"', PNG),
        ('name="mask"; filename="m"', b"mask"),
        ("name=n", b"2"),
        ('name="mask_image"; filename=""', b""),  # as browsers send a field that is empty
    )
    assert unpacked(tmp_path, body) == ({"prompt": "a \u82f9\u679c", "n": 2}, {"image": PNG, "mask": b"mask"})


@pytest.mark.parametrize("sent", [CODED, [CODED], f"data:image/png;base64,{CODED}", CODED[:99] + "\r\n" + CODED[99:]])
def test_json_has_fields_and_files(tmp_path: Path, sent: object) -> None:
    body = json.dumps({"image": sent, "mask_image": CODED, "mask": None, "n": 2}).encode()
    assert unpacked(tmp_path, body, "application/json") == ({"n": 2}, {"image": PNG, "mask_image": PNG})


IMAGE = ('name="image"; filename="a"', PNG)
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "no image": (form(("name=n", b"1")), "invalid_value", "image: is required"),
    "two images": (form(IMAGE, IMAGE), "invalid_value", "image: takes one picture"),
    "two masks": (form(IMAGE, (IMAGE[0].replace("image", "mask"), PNG),
                       (IMAGE[0].replace("image", "mask_image"), PNG)), "invalid_value", "mask_image: came with mask"),
    "another file": (form(IMAGE, ('name="prompt"; filename="a"', b"a")), "invalid_value", "prompt: is no field"),
    "no last boundary": (form(IMAGE, end=b""), "invalid_request", "last boundary"),
    "half of it": (form(IMAGE)[:200], "invalid_request", "last boundary"),
    "another boundary": (form(IMAGE).replace(b"--b", b"--c"), "invalid_request", "multipart/form-data"),
    "no name": (form(("filename=a", PNG)), "invalid_request", "multipart/form-data"),
    "no UTF-8": (form(IMAGE, ("name=prompt", b"\xff")), "invalid_request", "UTF-8"),
    "a long text": (form(IMAGE, ("name=prompt", b"a" * FIELDS_LIMIT)), "body_too_large", "beside the pictures"),
    "a URL": (form(("name=image", b"https://a.example/b.png")), "invalid_value", "a URL is not fetched"),
    "a file's URL": (form(("name=image", b" FILE:///etc/passwd")), "invalid_value", "a URL is not fetched"),
    "no base64": (form(("name=image", b"a.png")), "invalid_value", "expects base64"),
    "parts": (form(IMAGE, *[("name=a", b"")] * PARTS), "body_too_large", "parts"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_used_is_one_error(tmp_path: Path, name: str) -> None:
    body, code, words = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        unpacked(tmp_path, body)
    assert caught.value.code == code and words in caught.value.message


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"), (b"{", "invalid_json"), (b"[]", "invalid_json"), (b"\xff", "invalid_json"),
        (b"[" * 200_000, "invalid_json"), (b'{"n":' + b"1" * 5000 + b"}", "invalid_json"),
        (b"[" * 2_000_000, "body_too_large"),
        (b'{"image":{"image_url":"https://a.example"}}', "invalid_value"), (b'{"image":7}', "invalid_value"),
        (json.dumps({"image": [CODED, CODED]}).encode(), "invalid_value"), (b'{"image":[]}', "invalid_value"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_used_is_one_error(tmp_path: Path, body: bytes, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        unpacked(tmp_path, body, "application/json")
    assert caught.value.code == code


def test_a_form_without_a_boundary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs its boundary"):
        unpacked(tmp_path, form(IMAGE), "multipart/form-data")


BOUNDED = """
import sys
from app.errors import InvalidValue
from app.source import MEMORY, bounded
assert {"torch", "fastapi", "app.main"}.isdisjoint(sys.modules)
try:
    bounded(bytearray, MEMORY + 1 if sys.argv[1] == "much" else MEMORY // 4)
except MemoryError:
    sys.exit("no memory")
"""


@pytest.mark.parametrize(("amount", "words"), [("much", "no memory\n"), ("little", "")])
def test_a_process_that_reads_has_a_limit_of_memory_and_no_server_in_it(amount: str, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", BOUNDED, amount], capture_output=True, text=True, timeout=60)
    assert done.stderr == words


LET_GO = """
import weakref
from app.errors import InvalidValue
from app.source import bounded
class Read: pass
def work():
    read = Read()
    global kept
    kept = weakref.ref(read)
    raise InvalidValue("of no use")
try:
    bounded(work)
except InvalidValue as error:
    assert error.message == "of no use" and kept() is None
"""


def test_an_error_does_not_keep_what_was_read() -> None:
    """The process has its last error until the next upload comes, and a gigabyte may hang on its traceback."""
    subprocess.run([sys.executable, "-c", LET_GO], check=True, timeout=60)


def test_the_bomb_of_text_is_one() -> None:
    assert [kind for kind, _ in chunks(bomb_text())][:2] == [b"IHDR", b"zTXt"]
    assert len(bomb_text()) < 200_000
