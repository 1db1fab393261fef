"""The layers around every request, as plain ASGI: its id, its log line, its turns, and how its answer ends.

FastAPI's own middleware would hide a client's disconnect.
"""

from __future__ import annotations

import re
import time
import uuid
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.api.front import Front, Turns
from app.errors import Cancelled, InstepError
from app.keys import KEY_LENGTH, NOBODY
from app.logs import logger

PROBES = ("/health", "/healthz", "/readyz")
"""Routes that are answered at once, so that a crowd does not look like a server that is stuck."""

SLICE = 256 * 1024  # bytes of an answer in one turn of the event loop: to copy a hundred megabytes takes 100 ms
DRAIN_LIMIT = 32 * 1024 * 1024  # bytes of a request that are read and dropped; REQUEST_TIMEOUT bounds the time
CLIENT_GONE = 499

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = (*PROBES, "/metrics")

log = logger("instep.access")


class Access:
    """The layer that gives a request its id, log line and turns, and answers a fixed 500 for what nobody caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, partial(_without_traceback, send))
            return
        identity, method, status = _id(scope), scope["method"], 0
        if method == "HEAD":  # answered as GET is; uvicorn, which has the method as it was, leaves the body out
            scope = {**scope, "method": "GET"}
        scope.setdefault("state", {}).update(id=identity, key=NOBODY, facts={})
        front: Front = scope["app"].state.front
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = identity
            await _sliced(message, send, front.turns)

        try:
            if scope["path"] not in PROBES or scope["state"].get("pipelined"):
                await front.turns.take()
            await self._app(scope, receive, noting)
        except ClientDisconnect:  # before its body was read
            status = CLIENT_GONE
            front.metrics.failed("", Cancelled.code)
        except Exception:
            log.exception("unhandled", request_id=identity)
            if status:
                raise
            await error_response(InstepError("unhandled"))(scope, receive, noting)
        finally:
            _write(scope, method, status, time.perf_counter() - started)


class Drain:
    """The outermost layer: it sends an answer at once, but ends it only when the request's body is whole.

    A server that closes a connection on unread data resets it, and a client that sends first and reads then would
    never see its 401.
    """

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


async def _without_traceback(send: Send, message: Message) -> None:
    """Send a message of the lifespan: what ends the start is raised by `serve`, so uvicorn need not log it."""
    await send({"type": message["type"]})


async def _sliced(message: Message, send: Send, turns: Turns) -> None:
    """Send a message, a long body in slices with a turn before each next one."""
    body, rest = message.get("body", b""), message.get("more_body", False)
    for end in range(SLICE, len(body), SLICE):
        await send({**message, "body": body[end - SLICE : end], "more_body": True})
        await turns.take()
        message = {**message, "body": body[end : end + SLICE], "more_body": rest}
    await send(message)


def _id(scope: Scope) -> str:
    """The client's own id for the request, if it sent one that is safe and no key; else a new one."""
    headers = Headers(scope=scope)
    given = headers.getlist("x-request-id")
    if len(given) != 1 or not _SAFE_ID.fullmatch(given[0]) or scope["app"].state.front.keys.find(given[0].encode()):
        return uuid.uuid4().hex
    sent = (value.split()[-1] for value in headers.getlist("authorization") if value.strip())
    return uuid.uuid4().hex if any(len(token) >= KEY_LENGTH and token in given[0] for token in sent) else given[0]


def _with_body(scope: Scope) -> bool:
    """Whether a body is on its way. NOTE: a client that waits for "100 Continue" need not send one after its answer;
    which client waits is judged as h11 judges it, since only that one would be sent a 100."""
    headers = Headers(scope=scope)
    expected = ",".join(headers.getlist("expect")).lower().split(",")
    if scope["http_version"] != "1.0" and "100-continue" in map(str.strip, expected):
        return False
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _write(scope: Scope, method: str, status: int, seconds: float) -> None:
    """Log one line for a request. NOTE: neither body nor query string, and of the path only the route's: prompts are
    private, and a client may put its key in any of them."""
    path = getattr(scope.get("route"), "path_format", None)
    write = log.debug if path in _QUIET else log.info
    state = scope["state"]
    gone = state["facts"].get("error") == Cancelled.code
    write(
        "request",
        request_id=state["id"],
        method=method,
        path=path,
        status=CLIENT_GONE if gone else status,
        total_ms=round(1000 * seconds, 1),
        **({"key": state["key"].name} if state["key"].name else {}),
        **state["facts"],
    )
