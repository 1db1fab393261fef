"""The socket that listens, and room for what it accepts: as many connections as files, and no flood of the log."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from app import main
from app.errors import SettingsError
from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import Served
from tests.parts.wires import connect

FEW = 64
FULL = """
import asyncio, os, resource, sys
from app import logs
from app import main
logs.setup("info")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

async def scene():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(main.few_words())
    listener = main.listen("127.0.0.1", 0)
    await asyncio.start_server(lambda _, writer: writer.close(), sock=listener, backlog=main.ACCEPTED)
    listener.listen(main.WAITING)
    files = []
    try:
        while True:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        print(listener.getsockname()[1], flush=True)
    await asyncio.sleep(4)
    for file in files:
        os.close(file)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(60)

asyncio.run(scene())
"""


@pytest.mark.slow
def test_few_files_hold_fewer_connections_and_the_log_stays_short(tmp_path: Path) -> None:
    """Many times more clients than files, who come all at once and wait in the system, and each probe is answered."""
    with Served(Settings(models=write_cards(tmp_path / "models"), devices="cpu", port=0, drain=5)) as served:
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (FEW, FEW))
        url = str(served.logged("listening")["url"])
        assert served.logged("fewer connections")["room"] == FEW // 2
        lines = len(served.lines)
        with ExitStack() as stack:
            served.process.send_signal(signal.SIGSTOP)
            for _ in range(4 * FEW):
                stack.enter_context(connect(url))
            served.process.send_signal(signal.SIGCONT)
            assert [httpx.get(f"{url}/healthz").status_code for _ in range(20)] == [200] * 20
            assert len(os.listdir(f"/proc/{served.process.pid}/fd")) < FEW
        assert len(served.lines) == lines


@pytest.mark.slow
def test_what_cannot_be_accepted_is_one_line_and_waits() -> None:
    """For four seconds, in which asyncio tries four times; then there are files again, and each client is served.

    What else fails on the event loop is still told.
    """
    words = [sys.executable, "-c", FULL]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with ExitStack() as stack:
            for wire in [stack.enter_context(connect(url)) for _ in range(20)]:
                assert wire.recv(1) == b""
        time.sleep(0.5)
        process.kill()
        told = [json.loads(line) for line in process.stderr]
        assert [line["event"] for line in told if line["logger"] == "instep"] == ["connections wait for open files"]
        assert told[0]["reason"] == "Too many open files"
        assert ["ZeroDivisionError" in line["exception"] for line in told if line["logger"] == "asyncio"] == [True]
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            main.listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_no_answer_waits_for_an_acknowledgement(host: str) -> None:
    async def without_delay() -> int:
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        listener = main.listen(host, 0)
        async with await asyncio.start_server(lambda _, writer: accepted.put(writer), sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname()[:2])
            server = await accepted.get()
            client.close()
            server.close()
            return server.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert asyncio.run(without_delay())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "hard", "files", "room", "told"),
    [
        (100, 2000, 500, 100, False),
        (300, 2000, 300 + main.OTHER_FILES, 300, False),
        (0, 2000, 2000, 1744, False),
        (1744, 2000, 2000, 1744, False),
        (1745, 2000, 2000, 1744, True),
        (1000, 500, 500, 250, True),
        (0, 64, 64, 32, False),
        (1000, 64, 64, 32, True),
        (20, 64, 64, 20, False),
    ],
)
def test_there_is_room_for_the_connections(connections: int, hard: int, files: int, room: int, told: bool) -> None:
    """0 is for as many as there can be. What is set is asked of the system, in a process that has its own limits."""
    code = f"""
import resource, sys
from app import logs
from app import main
resource.setrlimit(resource.RLIMIT_NOFILE, ({min(500, hard)}, {hard}))
logs.setup("warning")
print(main.make_room({connections}), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert [int(word) for word in done.stdout.split()] == [room, files, hard]
    assert ('"event": "fewer connections"' in done.stderr) == told


def test_a_limit_that_is_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    endless, given = resource.RLIM_INFINITY, list[tuple[int, int]]()
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    for soft in (500, endless):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, endless))
        assert main.make_room(0) > 1000 * 1000
    assert given == [(main.MOST_FILES, endless)]


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.1, port 0: "):
        main.listen("203.0.113.1", 0)
