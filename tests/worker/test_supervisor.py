"""Requests through the supervisor and a live process: answers, order, cancelling, overload, choice, draining."""

import asyncio
import os

import numpy as np
import pytest

from app.errors import (
    Cancelled,
    CheckpointError,
    InvalidValue,
    ModelNotFound,
    NonFiniteOutput,
    NoWorker,
    Overloaded,
    SettingsError,
    ShuttingDown,
)
from app.report import Failure, ModelState, Preview, Progress, Result, Tick
from app.request import ClassLabel, ImageSpec, Prompt
from app.settings import Settings
from app.worker.supervisor import Supervisor
from tests.fake_worker import colour
from tests.worker.parts import CARDS, PATIENCE, request, serving, until


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 3 * PATIENCE))


def test_images_come_in_order_with_their_own_seeds():
    async def scenario():
        async with serving() as here:
            asked = request(seeds=(5, 6, 7))
            results = await here.supervisor.submit(asked)
            assert [(result.index, result.seed) for result in results] == [(0, 5), (1, 6), (2, 7)]
            for result in results:
                assert result.pixels.shape == (32, 32, 3)
                assert tuple(result.pixels[0, 0]) == colour(Prompt("a cat"), result.seed)
            label = request(images=(ImageSpec(ClassLabel(3), 1),), keep_latents=True)
            (result,) = await here.supervisor.submit(label)
            assert tuple(result.pixels[-1, -1]) == colour(ClassLabel(3), 1)
            assert result.latents.dtype == np.float32

    run(scenario)


def test_progress_and_previews_reach_only_their_request():
    async def scenario():
        async with serving() as here:
            heard = []
            loud = request(steps=6, previews=2, progress=True)
            quiet = here.supervisor.submit(request(steps=6), heard.append)
            other = []
            await here.supervisor.submit(loud, other.append)
            await quiet
            assert [type(report) for report in heard] == [Result]
            assert {report.request_id for report in other} == {loud.id}
            steps = [report.step for report in other if isinstance(report, Progress)]
            assert steps == [1, 2, 3, 4, 5, 6]
            assert [report.partial for report in other if isinstance(report, Preview)] == [0, 1]
            assert len(here.told(Result)) == 2 and here.told(Tick)

    run(scenario)


def test_a_listener_that_fails_harms_nobody():
    async def scenario():
        async with serving() as here:
            results = await here.supervisor.submit(request(), lambda _: 1 / 0)
            assert len(results) == 1
            assert len(await here.supervisor.submit(request())) == 1

    run(scenario)


def test_failures_come_as_what_they_are_and_alone():
    async def scenario():
        async with serving() as here:
            good = [here.supervisor.submit(request(seeds=(1, 2), steps=20)) for _ in range(3)]
            for text, kind in (("!nan", NonFiniteOutput), ("!load", CheckpointError)):
                with pytest.raises(kind):
                    await here.supervisor.submit(request(text, seeds=(1, 2)))
            with pytest.raises(ModelNotFound):
                await here.supervisor.submit(request(model="nobody"))
            assert [len(results) for results in await asyncio.gather(*good)] == [2, 2, 2]
            assert here.supervisor.restarts == 0

    run(scenario)


def test_cancelling_the_future_cancels_the_request():
    async def scenario():
        async with serving() as here:
            heard = []
            asked = request("!slow 60", steps=500, progress=True)
            future = here.supervisor.submit(asked, heard.append)
            await until(lambda: heard and here.supervisor.running)
            assert here.supervisor.queued_seconds > 0
            future.cancel()
            await asyncio.sleep(0)
            assert (here.supervisor.queued_seconds, here.supervisor.running, here.supervisor.waiting) == (0.0, 0, 0)
            count = len(heard)
            await until(lambda: here.told(Failure))
            assert isinstance(here.told(Failure)[0].error, Cancelled)
            await here.supervisor.submit(request())
            assert len(heard) == count
            assert here.told(Tick)[-1].rows == 1

    run(scenario)


def test_a_task_that_is_cancelled_cancels_its_request():
    async def scenario():
        async with serving() as here:

            async def client():
                await here.supervisor.submit(request("!slow 60", steps=100))

            task = asyncio.create_task(client())
            await until(lambda: here.supervisor.running)
            task.cancel()
            await asyncio.wait({task})
            await until(lambda: here.told(Failure))
            assert here.supervisor.queued_seconds == 0.0

    run(scenario)


