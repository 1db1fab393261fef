"""Source: the body of an upload to its fields and files, and files of strangers to the pixels that images start from.

It runs in processes of its own: parsers of bodies and WebP hold the interpreter's lock, and a file may be a bomb. PNG,
JPEG and WebP are read: of 16 bits the upper 8, and no colour profile.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import resource
import signal
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageOps
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header

from app.errors import InvalidValue, RequestError
from app.request import Source

T = TypeVar("T")
Take = Callable[[str, bytes | str], None]
"""Takes a picture of an upload: the name of its field, and a file, or text that is base64 or a data URL."""

PICTURES = ("image", "mask", "mask_image")
"""The fields of an upload that are pictures."""

FORM, JSON = "multipart/form-data", "application/json"
FIELDS_LIMIT = 1024 * 1024  # bytes of all other fields together, as JSON
PARTS = 4096  # the most parts of a form
_MUCH = f"The fields beside the pictures are over {FIELDS_LIMIT} bytes"
NICENESS = 10  # with which the engine keeps its threads, too (Cores in app/pool/budget.py)
MEMORY = 3 * 1024**3  # bytes that a process which reads uploads may have: 64 megapixels take up to 2 GB
PIXELS, SIDE = 64 * 1024**2, 32_768  # the most of a picture, and of its width or height
MOST = f"at most {PIXELS // 1024**2} megapixels, and {SIDE} on a side"
FORMATS, ANIMATED = ("PNG", "JPEG", "WEBP"), ("PNG", "WEBP")  # what else is in a JPEG are a camera's extras

PADDING = (128, 128, 128)
"""The colour beside a padded picture. Where there is a mask, it is painted anew: nothing there is worth keeping."""


def bounded(work: Callable[..., T], *arguments: object) -> T:
    """Do this in a process of its own that gives way to the server: with a low priority, at most MEMORY, and deaf to
    Ctrl-C in the server's terminal."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        return work(*arguments)
    except Exception as error:  # a traceback would keep what was read, for as long as the process waits for more
        raise error.with_traceback(None) from None


def unpack(body: Path, content_type: str, typed: Collection[str]) -> tuple[bytes, dict[str, Path]]:
    """The fields of an upload, as JSON; and its PICTURES, as files that take the place of `body`.

    typed: fields that are JSON in a form, where they can be; the others are text.
    Raises RequestError: a form or JSON that is broken, fields over FIELDS_LIMIT, no image or several.
    """
    kind, options = parse_options_header(content_type)
    files: dict[str, Path] = {}

    def take(name: str, value: bytes | str) -> None:
        if name in files:
            raise InvalidValue(f"{name}: takes one picture, and several came", param=name)
        files[name] = body.with_name(name)
        files[name].write_bytes(_decoded(name, value) if isinstance(value, str) else value)

    data, is_form = body.read_bytes(), kind == FORM.encode()
    found = folded(_form(data, options.get(b"boundary"), take), typed) if is_form else _json(data, take)
    fields = json.dumps(found).encode()
    if "image" not in files:
        raise InvalidValue("image: is required: the picture to start from", param="image")
    if {"mask", "mask_image"} <= files.keys():
        raise InvalidValue("mask_image: came with mask; send one of them", param="mask_image")
    if len(fields) > FIELDS_LIMIT:
        raise RequestError(_MUCH, code="body_too_large")
    body.unlink()  # last: a process that dies before it is followed by one that reads it again
    return fields, files


def look(image: Path) -> tuple[int, int]:
    """Width and height of a picture as it is shown, from its header. Raises InvalidValue."""
    with _reading("image", image) as picture:
        width, height = picture.size
        with suppress(Exception):  # NOTE: broken EXIF is none; a PNG's own getexif would decode the picture
            if Image.Image.getexif(picture).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                return height, width
        return width, height


def read_source(
    image: Path, mask: Path | None, by_white: bool, width: int, height: int, resize: str, blur: float
) -> Source:
    """The pixels and the mask of images of width x height pixels.

    by_white: the white of the mask is repainted, even where it has alpha; else what is transparent, if anything is.
    Without a mask it is what is transparent in the image. resize: crop (to its centre), stretch or pad. blur: pixels
    of the soft edge inside the mask, 0 for none. Raises InvalidValue.
    """
    size, masked = (width, height), None
    colours, alpha = _upright("image", image)
    if repaint := _repaint(mask, by_white) if mask else alpha and ImageChops.invert(alpha):
        repaint = repaint.resize(colours.size, Image.Resampling.BILINEAR)
        masked = np.asarray(_fitted(repaint, size, resize, 255, Image.Resampling.BILINEAR)) >= 128
        if mask and not masked.any():
            raise InvalidValue(f"mask: it repaints nothing of {width}x{height} pixels", param="mask")
    masked = masked if masked is not None and masked.any() else None
    if alpha and (mask or masked is None):
        colours.paste("white", mask=ImageChops.invert(alpha))
    pixels = _fitted(colours, size, resize, PADDING, Image.Resampling.LANCZOS).tobytes()
    return Source(pixels, None if masked is None else _soft(masked, blur).tobytes())


