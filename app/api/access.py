"""Access: around every request: its id, its log line, and a fixed 500 for what nobody caught.

Knows nothing of routes; plain ASGI, because FastAPI's own middleware hides a client's disconnect.
"""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.crowd import Turns
from app.api.front import Front, Record
from app.api.responses import error_response
from app.errors import Cancelled, InstepError
from app.keys import KEY_LENGTH
from app.logs import logger

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PROBES = ("/health", "/healthz", "/readyz")
"""Routes that are answered at once, so that a crowd does not look like a server that is stuck."""

_QUIET = (*PROBES, "/metrics")
CLIENT_GONE = 499

SLICE = 256 * 1024
"""Bytes of an answer that are sent in one turn of the event loop: to copy a hundred megabytes takes 100 ms."""

log = logger("instep.access")


class Access:
    """The outermost layer of our own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, method = Record(_id(scope)), scope["method"]
        if method == "HEAD":  # answered as GET is; uvicorn, which has the method as it was, leaves the body out
            scope = {**scope, "method": "GET"}
        scope.setdefault("state", {})["record"] = record
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = record.id
            await _sliced(message, send, turns)

        front: Front = scope["app"].state.front
        turns = front.turns
        try:
            if scope["path"] not in PROBES or scope["state"].get("pipelined"):
                await turns.take()
            await self._app(scope, receive, noting)
        except ClientDisconnect:  # before its body was read
            record.gone = True
            front.metrics.failed("", Cancelled.code)
        except Exception:
            log.exception("unhandled", request_id=record.id)
            if record.status:
                raise
            await error_response(InstepError("unhandled"))(scope, receive, noting)
        finally:
            _write(scope, method, record, time.perf_counter() - started)


async def _sliced(message: Message, send: Send, turns: Turns) -> None:
    """Send a message, a long body in slices with a turn before each next one."""
    body, rest = message.get("body", b""), message.get("more_body", False)
    for end in range(SLICE, len(body), SLICE):
        await send({**message, "body": body[end - SLICE : end], "more_body": True})
        await turns.take()
        message = {**message, "body": body[end : end + SLICE], "more_body": rest}
    await send(message)


def _id(scope: Scope) -> str:
    """The client's own id for the request, where it sent one, safe and no key; else a new one."""
    headers = Headers(scope=scope)
    given = headers.getlist("x-request-id")
    if len(given) != 1 or not _SAFE_ID.fullmatch(given[0]) or scope["app"].state.front.keys.find(given[0].encode()):
        return uuid.uuid4().hex
    sent = (value.split()[-1] for value in headers.getlist("authorization") if value.strip())
    return uuid.uuid4().hex if any(len(token) >= KEY_LENGTH and token in given[0] for token in sent) else given[0]


def _write(scope: Scope, method: str, record: Record, seconds: float) -> None:
    """One line a request. NOTE: neither body nor query string, and of the path only the route's: prompts are nobody's
    business, and a client may put its key in any of them."""
    path = getattr(scope.get("route"), "path_format", None)
    facts = {
        "request_id": record.id,
        "method": method,
        "path": path,
        "status": CLIENT_GONE if record.gone or record.facts.get("error") == Cancelled.code else record.status,
        "total_ms": round(1000 * seconds, 1),
        **({"key": record.key.name} if record.key.name else {}),
        **record.facts,
    }
    if path in _QUIET:
        log.debug("request", **facts)
    else:
        log.info("request", **facts)
