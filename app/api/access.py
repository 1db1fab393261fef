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

from app.api.front import Record
from app.api.responses import error_response
from app.errors import InstepError
from app.logs import logger

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/health", "/healthz", "/readyz", "/metrics")
CLIENT_GONE = 499

log = logger("instep.access")


class Access:
    """The outermost layer of our own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        started = time.perf_counter()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = record.id
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            record.gone = True
        except Exception:
            log.exception("unhandled", request_id=record.id)
            if record.status:
                raise
            await error_response(InstepError("unhandled"))(scope, receive, noting)
        finally:
            _write(scope, record, time.perf_counter() - started)


def _write(scope: Scope, record: Record, seconds: float) -> None:
    """One line a request. NOTE: neither body nor query string: prompts are nobody's business."""
    facts = {
        "request_id": record.id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": CLIENT_GONE if record.gone else record.status,
        "total_ms": round(1000 * seconds, 1),
        **record.facts,
    }
    if scope["path"] in _QUIET:
        log.debug("request", **facts)
    else:
        log.info("request", **facts)
