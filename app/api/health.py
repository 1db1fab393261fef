"""Health, readiness and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

from app.api.errors import ErrorReply
from app.api.front import front_of
from app.errors import Unavailable
from app.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process answers; `ready` tells whether it would serve an image now."""

    status: str
    ready: bool
    running: int
    waiting: int
    queue_device_seconds: float


@router.get("/health")
@router.get("/healthz")
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


@router.get("/readyz", responses={503: {"model": ErrorReply, "description": "Not ready, or draining"}})
async def readyz(request: Request) -> dict[str, str]:
    """Ready: an engine process lives, every PRELOAD model is loaded, and the server does not drain."""
    if not front_of(request).supervisor.ready:
        raise Unavailable("Not ready: the engine or a preloaded model is still starting, or the server drains.")
    return {"status": "ready"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    front = front_of(request)

    async def text() -> bytes:
        front.metrics.refresh(front.supervisor)
        return await front.in_thread(front.metrics.text)

    return Response(await front.shared("metrics", text), media_type=CONTENT_TYPE)
