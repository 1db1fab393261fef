"""The FastAPI application around one Front, and its routes for probes and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from app.api import docs, images, models, page, reload
from app.api.access import Access, Answer, authorize
from app.api.errors import ErrorReply, error_response, on_error, on_http_error, on_invalid
from app.api.front import Front, front_of
from app.errors import InstepError, RequestError, SettingsError, Unavailable
from app.metrics import CONTENT_TYPE
from app.settings import Settings

EXPOSED = (
    *("Retry-After", "WWW-Authenticate"),
    *("X-Model", "X-Request-ID", "X-Seed", "X-Should-Retry", "X-Warning"),
)
"""Headers of our answers that a page may read, besides those that every page may."""

_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")

Application = FastAPI
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_ABOUT = """Images from diffusion models, batched at every denoising step. The `openai` client works unmodified;
the bounds below are those of each model."""

probes = APIRouter(tags=["health"])


@probes.get("/health")
@probes.get("/healthz")
async def health(request: Request) -> dict[str, str | bool | int | float]:
    """Live: 200 whenever this process answers at all, with a few numbers; `ready` says whether it can draw now."""
    workers = front_of(request).supervisor
    return {
        "status": "ok",
        "ready": front_of(request).ready,
        "running": workers.running,
        "waiting": workers.waiting,
        "queue_device_seconds": round(sum(workers.queues), 3),
    }


@probes.get("/readyz", responses={503: {"model": ErrorReply, "description": "Not ready, or draining"}})
async def readyz(request: Request) -> Response:
    """Ready: an engine process is alive, PRELOAD is loaded, LoRAs are known, and the server does not shut down."""
    if front_of(request).ready:
        return JSONResponse({"status": "ready"})
    message = "Not ready: the engine, a preloaded model or a LoRA is still being read, or the server drains."
    return error_response(Unavailable(message))


@probes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    front = front_of(request)

    async def text() -> bytes:
        front.metrics.refresh(front.supervisor)
        return await front.in_thread(front.metrics.text)

    return Response(await front.shared("metrics", text), media_type=CONTENT_TYPE)


def build(front: Front, lifespan: Lifespan, version: str) -> Application:
    """The application that serves this front. NOTE: FastAPI's own pages for docs would stand beside `authorize`."""
    app = FastAPI(
        title="Instep",
        version=version,
        description=_ABOUT,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        dependencies=[Depends(authorize)],
        exception_handlers={
            InstepError: on_error,
            HTTPException: on_http_error,
            RequestValidationError: on_invalid,
        },
    )
    app.state.front = front
    for router in (images.router, models.router, models.loras, reload.router, probes, docs.router, page.router):
        app.include_router(router)
    if front.settings.cors_origins:
        app.add_middleware(_Cors, **_cors(front.settings))
    app.add_middleware(Access, answer=_answerer(app))
    return app


def refuser(app: Application) -> Answer:
    """Makes the answer to a request that the wire refuses, and counts it as all errors are."""
    answer, metrics = _answerer(app), app.state.front.metrics

    def refuse(error: InstepError, origin: str) -> Response:
        metrics.rejected("", error.code)
        return answer(error, origin)

    return refuse


class _Cors(CORSMiddleware):
    """Starlette's layer, with a refused preflight in our own envelope."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight, which needs no key."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = RequestError("CORS_ORIGINS of this server does not have this origin.", code="not_allowed")
        refusal = error_response(error)
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal


def _answerer(app: Application) -> Answer:
    """Makes the answer to a request that reaches no route, readable to the same pages as all others."""
    settings: Settings = app.state.front.settings
    cors = CORSMiddleware(app, **_cors(settings))

    def answer(error: InstepError, origin: str) -> Response:
        response = error_response(error)
        if origin and settings.cors_origins:
            response.headers.update(cors.simple_headers)
            if cors.is_allowed_origin(origin):
                cors.allow_explicit_origin(response.headers, origin)
        return response

    return answer


def _cors(settings: Settings) -> dict[str, Any]:
    """Starlette's options for the pages of CORS_ORIGINS. No cookies: a key is a header here.

    Raises SettingsError for an origin that no browser would send.
    """
    origins = tuple(filter(None, (part.strip() for part in settings.cors_origins.split(","))))
    for origin in origins:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            wanted = 'an origin is scheme://host or scheme://host:port, in lower case and with nothing after it, or "*"'
            raise SettingsError(f'cors_origins: "{origin[:128]}": {wanted}', param="cors_origins")
    return {
        "allow_origins": origins,
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "allow_private_network": True,
        "expose_headers": EXPOSED,
    }
