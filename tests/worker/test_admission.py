"""The door: who may queue, by the seconds ahead, the key's share, its own limit, and the deadline."""

import asyncio
import math
import time

import pytest

from app.errors import DeadlineExceeded, RateLimited
from app.jobs.job import Estimate, Job
from app.worker.admission import Backlog, admit, after
from tests.parts.edits import edited
from tests.parts.fake_worker import RATE
from tests.parts.requests import changed, refused
from tests.parts.supervising import job, request, serving, tenants
from tests.parts.waiting import run, until
from tests.worker.test_backlog import backlog, of

BOUND = 10.0


def ask(books: Backlog, tenant: str = "", *, weight: float = 1.0, limit: float | None = None, **changes) -> Estimate:
    """One image of a second at the door of one worker."""
    return admitted(of(tenant, weight=weight, **changes), books, [books], limit)


def admitted(asked: Job, chosen: Backlog, books: list[Backlog], limit: float | None = None) -> Estimate:
    admit(asked, chosen, books, max_wait=BOUND, limit=limit)
    return asked.estimate


def test_what_is_ahead_counts_and_the_requests_own_cost_does_not():
    estimate = admitted(of("a", images=500), backlog(), [backlog()])
    assert estimate == Estimate(0.0, 0, pytest.approx(500.0))
    behind = backlog(a=(1.0, 4), b=(1.0, 3), c=(1.0, 3))
    assert ask(backlog(a=(1.0, 10)), "a") == Estimate(pytest.approx(10.0), 1, pytest.approx(1.0))
    assert ask(behind, "d").position == 3


def test_alone_a_tenant_may_fill_the_queue_and_is_told_how_long_it_drains():
    with refused("overloaded") as caught:
        ask(backlog(a=(1.0, 40)), "a")
    assert 30.0 <= caught.value.retry_after <= 45.0


def test_behind_a_full_queue_of_another_a_small_tenant_enters():
    """It waits for none of the other's eleven, but for one of them while it runs itself."""
    assert ask(backlog(flood=(1.0, 11)), "small").wait == pytest.approx(1.0)


def test_among_many_tenants_a_turn_is_as_long_as_they_are_many():
    crowd = backlog(**{f"t{number}": (1.0, 4) for number in range(40)})
    assert ask(crowd, "new").wait == pytest.approx(40.0)
    with refused("overloaded"):
        ask(crowd, "new", deadline=time.monotonic() + 8.0)


def test_over_half_full_a_tenant_over_its_share_is_told_so():
    with pytest.raises(RateLimited) as refused:
        ask(backlog(flood=(1.0, 7), small=(1.0, 1)), "flood")
    assert 2 * 7 - BOUND <= refused.value.retry_after <= 1.5 * (2 * 7 - BOUND)
    ask(backlog(flood=(1.0, 7), small=(1.0, 1)), "small")
    ask(backlog(flood=(3.0, 7), small=(1.0, 1)), "flood", weight=3.0)


def test_under_half_full_nobody_is_over_a_share():
    ask(backlog(flood=(0.1, 4), small=(1.0, 1)), "flood", weight=0.1)


def test_a_keys_own_limit_holds_at_any_time():
    with pytest.raises(RateLimited):
        ask(backlog(a=(1.0, 3)), "a", limit=2.0)
    ask(backlog(a=(1.0, 2)), "a", limit=2.0)


def test_a_share_is_of_all_workers():
    asked, books = of("a"), backlog(a=(1.0, 7), b=(1.0, 1))
    with pytest.raises(RateLimited):
        admitted(asked, books, [books])
    admitted(asked, books, [books, backlog()])


def test_a_deadline_that_even_an_idle_device_misses_is_not_tried_elsewhere():
    with pytest.raises(DeadlineExceeded):
        ask(backlog(), deadline=time.monotonic() + 0.5)
    with pytest.raises(DeadlineExceeded):
        ask(backlog(), deadline=time.monotonic() + 4.0, images=5)


def test_a_deadline_that_the_queue_misses_may_be_met_elsewhere():
    with refused("overloaded") as caught:
        ask(backlog(a=(1.0, 8)), "a", deadline=time.monotonic() + 5.0)
    assert caught.value.retry_after >= 3.0
    ask(backlog(a=(1.0, 8)), "a", deadline=time.monotonic() + 10.0)
    ask(backlog(flood=(1.0, 8)), "small", deadline=time.monotonic() + 2.1)
    with refused("overloaded"):
        ask(backlog(flood=(1.0, 8)), "small", deadline=time.monotonic() + 1.9)


def test_a_deadline_is_of_the_lines_that_run():
    """40 steps of a tenth of a second; a third of them, with the encode of the source, is soon done."""
    whole = request(steps=40)
    late = changed(edited(whole, 0.3), deadline=time.monotonic() + 2.5)
    with pytest.raises(DeadlineExceeded):
        admitted(job(changed(whole, deadline=time.monotonic() + 2.5)), backlog(), [backlog()])
    assert admitted(job(late), backlog(), [backlog()]).cost == pytest.approx(0.1 * (12 + 3))


def test_a_short_request_is_not_refused_for_long_ones_that_let_it_pass():
    books = backlog()
    books.add(of("a", 78))
    ask(books, "a", deadline=time.monotonic() + 2.0)


def test_a_job_that_is_refused_has_no_estimate():
    asked, books = of("a", deadline=time.monotonic() + 5.0), backlog(a=(1.0, 8))
    with refused("overloaded"):
        admitted(asked, books, [books])
    assert asked.estimate is None


def test_a_deadline_is_not_judged_by_a_guess():
    books = backlog()
    asked = of(passes=900, model="other", deadline=time.monotonic() + 1.0)
    assert admitted(asked, books, [books]).cost > 1.0


def test_retry_after_is_spread_and_bounded():
    told = [after(seconds) for seconds in (0.0, 0.5, 20.0, 1e9, math.inf) for _ in range(50)]
    assert all(1.0 <= seconds <= 120.0 for seconds in told)
    assert len({after(20.0) for _ in range(50)}) > 25


def test_keys_at_a_live_worker_are_refused_alone_and_the_books_end_empty():
    async def scenario():
        async with serving(max_wait=50 * RATE) as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            flood = [supervisor.submit(job("!slow 60", steps=18, tenant="flood")) for _ in range(3)]
            assert flood[-1].estimate == Estimate(pytest.approx(40 * RATE), 2, pytest.approx(20 * RATE))
            small = supervisor.submit(job("!slow 60", tenant="small"))
            assert small.estimate.wait == pytest.approx(6 * RATE)
            assert tenants(supervisor) == pytest.approx({"flood": 60 * RATE, "small": 6 * RATE})
            with pytest.raises(RateLimited):
                supervisor.submit(job(tenant="flood"))
            with pytest.raises(RateLimited):
                supervisor.submit(job(tenant="small"), limit=RATE)
            for future in (*flood, small):
                future.cancel()
            await asyncio.sleep(0)
            assert tenants(supervisor) == {}

    run(scenario)
