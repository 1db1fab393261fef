"""One log line a request, its id, and the fixed 500."""

from __future__ import annotations

import logging
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.parts.servers import ALICE, BOB, Server, bearer, generate
from tests.parts.waiting import eventually


def lines(caplog: pytest.LogCaptureFixture, count: int = 0) -> list[dict[str, Any]]:
    """The lines so far, `count` at least: a line is written just after its answer has gone out."""
    until = time.monotonic() + 5
    while True:
        found = [record.msg for record in caplog.records if record.name == "instep.access"]
        if len(found) >= count or time.monotonic() > until:
            return [line for line in found if isinstance(line, dict)]
        time.sleep(0.005)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, url: str) -> pytest.LogCaptureFixture:
    """Without what the tests before this one have yet to say: their lines may come after their answers."""
    caplog.set_level(logging.INFO, logger="instep.access")
    httpx.get(f"{url}/v1/models", headers={"X-Request-ID": "last"})
    eventually(lambda: any(line["request_id"] == "last" for line in lines(caplog)), 5)
    caplog.clear()
    return caplog


def test_a_generation_is_one_line_without_the_prompt(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:
    reply = generate(http, {"prompt": "secret wish", "seed": 5, "n": 2})
    assert reply.status_code == 200
    (line,) = lines(log, 1)
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (line["status"], line["model"], line["seed"], line["steps"], line["images"]) == (200, "tiny-text", 5, 4, 2)
    for stage in ("queue", "encode", "denoise", "decode", "image_encode", "total"):
        assert line[f"{stage}_ms"] >= 0
    assert "secret" not in str(log.records)


@pytest.mark.parametrize("body", [{"prompt": "secret" * 100}, {"prompt": "secret", "size": "1x1"}, {"secret": 1}])
def test_a_refusal_is_logged_by_its_code(
    http: httpx.Client, log: pytest.LogCaptureFixture, body: dict[str, object]
) -> None:
    assert generate(http, body).status_code == 400
    (line,) = lines(log, 1)
    assert (line["status"], line["error"]) in [(400, "invalid_value"), (400, "unknown_parameter")]
    assert "secret" not in str(line)


def test_a_request_that_is_refused_by_its_head_is_not_logged(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:
    """It is counted: a flood of them must not fill a disk."""
    before = http.get("/metrics").text.count('reason="headers_too_large"')
    assert http.get("/v1/models", headers=[("X-A", "b")] * 200).status_code == 431
    assert http.get("/metrics").text.count('reason="headers_too_large"') >= max(1, before)
    both = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
    assert http.post("/v1/images/generations", headers=both, content=iter([b"{}"])).status_code == 400
    http.get("/v1/models", headers={"X-Request-ID": "after"})
    eventually(lambda: any(line["request_id"] == "after" for line in lines(log)), 5)
    assert len(lines(log)) == 1


def test_probes_are_quiet(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/healthz", "/readyz", "/metrics"):
        assert http.get(path).status_code == 200
    assert lines(log) == []


def test_a_request_id_is_kept_when_it_is_safe(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-ID": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for given in ("a b", "x" * 65, "", 'a"b', "ä", "a,b", "a%0d%0ab", "a/../b", "\u0430"):
        told = http.get("/health", headers={"X-Request-ID": given.encode()}).headers["x-request-id"]
        assert told != given and len(told) == 32


@pytest.mark.parametrize(
    "lines_",
    [
        b"X-Request-ID: one\r\nX-Request-ID: two\r\n",
        b"X-Request-ID: one\r\n two\r\n",
        b"X-Request-ID: one\xe4\r\n",
        b"X-Request-ID: one\r\nx-request-id: one\r\n",
    ],
    ids=["two", "folded", "latin", "twice"],
)
def test_one_request_has_one_id(url: str, lines_: bytes) -> None:
    """As raw bytes, which no client library would send."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, int(address.port or 0)), timeout=10) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + lines_ + b"\r\n")
        head = wire.makefile("rb").read().partition(b"\r\n\r\n")[0].lower()
    ids = re.findall(rb"^x-request-id: (.*?)\r?$", head, re.MULTILINE)
    assert len(ids) == 1 and re.fullmatch(rb"[0-9a-f]{32}", ids[0])


def test_a_key_is_no_request_id(closed: Server) -> None:
    for given, key in ((ALICE, BOB), (BOB, BOB), (f"{BOB}.7", BOB), ("sk-not-known-4242", "sk-not-known-4242")):
        headers = {"X-Request-ID": given, **bearer(key)}
        assert len(httpx.get(f"{closed.url}/v1/models", headers=headers).headers["x-request-id"]) == 32
    headers = {"X-Request-ID": "trace-1", **bearer("trace")}
    assert httpx.get(f"{closed.url}/v1/models", headers=headers).headers["x-request-id"] == "trace-1"


def test_a_path_is_logged_as_its_route(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:
    for path in ("/v1/models/tiny-text", "/v1/models/secret-name/classes?q=secret", "/secret"):
        http.get(path)
    told = [line["path"] for line in lines(log, 3)]
    assert told == ["/v1/models/{model}", "/v1/models/{model}/classes", None]
    assert "secret" not in str(log.records)


def test_the_same_request_id_may_come_twice_at_once(http: httpx.Client, url: str) -> None:
    def one(_: int) -> int:
        headers = {"X-Request-ID": "twin"}
        return httpx.post(f"{url}/v1/images/generations", json={"prompt": "!slow 0.2"}, headers=headers).status_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [200] * 4


def test_what_nobody_caught_is_a_fixed_500(
    http: httpx.Client, server: Server, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.metrics, "text", broken)
    reply = http.get("/metrics")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in reply.text and reply.headers["x-request-id"]
    assert any(line["event"] == "unhandled" and "secret detail" in line["exception"] for line in lines(log, 1))


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_after_the_engine_is_a_fixed_error_too(
    http: httpx.Client, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("app.jobs.replies.encode_image", broken)
    reply = generate(http, {"prompt": "a", "stream": stream})
    assert reply.status_code == (200 if stream else 500)
    assert '"code":"internal_error"' in reply.text and "secret" not in reply.text
    trace, line = lines(log, 2)
    assert trace["event"] == "unhandled" and "secret detail" in trace["exception"]
    assert line["error"] == "internal_error" and line["status"] == reply.status_code
