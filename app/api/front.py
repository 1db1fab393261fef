"""What every route works with: the server's parts, and a request's key, facts for the log, JSON body and Accept."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, cast

from fastapi import Request

from app.cards.catalog import Registry
from app.errors import RequestError
from app.imaging import FORMATS, Format
from app.keys import ApiKey, Keyring
from app.metrics import Metrics
from app.settings import Settings
from app.worker.supervisor import Supervisor

T = TypeVar("T")

BODY_LIMIT = 1024 * 1024  # bytes; the longest prompt that any card allows is 32,000 characters
RANGES = 32  # media ranges of an Accept header, and parameters of one, that are read; browsers send ten
VALUES_LIMIT = 4096
"""Values, names and brackets in its JSON. Half a million small lists take 60 ms to parse, and a thread does not help:
the parser holds the interpreter's lock."""


@dataclass(frozen=True)
class Front:
    """What create_app puts together. pool: threads for work that would hold the event loop."""

    settings: Settings
    registry: Registry
    supervisor: Supervisor
    metrics: Metrics
    keys: Keyring
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "imaging"))
    _queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    _running: defaultdict[Hashable, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _next: dict[Hashable, asyncio.Future[Any]] = field(default_factory=dict)

    async def turn(self) -> None:
        """Wait in line until this request may go on: one does in each turn of the event loop.

        So sockets and probes come between. What follows should hold the loop for a few ms at most.
        """
        async with self._queue:
            await asyncio.sleep(0)

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run what computes or reads files off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    async def shared(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """The result of `make`, shared by all who ask with this key before it starts; then they go on one a turn.

        Whoever asks while it runs waits for the next run, so a result is never older than the question.
        """
        if key not in self._next:
            self._next[key] = asyncio.ensure_future(self._run(key, make))
        made: T = await asyncio.shield(self._next[key])
        await self.turn()
        return made

    async def _run(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        async with self._running[key]:
            del self._next[key]
            return await make()


def front_of(request: Request) -> Front:
    """The bundle of the app that this request reached, with the models that its key may use."""
    front, key = cast(Front, request.app.state.front), key_of(request)
    return replace(front, registry=front.registry.only(key.models)) if key.models else front


def key_of(request: Request) -> ApiKey:
    """Who asks; NOBODY until `app/api/access.py` has looked at the key."""
    return cast(ApiKey, request.state.key)


def facts_of(request: Request) -> dict[str, Any]:
    """What this request's line of the log says beside id, route and status. NOTE: never a prompt."""
    return cast(dict[str, Any], request.state.facts)


async def read_json(request: Request) -> object:
    """Read the body as a JSON value, in a turn of its own.

    Raises RequestError (chunked bodies may be too large as well), or ClientDisconnect.
    """
    data = await _read(request)
    await front_of(request).turn()
    codings = ", ".join(request.headers.getlist("content-encoding")).split(",")
    for coding in map(str.strip, codings):
        if coding.lower() not in ("", "identity"):
            message = f'Content-Encoding: "{coding[:40]}" is not decoded here; send the JSON as it is'
            raise RequestError(message, code="unsupported_encoding")
    return parse_json(data)


def parse_json(data: bytes) -> object:
    """Parse strict JSON: no NaN, no bottomless nesting, not too many values. Raises RequestError."""
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass")
        if _crowded(text):
            raise RequestError(f"The body has over {VALUES_LIMIT} values", code="body_too_large")
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise RequestError("The body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"The body is not valid JSON{where}", code="invalid_json") from None


def accepted_format(request: Request, preferred: str | None = None) -> Format | None:
    """The image format that Accept prefers over JSON; None for JSON, also when Accept names neither.

    As RFC 9110 section 12.5.1: of each type the most specific range counts. Ranges of one weight go in their order;
    one that takes several types (`image/*`) gives JSON, then the `preferred` format, then PNG. Raises RequestError
    when Accept names images alone, and none that this server writes.
    """
    ranges = _ranges(",".join(request.headers.getlist("accept")))
    images = sorted(FORMATS, key=lambda format: format != preferred)
    offers: dict[str, Format | None] = {"application/json": None, **{f"image/{format}": format for format in images}}
    best = min(offers, key=lambda media: _rank(ranges, media))
    if _rank(ranges, best)[0] < 0:
        return offers[best]
    if any(media.startswith("image/") and weight < 0 for media, (weight, _) in ranges.items()):
        types = ", ".join(f"image/{format}" for format in FORMATS)
        message = f"Accept: no such image type is written here; there are {types} and application/json"
        raise RequestError(message, code="not_acceptable")
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
        raise RequestError(f"The body is over {BODY_LIMIT} bytes", code="body_too_large")
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


def _rank(ranges: Mapping[str, tuple[float, int]], media: str) -> tuple[float, int]:
    """(minus weight, place) of the most specific range that takes this type; a weight of 0 where none does."""
    broader = f"{media.partition('/')[0]}/*"
    return next((ranges[name] for name in (media, broader, "*/*") if name in ranges), (0.0, 0))


def _quality(text: str) -> float:
    try:
        return min(1.0, max(0.0, float(text)))
    except ValueError:
        return 0.0
