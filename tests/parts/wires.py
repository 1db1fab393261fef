"""Sockets as no client library would use them, for the tests of what a server does with such clients."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

GET = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n"
PAUSE = 0.05
"""Seconds between two drops."""


def connect(url: str, source: str = "127.0.0.1") -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), 20, (source, 0))


def gone(wire: socket.socket) -> bool:
    """Whether the server has closed this connection, of which nothing is read that it sent before."""
    wire.setblocking(False)
    try:
        return wire.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        wire.settimeout(20)


def heard(wire: socket.socket) -> bytes:
    """Everything until the server closes, which is no reset."""
    return b"".join(iter(lambda: wire.recv(65536), b""))


def dripped(wire: socket.socket, start: bytes, drops: Iterator[bytes]) -> bytes:
    """What the server says to a client that goes on dripping until it is cut off."""
    wire.sendall(start)
    gone = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not gone.wait(PAUSE):
                wire.sendall(next(drops))

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        return heard(wire)
    finally:
        gone.set()
        thread.join()


def asked(wire: socket.socket, request: bytes = GET) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one exchange; the connection stays."""
    wire.sendall(request + b"\r\n")
    return answer(wire)


def answer(wire: socket.socket) -> tuple[int, dict[str, str], Any]:
    with wire.makefile("rb") as file:
        status = int(file.readline().split()[1])
        lines = (line.decode().strip().split(": ", 1) for line in iter(file.readline, b"\r\n"))
        headers = {name.lower(): value for name, value in lines}
        return status, headers, json.loads(file.read(int(headers["content-length"])))


def refusal(said: bytes) -> tuple[int, str]:
    """Status and code of the one answer that these bytes are, whole and closing."""
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert "connection: close" in lines and f"content-length: {len(body)}" in lines
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(lines[0].split()[1]), error["code"]
