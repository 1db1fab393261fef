"""What a request brings besides its fields: its body as strict JSON, with limits, and the formats that it accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NoReturn

from fastapi import Request

from app.api.front import front_of
from app.errors import BodyTooLarge, InvalidJSON, NotAcceptable, UnsupportedEncoding
from app.imaging import FORMATS, Format

BODY_LIMIT = 1024 * 1024  # bytes; the longest prompt that any card allows is 32,000 characters
RANGES = 32  # media ranges of an Accept header, and parameters of one, that are read; browsers send ten
VALUES_LIMIT = 4096
"""Values, names and brackets in its JSON. Half a million small lists take 60 ms to parse, and a thread does not help:
the parser holds the interpreter's lock."""

_GZIP = b"\x1f\x8b"


async def read_json(request: Request) -> object:
    """Read the body as a JSON value, in a turn of its own.

    Raises UnsupportedEncoding, BodyTooLarge (chunked bodies too), InvalidJSON, or ClientDisconnect.
    """
    data = await _read(request)
    await front_of(request).turns.take()
    codings = ", ".join(request.headers.getlist("content-encoding")).split(",")
    for coding in map(str.strip, codings):
        if coding.lower() not in ("", "identity"):
            message = f'Content-Encoding: "{coding[:40]}" is not decoded here; send the JSON as it is'
            raise UnsupportedEncoding(message)
    if data.startswith(_GZIP):
        raise InvalidJSON("The body is compressed, which is not understood here: send the JSON as it is")
    return parse_json(data)


def parse_json(data: bytes) -> object:
    """Parse strict JSON: no NaN, no bottomless nesting, not too many values. Raises InvalidJSON, BodyTooLarge."""
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        if _crowded(text):
            raise BodyTooLarge(f"The body has over {VALUES_LIMIT} values")
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise InvalidJSON("The body is nested too deeply") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidJSON(f"The body is not valid JSON{where}") from None


def accepted_format(request: Request, preferred: str | None = None) -> Format | None:
    """The image format that Accept prefers over JSON; None for JSON, also when Accept names neither.

    As RFC 9110 section 12.5.1: of each type the most specific range counts. Ranges of one weight go in their order;
    one that takes several types (`image/*`) gives JSON, then the `preferred` format, then PNG. Raises NotAcceptable
    when Accept names images alone, and none that this server writes.
    """
    ranges = _ranges(",".join(request.headers.getlist("accept")))
    offers: list[Format | None] = [None, *sorted(FORMATS, key=lambda format: format != preferred)]
    ranked = [(*_rank(ranges, offer), order) for order, offer in enumerate(offers)]
    weight, _, order = min(ranked)
    if weight < 0:
        return offers[order]
    if any(media.startswith("image/") and weight < 0 for media, (weight, _) in ranges.items()):
        types = ", ".join(f"image/{format}" for format in FORMATS)
        raise NotAcceptable(f"Accept: no such image type is written here; there are {types} and application/json")
    return None


async def _read(request: Request) -> bytes:
    """The whole body. A client that waits for "100 Continue" is refused before it sends what is too large."""
    kept, declared = bytearray(), request.headers.get("content-length", "")
    size = int(declared) if "expect" in request.headers and declared.isdigit() else 0
    if size <= BODY_LIMIT:
        async for chunk in request.stream():
            kept += chunk
            if (size := len(kept)) > BODY_LIMIT:
                break
    if size > BODY_LIMIT:
        raise BodyTooLarge(f"The body is over {BODY_LIMIT} bytes")
    return bytes(kept)


def _crowded(text: str) -> bool:
    """Whether JSON has over VALUES_LIMIT values, counted by its punctuation outside of strings, in 4 ms a megabyte."""
    bare = text.replace("\\\\", "").replace('\\"', "")
    if bare.count('"') > 2 * VALUES_LIMIT:
        return True
    outside = "".join(bare.split('"')[::2])
    return sum(map(outside.count, ",[{")) > VALUES_LIMIT


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _ranges(accept: str) -> dict[str, tuple[float, int]]:
    """The media ranges of an Accept header in lower case, without parameters: (minus its weight, its place)."""
    found: dict[str, tuple[float, int]] = {}
    for place, part in enumerate(accept.lower().split(",", RANGES)[:RANGES]):
        media, *options = (piece.strip() for piece in part.split(";", RANGES))
        weight = next((_quality(option[2:]) for option in options if option.startswith("q=")), 1.0)
        found.setdefault(media, (-weight, place))
    return found


def _rank(ranges: Mapping[str, tuple[float, int]], offer: Format | None) -> tuple[float, int]:
    """(minus weight, place) of the most specific range that takes this offer; a weight of 0 where none does."""
    kind, name = ("image", offer) if offer else ("application", "json")
    return next((ranges[media] for media in (f"{kind}/{name}", f"{kind}/*", "*/*") if media in ranges), (0.0, 0))


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
