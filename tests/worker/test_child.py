"""Processes that hang, freeze, refuse or lie, and starts that fail: each is noticed and told by its reason."""

import asyncio
import logging
import os
import signal

import pytest

from app.settings import Settings
from app.worker import wire
from app.worker.supervisor import Supervisor
from tests.parts.requests import refused
from tests.parts.supervising import CARDS, job, serving
from tests.parts.waiting import run, until
from tests.parts.workers import HELLO, REFUSAL, script

pytestmark = pytest.mark.usefixtures("quick_restarts")


@pytest.mark.slow
def test_a_hang_is_killed_and_restarted(caplog):
    async def scenario():
        async with serving() as here:
            supervisor = here.supervisor
            first = supervisor.pids[0]
            hangs, beside = (supervisor.submit(job(text, steps=50)) for text in ("!hang", "!slow 1"))
            await until(lambda: supervisor.restarts == 1)
            with pytest.raises(ProcessLookupError):
                os.kill(first, 0)
            with refused("crashed"):
                await hangs
            assert len(await beside) == 1 and (hangs.sent, beside.sent) == (2, 3)
            assert supervisor.restarts == 2
            assert len(await supervisor.submit(job())) == 1

    with caplog.at_level(logging.INFO, logger="instep.worker"):
        run(scenario)
    assert any('hung in phase "step"' in record.getMessage() for record in caplog.records)


@pytest.mark.slow
def test_idleness_is_no_hang(monkeypatch):
    """Idle for longer than a process may be silent: it says again and again that it is."""

    async def scenario():
        async with serving() as here:
            await until(lambda: here.supervisor.ready)
            monkeypatch.setattr(wire, "MAX_SILENCE", 2.0)
            await asyncio.sleep(3.0)
            assert (here.supervisor.live, here.supervisor.restarts) == (1, 0)

    run(scenario)


def test_a_process_that_says_hello_and_no_more_is_a_hang(monkeypatch, caplog):
    async def scenario():
        async with serving(command=script(f"say({HELLO}); time.sleep(600)")) as here:
            monkeypatch.setattr(wire, "MAX_SILENCE", 0.3)
            await until(lambda: here.supervisor.restarts)

    run(scenario)
    assert any('hung in phase "ready"' in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (f"say({REFUSAL})", "internal_error", "no such GPU"),
        ("os._exit(7)", "no_worker", "ended with exit code 7 before it was ready"),
        ("say(bytes(7) + b'\\x04oops'); time.sleep(60)", "no_worker", "sent what cannot be read"),
    ],
    ids=["refuses", "exits", "lies"],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(body, code, words):
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu,cpu"), CARDS, command=script(body))
        with refused(code, match=words):
            await supervisor.start()
        assert supervisor.pids == [0, 0]

    run(scenario)


def test_a_hello_after_the_death_is_no_start():
    """From a child of the process that has its stream."""
    command = script(f"if os.fork(): os._exit(7)\ntime.sleep(0.25); say({HELLO}); time.sleep(1)")

    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS, command=command)
        with refused("no_worker", match="ended with exit code 7"):
            await supervisor.start()

    run(scenario)


def test_a_program_that_is_not_there():
    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS, command=("/nowhere/python",))
        with refused("no_worker", match="could not be started"):
            await supervisor.start()

    run(scenario)


def test_a_start_that_takes_too_long_is_a_hang(monkeypatch):
    monkeypatch.setattr(wire, "START_LIMIT", 0.5)

    async def scenario():
        supervisor = Supervisor(Settings(devices="cpu"), CARDS, command=script("time.sleep(600)"))
        with refused("no_worker", match='hung in phase "start"'):
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
