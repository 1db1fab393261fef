"""HEAD is GET without a body, on every route, for every answer."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.api.test_access import lines, log  # noqa: F401
from tests.parts.servers import ALICE, BOB, Server, bearer
from tests.parts.wires import answer, connect

OPEN_PATHS = ("/healthz", "/readyz", "/metrics", "/", "/page/page.css", "/page/nothing")
PATHS = (
    *("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/nothing", "/openapi.json", "/health"),
    *("/v1/models", "/v1/models/tiny-text", "/v1/models/nope", "/v1/models/tiny-label/classes?q=gold", "/nothing"),
    *("/v1/images/generations", "/v1/models/tiny-label/load"),
)


@pytest.mark.parametrize("path", [*OPEN_PATHS, *PATHS])
def test_the_head_of_what_get_answers(closed: Server, path: str) -> None:
    """Status and headers, for one that may, one that may less, and one without a key."""
    for headers in (bearer(ALICE), bearer(BOB), {}):
        with httpx.Client(base_url=closed.url, headers=headers | {"X-Request-ID": "one"}) as http:
            head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"") and get.status_code != 500
        kept = [{k: v for k, v in one.headers.items() if k != "date"} for one in (head, get)]
        if path == "/metrics":  # which counts meanwhile
            del kept[0]["content-length"], kept[1]["content-length"]
        assert kept[0] == kept[1]
        if path in PATHS and not headers and get.status_code not in (404, 405):
            assert head.status_code == 401


def test_a_connection_goes_on_after_a_head(closed: Server) -> None:
    """Not one byte of a body goes out, or the next answer would begin with it."""
    key = f"Authorization: Bearer {ALICE}\r\n".encode()
    with connect(closed.url) as wire:
        for path in (b"/v1/models", b"/nothing", b"/readyz", b"/docs/swagger-ui-bundle.js"):
            wire.sendall(b"HEAD %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, key))
            with wire.makefile("rb", buffering=0) as file:
                while file.readline() != b"\r\n":
                    continue
        wire.sendall(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n%b\r\n" % key)
        assert answer(wire)[0] == 200


def test_a_method_that_is_not_there_is_told_which_are(http: httpx.Client) -> None:
    for path, methods in (("/v1/models", "GET, HEAD"), ("/v1/images/generations", "POST"), ("/docs", "GET, HEAD")):
        assert http.request("PATCH", path).headers["allow"] == methods
    assert http.head("/v1/images/generations").headers["allow"] == "POST"


def test_the_log_says_head(http: httpx.Client, log: pytest.LogCaptureFixture) -> None:  # noqa: F811
    http.head("/v1/models/tiny-text")
    (line,) = lines(log, 1)
    assert (line["method"], line["path"], line["status"], line["model"]) == (
        "HEAD",
        "/v1/models/{model}",
        200,
        "tiny-text",
    )


def test_a_head_that_is_refused_before_a_route_has_no_body_either(closed: Server) -> None:
    with connect(closed.url) as wire:
        wire.sendall(b"HEAD / HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 200 + b"\r\n")
        head, _, rest = b"".join(iter(lambda: wire.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431") and rest == b""
    with connect(closed.url) as wire:
        wire.sendall(b"HEAD / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
        head, _, rest = b"".join(iter(lambda: wire.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and rest == b""
    with connect(closed.url) as wire:
        wire.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 200 + b"\r\n")
        rest = b"".join(iter(lambda: wire.recv(65536), b"")).partition(b"\r\n\r\n")[2]
    assert json.loads(rest)["error"]["code"] == "headers_too_large"
