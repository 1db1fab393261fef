"""The event stream of a generation: previews, then each finished image, or an error after the 200.

Knows nothing of bodies and bounds: what it streams is already valid.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.errors import envelope
from app.api.generation import Generation, unless_gone
from app.errors import Cancelled
from app.jobs.replies import completed_event, partial_event
from app.report import Preview, Progress, Result

PING = 15.0
"""Seconds of silence after which a comment is sent, so that proxies keep the connection."""


HOLD = 5.0
"""Seconds that the status may wait for the engine's first word. A model that is not downloaded, is broken or does not
fit is known by then. What waits longer is drawn or queued, and needs the pings that only a begun answer can have."""

News = Preview | Progress | Result | bytes | None


class EventStream(StreamingResponse):
    """Server-sent events of one generation. Submits it when made, so that a refusal is an HTTP status."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation) -> None:
        """Raises Unavailable, RateLimited, DeadlineExceeded."""
        self._generation = generation
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._first: News = None
        self._future = generation.submit(self._news.put_nowait)
        self._future.add_done_callback(lambda _: self._news.put_nowait(None))
        self._told = False
        super().__init__(self._events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def begin(self, request: Request) -> EventStream:
        """Wait for the engine's first word, at most HOLD seconds, and return itself.

        Raises the error of a generation that failed before there was anything to show, so that it is an HTTP status,
        and Cancelled when the client leaves.
        """
        begun = False
        try:
            self._first = await unless_gone(request, asyncio.ensure_future(self._next(HOLD)))
            if self._first is None:
                self._future.result()
            begun = True
        except Exception as error:
            raise self._generation.failed(error) from None
        finally:
            if not begun:
                self._future.cancel()
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """NOTE: the cancelling is here, not in the generator: a client may go before the generator has begun, and
        then its `finally` never runs."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._future.cancel()
            if not self._told:
                self._generation.failed(Cancelled("The client left before the stream ended."))

    async def _events(self) -> AsyncIterator[bytes]:
        ask, seconds, news = self._generation.ask, 0.0, self._first
        try:
            while news is not None:
                if isinstance(news, bytes):
                    yield news
                elif isinstance(news, Preview):
                    yield await self._generation.front.in_thread(partial_event, ask, news)
                elif isinstance(news, Result) and not ask.columns:
                    event, taken = await self._generation.front.in_thread(completed_event, ask, [news])
                    seconds += taken
                    yield event
                news = await self._next(PING)
            results = self._future.result()
            if ask.columns:
                event, seconds = await self._generation.front.in_thread(completed_event, ask, results)
                yield event
            self._told = True
            self._generation.answered(results, seconds)
        except Exception as error:
            self._told = True
            told = self._generation.failed(error)
            yield f"data: {envelope(told).model_dump_json()}\n\n".encode()

    async def _next(self, seconds: float) -> News:
        """What happened next, a ping after so many seconds of silence, None at the end."""
        try:
            return await asyncio.wait_for(self._news.get(), seconds)
        except TimeoutError:
            return b": ping\n\n"
