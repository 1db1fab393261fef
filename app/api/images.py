"""The routes that draw: make jobs of a body, submit them, await them unless the client leaves, and answer."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api.docs import BATCH_ROUTE, COMPARE_ROUTE, EDIT_ROUTE, IMAGE_ROUTE
from app.api.errors import envelope
from app.api.front import Front, accepted_format, facts_of, front_of, key_of, read_json
from app.api.uploads import upload
from app.cards.card import Card
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InstepError,
    InvalidValue,
    LoadError,
    RateLimited,
    Unavailable,
)
from app.imaging import Format
from app.jobs import replies
from app.jobs.batch import batch_jobs, of_request
from app.jobs.body import ImageBody, read_body
from app.jobs.compare import cells, panel_answer, read_comparison, with_model
from app.jobs.edit import read_edit, with_source
from app.jobs.job import Job
from app.logs import logger
from app.report import Preview, Progress, Result
from app.request import Source
from app.source import look, read_source

PING = 15.0
"""Seconds of silence after which a comment is sent, so that proxies keep the connection."""

HOLD = 5.0
"""Seconds that the status of a stream may wait for the engine's first report. A model that is not downloaded, is broken
or does not fit is known by then. What waits longer needs the pings that only a begun answer can have."""

_SECONDS = re.compile(r"[0-9]{1,8}(\.[0-9]{1,20})?")

News = tuple[int, Preview | Progress | Result | None] | bytes
"""A report of the job at this place, None for its end; or what is sent as it is."""

Encode = Callable[[list[list[Result]]], replies.Answer]

router = APIRouter()
log = logger("instep.access")


@router.post("/v1/images/generations", **IMAGE_ROUTE)
async def create_image(request: Request) -> Response:
    """Draw one image or several.

    OpenAI's `images.generate` with extensions. Send `Accept: image/png` (image/jpeg, image/webp, image/*) for the
    bytes of a single image or sheet instead of JSON; `stream: true` for server-sent events. `usage` counts padded text
    tokens and 16 x 16 pixels for an image token. `model` names the model that drew, and `warnings` the fields
    without effect; beside bytes they are the headers X-Model and X-Warning.
    """
    started = time.perf_counter()
    job = prepared(request, started, read_body(await read_json(request)))
    return await drawn(request, noted(job))


@router.post("/v1/images/batch", **BATCH_ROUTE)
async def draw_batch(request: Request) -> Response:
    """Draw several requests, for any models, and answer all of them in one stream of events.

    A browser opens six connections to a server at most; this takes one. The events are those of `generations` with
    `stream`, and the data of each has the `request_index`. An error of one request is an event, and the others go on.
    All are accepted before one is drawn: an error before that is the answer. At most 67 megapixels in all.
    """
    front, facts, started = front_of(request), facts_of(request), time.perf_counter()
    raw = await read_json(request)
    jobs = await front.in_thread(batch_jobs, raw, partial(prepared, request, started))
    del facts["model"]
    facts |= {"models": [*dict.fromkeys(job.card.model for job in jobs)], "requests": len(jobs)}
    facts |= {"images": sum(len(job.request.images) for job in jobs)}
    events = EventStream(front, jobs)
    submit(front, jobs, key_of(request).queue, "requests")
    return events


@router.post("/v1/images/variations", summary="Vary Image", **EDIT_ROUTE)
@router.post("/v1/images/edits", **EDIT_ROUTE)
async def edit_image(request: Request) -> Response:
    """Draw from a picture: all of it anew, or where a mask says.

    OpenAI's `images.edit` and `images.create_variation` with the fields of `generations` and more, as a form or as JSON
    with base64; a variation needs no prompt. `strength` says how much changes. The transparent parts of `mask`, or the
    white ones where it has none, are painted anew; the other pixels stay exactly. In `mask_image` it is the white ones
    always. Without `size`, images have the size of the model that is nearest in shape to the picture.
    """
    started, front, facts = time.perf_counter(), front_of(request), facts_of(request)
    async with upload(request) as sent:
        body = read_edit(sent.fields)
        card = front.registry.find(body.model)
        if request.scope["route"].path.endswith("variations") and body.prompt is None and not card.draws_classes:
            body = body.model_copy(update={"prompt": ""})
        job = prepared(request, started, body.sized(card, *await front.in_process(look, sent.image)))
        shape = body.reading(job.request.recipe)
        source = await _decoded(request, job, partial(read_source, sent.image, sent.mask, sent.by_white, *shape))
    job.request = await front.in_thread(with_source, job.request, source)
    facts |= {"strength": job.request.recipe.strength, "masked": job.request.recipe.masked}
    return await drawn(request, noted(job))


async def _decoded(request: Request, job: Job, read: Callable[[], Source]) -> Source:
    """The source of a job. Raises InvalidValue, DeadlineExceeded, and Cancelled when the client leaves."""
    front, deadline = front_of(request), job.request.delivery.deadline
    reading = asyncio.ensure_future(front.in_process(read))
    job.future.add_done_callback(lambda _: reading.cancel())
    try:
        async with _watched(request, [job]), asyncio.timeout(deadline and deadline - time.monotonic()):
            return await reading
    except TimeoutError:
        raise DeadlineExceeded("The deadline passed before the picture was read.") from None
    except asyncio.CancelledError:
        if not job.future.cancelled():
            raise
        raise failed(front, [job], Cancelled("The client left before the picture was read.")) from None


@router.post("/v1/images/compare", **COMPARE_ROUTE)
async def compare_images(request: Request) -> Response:
    """Draw the same prompts or class labels with several models and one seed.

    One labelled panel: a row for each prompt or label, a column for each model, in order of their parameters. A field
    that is absent is each model's own default. `preset: "two_prompts"` fills in two prompts, 28 steps and guidance 7.
    Send `Accept: image/png` (image/jpeg, image/webp, image/*) for the bytes of the panel instead of JSON. At most 8
    models, 16 rows and 67 megapixels in all. All pictures are accepted before one is drawn; if one fails, its error is
    the answer.
    """
    front, facts, started = front_of(request), facts_of(request), time.perf_counter()
    raw = await read_json(request)
    body = await front.in_thread(read_comparison, raw, front.registry)
    wanted = accepted_format(request, body.output_format)
    format = wanted or body.output_format or "png"
    complete = partial(job_of, request, started, format=format, raw=wanted is not None)
    jobs = await front.in_thread(cells, body, front.registry, complete)
    facts |= {"models": body.models, "seed": body.seed, "images": len(jobs)}
    submit(front, jobs, key_of(request).queue, "models")
    try:
        return await reply(request, front, jobs, lambda results: panel_answer(body, jobs, [one for (one,) in results]))
    except (EngineError, LoadError) as error:
        raise with_model(jobs, error) from None


def prepared(request: Request, started: float, body: ImageBody) -> Job:
    """The job of a body. Raises RequestError, ModelNotFound."""
    card = front_of(request).registry.find(body.model)
    facts_of(request)["model"] = card.model
    wanted = accepted_format(request, body.output_format)
    format = wanted or body.output_format or "png"
    job = job_of(request, started, card, body, format, wanted is not None)
    images = job.request.images
    if job.raw and not body.stream and len(images) > 1 and not job.columns:
        message = f'grid: {len(images)} images as one image/{format} take {{"columns": 1}} or more'
        raise InvalidValue(message, param="grid")
    return job


def noted(job: Job) -> Job:
    """The job, with facts for the log of a request that has one job."""
    images, refiner = job.request.images, {"refiner": job.refiner.id} if job.refiner else {}
    job.facts |= {"seed": images[0].seed, "steps": job.request.recipe.steps, "images": len(images), **refiner}
    return job


async def drawn(request: Request, job: Job) -> Response:
    """Submit a job and answer with its images, as a whole or as a stream. Raises as `submit` and `reply`."""
    front = front_of(request)
    events = EventStream(front, [job]) if job.body.stream else None
    submit(front, [job], key_of(request).queue)
    if events:
        return events if job.body.progress else await events.begin(request)
    return await reply(request, front, [job], lambda results: replies.answer(job, results[0]))


def job_of(
    request: Request, started: float, card: Card, body: ImageBody, format: Format = "png", raw: bool = False
) -> Job:
    """The job that a body asks for, which came by this request. Raises RequestError, Unavailable."""
    identity = request.state.id
    unique = f"{identity}-{uuid.uuid4().hex[:12]}"  # a client may send the same X-Request-ID twice at once
    adapters = front_of(request).adapters if body.loras or card.loras else None
    refiner = body.refined_by(card, front_of(request).registry)
    asked = body.to_request(card, unique, key_of(request), patience(request), adapters, refiner)
    return Job(asked, card, body, format, raw, identity, started, facts_of(request), refiner=refiner)


def patience(request: Request) -> float | None:
    """Seconds that OpenAI's client waits for the reply, by the header it sends; None where that makes no sense."""
    values = request.headers.getlist("x-stainless-read-timeout")
    seconds = float(values[0]) if len(values) == 1 and _SECONDS.fullmatch(values[0]) else 0.0
    return seconds if seconds > 0 else None


def submit(front: Front, jobs: Sequence[Job], limit: float | None, field: str = "") -> None:
    """Submit all of these jobs; when one is refused, none is in flight. limit: as in `Supervisor.submit`. field: of the
    body that made several jobs.

    Raises Unavailable, RateLimited, DeadlineExceeded, and InvalidValue where no later time would take them.
    """
    for place, job in enumerate(jobs):
        try:
            front.supervisor.submit(job, limit=limit)
        except InstepError as error:
            for earlier in jobs[:place]:
                earlier.cancel()
                front.metrics.failed(earlier.card.model, Cancelled.code)
            job.facts["model"] = job.card.model
            busy = field and isinstance(error, Unavailable | RateLimited)
            named = error if job.place is None else of_request(error, job.place)
            raise (busy and _for_good(front, jobs, limit, field)) or named from None


async def reply(request: Request, front: Front, jobs: Sequence[Job], encode: Encode) -> Response:
    """Await the jobs, and answer with what `encode` makes of the results of each.

    When one job fails, all are cancelled and its error is raised; Cancelled when the client leaves.
    """
    try:
        async with _watched(request, jobs):
            results = await asyncio.gather(*jobs)
        made = await front.in_thread(encode, results)
    except Exception as error:
        raise failed(front, jobs, error) from None
    answered(front, jobs)
    content, headers = made
    return Response(content, headers=headers)


def answered(front: Front, jobs: Sequence[Job]) -> None:
    """Count and log jobs that were answered in full."""
    total = time.perf_counter() - jobs[0].started
    for job in jobs:
        front.metrics.answered(job, total, job.imaging)
    timings = [result.timings for job in jobs for result in job.results.values()]
    slowest = max(timings, key=lambda one: one.queue + one.denoise)
    stages = {name: getattr(slowest, name) for name in ("queue", "encode", "denoise", "decode")}
    stages["image_encode"] = sum(job.imaging for job in jobs)
    jobs[0].facts |= {f"{name}_ms": round(1000 * seconds, 1) for name, seconds in stages.items()}


def failed(front: Front, jobs: Sequence[Job], error: Exception) -> InstepError:
    """End jobs that get no answer: the one with this error counts as failed, the others as cancelled.

    The log has the full message, which the client may not see. Returns the error to answer with: one that is not ours
    is a bug, and is logged with its traceback.
    """
    guilty = next((job for job in jobs if job.error is error), jobs[0])
    if not isinstance(error, InstepError):
        log.exception("unhandled", request_id=guilty.id)
        error = InstepError(repr(error))
    for job in jobs:
        job.cancel()
        front.metrics.failed(job.card.model, error.code if job is guilty else Cancelled.code)
    guilty.facts |= {"error": error.code, "detail": error.message}
    return error


@asynccontextmanager
async def _watched(request: Request, jobs: Sequence[Job]) -> AsyncIterator[None]:
    """Cancel the jobs when the client leaves. NOTE: before the body is read this would take it away."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue
        for job in jobs:
            job.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _for_good(front: Front, jobs: Sequence[Job], queue: float | None, field: str) -> InvalidValue | None:
    """The error where these jobs by themselves are more than may wait, as no later time would take it; else None."""
    costs = [job.estimate.cost for job in jobs if job.estimate]
    limit = front.settings.max_wait * max(1, front.supervisor.live)
    limit = limit if queue is None else min(limit, queue)
    if sum(costs) <= limit:
        return None
    what = "pictures" if field == "models" else field
    message = f"{field}: the first {len(costs)} of {len(jobs)} {what} are {sum(costs):.0f} seconds of work already, "
    return InvalidValue(
        f"{message}and {limit:.0f} may wait here; ask for fewer, smaller or with fewer steps", param=field
    )


class EventStream(StreamingResponse):
    """The answer to jobs as server-sent events: previews, then each finished image, or an error after the 200.

    An error ends its job, and the others go on.
    """

    media_type = "text/event-stream"

    def __init__(self, front: Front, jobs: Sequence[Job]) -> None:
        self._front = front
        self._open = dict(enumerate(jobs))
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._first: News | None = None
        for place, job in self._open.items():
            self._follow(place, job)
        super().__init__(self._events(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    def _follow(self, place: int, job: Job) -> None:
        """NOTE: what hears of the job knows its place alone, or it would keep its pictures."""
        put = self._news.put_nowait
        job.on_report = lambda report: put((place, report))
        job.on_restart = partial(put, b": restarted\n\n")
        job.future.add_done_callback(lambda _: put((place, None)))

    async def begin(self, request: Request) -> EventStream:
        """Wait for the engine's first report of the one job, at most HOLD seconds, and return itself.

        Raises the error of a job that failed before there was anything to show, so that it is an HTTP status, and
        Cancelled when the client leaves.
        """
        (job,) = self._open.values()
        try:
            async with _watched(request, [job]):
                self._first = await self._next(HOLD)
                if self._first == (0, None):
                    job.result()
        except Exception as error:
            raise failed(self._front, [job], error) from None
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """NOTE: a client may leave before the generator has begun, and then its `finally` never runs."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._open:
                failed(self._front, [*self._open.values()], Cancelled("The client left before the stream ended."))
                self._open.clear()

    async def _events(self) -> AsyncIterator[bytes]:
        for event in [replies.accepted_event(job) for job in self._open.values() if job.body.progress]:
            yield event
        news = self._first or await self._next(PING)
        while True:
            if isinstance(news, bytes):
                yield news
            elif news[0] in self._open:
                async for event in self._shown(*news):
                    yield event
            if not self._open:
                return
            news = await self._next(PING)

    async def _shown(self, place: int, report: Preview | Progress | Result | None) -> AsyncIterator[bytes]:
        """The events, one at most, that show a report of a job, or the end of it."""
        job = self._open[place]
        try:
            if isinstance(report, Progress):
                yield replies.progress_event(job, report)
            elif isinstance(report, Preview):
                yield await self._front.in_thread(replies.partial_event, job, report)
            elif report and not job.columns:
                yield await self._front.in_thread(replies.completed_event, job, [report])
            elif not report:
                results = job.result()
                if job.columns:
                    yield await self._front.in_thread(replies.completed_event, job, results)
                del self._open[place]
                answered(self._front, [job])
        except Exception as error:
            self._open.pop(place, None)
            yield replies.error_event(job, envelope(failed(self._front, [job], error)).model_dump())

    async def _next(self, seconds: float) -> News:
        """The next news, or a ping after so many seconds of silence."""
        try:
            return await asyncio.wait_for(self._news.get(), seconds)
        except TimeoutError:
            return b": ping\n\n"
