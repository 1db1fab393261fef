"""POST /v1/images/generations: one body in; JSON, raw bytes or a stream of events out.

Knows nothing of how images are made: it submits a Request and waits, and cancels it when the client has gone.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Iterable
from typing import cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.front import Record, front_of, record_of
from app.api.generation import Generation, unless_gone
from app.api.openapi import IMAGE_ROUTE
from app.api.reading import accepted_format, read_json
from app.api.stream import EventStream
from app.errors import InstepError, InvalidValue
from app.imaging import Format
from app.jobs.body import read_body
from app.jobs.replies import Ask, json_reply, raw_image
from app.jobs.warnings import warnings
from app.report import Result

router = APIRouter()

_SECONDS = re.compile(r"[0-9]{1,8}(\.[0-9]{1,20})?")


@router.post("/v1/images/generations", **IMAGE_ROUTE)
async def create_image(request: Request) -> Response:
    """Draw one image or several.

    OpenAI's `images.generate` with extensions. Send `Accept: image/png` (image/jpeg, image/webp, image/*) for the
    bytes of a single image or sheet instead of JSON; `stream: true` for server-sent events. `usage` counts padded text
    tokens and 16 x 16 pixels for an image token. `model`, or the header X-Model beside bytes, says who drew;
    `warnings`, or X-Warning, has what was asked for without effect.
    """
    front, record, started = front_of(request), record_of(request), time.perf_counter()
    model = ""
    try:
        body = read_body(await read_json(request))
        card = front.registry.find(body.model)
        record.facts["model"] = model = card.id
        wanted = accepted_format(request, body.output_format)
        asked = body.to_request(card, engine_id(record), record.key, patience(request))
        ask = Ask(body, card, asked, wanted or cast(Format, body.output_format or "png"), wanted is not None)
        record.facts |= {"seed": asked.images[0].seed, "steps": asked.recipe.steps, "images": len(asked.images)}
        _single(ask)
        generation = Generation(front, record, ask, started)
        answer = EventStream(generation) if body.stream else generation.submit()
    except InstepError as error:
        front.metrics.rejected(model, error.code)
        record.facts |= {"error": error.code}
        raise
    if isinstance(answer, EventStream):
        return await answer.begin(request)
    return await _reply(request, generation, answer)


async def _reply(request: Request, generation: Generation, future: asyncio.Future[list[Result]]) -> Response:
    """Wait for the images, then encode them; stop both when the client goes."""
    ask = generation.ask
    try:
        results = await unless_gone(request, future)
        if ask.raw:
            data, seconds = await generation.front.in_thread(raw_image, ask, results)
            said = await generation.front.in_thread(warnings, ask, results)
            beside = headers([ask.card.id], results[0].seed, said)
            response = Response(data, media_type=f"image/{ask.format}", headers=beside)
        else:
            data, seconds = await generation.front.in_thread(json_reply, ask, results)
            response = Response(data, media_type="application/json")
    except Exception as error:
        raise generation.failed(error) from None
    generation.answered(results, seconds)
    return response


def headers(models: Iterable[str], seed: int, told: list[str]) -> dict[str, str]:
    """What raw bytes cannot say: who drew them, the first seed, warnings.

    NOTE: a warning may quote a prompt; JSON leaves nothing in it that ends a header.
    """
    known = {"X-Model": ", ".join(models), "X-Seed": str(seed)}
    return {**known, **({"X-Warning": json.dumps("; ".join(told)[:400])} if told else {})}


def _single(ask: Ask) -> None:
    if ask.raw and not ask.body.stream and len(ask.request.images) > 1 and not ask.columns:
        count = len(ask.request.images)
        raise InvalidValue(
            f'grid: {count} images as one image/{ask.format} take {{"columns": 1}} or more', param="grid"
        )


def patience(request: Request) -> float | None:
    """Seconds that OpenAI's client waits for the reply, by the header it sends; None where that makes no sense."""
    told = request.headers.getlist("x-stainless-read-timeout")
    seconds = float(told[0]) if len(told) == 1 and _SECONDS.fullmatch(told[0]) else 0.0
    return seconds if seconds > 0 else None


def engine_id(record: Record) -> str:
    """The log's id with a unique tail: a client may send the same X-Request-ID twice at once."""
    return f"{record.id}-{uuid.uuid4().hex[:12]}"
