"""Uploads: the bodies that bring a picture, as a form or as JSON. A file keeps the body, another process reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from fastapi import Request

from app.api.front import Front, body_size, front_of, parse_json, received
from app.errors import RequestError, Unavailable
from app.jobs.body import ImageBody, Json
from app.jobs.edit import EditBody
from app.source import FORM, JSON, unpack

PIECE = 1024 * 1024  # bytes that are written at once


@dataclass(frozen=True)
class Upload:
    """What a client sent: the fields as JSON would have them, and files that are there as long as the context.

    by_white: the mask came as `mask_image`, of which the white is repainted always.
    """

    fields: Json
    image: Path
    mask: Path | None
    by_white: bool


@asynccontextmanager
async def upload(request: Request) -> AsyncIterator[Upload]:
    """Read the body. Raises RequestError, Unavailable where all uploads together take too much, or ClientDisconnect."""
    front, kind = front_of(request), request.headers.get("content-type", JSON)
    if kind.partition(";")[0].strip().lower() not in (FORM, JSON):
        raise RequestError(f"Content-Type: this route takes {FORM} and {JSON}")
    folder = ExitStack()
    try:
        body = await _keep(request, front, folder)
        text, files = await front.in_process(unpack, body, kind, typed_fields(EditBody))
        await front.turn()
        mask = files.get("mask_image", files.get("mask"))
        yield Upload(cast(Json, parse_json(text)), files["image"], mask, "mask_image" in files)
    finally:
        del front.uploads[folder]
        await front.in_thread(folder.close)


async def _keep(request: Request, front: Front, folder: ExitStack) -> Path:
    """Write the body to a file. What has come counts, so that a client which sends nothing takes no room."""
    _count(front, folder, 0, body_size(request, 0))
    waiting, size = bytearray(), 0
    try:
        body = Path(folder.enter_context(TemporaryDirectory(prefix="instep-")), "body")
        with body.open("wb") as out:
            async for chunk in received(request):
                size += len(chunk)
                _count(front, folder, size)
                waiting += chunk
                if len(waiting) >= PIECE:
                    await front.in_thread(out.write, waiting)
                    waiting = bytearray()
            await front.in_thread(out.write, waiting)
        return body
    except OSError as error:
        message = f"This server has no room for an upload now: {error.strerror}."
        raise Unavailable(message, retry_after=10.0, code="overloaded") from error


def _count(front: Front, upload: object, size: int, coming: int = 0) -> None:
    """Count so many bytes for this upload. Raises Unavailable, also where there is no room for what is coming."""
    if front.uploads.total() - front.uploads[upload] + size + coming > front.settings.upload_memory:
        message = "This server has too many uploads now. Try again later."
        raise Unavailable(message, retry_after=2.0, code="overloaded")
    front.uploads[upload] = size


@cache
def typed_fields(body: type[ImageBody]) -> frozenset[str]:
    """Fields of a body that may be something else than text: numbers, flags, objects, lists of them."""
    found = body.model_json_schema()["properties"].items()
    types = {
        name: {one.get("items", one).get("type", "object") for one in field.get("anyOf", [])} for name, field in found
    }
    return frozenset(name for name, each in types.items() if each - {"string", "null"})