def test_books_follow_the_images():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            future = supervisor.submit(request("!slow 0.5", seeds=(1, 2, 3), steps=10, guided=True))
            assert supervisor.queued_seconds == pytest.approx(3 * 10 * 2 * 0.001)
            assert (supervisor.running, supervisor.waiting) == (0, 3)
            await until(lambda: supervisor.running == 3)
            assert supervisor.waiting == 0
            await future
            assert (supervisor.queued_seconds, supervisor.running, supervisor.waiting) == (0.0, 0, 0)

    run(scenario)


def test_overload_is_refused_by_the_wait_ahead():
    async def scenario():
        async with serving(max_wait=0.05) as here:
            await until(lambda: here.supervisor.ready)
            large = here.supervisor.submit(request("!slow 60", steps=60))
            with pytest.raises(Overloaded) as refused:
                here.supervisor.submit(request())
            assert 1.0 <= refused.value.retry_after <= 120.0
            large.cancel()
            await asyncio.sleep(0)
            assert len(await here.supervisor.submit(request())) == 1

    run(scenario)


def test_an_id_is_in_flight_once():
    async def scenario():
        async with serving() as here:
            asked = request()
            future = here.supervisor.submit(asked)
            with pytest.raises(InvalidValue):
                here.supervisor.submit(asked)
            await future
            await here.supervisor.submit(asked)

    run(scenario)


def test_two_workers_the_least_queued_gets_the_next():
    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            assert len(set(supervisor.pids)) == 2
            warm = [supervisor.submit(request("!slow 0.3")) for _ in range(2)]
            assert all(supervisor.queues)
            await asyncio.gather(*warm)
            slow = [supervisor.submit(request("!slow 60", steps=steps)) for steps in (50, 10, 10, 10, 10)]
            queues = sorted(supervisor.queues)
            assert queues == pytest.approx([0.04, 0.05])
            slow.append(supervisor.submit(request("!slow 60", steps=10)))
            assert supervisor.queues == pytest.approx([0.05, 0.05])
            for future in slow:
                future.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_between_idle_workers_the_one_that_has_the_model():
    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            for _ in range(3):
                await here.supervisor.submit(request())
            assert [state.state for state in here.told(ModelState)] == ["loading", "ready"]

    run(scenario)


def test_states_ready_and_load():
    async def scenario():
        async with serving(preload="fake") as here:
            await until(lambda: here.supervisor.ready)
            states = here.supervisor.states
            assert (states["fake"].state, states["other"].state) == ("ready", "absent")
            assert states["fake"].rates == {"32x32": 0.001}
            here.supervisor.load("other")
            await until(lambda: here.supervisor.states["other"].state == "ready")
            with pytest.raises(ModelNotFound):
                here.supervisor.load("nobody")

    run(scenario)


def test_not_ready_while_a_preload_loads(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "0.3")

    async def scenario():
        async with serving(preload="all") as here:
            await until(lambda: here.supervisor.states["other"].state == "loading")
            assert here.supervisor.live == 1 and not here.supervisor.ready
            await until(lambda: here.supervisor.ready)

    run(scenario)


def test_stop_drains_and_refuses():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            future = supervisor.submit(request("!slow 0.5", seeds=(1, 2)))
            pid = supervisor.pids[0]
            stopping = asyncio.create_task(supervisor.stop(PATIENCE))
            await asyncio.sleep(0)
            with pytest.raises(ShuttingDown):
                supervisor.submit(request())
            assert not supervisor.ready
            assert len(await future) == 2
            await stopping
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(scenario)


def test_stop_gives_up_after_its_grace():
    async def scenario():
        async with serving() as here:
            future = here.supervisor.submit(request("!slow 600"))
            await here.supervisor.stop(0.05)
            with pytest.raises(ShuttingDown):
                await future
            assert here.supervisor.pids == [0]

    run(scenario)


def test_nothing_is_served_before_the_start():
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS)
        with pytest.raises(NoWorker) as refused:
            supervisor.submit(request())
        assert refused.value.retry_after >= 1.0
        await supervisor.stop(0)

    run(scenario)


def test_settings_that_make_no_sense():
    for wrong in ({"devices": "tpu"}, {"preload": "nobody", "devices": "cpu"}):
        with pytest.raises(SettingsError):
            Supervisor(Settings(**wrong), CARDS)
