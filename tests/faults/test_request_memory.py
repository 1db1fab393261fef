"""REQUEST_MEMORY: what accepted requests carry is bounded in bytes, refused at the door, and free when they end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack

import httpx
import pytest

from app.errors import InstepError, Unavailable
from app.jobs.job import Job
from app.settings import Settings
from app.worker import wire
from app.worker.supervisor import Supervisor
from tests.parts.servers import Clients, Server, generate
from tests.parts.supervising import job, serving
from tests.parts.waiting import eventually, run, until

pytestmark = pytest.mark.slow

SLOW = "!slow 60"


def size(one: Job) -> int:
    """Bytes that a request carries: of the order that gives it to an engine process."""
    return len(wire.pack(("submit", one.request)))


def refused(supervisor: Supervisor, one: Job) -> bool:
    """Whether there is no room for this job; it is in flight otherwise."""
    try:
        supervisor.submit(one)
    except Unavailable as error:
        assert error.code == "overloaded" and error.retry_after is not None and error.retry_after >= 1
        assert "INSTEP_REQUEST_MEMORY" in error.message
        return True
    return False


def long(words: int) -> Job:
    """A request that runs for a minute and has a prompt of so many words."""
    return job(SLOW + " word" * words)


def test_bytes_count_and_not_requests() -> None:
    """One long prompt takes the room of many short ones: the budget is full to the byte, whatever it is full of."""
    large, small = long(2000), long(1)
    budget = size(large) + size(small)

    async def scenario() -> None:
        async with serving(request_memory=budget, max_wait=1e6) as served:
            supervisor = served.supervisor
            assert not refused(supervisor, large) and not refused(supervisor, small)
            assert refused(supervisor, long(1))
            large.cancel()
            await until(lambda: supervisor.waiting + supervisor.running == 1)
            count = 0
            while not refused(supervisor, long(1)):
                count += 1
            assert count == size(large) // size(small) > 10
            small.cancel()

    run(scenario)


def test_a_request_that_alone_is_too_large() -> None:
    async def scenario() -> None:
        async with serving(request_memory=10_000, max_wait=1e6) as served:
            assert refused(served.supervisor, long(2000)) and not refused(served.supervisor, long(1))

    run(scenario)


@pytest.mark.parametrize("ended", ["answered", "cancelled", "failed"])
def test_what_ends_is_free_again_to_the_byte(ended: str) -> None:
    """Twenty times as many as there is room for, one after another; then as many at once as at the start."""
    words = {"answered": "a cat", "cancelled": SLOW, "failed": "!nan"}[ended]
    budget = 2 * size(job(words)) + 8  # ids grow by a digit

    async def scenario() -> None:
        async with serving(request_memory=budget, max_wait=1e6) as served:
            for _ in range(40):
                one = job(words)
                served.supervisor.submit(one)
                if ended == "cancelled":
                    one.cancel()
                await asyncio.wait([asyncio.ensure_future(_end(one))])
            room = [refused(served.supervisor, job(words)) for _ in range(3)]
            assert room == [False, False, True]

    run(scenario)


async def _end(one: Job) -> None:
    try:
        await one
    except (InstepError, asyncio.CancelledError):
        return


def test_a_request_that_waits_for_an_engine_is_not_free() -> None:
    """It is kept for the next one, so it counts until it is answered, and once."""

    async def scenario() -> None:
        first = job("!slow 1")
        async with serving(request_memory=size(first) + 20, max_wait=1e6) as served:
            supervisor = served.supervisor
            await until(lambda: supervisor.ready)
            supervisor.submit(first)
            await until(lambda: supervisor.running == 1)
            os.kill(supervisor.pids[0], signal.SIGKILL)
            await until(lambda: supervisor.live == 0)
            assert refused(supervisor, job("a cat"))
            await first
            assert not refused(supervisor, job("a cat")) and supervisor.restarts == 1

    run(scenario)


def test_at_the_door_it_is_a_503_that_says_when(settings: Settings) -> None:
    """And what is in flight is answered: two requests fill the budget, the third is refused until they are done."""
    with ExitStack() as stack:
        server = stack.enter_context(Server(settings.model_copy(update={"request_memory": budget_of(settings)})))
        http = stack.enter_context(httpx.Client(base_url=server.ready().url, timeout=30))
        clients = Clients(http.base_url, "!slow 3")
        reply = generate(http, {"prompt": "!slow 3", "model": "tiny-text"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1 and reply.headers["x-should-retry"] == "true"
        assert [answer.status_code for answer in clients.answers()] == [200, 200]
        eventually(lambda: http.get("/health").json()["waiting"] == 0)
        assert generate(http, {"prompt": "!slow 0.1", "model": "tiny-text"}).status_code == 200


def budget_of(settings: Settings) -> int:
    """Room for two requests of tiny-text and for half of another, by what the server counts for one."""
    counted: list[int] = []
    with Server(settings) as server:
        submit: Callable[..., Job] = server.supervisor.submit

        def count(one: Job, **more: float | None) -> Job:
            counted.append(size(one))
            return submit(one, **more)

        server.supervisor.submit = count  # type: ignore[method-assign]
        reply = httpx.post(f"{server.ready().url}/v1/images/generations", json={"prompt": "a", "model": "tiny-text"})
        assert reply.status_code == 200
    return counted[0] * 5 // 2
