"""Imaging: finished pixels to PNG, JPEG or WebP bytes with the facts of the request inside, and sheets of several.

Every file says in XMP that a trained model made it, a preview too: EU AI Act Art. 50(2) asks for a mark that machines
read on whatever synthetic image is given out, and a preview is given out. There is no switch.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from io import BytesIO
from typing import IO, Any, Literal
from xml.sax.saxutils import escape

import numpy as np
from isal import isal_zlib
from PIL import Image

from app.errors import InvalidValue

Format = Literal["png", "jpeg", "webp"]
FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp")
LONGEST: dict[Format, int] = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
"""Pixels of a side at which a format, or what writes it, ends."""
DEFAULT_QUALITY = 90

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word, as its DigitalSourceType, for what a trained model made."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_COMMENT_LIMIT, _XMP_LIMIT, _XMP_PART = 64_000, 65_502, 65_400
"""Bytes that leave a JPEG segment (64 KiB) room for its heads: of a comment, a packet, a part of a longer one."""

_NAMESPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
    "instep": "urn:instep:",
}
_A1111 = {
    "num_inference_steps": "Steps",
    "sampler": "Sampler",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "model": "Model",
    "class_label": "Class label",
}


def encode_image(pixels: np.ndarray, format: str, compression: int | None, facts: dict[str, Any]) -> bytes:
    """One picture as a file, marked as made by a trained model (XMP `Iptc4xmpExt:DigitalSourceType`).

    pixels: uint8 [height, width, 3]. compression: quality 0..100 of JPEG and WebP (OpenAI's field name), None for the
    default; PNG is lossless and ignores it. facts: the effective request, as A1111's line and as JSON: the text chunks
    `parameters` and `instep` of a PNG, the EXIF UserComment and the XMP property `instep:Request` of the others; an
    empty dict writes neither. Raises InvalidValue for an unknown format.
    """
    if format == "png":
        texts = {"parameters": a1111(facts), "instep": json.dumps(facts)} if facts else {}
        return _png(pixels, texts, _xmp(_marks()))
    if format not in FORMATS:
        raise InvalidValue(f"output_format: expects one of {', '.join(FORMATS)}", param="output_format")
    quality = DEFAULT_QUALITY if compression is None else compression
    told, exif = _marks(), b""
    if facts:
        told["instep:Request"], exif = json.dumps(facts), _exif(a1111(facts))
    options: dict[str, Any] = {"method": 2, "xmp": _xmp(told)}
    if format == "jpeg":
        options = {"subsampling": 0, **_jpeg_xmp(told)}
    with _file() as out:
        Image.fromarray(pixels).save(out, format, quality=quality, exif=exif, **options)
        out.seek(0)
        return out.read()


def sheet_size(count: int, columns: int, width: int, height: int) -> tuple[int, int]:
    """Pixels across and down of the sheet that `grid` makes of so many pictures of this size."""
    columns = min(columns, count)
    return columns * width, -(-count // columns) * height


def grid(pixels: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """One sheet of equally sized pictures, row by row; cells left over are black.

    pixels: each uint8 [height, width, 3] -> uint8 [rows * height, columns * width, 3]; never wider than the pictures
    there are.
    """
    columns = min(columns, len(pixels))
    rows = -(-len(pixels) // columns)
    height, width, channels = pixels[0].shape
    sheet = np.zeros((rows, height, columns, width, channels), np.uint8)
    for index, picture in enumerate(pixels):
        sheet[index // columns, :, index % columns] = picture
    return sheet.reshape(rows * height, columns * width, channels)


def a1111(facts: dict[str, Any]) -> str:
    """The `parameters` text that A1111 writes and its users' tools read: prompt, negative prompt, then one line."""
    prompt = facts.get("prompt", "")
    lines = [prompt if isinstance(prompt, str) else "\n".join(prompt)]
    if facts.get("negative_prompt"):
        lines.append(f"Negative prompt: {facts['negative_prompt']}")
    lines.append(", ".join(f"{name}: {facts[key]}" for key, name in _A1111.items() if key in facts))
    return "\n".join(lines)


def _png(pixels: np.ndarray, texts: dict[str, str], xmp: bytes) -> bytes:
    """An 8-bit RGB PNG: filter Up on every line, one fast deflate (isa-l, level 1) that releases the interpreter lock.

    Twenty-odd times faster than Pillow's default and about an eighth larger; the twin in the tests is Pillow.
    """
    height, width, _ = pixels.shape
    flat = np.ascontiguousarray(pixels).reshape(height, width * 3)
    lines = np.empty((height, width * 3 + 1), np.uint8)
    lines[:, 0] = 2
    lines[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=lines[1:, 1:])
    body = isal_zlib.compress(lines, level=1)
    return b"".join(
        [
            _SIGNATURE,
            *_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            *_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
            *(part for key, text in texts.items() for part in _text_chunk(key, text)),
            *_chunk(b"IDAT", body),
            *_chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, ...]:
    """The parts of one chunk, so that a large body is copied once."""
    check = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return struct.pack(">I", len(body)), kind, body, struct.pack(">I", check)


def _text_chunk(key: str, text: str) -> tuple[bytes, ...]:
    """tEXt where Latin-1 holds the text, else iTXt. NOTE: NUL ends a field in both, so it is replaced."""
    text = text.replace("\0", "\ufffd")
    try:
        return _chunk(b"tEXt", key.encode() + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", key.encode() + b"\0\0\0\0\0" + text.encode("utf-8", "replace"))


def _file() -> IO[bytes]:
    """A file in memory. NOTE: Pillow gives up the interpreter lock over a JPEG for a real file only, not BytesIO."""
    return open(os.memfd_create("image"), "w+b") if sys.platform == "linux" else BytesIO()


@cache
def _creator() -> str:
    try:
        return f"Instep {metadata.version('instep')}"
    except metadata.PackageNotFoundError:
        return "Instep"


def _marks() -> dict[str, str]:
    return {"Iptc4xmpExt:DigitalSourceType": GENERATED, "xmp:CreatorTool": _creator()}


def _xmp(told: dict[str, str], *, wrapped: bool = True) -> bytes:
    """An XMP document (ISO 16684-1) of these properties; wrapped: as the packet that a file begins with.

    NOTE: XML cannot hold every character, escaped or not: a value from outside is JSON in ASCII.
    """
    names = dict.fromkeys(key.split(":")[0] for key in told)
    spaces = "".join(f' xmlns:{name}="{_NAMESPACES[name]}"' for name in names)
    values = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in told.items())
    text = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about=""{spaces}>{values}</rdf:Description></rdf:RDF></x:xmpmeta>'
    )
    if wrapped:
        text = f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{text}<?xpacket end="r"?>'
    return text.encode()


def _jpeg_xmp(told: dict[str, str]) -> dict[str, bytes]:
    """Pillow's options for XMP in a JPEG: one packet, and what it has no room for in segments of its own.

    A request that is longer than a segment goes into ExtendedXMP (XMP specification part 3, 1.1.3.1).
    """
    packet = _xmp(told)
    if len(packet) <= _XMP_LIMIT:
        return {"xmp": packet}
    rest = _xmp({"instep:Request": told["instep:Request"]}, wrapped=False)
    name = hashlib.md5(rest, usedforsecurity=False).hexdigest().upper()
    segments = []
    for start in range(0, len(rest), _XMP_PART):
        head = b"http://ns.adobe.com/xmp/extension/\0" + name.encode() + struct.pack(">II", len(rest), start)
        part = head + rest[start : start + _XMP_PART]
        segments.append(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part)
    return {"xmp": _xmp({**_marks(), "xmpNote:HasExtendedXMP": name}), "extra": b"".join(segments)}


def _exif(text: str) -> bytes:
    """An EXIF block with this UserComment. Too long a text loses the end of its prompts, never its last line.

    NOTE: Pillow would write the comment as BYTE, where EXIF wants UNDEFINED (7) and some readers look for nothing else.
    """
    if len(text.encode("utf-16-be", "replace")) > _COMMENT_LIMIT:
        prompts, _, line = text.rpartition("\n")
        cut = prompts.encode("utf-16-be", "replace")[: _COMMENT_LIMIT - 2 * len(line)]
        text = cut.decode("utf-16-be", "ignore") + "\n" + line
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    first = struct.pack(">HHHIII", 1, _EXIF_IFD, 4, 1, 26, 0)
    second = struct.pack(">HHHIII", 1, _USER_COMMENT, 7, len(comment), 44, 0)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + first + second + comment
