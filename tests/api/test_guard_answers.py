"""Clients that do not read their answer, on real sockets: they are cut off; one that reads at its own pace is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response

from app.api.guard import Door, Guarded
from app.settings import Settings
from tests.parts.waiting import eventually
from tests.parts.wires import GET, connect, heard

SECONDS = 0.5
PLENTY = 64 * 1024 * 1024


class Endless:
    """A real uvicorn behind the door, whose one route sends PLENTY of bytes, or 503 to who is over the cap."""

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        door = Door(Settings(request_timeout=SECONDS, max_connections=1), lambda *_: Response(status_code=500))
        config: Any = {
            "http": partial(Guarded, door),
            "log_config": None,
            "lifespan": "off",
            "ws": "none",
            "interface": "asgi3",
        }
        self.uvicorn = uvicorn.Server(uvicorn.Config(self._app, port=0, **config))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        eventually(lambda: self.uvicorn.started)
        self.url = f"http://127.0.0.1:{self.uvicorn.servers[0].sockets[0].getsockname()[1]}"

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        status = 503 if "crowded" in scope["state"] else 200
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/event-stream")]}
        )
        for left in range(PLENTY // self._chunk - 1, -1, -1):
            await send({"type": "http.response.body", "body": bytes(self._chunk), "more_body": left > 0})


@pytest.fixture(params=[64 * 1024, PLENTY], ids=["stream", "picture"])
def endless(request: pytest.FixtureRequest) -> Iterator[Endless]:
    endless = Endless(request.param)
    yield endless
    endless.uvicorn.should_exit = True
    endless.thread.join(20)


@pytest.mark.slow
@pytest.mark.parametrize("closing", [b"", b"Connection: close\r\n"])
def test_a_client_that_does_not_read_is_cut_off(endless: Endless, closing: bytes) -> None:
    with connect(endless.url) as wire:
        wire.sendall(GET + closing + b"\r\n")
        assert wire.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: not endless.uvicorn.server_state.connections)
        assert len(heard(wire)) < PLENTY


@pytest.mark.slow
def test_a_client_that_takes_a_byte_now_and_then_is_cut_off(endless: Endless) -> None:
    with connect(endless.url) as wire:
        wire.sendall(GET + b"\r\n")
        assert wire.recv(12) == b"HTTP/1.1 200"
        ends = time.monotonic() + 20 * SECONDS
        while endless.uvicorn.server_state.connections and time.monotonic() < ends:
            assert len(wire.recv(1)) == 1
            time.sleep(SECONDS / 5)
        assert not endless.uvicorn.server_state.connections


@pytest.mark.slow
def test_a_client_that_reads_at_its_own_pace_gets_all(endless: Endless) -> None:
    got = 0
    with connect(endless.url) as wire:
        wire.sendall(GET + b"Connection: close\r\n\r\n")
        while data := wire.recv(1024 * 1024):
            got += len(data)
            time.sleep(SECONDS / 20)
    assert got > PLENTY


def test_an_answer_that_is_not_read_yet_is_not_pushed_out(endless: Endless) -> None:
    """It still needs its place, though the route is done with it."""
    with connect(endless.url) as one:
        one.sendall(GET + b"\r\n")
        assert one.recv(12) == b"HTTP/1.1 200"
        with connect(endless.url) as two:
            two.sendall(GET + b"\r\n")
            assert two.recv(12) == b"HTTP/1.1 503"
