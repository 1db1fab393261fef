"""POST /v1/images/compare: several models side by side: one body in, one labelled panel out.

Knows nothing of how images are made: each cell is an ordinary request, submitted, waited for and counted as one.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.front import Front, Record, front_of, record_of
from app.api.generation import Generation, milliseconds, unless_gone
from app.api.images import engine_id, headers, patience
from app.api.openapi import COMPARE_ROUTE
from app.api.reading import accepted_format, read_json
from app.cards.card import Card
from app.errors import EngineError, InstepError, InvalidValue, LoadError, Overloaded, RateLimited
from app.jobs.body import ImageBody
from app.jobs.compare import Comparison, lay_out, read_comparison
from app.jobs.panels import json_panel, panel_warnings, raw_panel
from app.report import Result
from app.request import Request as Asked

router = APIRouter()

Futures = list[asyncio.Future[list[Result]]]


@router.post("/v1/images/compare", **COMPARE_ROUTE)
async def compare_images(request: Request) -> Response:
    """Draw the same prompts or class labels by several models, with one seed.

    One labelled panel: a row for each prompt or label, a column for each model, in order of their parameters. What is
    absent is each model's own default. `preset: "two_prompts"` brings two prompts, 28 steps and guidance 7. Send
    `Accept: image/png` (image/jpeg, image/webp, image/*) for the bytes of the panel instead of JSON. At most 8 models,
    16 rows and 67 megapixels in all. Every picture is accepted before one is drawn; when one fails, that is the answer.
    """
    front, record, started = front_of(request), record_of(request), time.perf_counter()
    try:
        comparison = await _laid_out(request, front, record)
        cells = [Generation(front, record, ask, started) for ask in comparison.asks]
        futures = _submitted(front, record, cells)
    except InstepError as error:
        front.metrics.rejected(record.facts.get("model", ""), error.code)
        record.facts |= {"error": error.code}
        raise
    try:
        return await _reply(request, comparison, cells, futures)
    finally:
        for future in futures:
            future.cancel()


async def _laid_out(request: Request, front: Front, record: Record) -> Comparison:
    """The comparison that the body asks for; made in a thread, as it may look at the disk."""
    body = read_comparison(await read_json(request))
    limit, wanted = patience(request), accepted_format(request, body.shared.output_format)

    def make() -> Comparison:
        def complete(image: ImageBody, card: Card) -> Asked:
            return image.to_request(card, engine_id(record), record.key, limit)

        return lay_out(body, front.registry, complete, wanted)

    comparison = await front.in_thread(make)
    record.facts |= {"models": [card.id for card in comparison.cards], "seed": comparison.seed}
    record.facts |= {"images": len(comparison.asks)}
    return comparison


def _submitted(front: Front, record: Record, cells: list[Generation]) -> Futures:
    """The futures of all cells, or none: when one is refused, those before it are cancelled."""
    futures: Futures = []
    try:
        for cell in cells:
            futures.append(cell.submit())
    except InstepError as error:
        _dropped(front, cells[: len(futures)])
        for future in futures:
            future.cancel()
        record.facts["model"] = cells[len(futures)].ask.request.recipe.model
        raise _honest(front, record, cells[: len(futures)], len(cells), error) from None
    return futures


def _honest(front: Front, record: Record, accepted: list[Generation], count: int, error: InstepError) -> InstepError:
    """The refusal; of a comparison that by itself is more than may wait, a 400, as no later time would take it."""
    own = sum(cell.ask.estimate.cost for cell in accepted if cell.ask.estimate)
    limit = front.settings.max_wait * max(1, front.supervisor.live)
    limit = min(limit, record.key.queue) if record.key.queue is not None else limit
    if not isinstance(error, Overloaded | RateLimited) or own <= limit:
        return error
    message = f"models: the first {len(accepted)} of {count} pictures are {own:.0f} seconds of work already, and "
    return InvalidValue(
        f"{message}{limit:.0f} may wait here; ask for fewer, smaller or with fewer steps", param="models"
    )


async def _reply(request: Request, comparison: Comparison, cells: list[Generation], futures: Futures) -> Response:
    """Wait for all cells, then draw the panel; the first error, or the client's leaving, ends it for all."""
    try:
        results = await unless_gone(request, asyncio.ensure_future(_all(futures)))
        if comparison.raw:
            data, seconds = await cells[0].front.in_thread(raw_panel, comparison, results)
            said = await cells[0].front.in_thread(panel_warnings, comparison, results)
            beside = headers([card.id for card in comparison.cards], comparison.seed, said)
            response = Response(data, media_type=f"image/{comparison.format}", headers=beside)
        else:
            asks = [cell.ask for cell in cells]
            data, seconds = await cells[0].front.in_thread(json_panel, comparison, asks, results)
            response = Response(data, media_type="application/json")
    except Exception as error:
        raise _failed(cells, futures, error) from None
    _answered(cells, results, seconds)
    return response


async def _all(futures: Futures) -> list[Result]:
    """The picture of each cell. NOTE: a bare `gather` that is cancelled logs an error, as nobody awaits it any more."""
    return [one[0] for one in await asyncio.gather(*futures)]


def _failed(cells: list[Generation], futures: Futures, error: Exception) -> InstepError:
    """Count the cell that failed as failed and the others as cancelled; returns the error as it is to be told.

    An error of one model names it as the field, where it names none: `models.<id>`.
    """
    failing = (cell for cell, future in zip(cells, futures, strict=True) if _raised(future) is error)
    guilty = next(failing, None)
    first = guilty or cells[0]
    _dropped(first.front, [cell for cell in cells if cell is not first])
    told = first.failed(error)
    if guilty and told.param is None and isinstance(told, EngineError | LoadError):
        guilty.record.facts["model"] = guilty.ask.request.recipe.model
        return type(told)(told.message, param=f"models.{guilty.ask.request.recipe.model}", retry_after=told.retry_after)
    return told


def _raised(future: asyncio.Future[list[Result]]) -> BaseException | None:
    return future.exception() if future.done() and not future.cancelled() else None


def _dropped(front: Front, cells: list[Generation]) -> None:
    for cell in cells:
        front.metrics.failed(cell.ask.request.recipe.model, "cancelled")


def _answered(cells: list[Generation], results: list[Result], seconds: float) -> None:
    """Count every cell as a request that was answered; each has its share of the seconds of imaging."""
    total = time.perf_counter() - cells[0].started
    for cell, result in zip(cells, results, strict=True):
        cell.front.metrics.answered(cell.ask.request.recipe.model, [result], total, seconds / len(cells))
    cells[0].record.facts |= milliseconds(results, seconds)
