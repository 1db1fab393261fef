"""Processes that die: their requests answered, started again with back-off, and no poison tried for ever."""

import asyncio
import gc
import os
import signal

import pytest

from app.errors import EngineError, Unavailable
from app.report import ModelState
from app.worker import child
from app.worker.wire import Pulse
from tests.parts.requests import refused
from tests.parts.supervising import job, serving
from tests.parts.waiting import run, until
from tests.parts.workers import HELLO, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]


def test_killed_while_working():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            first = supervisor.pids[0]
            lost = [supervisor.submit(job("!slow 600", seeds=(1, 2))) for _ in range(3)]
            await until(lambda: supervisor.running)
            os.kill(first, signal.SIGKILL)
            for answer in await asyncio.gather(*lost, return_exceptions=True):
                assert answer.code == "no_worker" and answer.retry_after >= 1.0
            assert (sum(supervisor.queues), supervisor.running, supervisor.waiting) == (0.0, 0, 0)
            assert not supervisor.ready
            with refused("no_worker") as caught:
                supervisor.submit(job())
            assert caught.value.retry_after >= 1.0
            await until(lambda: supervisor.ready)
            assert supervisor.pids[0] not in (0, first)
            assert supervisor.restarts == 1
            assert len(await supervisor.submit(job())) == 1

    run(scenario)


def test_a_request_lost_when_nobody_waits_for_it_is_no_bug_to_log():
    async def scenario():
        logged = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context["message"]))
        async with serving() as here:
            here.supervisor.submit(job("!slow 600"))
            await until(lambda: here.supervisor.running)
            os.kill(here.supervisor.pids[0], signal.SIGKILL)
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
            os.kill(here.supervisor.pids[0], signal.SIGKILL)
            await until(lambda: not here.supervisor.live)
            await until(lambda: here.supervisor.ready)
            states = [state.state for state in here.told(ModelState) if state.model == "fake"]
            assert states == ["loading", "ready", "absent", "loading", "ready"]

    run(scenario)


def test_the_other_worker_goes_on():
    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            lost = supervisor.submit(job("!slow 600", steps=20))
            victim = supervisor.queues.index(max(supervisor.queues))
            kept = supervisor.submit(job("!slow 0.5", steps=20))
            await until(lambda: supervisor.running == 2)
            os.kill(supervisor.pids[victim], signal.SIGKILL)
            with refused("no_worker"):
                await lost
            assert len(await kept) == 1
            assert supervisor.states["fake"].state == "ready"
            await until(lambda: supervisor.live == 2)

    run(scenario)


def test_a_request_at_two_deaths_is_not_tried_again():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            with refused("no_worker"):
                await supervisor.submit(job("!die", seeds=(1,)))
            await until(lambda: supervisor.live)
            with pytest.raises(EngineError):
                await supervisor.submit(job("!die", seeds=(2,)))
            await until(lambda: supervisor.live)
            with pytest.raises(EngineError):
                supervisor.submit(job("!die", seeds=(3,)))
            assert (supervisor.live, supervisor.restarts) == (1, 2)
            assert len(await supervisor.submit(job())) == 1

    run(scenario)


def test_a_bystander_is_tried_again():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            for _ in range(2):
                bystander = supervisor.submit(job("!slow 0.2"))
                with pytest.raises((Unavailable, EngineError)):
                    await supervisor.submit(job("!die"))
                with refused("no_worker"):
                    await bystander
                await until(lambda: supervisor.live)
                assert len(await supervisor.submit(job("!slow 0.2"))) == 1

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