def _form(body: bytes, boundary: bytes | None, take: Take) -> list[tuple[str, str]]:
    """The text fields of multipart/form-data; a picture is a file or text."""
    parts: list[Field | File] = []
    fields, ends = [], []
    if not boundary:
        raise RequestError(f"Content-Type: {FORM} needs its boundary; the client's library sets both")
    if body.count(b"\r\n--" + boundary) > PARTS:
        raise RequestError(f"The form has over {PARTS} parts", code="body_too_large")
    try:
        options = {"MAX_MEMORY_FILE_SIZE": math.inf}
        parser = FormParser(FORM, parts.append, parts.append, lambda: ends.append(True), boundary, config=options)
        parser.write(body)
        for part in parts:
            name = (part.field_name or b"").decode()
            if isinstance(part, File):
                part.file_object.seek(0)
            value = part.file_object.read() if isinstance(part, File) else part.value or b""
            if (picture := name.removesuffix("[]")) in PICTURES:
                # NOTE: browsers send an empty file without a name for none; others send bytes without one.
                if value or (isinstance(part, File) and part.file_name):
                    take(picture, value if isinstance(part, File) or not value.isascii() else value.decode())
            elif isinstance(part, File):
                raise InvalidValue(f"{name[:64]}: is no field that takes a file", param=name[:64])
            else:
                fields.append((name, value.decode()))
    except (FormParserError, UnicodeDecodeError):
        raise RequestError(f"The body is not valid {FORM} in UTF-8") from None
    if not ends:
        raise RequestError(f"The body is not valid {FORM}: its last boundary is missing")
    return fields


def folded(pairs: Iterable[tuple[str, str]], typed: Collection[str]) -> dict[str, Any]:
    """The fields of a form as in JSON: `name[]` is an entry of a list, `name[key]` one of an object, and `name[][key]`
    of the next object in a list, all with the same keys. OpenAI's client sends all values of one key, then of the next.
    """
    fields: dict[str, Any] = {}
    lists: dict[str, list[dict[str, object]]] = {}
    for name, text in pairs:
        value: object = text
        field, bracket, key = name.removesuffix("]").partition("[")
        if field in typed and key != "][name":  # which may look like a number
            with suppress(ValueError, RecursionError):
                read = json.loads({"": "null", "True": "true", "False": "false"}.get(text, text))
                value = json.loads(json.dumps(read, allow_nan=False))  # else text, which JSON can have
        if key.startswith("]["):
            entries, key = lists.setdefault(field, []), key.removeprefix("][")
            place = next((one for one in entries if key not in one), None)
            entries += [place := {}] if place is None else []
        else:
            place = fields.setdefault(field, {} if key else []) if bracket else fields
        if isinstance(place, list):
            place.append(value)
        elif isinstance(place, dict) and (key or field) not in place:
            place[key or field] = value
        else:
            raise InvalidValue(f"{name[:64]}: came twice", param=field[:64])
    for field, entries in lists.items():
        if field in fields or len({*map(len, entries)}) > 1:
            raise InvalidValue(f"{field[:64]}: gives no list of objects with the same keys", param=field[:64])
    return fields | lists


def _json(body: bytes, take: Take) -> dict[str, object]:
    """The fields of a JSON object beside its pictures, which are base64 or data URLs, each alone or in a list."""
    if sum(map(body.count, (b",", b"[", b"{"))) > FIELDS_LIMIT:  # a picture has at most one
        raise RequestError(_MUCH, code="body_too_large")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"The body is not valid JSON{where}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object", code="invalid_json")
    for name in PICTURES:
        sent = fields.pop(name, None)
        for text in sent if isinstance(sent, list) else [] if sent is None else [sent]:
            take(name, text if isinstance(text, str) else "-")
    return fields


