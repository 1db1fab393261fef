"""The supervisor from start to stop: choice between workers, overload, states, readiness, draining."""

import asyncio
import os
import signal

import pytest

from app.errors import CheckpointError, ModelNotFound, SettingsError
from app.report import Memory, ModelState
from app.settings import Settings
from app.worker import wire
from app.worker.supervisor import Supervisor
from tests.parts.fake_worker import RATE
from tests.parts.requests import refused
from tests.parts.supervising import CARDS, job, serving
from tests.parts.waiting import PATIENCE, run, until
from tests.parts.workers import HELLO, script

pytestmark = pytest.mark.slow


def test_overload_is_refused_by_the_wait_ahead():
    async def scenario():
        async with serving(max_wait=50 * RATE) as here:
            await until(lambda: here.supervisor.ready)
            large = here.supervisor.submit(job("!slow 60", steps=60))
            with refused("overloaded") as caught:
                here.supervisor.submit(job())
            assert 1.0 <= caught.value.retry_after <= 120.0
            large.cancel()
            await asyncio.sleep(0)
            assert len(await here.supervisor.submit(job())) == 1

    run(scenario)


def test_two_workers_the_least_queued_gets_the_next():
    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            assert len(set(supervisor.pids)) == 2
            warm = [supervisor.submit(job("!slow 0.3")) for _ in range(2)]
            assert all(supervisor.queues)
            await asyncio.gather(*warm)
            slow = [supervisor.submit(job("!slow 60", steps=steps)) for steps in (50, 10, 10, 10, 10)]
            queues = sorted(supervisor.queues)
            assert queues == pytest.approx([48 * RATE, 52 * RATE])
            slow.append(supervisor.submit(job("!slow 60", steps=10)))
            assert sorted(supervisor.queues) == pytest.approx([52 * RATE, 60 * RATE])
            for future in slow:
                future.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_between_idle_workers_the_one_that_has_the_model():
    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            for _ in range(3):
                await here.supervisor.submit(job())
            assert [state.state for state in here.told(ModelState)] == ["loading", "ready"]

    run(scenario)


def test_a_worker_where_the_model_failed_draws_no_requests():
    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            supervisor = here.supervisor
            with pytest.raises(CheckpointError):
                await supervisor.submit(job("!load"))
            slow = [supervisor.submit(job("!slow 60", steps=10)) for _ in range(3)]
            assert supervisor.queues[0] == 0.0 < supervisor.queues[1]
            for future in slow:
                future.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_each_workers_loads_are_told_as_its_own():
    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            with pytest.raises(CheckpointError):
                await here.supervisor.submit(job("!load"))
            await here.supervisor.submit(job())
            states = [(report.state, worker) for report, worker in here.reports if isinstance(report, ModelState)]
            assert states == [("failed", "cpu"), ("loading", "cpu#1"), ("ready", "cpu#1")]

    run(scenario)


def test_each_workers_batch_counts_until_its_images_are_answered():
    async def scenario():
        async with serving(devices="cpu,cpu") as here:
            supervisor = here.supervisor
            await until(lambda: all(child.backlog.proved("fake") for child in supervisor.children))
            first = supervisor.submit(job("!slow 60", seeds=(1, 2, 3), steps=100))
            other = supervisor.submit(job("!slow 60", steps=100))
            await until(lambda: supervisor.images("fake") == (4, 4))
            first.cancel()
            await until(lambda: supervisor.images("fake") == (1, 1))
            other.cancel()
            await until(lambda: supervisor.images("fake") == (0, 0))

    run(scenario)


def test_where_every_worker_failed_one_is_tried_again():
    async def scenario():
        async with serving(preload="") as here:
            with pytest.raises(CheckpointError):
                await here.supervisor.submit(job("!load"))
            assert len(await here.supervisor.submit(job())) == 1

    run(scenario)


def test_a_queue_shorter_than_a_load_is_joined(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "0.5")

    async def scenario():
        async with serving(devices="cpu,cpu", preload="") as here:
            supervisor = here.supervisor
            await supervisor.submit(job())
            slow = [supervisor.submit(job("!slow 60", steps=steps)) for steps in (50, 5_000)]
            assert supervisor.queues == pytest.approx([5_054 * RATE, 0.0])
            slow.append(supervisor.submit(job("!slow 60", steps=10)))
            assert supervisor.queues[1] > 0.0
            for future in slow:
                future.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_a_full_queue_is_left_for_a_load(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "0.5")

    async def scenario():
        async with serving(devices="cpu,cpu", preload="", max_wait=50 * RATE) as here:
            supervisor = here.supervisor
            await supervisor.submit(job())
            slow = [supervisor.submit(job("!slow 60", steps=100)) for _ in range(2)]
            assert supervisor.queues[0] == pytest.approx(102 * RATE) and supervisor.queues[1] > 0.0
            for future in slow:
                future.cancel()
            await asyncio.sleep(0)

    run(scenario)


