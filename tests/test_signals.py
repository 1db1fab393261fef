"""What a signal ends, and how soon: a start, a drain, and what clients have not finished."""

from __future__ import annotations

import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import Clients, Process, Served, refuses
from tests.parts.waiting import eventually
from tests.parts.wires import GET, answer, connect, heard, refusal

pytestmark = pytest.mark.slow

CONSOLE = str(Path(sys.executable).with_name("instep"))
UPLOAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
LARGE = UPLOAD.replace(b"generations", b"edits").replace(b"1000", b"5000000")
CAUGHT = 1 << (signal.SIGTERM - 1)
BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(models=write_cards(tmp_path / "models"), devices="cpu", preload="all", port=0, drain=20)


@pytest.fixture
def served(settings: Settings) -> Iterator[Served]:
    with Served(settings) as served:
        yield served


def taken(wire: socket.socket) -> bool:
    """Whether the server has read all that was sent to it here: nothing waits in either end's queue."""
    ends = {f":{end[1]:04X}" for end in (wire.getsockname(), wire.getpeername())}
    rows = (line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:])
    queues = [row[4] for row in rows if {row[1][8:], row[2][8:]} == ends]
    return queues == ["00000000:00000000"] * 2


@pytest.mark.parametrize("sent", [UPLOAD, UPLOAD[:40], LARGE + b"a" * 200_000])
def test_a_stalled_upload_is_503_at_once(served: Served, sent: bytes) -> None:
    """Long before the drain and the time for a request are over, and the server ends."""
    with connect(str(served.logged("listening")["url"])) as wire:
        wire.settimeout(10)
        wire.sendall(sent)
        eventually(lambda: taken(wire))
        served.process.send_signal(signal.SIGTERM)
        assert refusal(heard(wire)) == (503, "shutting_down")
    assert served.ended() == (0, "returned\n")
    assert "Traceback" not in "".join(served.lines)


def test_an_upload_that_goes_on_still_gets_its_503(served: Served) -> None:
    """Its client sends the whole body before it reads. To close on that would reset it and lose the answer."""
    with connect(str(served.logged("listening")["url"])) as wire:
        wire.settimeout(10)
        wire.sendall(LARGE)
        eventually(lambda: taken(wire))
        served.process.send_signal(signal.SIGTERM)
        for _ in range(40):
            wire.sendall(b"a" * 120_000)
            time.sleep(0.05)
        assert refusal(heard(wire)) == (503, "shutting_down")
    assert served.ended() == (0, "returned\n")
    assert "Traceback" not in "".join(served.lines)


def test_a_body_that_nobody_waits_for_does_not_hold_up_the_end(served: Served) -> None:
    """It was answered before it came."""
    with connect(str(served.logged("listening")["url"])) as wire:
        wire.settimeout(10)
        wire.sendall(GET + b"Content-Length: 1000\r\n\r\n")
        assert answer(wire)[0] == 200
        served.process.send_signal(signal.SIGTERM)
        assert heard(wire) == b""
    assert served.ended() == (0, "returned\n")
    assert "Traceback" not in "".join(served.lines)


def test_a_client_that_was_reset_does_not_spoil_the_drain_of_others(served: Served) -> None:
    """The server does not know yet, since it has chunks of a byte left to parse and reads no more meanwhile."""
    url = str(served.logged("listening")["url"])
    clients = Clients(url, "!slow 2")
    with connect(url) as wire:
        wire.sendall(b"POST /nothing HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert wire.recv(12) == b"HTTP/1.1 404"
        wire.settimeout(0.5)
        with pytest.raises(TimeoutError):
            wire.sendall(b"1\r\n \r\n" * 5_000_000)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served.process.send_signal(signal.SIGTERM)
    assert [reply.status_code for reply in clients.answers()] == [200, 200]
    assert served.ended() == (0, "returned\n")
    assert "Traceback" not in "".join(served.lines)


@pytest.mark.parametrize("first", BOTH)
def test_the_second_ctrl_c_ends_the_drain(served: Served, first: int) -> None:
    url = str(served.logged("listening")["url"])
    clients = Clients(url, "!slow 60")
    served.process.send_signal(first)
    eventually(lambda: refuses(url))
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(10) == 0
    whole, stream = clients.answers()
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
    assert '"code":"shutting_down"' in stream.text
    assert "Traceback" not in "".join(served.lines)


def test_a_client_that_does_not_read_is_cut_off_at_the_end(settings: Settings) -> None:
    """After the drain and the time for last answers, without a traceback."""
    with Served(settings.model_copy(update={"drain": 0.5})) as served:
        with connect(str(served.logged("listening")["url"])) as wire:
            wire.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
            time.sleep(1)
            served.process.send_signal(signal.SIGTERM)
            assert served.ended() == (0, "returned\n")
        assert "Traceback" not in "".join(served.lines)


def test_a_reload_during_the_start_is_not_lost(served: Served, settings: Settings) -> None:
    eventually(lambda: "starting engine processes" in served.words)
    shutil.rmtree(settings.models / "tiny-label")
    served.process.send_signal(signal.SIGHUP)
    assert served.logged("reloaded")["removed"] == ["tiny-label"]
    served.wait_ready()
    assert [model["id"] for model in httpx.get(f"{served.url}/v1/models").json()["data"]] == ["tiny-text"]


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Process]:
    """`instep serve` as the console script starts it."""
    flags = ("--port", "0", "--devices", "cpu", "--models", str(write_cards(tmp_path / "models")))
    with Process((CONSOLE, "serve", *flags)) as console:
        yield console


def catches(console: Process) -> bool:
    """Whether a signal would no longer end the process in the system's own way."""
    status = Path(f"/proc/{console.process.pid}/status").read_text(encoding="ascii")
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) & CAUGHT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_caught_before_anything_large_is_imported(console: Process, number: int) -> None:
    eventually(lambda: catches(console))
    assert "pydantic" not in Path(f"/proc/{console.process.pid}/maps").read_text(encoding="utf-8")
    console.process.send_signal(number)
    assert console.ended() == (0, "") and not console.lines


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.8, 1.6, 2.5])
def test_a_signal_during_a_start_ends_it(console: Process, number: int, seconds: float) -> None:
    eventually(lambda: catches(console))
    time.sleep(seconds)
    console.process.send_signal(number)
    assert console.ended()[0] == 0 and "Traceback" not in console.words