def _decoded(name: str, text: str) -> bytes:
    """The file that is in base64, or in a data URL. Raises InvalidValue."""
    head, comma, _ = text[:200].partition(",")
    if re.match(r"\s*(?!data:)[a-z][a-z0-9+.-]*:", head, re.IGNORECASE):
        raise InvalidValue(f"{name}: a URL is not fetched here; send the picture itself, or its base64", param=name)
    coded = text[len(head) + 1 :] if comma and head.lower().endswith(";base64") else text
    try:
        return base64.b64decode("".join(coded.split()), validate=True)
    except ValueError:
        raise InvalidValue(f"{name}: expects base64 or a data URL", param=name) from None


@contextmanager
def _reading(field: str, file: Path) -> Iterator[Image.Image]:
    """The picture, of which only the header has been read. What goes wrong with it is an InvalidValue."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > PIXELS or max(width, height) > SIDE:
                raise InvalidValue(f"{field}: {width} x {height} pixels are too many; {MOST}", param=field)
            if picture.format in ANIMATED and getattr(picture, "is_animated", False):
                raise InvalidValue(f"{field}: is animated; send one picture of it", param=field)
            yield picture
    except InvalidValue:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise InvalidValue(f"{field}: has too many pixels; {MOST}", param=field) from None
    except Exception:  # Pillow raises a dozen kinds
        raise InvalidValue(f"{field}: is no PNG, JPEG or WebP file that is whole", param=field) from None


def _upright(field: str, file: Path) -> tuple[Image.Image, Image.Image | None]:
    """A picture in RGB as it is shown, and its alpha, None if it is opaque."""
    with _reading(field, file) as shown:
        shown.load()
        with suppress(Exception):  # broken EXIF is none
            shown = ImageOps.exif_transpose(shown)
        if shown.mode.startswith("I"):  # grey of 16 bits; Pillow would cut them off at 255
            shown = Image.fromarray((np.asarray(shown) >> 8).astype(np.uint8))
        alpha = None
        if shown.has_transparency_data:
            alpha = (shown if "A" in shown.getbands() else shown.convert("RGBA")).getchannel("A")
        return shown if shown.mode == "RGB" else shown.convert("RGB"), alpha and (
            None if alpha.getextrema() == (255, 255) else alpha
        )


def _repaint(mask: Path, by_white: bool) -> Image.Image:
    """A mask as grey: white is repainted. by_white: what is transparent is kept."""
    colours, alpha = _upright("mask", mask)
    if alpha is None:
        return colours.convert("L")
    return ImageChops.multiply(colours.convert("L"), alpha) if by_white else ImageChops.invert(alpha)


def _fitted(
    picture: Image.Image, size: tuple[int, int], resize: str, beside: Any, filter: Image.Resampling
) -> Image.Image:
    """The picture at this size; what it leaves empty has the colour `beside`."""
    (across, down), (width, height) = picture.size, size
    part: tuple[float, float, float, float] = (0, 0, across, down)
    inner = size
    if resize == "crop":  # NOTE: from a whole pixel on, so that what is only cut is not blurred
        wide, high = min(across, down * width / height), min(down, across * height / width)
        left, top = (across - wide) // 2, (down - high) // 2
        part = (left, top, left + wide, top + high)
    elif resize == "pad":
        scale = min(width / across, height / down)
        inner = max(1, round(across * scale)), max(1, round(down * scale))
    whole = Image.new(picture.mode, size, beside)
    whole.paste(picture.resize(inner, filter, part), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return whole


def _soft(masked: np.ndarray, blur: float) -> np.ndarray:
    """Booleans [height, width] to uint8: 0 where false; else 255, or less where a false one is within `blur` pixels.

    The distances are Euclid's: along each line first, then over the lines within reach.
    """
    reach, (height, width) = math.ceil(blur), masked.shape
    place, far = np.arange(width), reach + 1
    before = np.maximum.accumulate(np.where(masked, -far, place), 1)
    after = np.minimum.accumulate(np.where(masked, width + far, place)[:, ::-1], 1)[:, ::-1]
    squares = np.full((height + 2 * reach, width), far * far, np.int32)
    squares[reach : reach + height] = np.minimum(np.minimum(place - before, after - place), far) ** 2
    nearest = np.full((height, width), far * far, np.int32)
    for line in range(2 * reach + 1):
        np.minimum(nearest, squares[line : line + height] + (line - reach) ** 2, out=nearest)
    ramp = np.maximum(1, np.round(255 * np.sqrt(nearest) / (blur + 1)))
    return np.where(masked, np.where(nearest > blur * blur, 255, ramp), 0).astype(np.uint8)
