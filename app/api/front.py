"""What every route works with: the server's parts, and a request's key, facts for the log, JSON body and Accept."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

from anyio import BrokenWorkerProcess, CapacityLimiter, fail_after, to_process
from fastapi import Request

from app.cards.catalog import Adapters, Registry
from app.errors import InvalidValue, RequestError, Unavailable
from app.imaging import FORMATS, Format
from app.keys import ApiKey, Keyring
from app.logs import logger
from app.metrics import Metrics
from app.settings import Settings
from app.source import bounded
from app.worker.supervisor import Supervisor

T = TypeVar("T")

BODY_LIMIT = 1024 * 1024
BODY_LIMITS = dict.fromkeys(("/v1/images/edits", "/v1/images/variations"), 32 * BODY_LIMIT)
"""Bytes of a body: of routes that take a picture, and of all others. The longest prompt of any card has 32,000
characters."""
RANGES = 32  # media ranges of an Accept header, and parameters of one, that are read; browsers send ten
log = logger("instep")
VALUES_LIMIT = 4096
"""Values, names and brackets in its JSON. Half a million small lists take 60 ms to parse, and a thread does not help:
the parser holds the interpreter's lock."""


@dataclass(frozen=True)
class Front:
    """What create_app puts together; a reload makes another one. reread: reads the settings again.

    documents: OpenAPI documents by the models and LoRAs in them. pool: threads for work that would hold the event loop.
    readers: how many processes read uploads at once. uploads: bytes of those that are here.
    """

    settings: Settings
    registry: Registry
    supervisor: Supervisor
    metrics: Metrics
    keys: Keyring
    reread: Callable[[], Settings]
    documents: dict[tuple[tuple[str, ...], ...], asyncio.Future[bytes]] = field(default_factory=dict)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "imaging"))
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))
    uploads: Counter[object] = field(default_factory=Counter)
    _queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    _running: defaultdict[Hashable, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _next: dict[Hashable, asyncio.Future[Any]] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether it can draw whatever a request may ask for."""
        return self.supervisor.ready and self.registry.adapters is not None

    @property
    def adapters(self) -> Adapters:
        """The LoRAs that may be asked for, by name. Raises Unavailable until it is known which models they fit."""
        if self.registry.adapters is None:
            raise Unavailable("This server still reads its LoRAs. Try again soon.", retry_after=5.0)
        return self.registry.adapters

    async def turn(self) -> None:
        """Wait in line until this request may go on: one does in each turn of the event loop.

        So sockets and probes come between. What follows should hold the loop for a few ms at most.
        """
        async with self._queue:
            await asyncio.sleep(0)

    async def in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        """Run what computes or reads files off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    async def in_process(self, work: Callable[..., T], *arguments: object) -> T:
        """Run what reads an upload in a process of its own, which ends when the caller is cancelled.

        Raises what `work` raises, InvalidValue where the file ends two processes, or Unavailable.
        """
        read = partial(to_process.run_sync, bounded, work, *arguments, cancellable=True, limiter=self.readers)
        try:
            with fail_after(self.settings.request_timeout):
                with suppress(BrokenWorkerProcess):  # it may have been dead before
                    return await read()
                return await read()
        except BrokenWorkerProcess:
            raise InvalidValue("image: cannot be read: it ends the process that reads it", param="image") from None
        except OSError as error:  # a TimeoutError too
            log.error("upload not read", reason=repr(error))
            message = "This server has no time or no room to read an upload now."
            raise Unavailable(message, retry_after=5.0, code="overloaded") from None

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
    """The server's parts as they were when this request came, with the models and LoRAs that its key may use."""
    front, key = cast(Front, request.state.front), key_of(request)
    limited = key.models or key.loras
    return replace(front, registry=front.registry.only(key.models, key.loras)) if limited else front


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
    data = b"".join([chunk async for chunk in received(request)])
    await front_of(request).turn()
    return parse_json(data)


async def received(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises RequestError: over the limit of its route, or with a Content-Encoding."""
    size = 0
    body_size(request, size)
    async for chunk in request.stream():
        size += len(chunk)
        body_size(request, size)
        yield chunk
    codings = ", ".join(request.headers.getlist("content-encoding")).split(",")
    for coding in map(str.strip, codings):
        if coding.lower() not in ("", "identity"):
            message = f'Content-Encoding: "{coding[:40]}" is not decoded here; send the body as it is'
            raise RequestError(message, code="unsupported_encoding")


def body_size(request: Request, size: int) -> int:
    """Bytes of a body of which so many have come: those that it declares, where these are more.

    Raises RequestError: over the limit of its route.
    """
    declared = request.headers.get("content-length", "")
    limit = BODY_LIMITS.get(request.scope["route"].path, BODY_LIMIT)
    size = max(size, int(declared) if declared.isdigit() else 0)
    if size > limit:
        raise RequestError(f"The body is over {limit} bytes", code="body_too_large")
    return size


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
