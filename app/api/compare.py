"""POST /v1/images/compare: several models side by side: one body in, one labelled panel out.

Each cell is an ordinary job, submitted, awaited and counted as one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.docs import COMPARE_ROUTE
from app.api.front import Front, accepted_format, facts_of, front_of, key_of, read_json
from app.api.images import job_of, refusals, reply, submit
from app.errors import EngineError, InvalidValue, LoadError, RateLimited, Unavailable
from app.jobs.compare import cells, panel_answer, read_comparison, with_model
from app.jobs.job import Job

router = APIRouter()


@router.post("/v1/images/compare", **COMPARE_ROUTE)
async def compare_images(request: Request) -> Response:
    """Draw the same prompts or class labels by several models, with one seed.

    One labelled panel: a row for each prompt or label, a column for each model, in order of their parameters. What is
    absent is each model's own default. `preset: "two_prompts"` brings two prompts, 28 steps and guidance 7. Send
    `Accept: image/png` (image/jpeg, image/webp, image/*) for the bytes of the panel instead of JSON. At most 8 models,
    16 rows and 67 megapixels in all. Every picture is accepted before one is drawn; when one fails, that is the answer.
    """
    front, facts, started = front_of(request), facts_of(request), time.perf_counter()
    queue = key_of(request).queue
    with refusals(front, facts):
        raw = await read_json(request)
        body = await front.in_thread(read_comparison, raw, front.registry)
        wanted = accepted_format(request, body.output_format)
        format = wanted or body.output_format or "png"
        complete = partial(job_of, request, started, format=format, raw=wanted is not None)
        jobs = await front.in_thread(cells, body, front.registry, complete)
        facts |= {"models": body.models, "seed": body.seed, "images": len(jobs)}
        try:
            submit(front, jobs, queue)
        except (Unavailable, RateLimited) as error:
            raise _for_good(front, jobs, queue) or error from None
    try:
        return await reply(request, front, jobs, lambda results: panel_answer(body, jobs, [one for (one,) in results]))
    except (EngineError, LoadError) as error:
        raise with_model(jobs, error) from None


def _for_good(front: Front, jobs: Sequence[Job], queue: float | None) -> InvalidValue | None:
    """The error where a comparison by itself is more than may wait, as no later time would take it; else None."""
    costs = [job.estimate.cost for job in jobs if job.estimate]
    limit = front.settings.max_wait * max(1, front.supervisor.live)
    limit = limit if queue is None else min(limit, queue)
    if sum(costs) <= limit:
        return None
    message = f"models: the first {len(costs)} of {len(jobs)} pictures are {sum(costs):.0f} seconds of work already, "
    return InvalidValue(
        f"{message}and {limit:.0f} may wait here; ask for fewer, smaller or with fewer steps", param="models"
    )
