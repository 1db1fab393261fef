"""Drain: the outermost layer: an answer that comes before its request's body is whole ends after that body.

A server that closes a connection on unread data resets it, and a client that sends first and reads then would never
see its 401.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAIN_LIMIT = 32 * 1024 * 1024
"""Bytes that are read and dropped. REQUEST_TIMEOUT bounds the time."""


class Drain:
    """Sends the whole answer at once and holds back its end alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = scope["type"] != "http" or not _with_body(scope)
        if whole:
            await self._app(scope, receive, send)
            return

        async def hearing() -> Message:
            nonlocal whole
            message = await receive()
            whole = not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not whole:
                await send({**message, "more_body": True})
                message, left = {"type": "http.response.body"}, DRAIN_LIMIT
                while not whole and left > 0:
                    left -= len((await hearing()).get("body", b""))
            await send(message)

        await self._app(scope, hearing, sending)


def _with_body(scope: Scope) -> bool:
    """Whether a body is on its way. NOTE: a client that waits for "100 Continue" need not send one after its answer;
    which client waits is told here as h11 tells it, since only that one would be sent a 100."""
    headers = Headers(scope=scope)
    expected = ",".join(headers.getlist("expect")).lower().split(",")
    if scope["http_version"] != "1.0" and "100-continue" in map(str.strip, expected):
        return False
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
