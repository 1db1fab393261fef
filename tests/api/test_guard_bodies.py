"""Bodies on real sockets: where one ends is never in doubt, and one that nobody wants does not cost the answer."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import ALICE, Server
from tests.parts.waiting import eventually
from tests.parts.wires import asked, connect, heard, refusal

IMAGES = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n"
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
LARGE = b" " * 5_000_000
CHUNKED = b"0\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a key, so that all but probes are refused before their body is read."""
    folder = write_cards(tmp_path_factory.mktemp("bodies") / "models")
    key = f"alice={ALICE}"
    with Server(
        Settings(models=folder, devices="cpu", default_model="tiny-text", port=0, drain=5, api_keys=key)
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def serves_on(server: Server) -> Iterator[None]:
    yield
    eventually(lambda: not server.uvicorn.server_state.connections)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"transfer-encoding: CHUNKED\r\ncontent-length: 0\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 6\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length: 5_0\r\n",
        b"Content-Length:\r\n",
        b"Content-Length : 5\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"X-A: b\rTransfer-Encoding: chunked\r\n",
        b"X-A: b\x00c\r\n",
        b"Host: b\r\n",
    ],
)
def test_a_doubtful_end_is_400_and_the_rest_is_dropped(server: Server, head: bytes) -> None:
    """RFC 9112, sections 2.2, 5.1, 6.1 and 6.3: what follows is never taken for a request."""
    with connect(server.url) as wire:
        wire.sendall(IMAGES.replace(b"Host: a\r\n", b"Host: a\r\n" + head) + b"\r\n" + CHUNKED + SMUGGLED)
        assert refusal(heard(wire)) == (400, "invalid_request")


def test_http_1_0_has_no_chunks(server: Server) -> None:
    with connect(server.url) as wire:
        wire.sendall(b"POST /healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED + SMUGGLED)
        assert refusal(heard(wire)) == (400, "invalid_request")


@pytest.mark.parametrize(
    "chunk", [b"-1\r\na\r\n", b"0x1\r\na\r\n", b"1_0\r\na\r\n", b"\r\n", b"1\nab\r\n", b"1\r\nab\r\n"]
)
def test_a_chunk_that_is_none_is_400(server: Server, chunk: bytes) -> None:
    with connect(server.url) as wire:
        key = f"Authorization: Bearer {ALICE}\r\n".encode()
        wire.sendall(IMAGES + key + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + CHUNKED + SMUGGLED)
        assert refusal(heard(wire)) == (400, "invalid_request")


@pytest.mark.parametrize("head", [b"Content-Length: 0\r\n", b"Content-Length: 0, 0\r\n", b"Content-Length: 0\r\n" * 2])
def test_one_length_said_twice_is_one(server: Server, head: bytes) -> None:
    with connect(server.url) as wire:
        assert asked(wire, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + head)[0] == 200
        assert asked(wire, b"GET /healthz HTTP/1.1\r\nHost: a\r\n")[0] == 200


@pytest.mark.slow
def test_a_refused_client_may_take_its_time_to_send_the_rest(server: Server) -> None:
    with connect(server.url) as wire:
        wire.sendall(IMAGES + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(44):
            wire.sendall(b"a" * 100_000)
            time.sleep(0.05)
        assert refusal(heard(wire)) == (400, "invalid_request")


EARLY = [
    ("POST", "/v1/images/generations", {}, 401),
    ("POST", "/v1/images/generations", {"Authorization": f"Bearer {ALICE}"}, 413),
    ("POST", "/v1/nowhere", {"Authorization": f"Bearer {ALICE}"}, 404),
    ("POST", "/healthz", {}, 405),
    ("POST", "/v1/models/tiny-text/load", {}, 403),
    ("GET", "/healthz", {}, 200),
    ("HEAD", "/healthz", {}, 200),
    ("POST", "/v1/images/generations", {"Expect": "nothing"}, 401),
    ("POST", "/healthz", {"X-Long": "a" * 40_000}, 431),
    ("POST", "/healthz", {"Transfer-Encoding": "chunked"}, 400),
]
"""Answers that do not wait for a body."""


@pytest.mark.parametrize(("method", "path", "headers", "status"), EARLY)
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_sends_first_gets_its_answer(
    server: Server, method: str, path: str, headers: dict[str, str], status: int, connection: str
) -> None:
    for _ in range(3):
        http_ = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        headers = {"Content-Length": str(len(LARGE)), "Connection": connection, **headers}
        http_.request(method, path, LARGE, headers)
        reply = http_.getresponse()
        assert reply.status == status
        assert len(reply.read()) == int(reply.headers["content-length"]) * (method != "HEAD")
        http_.close()


def test_an_answer_comes_before_the_body_and_the_connection_goes_on_after_it(server: Server) -> None:
    with connect(server.url) as wire:
        assert asked(wire, IMAGES + b"Content-Length: %d\r\n" % len(LARGE))[0] == 401
        wire.sendall(LARGE)
        assert asked(wire, b"GET /healthz HTTP/1.1\r\nHost: a\r\n")[0] == 200


@pytest.mark.parametrize("wait", [[], ["-H", "Expect:"]], ids=["expect", "none"])
@pytest.mark.parametrize("http10", [[], ["--http1.0"], ["-H", "Connection: close"]], ids=["1.1", "1.0", "close"])
def test_curl_gets_its_answer(server: Server, tmp_path: Path, wait: list[str], http10: list[str]) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    url = f"{server.url}/v1/images/generations"
    words = ["curl", "-sS", "--noproxy", "*", *wait, *http10, "--data-binary", "@large", "-w", "%{http_code}", url]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[-3:], done.stderr) == (0, "401", "")
    assert "invalid_api_key" in done.stdout


@pytest.mark.parametrize("chunk", [0, 65536], ids=["a length", "chunks"])
def test_a_large_body_is_read_in_large_pieces(server: Server, chunk: int) -> None:
    """8 MB take 0.1 s where pieces are large; in the pieces of a body in small chunks they would take 6."""
    size = 8 * 1024 * 1024
    head = b"POST /v1/nowhere HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    parts = (b"%x\r\n" % chunk + bytes(chunk) + b"\r\n") * (size // chunk) + CHUNKED if chunk else bytes(size)
    kind = b"Transfer-Encoding: chunked" if chunk else b"Content-Length: %d" % size
    with connect(server.url) as wire:
        started = time.monotonic()
        wire.sendall(head + kind + b"\r\n\r\n" + parts)
        assert refusal(heard(wire))[0] == 404
        assert time.monotonic() - started < 1.5
