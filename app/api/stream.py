"""The event stream of a generation: previews, then each finished image, or an error after the 200.

Knows nothing of bodies and bounds: what it streams is already valid, and admitted before the 200 goes out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.generation import Generation
from app.api.replies import completed_event, partial_event
from app.api.responses import envelope
from app.errors import Cancelled
from app.report import Preview, Progress, Result

PING = 15.0
"""Seconds of silence after which a comment is sent, so that proxies keep the connection."""


class EventStream(StreamingResponse):
    """Server-sent events of one generation. Submits it when made, so that a refusal is still an HTTP status."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation) -> None:
        """Raises Unavailable, RateLimited, DeadlineExceeded."""
        self._generation = generation
        self._news: asyncio.Queue[Preview | Progress | Result | None] = asyncio.Queue()
        self._future = generation.submit(self._news.put_nowait)
        self._future.add_done_callback(lambda _: self._news.put_nowait(None))
        self._told = False
        super().__init__(self._events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

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
        ask, seconds = self._generation.ask, 0.0
        try:
            while (news := await self._next()) is not None:
                if isinstance(news, bytes):
                    yield news
                elif isinstance(news, Preview):
                    yield await self._generation.in_thread(partial_event, ask, news)
                elif isinstance(news, Result) and not ask.columns:
                    event, taken = await self._generation.in_thread(completed_event, ask, [news])
                    seconds += taken
                    yield event
            results = self._future.result()
            if ask.columns:
                event, seconds = await self._generation.in_thread(completed_event, ask, results)
                yield event
            self._told = True
            self._generation.answered(results, seconds)
        except Exception as error:
            self._told = True
            told = self._generation.failed(error)
            yield f"data: {envelope(told).model_dump_json()}\n\n".encode()

    async def _next(self) -> Preview | Progress | Result | bytes | None:
        """What happened next, a ping after a silence, None at the end."""
        try:
            return await asyncio.wait_for(self._news.get(), PING)
        except TimeoutError:
            return b": ping\n\n"
