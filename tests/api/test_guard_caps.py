"""More connections than a server holds, on real sockets: silent ones make room, and one that is answered stays."""

from __future__ import annotations

import os
import socket as sockets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from socket import socket

import httpx
import pytest

from app.api import guard
from app.api.access import PROBES
from app.main import ACCEPTED, WAITING
from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import ALICE, Server, bearer
from tests.parts.waiting import eventually
from tests.parts.wires import GET, PAUSE, answer, asked, connect, gone, heard, refusal

CAP = 12
"""More than the connections that a burst may have unread at once: asyncio accepts four in a turn."""
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = write_cards(tmp_path_factory.mktemp("caps") / "models")
    return Settings(models=folder, devices="cpu", default_model="tiny-text", port=0, drain=5)


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    """As `serve` has it, a few connections are accepted in a turn and many wait."""
    server = Server(settings.model_copy(update={"max_connections": CAP}))
    server.uvicorn.config.backlog = ACCEPTED
    with server:
        with socket(fileno=os.dup(server.uvicorn.servers[0].sockets[0].fileno())) as listener:
            listener.listen(WAITING)
        yield server


@pytest.fixture
def room(server: Server) -> Iterator[ExitStack]:
    """Closes what a test opens; before and after it nobody is connected and nothing is drawn."""
    with ExitStack() as stack:
        yield stack
    eventually(lambda: not server.uvicorn.server_state.connections and not server.supervisor.running)


def drawing(server: Server, room: ExitStack, number: int, seconds: float = 60) -> list[socket]:
    """Connections that each wait for their picture, all of which are being drawn."""
    body = b'{"prompt": "!slow %g", "seed": 1}' % seconds
    wires = [room.enter_context(connect(server.url)) for _ in range(number)]
    for wire in wires:
        wire.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    eventually(lambda: server.supervisor.running == number)
    return wires


def idle(server: Server, room: ExitStack, number: int, source: str = "127.0.0.1") -> list[socket]:
    """Connections that were answered once and are kept, the oldest first."""
    wires = [room.enter_context(connect(server.url, source)) for _ in range(number)]
    assert [asked(wire)[0] for wire in wires] == [200] * number
    return wires


@pytest.mark.parametrize("sent", [b"", b"G", GET], ids=["nothing", "letter", "half a head"])
def test_silent_connections_over_the_cap_leave_room(server: Server, room: ExitStack, sent: bytes) -> None:
    """Many times as many as there may be, all of one address, which then asks for more than a probe."""
    silent = [room.enter_context(connect(server.url)) for _ in range(8 * CAP)]
    for wire in silent:
        wire.sendall(sent)
    for _ in range(3):
        with connect(server.url) as wire:
            assert asked(wire)[0] == 200
    eventually(lambda: [gone(wire) for wire in silent].count(False) <= CAP + guard.SPARE_EACH)


def test_the_oldest_silent_connection_goes_first(server: Server, room: ExitStack) -> None:
    kept = idle(server, room, CAP)
    assert asked(kept[0])[0] == 200
    for oldest in (*kept[1:], kept[0]):
        idle(server, room, 1)
        assert heard(oldest) == b""
        rest = kept[kept.index(oldest) + 1 :] if oldest is not kept[0] else []
        assert not any(map(gone, rest))


def test_a_crowd_pushes_out_its_own(server: Server, room: ExitStack) -> None:
    (other,) = idle(server, room, 1, "127.0.0.2")
    for _ in range(3 * CAP):
        room.enter_context(connect(server.url))
    idle(server, room, 1, "127.0.0.3")
    assert asked(other)[0] == 200


def test_an_answer_is_never_cut_off_to_make_room(server: Server, room: ExitStack) -> None:
    wires = drawing(server, room, CAP - 1, seconds=1)
    for _ in range(4 * CAP):
        room.enter_context(connect(server.url))
    idle(server, room, 1)
    assert [answer(wire)[0] for wire in wires] == [200] * len(wires)
    assert asked(wires[0])[0] == 200


def test_a_body_on_its_way_is_never_cut_off_to_make_room(server: Server, room: ExitStack) -> None:
    body = b'{"prompt": "a"}'
    with connect(server.url) as slow:
        slow.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body[:3]))
        eventually(lambda: len(server.uvicorn.server_state.tasks) == 1)
        for _ in range(4 * CAP):
            room.enter_context(connect(server.url))
        idle(server, room, 1)
        slow.sendall(body[3:])
        assert answer(slow)[0] == 200


def test_an_answer_that_is_not_read_yet_is_never_cut_off_to_make_room(server: Server, room: ExitStack) -> None:
    """Its route is done with it, and the connection is used again once it was read."""
    listener = server.uvicorn.servers[0].sockets[0]
    before = listener.getsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF)
    listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 4096)
    wire = room.enter_context(socket())
    wire.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    wire.settimeout(20)
    wire.connect(listener.getsockname()[:2])
    wire.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
    assert wire.recv(12, sockets.MSG_PEEK) == b"HTTP/1.1 200"
    eventually(lambda: not server.uvicorn.server_state.tasks)
    listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, before // 2)
    for _ in range(4 * CAP):
        room.enter_context(connect(server.url))
    idle(server, room, 1)
    assert answer(wire)[2]["openapi"]
    assert asked(wire)[0] == 200