def test_states_ready_and_load():
    async def scenario():
        async with serving(preload="fake") as here:
            await until(lambda: here.supervisor.ready)
            states = here.supervisor.states
            assert (states["fake"].state, states["other"].state) == ("ready", "absent")
            assert states["fake"].rates == {"32x32": RATE}
            here.supervisor.call("load", "other")
            await until(lambda: here.supervisor.states["other"].state == "ready")
            with pytest.raises(ModelNotFound):
                here.supervisor.call("load", "nobody")

    run(scenario)


def test_a_preload_that_was_unloaded_leaves_the_server_ready_and_one_that_failed_does_not():
    async def scenario():
        async with serving(preload="fake,other") as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            supervisor.call("unload", "other")
            await until(lambda: supervisor.states["other"].state == "absent")
            assert supervisor.ready and supervisor.states["other"].rates == {"32x32": RATE}
            with pytest.raises(ModelNotFound):
                supervisor.call("unload", "nobody")
            with pytest.raises(CheckpointError):
                await supervisor.submit(job("!load", model="other"))
            assert not supervisor.ready
            supervisor.call("load", "other")
            await until(lambda: supervisor.ready)

    run(scenario)


def test_not_ready_while_a_preload_loads(monkeypatch):
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "0.3")

    async def scenario():
        async with serving(preload="fake,other") as here:
            await until(lambda: here.supervisor.states["other"].state == "loading")
            assert here.supervisor.live == 1 and not here.supervisor.ready
            await until(lambda: here.supervisor.ready)

    run(scenario)


def test_stop_drains_and_refuses():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            future = supervisor.submit(job("!slow 0.5", seeds=(1, 2)))
            pid = supervisor.pids[0]
            stopping = asyncio.create_task(supervisor.stop(PATIENCE))
            await asyncio.sleep(0)
            with refused("shutting_down"):
                supervisor.submit(job())
            assert not supervisor.ready
            assert len(await future) == 2
            await stopping
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(scenario)


def test_stop_gives_up_after_its_grace():
    async def scenario():
        async with serving() as here:
            future = here.supervisor.submit(job("!slow 600"))
            await here.supervisor.stop(0.05)
            with refused("shutting_down"):
                await future
            assert here.supervisor.pids == [0]

    run(scenario)


def test_nothing_is_served_before_the_start():
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS)
        with refused("no_worker") as caught:
            supervisor.submit(job())
        assert caught.value.retry_after >= 1.0
        await supervisor.stop(0)

    run(scenario)


def test_settings_that_make_no_sense():
    for wrong in ({"devices": "tpu"}, {"preload": "nobody", "devices": "cpu"}):
        with pytest.raises(SettingsError):
            Supervisor(Settings(**wrong), CARDS)


def test_a_dead_worker_holds_no_memory():
    memory = wire.pack(Memory({"weights": 5, "budget": 9}))
    command = script(f"say({HELLO}); say({memory}); time.sleep(60)")

    async def scenario():
        async with serving(devices="cpu,cpu", command=command, preload="") as here:
            await until(lambda: len(here.told(Memory)) == 2)
            os.kill(here.supervisor.pids[1], signal.SIGKILL)
            await until(lambda: len(here.told(Memory)) > 2)
            told = {worker: report.bytes for report, worker in here.reports[:3]}
            assert told == {"cpu": {"weights": 5, "budget": 9}, "cpu#1": {"weights": 0, "budget": 0}}

    run(scenario)


def test_an_observer_that_fails_at_a_death_does_not_keep_the_worker_away(quick_restarts):
    dead = False

    def observe(report, worker):
        if dead:
            raise RuntimeError("a bug in the figures")

    async def scenario():
        nonlocal dead
        supervisor = Supervisor(
            Settings(devices="cpu", preload=""), CARDS, observe=observe, command=script(f"say({HELLO}); time.sleep(60)")
        )
        await supervisor.start()
        dead = True
        os.kill(supervisor.pids[0], signal.SIGKILL)
        await until(lambda: supervisor.restarts == 1 and supervisor.live)
        await supervisor.stop(0)

    run(scenario)
