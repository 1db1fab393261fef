"""Processes that die, hang, refuse or lie: noticed, their requests answered, started again with back-off."""

import asyncio
import logging
import os
import signal
import sys

import pytest

from app.errors import EngineError, NoWorker, SettingsError
from app.report import Announce, ModelState
from app.settings import Settings
from app.worker import keeper, link, wire
from app.worker.supervisor import Supervisor
from tests.worker.parts import CARDS, request, serving, until
from tests.worker.test_supervisor import run

HEAD = "import os, socket, sys, time\nsay = socket.socket(fileno=int(sys.argv[-1])).sendall\n"
HELLO, PONG = wire.pack(wire.Hello(1)), wire.pack(wire.Pong())
SHORT, REFUSAL = wire.pack(Announce("step", 0.3)), wire.pack(wire.Refusal(SettingsError("no such GPU")))


def script(body: str) -> tuple[str, ...]:
    """A worker of a few lines, for what the fake worker does not do; it imports nothing of ours and starts at once."""
    return (sys.executable, "-S", "-c", HEAD + body)


@pytest.fixture(autouse=True)
def quick_restarts(monkeypatch):
    monkeypatch.setattr(keeper, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(link, "_EXIT", 0.3)


def test_killed_while_working():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            first = supervisor.pids[0]
            lost = [supervisor.submit(request("!slow 600", seeds=(1, 2))) for _ in range(3)]
            await until(lambda: supervisor.running)
            os.kill(first, signal.SIGKILL)
            for answer in await asyncio.gather(*lost, return_exceptions=True):
                assert type(answer) is NoWorker and answer.retry_after >= 1.0
            assert (supervisor.queued_seconds, supervisor.running, supervisor.waiting) == (0.0, 0, 0)
            assert not supervisor.ready
            with pytest.raises(NoWorker) as refused:
                supervisor.submit(request())
            assert refused.value.retry_after >= 1.0
            await until(lambda: supervisor.ready)
            assert supervisor.pids[0] not in (0, first)
            assert supervisor.restarts == 1
            assert len(await supervisor.submit(request())) == 1

    run(scenario)


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
            futures = [supervisor.submit(request("!slow 0.5", steps=20)) for _ in range(2)]
            await until(lambda: supervisor.running == 2)
            os.kill(supervisor.pids[0], signal.SIGKILL)
            lost, kept = await asyncio.gather(*futures, return_exceptions=True)
            assert type(lost) is NoWorker and len(kept) == 1
            assert supervisor.states["fake"].state == "ready"
            await until(lambda: supervisor.live == 2)

    run(scenario)


def test_a_hang_is_killed_and_restarted(caplog):
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            first = supervisor.pids[0]
            lost = [supervisor.submit(request(text, steps=50)) for text in ("!hang", "!slow 600")]
            for answer in await asyncio.gather(*lost, return_exceptions=True):
                assert type(answer) is NoWorker
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            await until(lambda: supervisor.live)
            assert len(await supervisor.submit(request())) == 1

    with caplog.at_level(logging.INFO, logger="instep.worker"):
        run(scenario)
    assert any('hung in phase "step"' in record.getMessage() for record in caplog.records)


def test_an_idle_process_that_does_not_wake_is_a_hang(monkeypatch):
    monkeypatch.setattr(link, "WAKE_LIMIT", 0.3)

    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            await until(lambda: supervisor.ready)
            first = supervisor.pids[0]
            os.kill(first, signal.SIGSTOP)
            with pytest.raises(NoWorker):
                await supervisor.submit(request())
            await until(lambda: supervisor.live)
            assert supervisor.pids[0] != first

    run(scenario)


def test_a_frozen_process_is_found_while_idle(monkeypatch):
    monkeypatch.setattr(link, "PING_EVERY", 0.1)
    monkeypatch.setattr(link, "WAKE_LIMIT", 2.0)

    async def scenario():
        async with serving() as here:
            await until(lambda: here.supervisor.ready)
            first = here.supervisor.pids[0]
            os.kill(first, signal.SIGSTOP)
            await until(lambda: here.supervisor.pids[0] not in (0, first))

    run(scenario)


def test_idleness_is_no_hang(monkeypatch):
    """Silence many times as long as what a worker at work is allowed."""
    monkeypatch.setattr(link, "MAX_SILENCE", 0.05)

    async def scenario():
        async with serving() as here:
            await asyncio.sleep(0.5)
            assert (here.supervisor.live, here.supervisor.restarts) == (1, 0)

    run(scenario)


def test_an_acknowledgement_does_not_hide_a_hang():
    """The reader thread lives and says Pong for ever; the engine announced 0.3 seconds and is stuck."""
    command = script(f"say({HELLO} + {SHORT})\nwhile True:\n    say({PONG})\n    time.sleep(0.02)")

    async def scenario():
        async with serving(command=command) as here:
            first = here.supervisor.pids[0]
            await until(lambda: here.supervisor.pids[0] not in (0, first))

    run(scenario)


def test_a_request_at_two_deaths_is_not_tried_again():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            with pytest.raises(NoWorker):
                await supervisor.submit(request("!die", seeds=(1,)))
            await until(lambda: supervisor.live)
            with pytest.raises(EngineError):
                await supervisor.submit(request("!die", seeds=(2,)))
            await until(lambda: supervisor.live)
            with pytest.raises(EngineError):
                supervisor.submit(request("!die", seeds=(3,)))
            assert (supervisor.live, supervisor.restarts) == (1, 2)
            assert len(await supervisor.submit(request())) == 1

    run(scenario)


def test_a_bystander_is_tried_again():
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            for _ in range(2):
                bystander = supervisor.submit(request("!slow 0.2"))
                with pytest.raises((NoWorker, EngineError)):
                    await supervisor.submit(request("!die"))
                with pytest.raises(NoWorker):
                    await bystander
                await until(lambda: supervisor.live)
                assert len(await supervisor.submit(request("!slow 0.2"))) == 1

    run(scenario)


def test_back_off_doubles_to_its_limit_and_health_resets_it(monkeypatch, caplog):
    monkeypatch.setattr(keeper, "LAST_DELAY", 0.2)
    command = script(f"say({HELLO}); os._exit(3)")

    async def scenario():
        async with serving(command=command) as here:
            await until(lambda: here.supervisor.restarts >= 4)

    def delays():
        return [record.args[2] for record in caplog.records if "next try" in record.msg]

    run(scenario)
    assert delays()[:4] == [0.05, 0.1, 0.2, 0.2]
    caplog.clear()
    monkeypatch.setattr(keeper, "HEALTHY", 0.0)
    run(scenario)
    assert delays()[:4] == [0.05, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (f"say({REFUSAL})", SettingsError, "no such GPU"),
        ("os._exit(7)", NoWorker, "ended with exit code 7 before it was ready"),
        ("say(bytes(7) + b'\\x04oops'); time.sleep(60)", NoWorker, "sent what cannot be read"),
    ],
    ids=["refuses", "exits", "lies"],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(body, error, words):
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu,cpu"), CARDS, command=script(body))
        with pytest.raises(error, match=words):
            await supervisor.start()
        assert supervisor.pids == [0, 0]

    run(scenario)


def test_a_program_that_is_not_there():
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS, command=("/nowhere/python",))
        with pytest.raises(NoWorker, match="could not be started"):
            await supervisor.start()

    run(scenario)


def test_a_start_that_takes_too_long_is_a_hang(monkeypatch):
    monkeypatch.setattr(link, "START_LIMIT", 0.5)

    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS, command=script("time.sleep(600)"))
        with pytest.raises(NoWorker, match='hung in phase "start"'):
            await supervisor.start()

    run(scenario)


def test_death_is_noticed_though_a_grandchild_holds_the_stream():
    command = script(f"say({HELLO}); time.sleep(60 if os.fork() else 3)")

    async def scenario():
        async with serving(command=command) as here:
            first = here.supervisor.pids[0]
            await asyncio.sleep(0.2)
            os.kill(first, signal.SIGKILL)
            await until(lambda: here.supervisor.restarts == 1)

    run(scenario)