def test_a_request_that_is_not_read_yet_is_answered(server: Server, room: ExitStack) -> None:
    """Two come for one place, with their requests, while the server is busy."""
    drawing(server, room, CAP - 1, seconds=2)
    loop, go = next(iter(server.uvicorn.server_state.connections)).loop, threading.Event()
    loop.call_soon_threadsafe(go.wait)
    first, second = (room.enter_context(connect(server.url)) for _ in range(2))
    for wire in (first, second):
        wire.sendall(GET + b"\r\n")
    go.set()
    assert (answer(first)[0], answer(second)[0]) == (200, 503)


def test_a_connection_over_the_cap_that_goes_on_sending_is_cut_off(
    server: Server, room: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the time for a request is over."""
    monkeypatch.setattr(guard, "GRACE", 4 * PAUSE)
    drawing(server, room, CAP)
    with connect(server.url) as wire:
        wire.sendall(POST + b"Content-Length: 9000\r\n\r\n")
        with pytest.raises(OSError):
            for _ in range(200):
                wire.sendall(b"a")
                time.sleep(PAUSE)


@pytest.mark.parametrize("spare", ["SPARE", "SPARE_EACH"])
def test_too_many_that_are_answered_get_503_and_probes_an_answer(
    server: Server, room: ExitStack, monkeypatch: pytest.MonkeyPatch, spare: str
) -> None:
    monkeypatch.setattr(guard, spare, 1)
    crowd = drawing(server, room, CAP)
    with connect(server.url) as wire:
        status, headers, body = asked(wire)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "2")
        assert heard(wire) == b""
    for probe in PROBES:
        eventually(lambda: len(server.uvicorn.server_state.connections) == CAP)
        with connect(server.url) as wire:
            assert asked(wire, b"GET %b HTTP/1.1\r\nHost: a\r\n" % probe.encode())[0] in (200, 503)
            assert heard(wire) == b""
    assert 'reason="overloaded"' in _metrics(server, crowd)
    assert httpx.get(f"{server.url}/v1/models").status_code == 200


def _metrics(server: Server, crowd: list[socket]) -> str:
    """The metrics, for which one of the crowd leaves."""
    crowd.pop().close()
    eventually(lambda: len(server.uvicorn.server_state.connections) == CAP - 1)
    return httpx.get(f"{server.url}/metrics").text


def test_more_than_a_crowd_is_dropped_without_a_word(
    server: Server, room: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SPARE", 0)
    drawing(server, room, CAP)
    with connect(server.url) as wire:
        assert heard(wire) == b""


def test_a_crowd_from_one_address_leaves_room_for_probes_from_another(
    server: Server, room: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "SPARE_EACH", 0)
    drawing(server, room, CAP)
    with connect(server.url) as wire:
        assert heard(wire) == b""
    monkeypatch.setattr(guard, "SPARE_EACH", 1)
    with connect(server.url, "127.0.0.2") as probe:
        assert asked(probe, b"GET /healthz HTTP/1.1\r\nHost: a\r\n")[0] == 200


def test_one_address_has_its_own_cap(settings: Settings) -> None:
    """Its own silent connection makes room, and no other's; without one it gets 503."""
    with Server(settings.model_copy(update={"connections_per_address": 2, "api_keys": ALICE})) as server:
        url = server.url
        key = b"".join(f"{name}: {value}\r\n".encode() for name, value in bearer(ALICE).items())
        half = POST + key + b"Content-Length: 9\r\n\r\n{"
        with connect(url, "127.0.0.2") as other, connect(url) as one, connect(url) as two, connect(url) as three:
            assert [asked(wire, GET + key)[0] for wire in (other, two, three)] == [200] * 3
            assert heard(one) == b""
            two.sendall(half)
            three.sendall(half)
            eventually(lambda: len(server.uvicorn.server_state.tasks) == 2)
            for _ in range(2):
                with connect(url) as four:
                    four.sendall(GET + key + b"\r\n")
                    assert refusal(heard(four)) == (503, "overloaded")
            assert asked(other, GET + key)[0] == 200


def test_room_is_not_lost(server: Server) -> None:
    """Places come back however a connection ends: pushed out, refused, or closed by its client."""
    numbers = count()
    for _ in range(3):
        with ExitStack() as stack:
            for _ in range(3 * CAP):
                wire = stack.enter_context(connect(server.url))
                wire.sendall((b"", b"\x00", GET + b"\r\n")[next(numbers) % 3])
        with suppress(httpx.TransportError):
            httpx.get(f"{server.url}/healthz")  # it is accepted after all that wait
        eventually(lambda: not server.uvicorn.server_state.connections)
    with ExitStack() as stack:
        kept = idle(server, stack, CAP)
        assert not any(map(gone, kept))
        assert len(server.uvicorn.server_state.connections) == CAP
