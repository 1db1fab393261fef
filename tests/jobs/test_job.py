"""A job hears of its engine, and ends once: with its results in order, with an error, or cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from app.errors import Cancelled, EngineError
from app.jobs.job import Job
from app.report import Failure, Preview, Progress, Result, Timings
from tests.parts.requests import refused
from tests.parts.supervising import job

PIXELS = np.zeros((2, 2, 3), np.uint8)


def result(index: int) -> Result:
    return Result("id", index, index, PIXELS, Timings(0, 0, 0, 0, 1, 1.0))


def test_its_results_come_in_the_order_of_the_images() -> None:
    heard: list[Any] = []
    asked = job(seeds=(1, 2), on_report=heard.append)
    reports = [Progress("id", 0, 1, 4), Preview("id", 1, 0, PIXELS), result(1), result(0)]
    for report in reports:
        assert not asked.future.done()
        asked.hear(report)
    assert heard == reports and asked.images_left == 0 and asked.error is None
    assert [one.index for one in asked.result()] == [0, 1]


def test_it_ends_once() -> None:
    heard: list[Any] = []
    asked, error = job(on_report=heard.append), EngineError("the network gave NaN", code="non_finite_output")
    asked.hear(Failure("id", error))
    asked.hear(result(0))
    asked.fail(EngineError("again", code="non_finite_output"))
    asked.cancel()
    assert asked.error is error and heard == [] and asked.images_left == 1
    with refused("non_finite_output", match="gave NaN"):
        asked.result()


def test_nothing_is_heard_of_a_job_that_was_given_up() -> None:
    asked = job()
    asked.cancel()
    asked.hear(result(0))
    assert asked.future.cancelled() and asked.error is None and not asked.results
    with pytest.raises(Cancelled):
        asked.result()


def test_a_listener_that_fails_or_cancels_harms_only_itself() -> None:
    asked = job(on_report=lambda report: 1 / 0)
    asked.hear(result(0))
    assert len(asked.result()) == 1
    given_up = job()
    given_up.on_report = lambda report: given_up.cancel()
    given_up.hear(result(0))
    assert given_up.future.cancelled()


def test_it_is_awaited_from_any_thread_and_cancelled_with_its_task() -> None:
    async def wait_for(one: Job) -> list[Result]:
        return await one

    async def scenario() -> None:
        answered, failing, left, slow = job(), job(), job(), job()
        waiting = [asyncio.create_task(wait_for(one)) for one in (answered, failing, left, slow)]
        await asyncio.sleep(0)
        await asyncio.to_thread(answered.hear, result(0))
        await asyncio.to_thread(failing.fail, EngineError("NaN", code="non_finite_output"))
        left.cancel()
        waiting[3].cancel()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in found] == [list, EngineError, Cancelled, asyncio.CancelledError]
        assert slow.future.cancelled()
        assert len(await answered) == 1

    asyncio.run(asyncio.wait_for(scenario(), 10))
