"""Clients that are slow, silent or send too much, on real sockets: each is ended, and the server serves on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import httpx
import pytest

from app.api import guard
from app.api.access import HEADERS
from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import Server
from tests.parts.waiting import eventually
from tests.parts.wires import GET, PAUSE, answer, asked, connect, dripped, heard, refusal

SECONDS = 0.5
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = write_cards(tmp_path_factory.mktemp("door") / "models")
    return Settings(models=folder, devices="cpu", default_model="tiny-text", port=0, drain=5)


@pytest.fixture(scope="module")
def server(settings: Settings) -> Iterator[Server]:
    """One with a small deadline."""
    with Server(settings.model_copy(update={"request_timeout": SECONDS})) as server:
        yield server


@pytest.fixture(autouse=True)
def serves_on(server: Server) -> Iterator[None]:
    """Before and after each test: nobody is connected, and an image is drawn."""
    yield
    eventually(lambda: not server.uvicorn.server_state.connections)
    reply = httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "a"}, timeout=20)
    assert reply.status_code == 200


def test_a_silent_client_is_closed_without_a_word(server: Server) -> None:
    with connect(server.url) as wire:
        assert heard(wire) == b""


DRIPS = {
    "line": (b"G", b"E"),
    "header": (GET, b"X-A: b\r\n"),
    "body": (POST + b"Content-Length: 1000\r\n\r\n", b"{"),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n"),
    "nothing": (POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n", b""),
}
"""How a request begins, and what goes on dripping."""


def test_a_client_that_drips_its_request_gets_408(server: Server) -> None:
    """One of every kind, at once."""

    def said(start: bytes, drop: bytes) -> tuple[int, str]:
        with connect(server.url) as wire:
            return refusal(dripped(wire, start, repeat(drop)).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))

    with ThreadPoolExecutor(len(DRIPS)) as pool:
        found = dict(zip(DRIPS, pool.map(said, *zip(*DRIPS.values(), strict=True)), strict=True))
    assert found == dict.fromkeys(DRIPS, (408, "request_timeout"))


def test_a_head_has_less_time_than_a_body(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two clients that drip from the same moment on, one its headers and one its body."""
    assert guard.HEAD_SECONDS == 10
    monkeypatch.setattr(guard, "HEAD_SECONDS", SECONDS / 5)
    body = b'{"prompt": "a"}'
    with connect(server.url) as head, connect(server.url) as whole:
        whole.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        assert refusal(dripped(head, GET, repeat(b"X-A: b\r\n"))) == (408, "request_timeout")
        whole.sendall(body)
        assert answer(whole)[0] == 200


def test_the_time_of_a_body_is_counted_from_its_head(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_SECONDS", SECONDS / 5)
    with connect(server.url) as wire:
        wire.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        assert refusal(dripped(wire, b"{", repeat(b" "))) == (408, "request_timeout")


def test_the_second_request_of_a_connection_has_a_deadline_too(server: Server) -> None:
    with connect(server.url) as wire:
        assert asked(wire)[0] == 200
        assert refusal(dripped(wire, POST, repeat(b"X-A: b\r\n"))) == (408, "request_timeout")
    with connect(server.url) as wire:
        wire.sendall(GET + b"\r\n" + POST)
        assert answer(wire)[0] == 200
        assert refusal(heard(wire)) == (408, "request_timeout")


def test_a_body_that_drips_after_its_answer_is_cut_off(server: Server) -> None:
    with connect(server.url) as wire:
        said = dripped(wire, GET + b"Content-Length: 1000\r\n\r\n", repeat(b"x"))
        assert said.startswith(b"HTTP/1.1 200") and said.count(b"HTTP/1.1") == 1


@pytest.mark.slow
def test_an_idle_connection_and_a_long_drawing_are_not_cut_off(server: Server) -> None:
    body = b'{"prompt": "!slow 1.2"}'
    with connect(server.url) as wire:
        assert asked(wire)[0] == 200
        time.sleep(3 * SECONDS)
        assert asked(wire, POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))[0] == 200


def test_a_request_may_have_so_many_headers(server: Server) -> None:
    lines = [b"X-%d: a\r\n" % number for number in range(HEADERS)]
    for more in (b"".join(lines), b"X-A: " + b"a" * 33_000 + b"\r\n"):
        with connect(server.url) as wire:
            assert asked(wire, GET + b"".join(lines[: HEADERS - 1]))[0] == 200
            wire.sendall(GET + more + b"\r\n")
            assert refusal(heard(wire)) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "request_",
    [GET + b"X-A: " + b"a" * 1_000_000, b"GET /" + b"a" * 1_000_000],
    ids=["megabyte", "path"],
)
def test_long_headers_get_431(server: Server, request_: bytes) -> None:
    """The whole of it is sent, and more after the answer: no reset, which would lose the answer on its way."""
    with connect(server.url) as wire:
        wire.sendall(request_ + b"\r\n\r\n")
        assert refusal(heard(wire)) == (431, "headers_too_large")
        for _ in range(3):
            wire.sendall(b"a" * 100_000)
            time.sleep(0.02)


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET /\r\n\r\n"])
def test_what_is_not_http_gets_400(server: Server, garbage: bytes) -> None:
    with connect(server.url) as wire:
        wire.sendall(garbage)
        assert refusal(heard(wire)) == (400, "invalid_request")


def test_a_broken_chunk_after_the_answer_began_is_cut_off(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server.url) as wire:
        assert asked(wire, GET + b"Transfer-Encoding: chunked\r\n")[0] == 200
        wire.sendall(b"zz\r\n")
        assert heard(wire) == b""
    assert "Traceback" not in caplog.text


def test_refusals_are_counted_by_their_code(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    for code in ("request_timeout", "headers_too_large", "invalid_request"):
        assert f'instep_requests_rejected_total{{model="",reason="{code}"}}' in text


@pytest.mark.slow
def test_a_refused_client_that_never_stops_is_cut_off(server: Server) -> None:
    with connect(server.url) as wire:
        wire.sendall(b"\x00")
        with pytest.raises(OSError):
            for _ in range(600):
                wire.sendall(b"a")
                time.sleep(PAUSE)


@pytest.mark.slow
def test_a_refused_client_does_not_hold_up_the_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    server = Server(settings)
    with connect(server.start()) as wire:
        wire.sendall(GET + b"X-A: b\r\n" * HEADERS + b"\r\n")
        assert wire.recv(12) == b"HTTP/1.1 431"
        server.stop()
    assert failures == []
