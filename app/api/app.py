"""The FastAPI application around one Front, and its routes for probes and metrics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from app.api import docs, images, models
from app.api.access import Access, Cors, authorize, read_origins
from app.api.errors import ErrorReply, error_response, on_error, on_http_error, on_invalid
from app.api.front import Front, front_of
from app.errors import InstepError, Unavailable
from app.metrics import CONTENT_TYPE

Application = FastAPI
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_ABOUT = """Images from diffusion transformers, batched at every denoising step. The `openai` client works unmodified;
the bounds below are those of each model."""

probes = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers; `ready` says whether it can draw an image now."""

    status: str
    ready: bool
    running: int
    waiting: int
    queue_device_seconds: float


@probes.get("/health")
@probes.get("/healthz")
async def health(request: Request) -> Health:
    """Live: 200 whenever this process answers at all, with a few numbers."""
    workers = front_of(request).supervisor
    return Health(
        status="ok",
        ready=workers.ready,
        running=workers.running,
        waiting=workers.waiting,
        queue_device_seconds=round(sum(workers.queues), 3),
    )


@probes.get("/readyz", responses={503: {"model": ErrorReply, "description": "Not ready, or draining"}})
async def readyz(request: Request) -> dict[str, str]:
    """Ready: an engine process is alive, every PRELOAD model is loaded, and the server does not shut down."""
    if not front_of(request).supervisor.ready:
        raise Unavailable("Not ready: the engine or a preloaded model is still starting, or the server drains.")
    return {"status": "ready"}


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
    app.state.documents = {}
    for router in (images.router, models.router, probes, docs.router):
        app.include_router(router)
    app.add_middleware(Access)
    if origins := read_origins(front.settings.cors_origins):
        app.add_middleware(Cors, origins=origins)
    return app


def refuser(app: Application) -> Callable[[InstepError, str], Response]:
    """Makes the answer to a request that reaches no route: counted as all errors, and readable to the same pages."""
    front: Front = app.state.front
    origins = read_origins(front.settings.cors_origins)
    cors = Cors(app, origins)

    def refuse(error: InstepError, origin: str) -> Response:
        front.metrics.rejected("", error.code)
        response = error_response(error)
        if origin and origins:
            cors.mark(response, origin)
        return response

    return refuse
