"""Heartbeats: from a process that computes, from one whose interpreter is held, and none from one that is stopped."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from app.worker import wire
from tests.parts.requests import refused
from tests.parts.supervising import job, serving
from tests.parts.waiting import run, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_restarts")]

RAN, FREE = bytes([signal.SIGALRM]), b"\0"
# numpy's threads start before the heartbeat, as they do in the engine's process.
HEAD = "import ctypes, sys, time\nimport numpy\nfrom app.worker import wire\nwire.beat(int(sys.argv[1]))\n"


@contextmanager
def beating(body: str):
    """A process that sends heartbeats while its main thread runs this, and our end of them."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs:
        words = [sys.executable, "-c", HEAD + body, str(theirs.fileno())]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(words, pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, env=environment)
        try:
            yield process, ours
        finally:
            process.kill()
            process.communicate()


def beats(ours: socket.socket, signals: int) -> bytes:
    """All that comes until the timer's signal was told so often."""
    told = b""
    while told.count(RAN) < signals:
        told += ours.recv(1)
    return told


def test_a_native_call_that_holds_the_interpreter_is_alive_and_not_free():
    with beating("print(flush=True)\nctypes.PyDLL(None).sleep(600)") as (process, ours):
        process.stdout.readline()
        beats(ours, 2)  # it may have been free until then
        assert beats(ours, 4).count(FREE) <= 1
    with beating("ctypes.CDLL(None).sleep(600)") as (_, ours):
        assert beats(ours, 4).count(FREE) >= 3


def test_a_stopped_process_has_no_heartbeat_until_it_goes_on():
    with beating("time.sleep(600)") as (process, ours):
        beats(ours, 1)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ours.recv(64)
        ours.settimeout(3)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        os.kill(process.pid, signal.SIGCONT)
        assert beats(ours, 2)


def test_no_call_of_the_main_thread_is_interrupted():
    with beating("print(ctypes.CDLL(None).usleep(2_500_000), flush=True)") as (process, _):
        assert process.communicate(timeout=20)[0].strip() == b"0"


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "at work, which may be silent for ten minutes"])
def test_a_stopped_engine_is_killed_and_restarted(busy, caplog):
    async def scenario():
        async with serving() as here:
            await until(lambda: here.supervisor.ready)
            first = here.supervisor.pids[0]
            lost = here.supervisor.submit(job("!slow 1" if busy else "a cat"))
            await until(lambda: here.supervisor.running) if busy else await lost
            os.kill(first, signal.SIGSTOP)
            await until(lambda: here.supervisor.restarts and here.supervisor.ready)
            assert here.supervisor.pids[0] != first and lost.future.done() is not busy
            assert len(await lost) == 1 and lost.sent == 1 + busy
            assert len(await here.supervisor.submit(job())) == 1

    run(scenario)
    assert any("stopped in phase" in record.getMessage() for record in caplog.records)


def test_an_engine_whose_interpreter_is_held_lives_though_it_misses_what_it_announced(monkeypatch):
    """As in an import or a large file of a load. It announces 4 seconds and says nothing for 8."""
    monkeypatch.setattr(wire, "HELD", 2.0)

    async def scenario():
        async with serving() as here:
            first = here.supervisor.pids[0]
            assert len(await here.supervisor.submit(job("!held 8"))) == 1
            assert (here.supervisor.pids[0], here.supervisor.restarts) == (first, 0)

    run(scenario)


def test_an_interpreter_that_is_held_for_too_long_is_a_hang(monkeypatch, caplog):
    async def scenario():
        async with serving() as here:
            lost = here.supervisor.submit(job("!held 600"))
            await until(lambda: here.supervisor.running)
            monkeypatch.setattr(wire, "START_LIMIT", 3.0)
            await until(lambda: here.supervisor.restarts)
            with refused("crashed"):
                await lost

    run(scenario)
    assert any('hung in phase "step"' in record.getMessage() for record in caplog.records)


def test_a_front_that_stood_still_kills_nobody():
    async def scenario():
        async with serving() as here:
            await until(lambda: here.supervisor.ready)
            os.kill(here.supervisor.pids[0], signal.SIGSTOP)  # as a container that is paused, front and engine
            time.sleep(wire.STOPPED + 2)
            await asyncio.sleep(0.5)
            os.kill(here.supervisor.pids[0], signal.SIGCONT)
            await asyncio.sleep(0.5)
            assert (here.supervisor.live, here.supervisor.restarts) == (1, 0)

    run(scenario)
