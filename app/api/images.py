"""POST /v1/images/generations: one body in; JSON, the bytes of a picture or a stream of events out."""

from __future__ import annotations

import time
from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.front import front_of, record_of
from app.api.jobs import EventStream, file_response, job_of, refusals, reply, submit
from app.api.openapi import IMAGE_ROUTE
from app.api.reading import accepted_format, read_json
from app.errors import InvalidValue
from app.imaging import Format
from app.jobs.body import read_body
from app.jobs.job import Job
from app.jobs.replies import json_reply, raw_image
from app.jobs.warnings import warnings
from app.report import Result

router = APIRouter()


@router.post("/v1/images/generations", **IMAGE_ROUTE)
async def create_image(request: Request) -> Response:
    """Draw one image or several.

    OpenAI's `images.generate` with extensions. Send `Accept: image/png` (image/jpeg, image/webp, image/*) for the
    bytes of a single image or sheet instead of JSON; `stream: true` for server-sent events. `usage` counts padded text
    tokens and 16 x 16 pixels for an image token. `model`, or the header X-Model beside bytes, says who drew;
    `warnings`, or X-Warning, has what was asked for without effect.
    """
    front, record, started = front_of(request), record_of(request), time.perf_counter()
    with refusals(front, record.facts):
        body = read_body(await read_json(request))
        card = front.registry.find(body.model)
        record.facts["model"] = card.id
        wanted = accepted_format(request, body.output_format)
        format = wanted or cast(Format, body.output_format or "png")
        job = job_of(request, started, card, body, format, wanted is not None)
        images = job.request.images
        record.facts |= {"seed": images[0].seed, "steps": job.request.recipe.steps, "images": len(images)}
        if job.raw and not body.stream and len(images) > 1 and not job.columns:
            message = f'grid: {len(images)} images as one image/{format} take {{"columns": 1}} or more'
            raise InvalidValue(message, param="grid")
        events = EventStream(front, job) if body.stream else None
        submit(front, [job], record.key.queue)
    if events:
        return await events.begin(request)
    return await reply(request, front, [job], lambda results: _encode(job, results[0]))


def _encode(job: Job, results: list[Result]) -> tuple[Response, float]:
    if job.raw:
        data, seconds = raw_image(job, results)
        return file_response(data, job.format, [job.card.id], results[0].seed, warnings(job, results)), seconds
    data, seconds = json_reply(job, results)
    return Response(data, media_type="application/json"), seconds
