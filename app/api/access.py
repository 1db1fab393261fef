"""What stands between the wire and a route: a request's id, limits, turn and log line, and its key.

The layers are plain ASGI: FastAPI's own middleware would hide that a client has left.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.front import Front
from app.errors import Cancelled, InstepError, RequestError, Unavailable
from app.keys import KEY_LENGTH, NOBODY, Keyring
from app.logs import logger

PROBES = ("/health", "/healthz", "/readyz")
"""Routes that wait for no turn and have room over the caps, so that a crowd does not look like a server that is stuck.
An orchestrator would restart it."""

OPEN = frozenset({"/healthz", "/readyz", "/metrics", "/", "/page/{path}"})
"""Routes that never need a key: probes, scrapers and a browser that opens a page send none."""

ADMIN = frozenset({"/v1/models/{model}/load", "/v1/models/{model}/unload", "/v1/reload"})
"""Routes that need the admin key, also on a server that is open to all."""

HEADERS = 100  # header lines of a request
HEADER_BYTES = 32 * 1024  # of a request's target and headers together
SLICE = 256 * 1024  # bytes of an answer in one turn of the event loop: to copy a hundred megabytes takes 100 ms
DRAIN_LIMIT = 32 * 1024 * 1024  # bytes of a request that are read and dropped; REQUEST_TIMEOUT bounds the time
CLIENT_GONE = 499

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = (*PROBES, "/metrics", "/page/{path}")
log = logger("instep.access")

Answer = Callable[[InstepError, str], Response]
"""Makes the answer to an error, for a page of this origin."""


class Access:
    """The layer that gives a request its id, limits, turns and log line, and answers a fixed 500 to other errors.

    It is the outermost one, so that the limits bind preflights too. A request that is refused by its head alone is
    counted and not logged, so that a flood cannot fill a disk.
    """

    def __init__(self, app: ASGIApp, answer: Answer) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # NOTE: without the traceback of a failed start, which uvicorn would log: `serve` raises the error.
            await self._app(scope, receive, lambda message: send({"type": message["type"]}))
            return
        front: Front = scope["app"].state.front
        identity, method, status = _id(scope, front.keys), scope["method"], 0
        if method == "HEAD":  # answered as GET is; uvicorn knows the method and leaves the body out
            scope = {**scope, "method": "GET"}
        state = scope.setdefault("state", {})
        state.update(id=identity, key=NOBODY, facts={}, front=front)
        receive, send = _drained(scope, receive, send)
        refusal, started = self._refusal(scope, front), time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = identity
                if refusal or "crowded" in state:
                    headers["Connection"] = "close"
            await _sliced(message, send, front)

        try:
            if scope["path"] not in PROBES or "pipelined" in state:
                await front.turn()
            await (refusal or self._app)(scope, receive, noting)
        except ClientDisconnect:  # before its body was read
            status = CLIENT_GONE
            front.metrics.failed("", Cancelled.code)
        except Exception:
            log.exception("unhandled", request_id=identity)
            if status:
                raise
            await self._answer(InstepError("unhandled"), _origin(scope))(scope, receive, noting)
        finally:
            if not refusal:
                _write(scope, method, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope, front: Front) -> Response | None:
        """The answer to a request that is refused by its head alone; it is the last one of its connection."""
        fault = _fault(scope)
        if fault is None:
            return None
        front.metrics.rejected("", fault.code)
        return self._answer(fault, _origin(scope))


async def authorize(request: Request) -> None:
    """Put the request's key into its state: the dependency of the whole application. Raises RequestError.

    NOTE: it reads the template of the chosen route, never request.url, which is made from the Host header. A route
    without a template is none of the open ones.
    """
    keys: Keyring = request.state.front.keys
    path = getattr(request.scope.get("route"), "path_format", "")
    if path in ADMIN and keys.admin is None:
        message = "This server has no admin key, so nobody may use this route."
        raise RequestError(message, code="not_allowed")
    if path in OPEN or (path not in ADMIN and not keys.clients):
        return
    key = keys.find(_token(request))
    if key is None:
        raise RequestError("This server does not know this key.", code="invalid_api_key")
    if path in ADMIN and key is not keys.admin:
        raise RequestError("This route takes the admin key.", code="not_allowed")
    request.state.key = key


def _token(request: Request) -> bytes:
    """The token of the one Authorization header. Raises RequestError: of two, a proxy may have checked the other."""
    sent = [value for name, value in request.headers.raw if name == b"authorization"]
    scheme, _, token = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not token.strip():
        raise RequestError("This server wants a key: Authorization: Bearer <key>, once.", code="invalid_api_key")
    return token.strip()


def _fault(scope: Scope) -> InstepError | None:
    """Why a request is refused by its head alone.

    With both Content-Length and Transfer-Encoding a proxy may see another end of this request than h11 does, and with
    it another next request (RFC 9112, 6.1). h11 itself refuses two lengths that differ, and other encodings.
    """
    headers = Headers(scope=scope)
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in headers.raw)
    if len(headers.raw) > HEADERS or size > HEADER_BYTES:
        message = f"A request may have {HEADERS} headers and {HEADER_BYTES} bytes of them."
        return RequestError(message, code="headers_too_large")
    if "transfer-encoding" in headers and ("content-length" in headers or scope["http_version"] == "1.0"):
        return RequestError("A request has either Content-Length or, in HTTP/1.1, Transfer-Encoding, never both.")
    if "crowded" in scope["state"] and scope["path"] not in PROBES:
        message = "Too many connections are open. Try again later."
        return Unavailable(message, retry_after=2.0, code="overloaded")
    return None


def _origin(scope: Scope) -> str:
    return Headers(scope=scope).get("origin", "")


def _drained(scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
    """`receive` and `send` for an answer that goes out at once, but ends only when the request's body is whole.

    A server that closes a connection on unread data resets it, and a client that first sends and then reads would
    never see its 401.
    """
    whole = not _with_body(scope)

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

    return hearing, sending


def _with_body(scope: Scope) -> bool:
    """Whether a body is on its way. NOTE: a client that waits for "100 Continue" need not send one after its answer;
    h11 sends a 100 to HTTP/1.1 alone."""
    headers = Headers(scope=scope)
    expected = ",".join(headers.getlist("expect")).lower().split(",")
    if scope["http_version"] != "1.0" and "100-continue" in map(str.strip, expected):
        return False
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


async def _sliced(message: Message, send: Send, front: Front) -> None:
    """Send a message; a long body goes in slices, with a turn before each next one."""
    body, rest = message.get("body", b""), message.get("more_body", False)
    for end in range(SLICE, len(body), SLICE):
        await send({**message, "body": body[end - SLICE : end], "more_body": True})
        await front.turn()
        message = {**message, "body": body[end : end + SLICE], "more_body": rest}
    await send(message)


def _id(scope: Scope, keys: Keyring) -> str:
    """The client's own id for the request, if it sent one that is safe and has no key in it; else a new one."""
    headers = Headers(scope=scope)
    ids = headers.getlist("x-request-id")
    if len(ids) != 1 or not _SAFE_ID.fullmatch(ids[0]) or keys.find(ids[0].encode()):
        return uuid.uuid4().hex
    tokens = (value.split()[-1] for value in headers.getlist("authorization") if value.strip())
    return uuid.uuid4().hex if any(len(token) >= KEY_LENGTH and token in ids[0] for token in tokens) else ids[0]


def _write(scope: Scope, method: str, status: int, seconds: float) -> None:
    """Log one line for a request. NOTE: neither body nor query string, and of the path only the route's: prompts are
    private, and a client may put its key in any of them."""
    path = getattr(scope.get("route"), "path_format", None)
    write = log.debug if path in _QUIET else log.info
    state = scope["state"]
    write(
        "request",
        request_id=state["id"],
        method=method,
        path=path,
        status=CLIENT_GONE if state["facts"].get("error") == Cancelled.code else status,
        total_ms=round(1000 * seconds, 1),
        **({"key": state["key"].name} if state["key"].name else {}),
        **state["facts"],
    )
