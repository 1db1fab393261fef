"""Processes that die: their requests begun again by another, started again with back-off, and no poison for ever."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time

import pytest

from app.errors import Cancelled
from app.report import Failure, ModelState, Progress, Result
from app.request import Prompt, Refiner
from app.worker import child
from app.worker.supervisor import LOADS, Supervisor
from app.worker.wire import Pulse
from tests.parts.fake_worker import RATE, colour
from tests.parts.requests import changed, refused
from tests.parts.supervising import CARDS, job, request, serving
from tests.parts.waiting import run, until
from tests.parts.workers import HELLO, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]


def kill(supervisor: Supervisor, worker: int = 0) -> int:
    pid = supervisor.pids[worker]
    assert pid, "0 would be this process and its group"
    os.kill(pid, signal.SIGKILL)
    return pid


async def dead(supervisor: Supervisor, worker: int = 0) -> int:
    """Kill a worker, and wait until that is noticed. Returns the id that it had."""
    pid = kill(supervisor, worker)
    await until(lambda: supervisor.pids[worker] == 0)
    return pid


def test_killed_while_working():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            jobs = [supervisor.submit(job(f"!slow 0.5 {number}", seeds=(1, 2))) for number in range(3)]
            await until(lambda: supervisor.running)
            first = await dead(supervisor)
            assert (supervisor.queues, supervisor.running, supervisor.waiting) == ([0.0], 0, 6)
            assert supervisor.stranded("fake") == 6 and supervisor.images("fake") == (0, 6)
            assert not supervisor.ready and not any(one.future.done() for one in jobs)
            late = supervisor.submit(job())
            assert supervisor.stranded("fake") == 7 and late.sent == 0
            for number, results in enumerate(await asyncio.gather(*jobs)):
                pictures = [tuple(result.pixels[0, 0]) for result in results]
                assert pictures == [colour(Prompt(f"!slow 0.5 {number}"), seed) for seed in (1, 2)]
            assert len(await late) == 1 and supervisor.stranded("fake") == 0
            assert supervisor.pids[0] not in (0, first) and supervisor.restarts == 1
            assert [one.sent for one in (*jobs, late)] == [2, 2, 2, 1]
            assert [one.facts.get("restarts") for one in (*jobs, late)] == [1, 1, 1, None]
            assert supervisor.replayed == {"fake": 3}

    run(scenario)


def test_many_deaths_in_a_row_fail_nobody():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            jobs = [supervisor.submit(job("!slow 3", steps=20, seeds=(number,))) for number in range(4)]
            for _ in range(5):
                await until(lambda: supervisor.running == 4)
                await dead(supervisor)
            assert [len(results) for results in await asyncio.gather(*jobs)] == [1] * 4
            assert supervisor.restarts == 5 and all(one.sent <= 6 for one in jobs)

    run(scenario)


def test_images_that_are_answered_are_not_drawn_again():
    """A picture a second, as a process gives them out one by one: the first is there when it dies."""

    async def scenario():
        async with serving() as here:
            heard, supervisor = [], here.supervisor
            images = request(seeds=(1, 2)).images
            slow = request("!slow 1").images
            asked = request(images=(images[0], *slow), progress=True)
            one = supervisor.submit(job(asked, on_report=heard.append))
            await until(lambda: one.results)
            assert supervisor.waiting + supervisor.running == 1
            await dead(supervisor)
            assert supervisor.stranded("fake") == 1
            del heard[:]
            results = await one
            assert [(result.index, result.seed) for result in results] == [(0, 1), (1, 1)]
            assert {(type(report), report.index) for report in heard} == {(Progress, 1), (Result, 1)}
            assert len([report for report in here.told(Result) if report.index == 0]) == 1

    run(scenario)


def test_they_are_begun_again_in_the_order_in_which_they_came():
    async def scenario():
        async with serving() as here:
            supervisor, order = here.supervisor, []
            jobs = [supervisor.submit(job("!slow 2", seeds=(number,))) for number in range(4)]
            await until(lambda: supervisor.running == 4)
            await dead(supervisor)
            jobs += [supervisor.submit(job(seeds=(number,))) for number in (4, 5)]
            for number, one in enumerate(jobs):
                sent = one.send
                one.send = lambda number=number, sent=sent: order.append(number) or sent()
            assert [one.accepted for one in jobs] == sorted(one.accepted for one in jobs)
            await asyncio.gather(*jobs)
            assert order == [0, 1, 2, 3, 4, 5]

    run(scenario)


def test_where_its_model_failed_on_the_other_device_it_waits_for_its_own():
    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            supervisor = here.supervisor
            own, other = supervisor.children
            other.backlog.hear(ModelState("fake", "failed", "it does not fit here"))
            one, two = supervisor.submit(job("!slow 0.5")), supervisor.submit(job("!slow 0.5", model="other"))
            await until(lambda: supervisor.running)
            await dead(supervisor)
            assert supervisor.stranded("fake") == 1 and supervisor.stranded("other") == 0
            assert len(await one) == len(await two) == 1
            assert one.sent == 2 and supervisor.stranded("fake") == 0 and own.live

    run(scenario)


def test_a_client_that_leaves_while_no_engine_lives_is_not_served_later():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            stays, leaves = (supervisor.submit(job("!slow 2", seeds=(number,))) for number in (1, 2))
            await until(lambda: supervisor.running == 2)
            await dead(supervisor)
            leaves.cancel()
            await asyncio.sleep(0)
            assert supervisor.stranded("fake") == 1
            assert len(await stays) == 1
            assert [report.seed for report in here.told(Result)] == [1] and leaves.sent == 1

    run(scenario)


def test_a_deadline_ends_a_request_that_waits_for_an_engine(monkeypatch):
    monkeypatch.setattr(child, "FIRST_DELAY", 600.0)

    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            inside = supervisor.submit(job("!slow 5", deadline=time.monotonic() + 1.5))
            outside = supervisor.submit(job("!slow 5", deadline=time.monotonic() + 600))
            await until(lambda: supervisor.running == 2)
            await dead(supervisor)
            with refused("deadline_exceeded", match="no engine process"):
                await inside
            assert supervisor.stranded("fake") == 1 and not outside.future.done()
            outside.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_a_deadline_that_passes_once_an_engine_is_back_is_the_engines():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            one = supervisor.submit(job("!slow 2.5", deadline=time.monotonic() + 2))
            await until(lambda: supervisor.running)
            await dead(supervisor)
            await until(lambda: supervisor.live)
            assert len(await one) == 1, "this worker knows no deadlines, and the front left it alone"
            assert one.sent == 2

    run(scenario)


def test_while_a_process_starts_again_requests_wait_and_after_a_start_that_failed_they_do_not(tmp_path):
    """Of the second process and the third, each waits for a file; the second ends then, before its Hello."""
    body = (
        f"count = open({str(tmp_path / 'count')!r}, 'a'); count.write('x'); count.flush(); number = count.tell()\n"
        f"while number > 1 and not os.path.exists({str(tmp_path)!r} + f'/go {{number}}'): time.sleep(0.01)\n"
        f"if number == 2: os._exit(3)\n"
        f"say({HELLO}); time.sleep(600)"
    )

    async def scenario():
        async with serving(command=script(body), preload="") as here:
            supervisor = here.supervisor
            (only,) = supervisor.children
            await dead(supervisor)
            waiting = [supervisor.submit(job())]
            await until(lambda: (tmp_path / "count").read_text() == "xx")
            waiting.append(supervisor.submit(job()))
            assert not supervisor.live and supervisor.stranded("fake") == 2
            (tmp_path / "go 2").touch()
            await until(lambda: not only.proved)
            for process in ("xx", "xxx"):
                await until(lambda process=process: (tmp_path / "count").read_text() >= process)
                with refused("no_worker") as caught:
                    supervisor.submit(job())
                assert caught.value.retry_after >= 1.0
            assert supervisor.stranded("fake") == 2 and not any(one.future.done() for one in waiting)
            (tmp_path / "go 3").touch()
            await until(lambda: supervisor.live)
            waiting.append(supervisor.submit(job()))
            assert supervisor.stranded("fake") == 0 and [one.sent for one in waiting] == [1, 1, 1]

    run(scenario)


def test_the_time_until_an_engine_is_back_counts_as_wait(monkeypatch):
    async def scenario():
        async with serving(max_wait=2.0) as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            await dead(supervisor)
            with monkeypatch.context() as patch:
                patch.setattr(child.Child, "back_in", 1.5)
                one = supervisor.submit(job())
                assert one.estimate.wait == pytest.approx(1.5)
                with refused("overloaded", match="before the deadline"):
                    supervisor.submit(job(deadline=time.monotonic() + 1.4))
                patch.setattr(child.Child, "back_in", 60.0)
                with refused("overloaded", match="queue is about 60 seconds") as caught:
                    supervisor.submit(job())
                assert 58.0 <= caught.value.retry_after <= 1.5 * 58.1
            assert len(await one) == 1
            assert supervisor.submit(later := job()).estimate.wait == 0.0
            assert len(await later) == 1

    run(scenario)


def test_the_wait_for_an_engine_is_as_long_as_the_last_start_and_its_delay(monkeypatch):
    monkeypatch.setattr(child, "FIRST_DELAY", 100.0)

    async def scenario():
        async with serving(max_wait=200.0) as here:
            (only,) = here.supervisor.children
            assert (only.back_in, only.proved) == (0.0, True)
            started = only._startup
            await dead(here.supervisor)
            assert 99.0 < only.back_in <= 100.0 + started < 130.0 and only.proved
            one = here.supervisor.submit(job())
            assert 99.0 < one.estimate.wait <= 100.0 + started
            one.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_a_request_that_waits_when_the_server_stops_is_refused(monkeypatch):
    monkeypatch.setattr(child, "FIRST_DELAY", 600.0)

    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            one = supervisor.submit(job("!slow 600"))
            await until(lambda: supervisor.running)
            await dead(supervisor)
            await supervisor.stop(0.05)
            with refused("shutting_down") as caught:
                await one
            assert caught.value.retry_after and supervisor.stranded("fake") == 0

    run(scenario)


def test_one_that_loses_its_engine_during_the_drain_is_drawn_by_the_next():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            one = supervisor.submit(job("!slow 0.5"))
            await until(lambda: supervisor.running)
            stopping = asyncio.create_task(supervisor.stop(30))
            await asyncio.sleep(0)
            kill(supervisor)
            assert len(await one) == 1 and one.sent == 2
            await stopping

    run(scenario)


def test_nobody_waits_and_nothing_is_logged_as_a_bug():
    async def scenario():
        logged = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        async with serving() as here:
            here.supervisor.submit(job("!slow 0.2"))
            here.supervisor.submit(job("!die"))
            await until(lambda: here.supervisor.restarts == 2)
            await until(lambda: not here.supervisor.waiting + here.supervisor.running)
            gc.collect()
            await until(lambda: here.supervisor.live)
        assert logged == []

    run(scenario)


def test_a_watch_that_breaks_is_a_death(monkeypatch, caplog):
    async def scenario():
        async with serving() as here:
            first = here.supervisor.pids[0]
            with monkeypatch.context() as broken:
                broken.setattr(Pulse, "hang", lambda _: 1 / 0)
                await until(lambda: not here.supervisor.live)
            await until(lambda: here.supervisor.live)
            assert here.supervisor.restarts == 1 and here.supervisor.pids[0] != first
            assert len(await here.supervisor.submit(job())) == 1

    run(scenario)
    assert any("ZeroDivisionError" in str(record.exc_info) for record in caplog.records)


def test_killed_while_idle():
    async def scenario():
        async with serving() as here:
            await until(lambda: here.supervisor.ready)
            kill(here.supervisor)
            await until(lambda: not here.supervisor.live)
            await until(lambda: here.supervisor.ready)
            states = [state.state for state in here.told(ModelState) if state.model == "fake"]
            assert states == ["loading", "ready", "absent", "loading", "ready"]
            assert here.supervisor.replayed == {}

    run(scenario)


def test_the_other_worker_takes_them_at_once():
    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            lost = supervisor.submit(job("!slow 2", steps=20))
            victim = supervisor.queues.index(max(supervisor.queues))
            kept = supervisor.submit(job("!slow 2", steps=20))
            await until(lambda: supervisor.running == 2)
            await dead(supervisor, victim)
            assert supervisor.stranded("fake") == 0 and supervisor.queues[victim] == 0.0
            assert supervisor.live == 1 and (lost.sent, kept.sent) == (2, 1)
            assert len(await kept) == 1 and len(await lost) == 1
            assert supervisor.states["fake"].state == "ready"
            await until(lambda: supervisor.live == 2)

    run(scenario)


def test_a_poison_among_others_fails_alone_and_its_twin_is_refused():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            good = [job(f"a cat {number}", steps=50) for number in range(5)]
            poison = job("!die", seeds=(1,))
            jobs = [supervisor.submit(one) for one in (*good[:2], poison, *good[2:])]
            answers = await asyncio.gather(*jobs, return_exceptions=True)
            error = answers.pop(2)
            assert (error.code, error.retry_after) == ("crashed", None)
            assert [len(results) for results in answers] == [1] * 5
            await until(lambda: supervisor.live)
            with refused("crashed"):
                supervisor.submit(job("!die", seeds=(3,)))
            assert (supervisor.live, supervisor.restarts, poison.sent) == (1, 2, 2)
            assert len(await supervisor.submit(job())) == 1

    run(scenario)


def test_a_twin_that_is_in_flight_elsewhere_ends_with_it_and_its_engine_lives():
    """The twin has not come to the step at which it would kill."""

    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            one = supervisor.submit(job("!slow 600"))
            worker = next(each for each in supervisor.children if one.request.id in each.backlog.jobs)
            supervisor._blame.judge([(one.request.id, 0, 1)], set(), worker.backlog.jobs)
            supervisor._blame.judge([(one.request.id, 0, 1)], set(), worker.backlog.jobs)
            await until(lambda: supervisor.running)
            other = supervisor.children.index(worker) ^ 1
            await dead(supervisor, other)
            with refused("crashed"):
                await one
            await until(lambda: here.told(Failure))
            assert isinstance(here.told(Failure)[0].error, Cancelled) and worker.live and worker.restarts == 0

    run(scenario)


def test_a_poison_whose_client_leaves_at_each_death_is_found_when_it_comes_again():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            beside = supervisor.submit(job("!slow 2"))
            gone = supervisor.submit(job("!die", seeds=(1,)))
            await until(lambda: supervisor.restarts == 1)  # it is not live some ms before its death is judged
            gone.cancel()
            await until(lambda: supervisor.live)
            with refused("crashed"):
                await supervisor.submit(job("!die", seeds=(2,)))
            assert len(await beside) == 1
            assert supervisor.restarts == 2

    run(scenario)


def test_a_bystander_is_tried_again_however_often_others_end_its_engine(monkeypatch):
    monkeypatch.setattr(child, "LAST_DELAY", 0.1)

    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            bystander = supervisor.submit(job("!slow 1.5", steps=50))
            for number in range(3):
                with refused("crashed"):
                    await supervisor.submit(job(f"!die {number}"))
            assert supervisor.restarts + (not supervisor.live) == 6
            assert len(await bystander) == 1 and bystander.sent == 7

    run(scenario)


def test_a_model_at_the_load_of_which_processes_died_in_a_row_is_not_loaded_for_a_while(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "30")
    monkeypatch.setattr(child, "LAST_DELAY", 0.1)

    async def scenario():
        async with serving(preload="") as here:
            supervisor = here.supervisor
            waits = supervisor.submit(job())
            for _ in range(LOADS):
                await until(lambda: supervisor.states["fake"].state == "loading")
                await dead(supervisor)
            with refused("model_load_failed", match=f"{LOADS} times"):
                await waits
            with refused("model_load_failed"):
                supervisor.submit(job())
            with refused("model_load_failed"):
                supervisor.call("load", "fake")

    run(scenario)


def test_a_preload_that_ends_processes_is_left_out_and_the_others_are_served(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "30")
    monkeypatch.setattr(child, "LAST_DELAY", 0.1)

    async def scenario():
        async with serving(preload="fake") as here:
            supervisor = here.supervisor
            for _ in range(LOADS):
                await until(lambda: supervisor.states["fake"].state == "loading")
                await dead(supervisor)
            monkeypatch.setenv("INSTEP_FAKE_LOAD", "0")
            await until(lambda: supervisor.live)
            assert len(await supervisor.submit(job(model="other"))) == 1
            assert not supervisor.ready and supervisor.states["fake"].state == "absent"

    run(scenario)


def test_the_next_process_has_the_cards_of_both_models_of_an_open_request():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            asked = job(changed(request("!slow 2", steps=10), refiner=Refiner("other", 0.5)))
            asked.refiner = CARDS["other"]
            supervisor.submit(asked)
            await until(lambda: supervisor.running == 1)
            supervisor.reload({"fake": CARDS["fake"]}, "info")
            await dead(supervisor)
            assert len(await asked) == 1

    run(scenario)


def test_what_requests_carry_is_bounded_and_free_once_they_end():
    async def scenario():
        async with serving(request_memory=20_000, max_wait=1e6) as here:
            supervisor = here.supervisor
            long = "x" * 8_500
            kept = [supervisor.submit(job(f"!slow 600 {text}")) for text in (long, long)]
            with refused("overloaded", match="INSTEP_REQUEST_MEMORY") as caught:
                supervisor.submit(job(long))
            assert 1.0 <= caught.value.retry_after <= 2.0
            assert len(await supervisor.submit(job("short"))) == 1
            await until(lambda: supervisor.running == 2)
            await dead(supervisor)
            with refused("overloaded"):
                supervisor.submit(job(long))
            await until(lambda: supervisor.running == 2)
            kept.pop().cancel()
            assert len(await supervisor.submit(job(long))) == 1
            with refused("non_finite_output"):
                await supervisor.submit(job(f"!nan {long}"))
            assert len(await supervisor.submit(job(long))) == 1
            kept.pop().cancel()

    run(scenario)


def test_one_that_is_refused_takes_no_memory():
    async def scenario():
        async with serving(max_wait=100 * RATE, request_memory=20_000) as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            one = supervisor.submit(job("!slow 600", steps=200))
            for _ in range(5):
                with refused("overloaded", match="queue is about"):
                    supervisor.submit(job("x" * 8_500))
            one.cancel()
            assert len(await supervisor.submit(job("x" * 8_500))) == 1

    run(scenario)


def test_back_off_doubles_to_its_limit_and_health_resets_it(monkeypatch, caplog):
    monkeypatch.setattr(child, "LAST_DELAY", 0.2)
    command = script(f"say({HELLO}); os._exit(3)")

    async def scenario():
        async with serving(command=command) as here:
            await until(lambda: here.supervisor.restarts >= 4)

    def delays():
        return [record.args[2] for record in caplog.records if "next try" in record.msg]

    run(scenario)
    assert delays()[:4] == [0.05, 0.1, 0.2, 0.2]
    caplog.clear()
    monkeypatch.setattr(child, "HEALTHY", 0.0)
    run(scenario)
    assert delays()[:4] == [0.05, 0.05, 0.05, 0.05]
