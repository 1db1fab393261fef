"""What a stranger may send, over a real socket: one clear error body each, in the envelope, and the service goes on."""

from __future__ import annotations

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.api.front import BODY_LIMIT
from tests.parts.servers import generate

PATH = "/v1/images/generations"
DEEP = b"[" * 4000 + b"]" * 4000


def checked(reply: httpx.Response) -> dict[str, Any]:
    """The error of an answer that is in the envelope and tells no internals."""
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in reply.text and "app/" not in reply.text and len(reply.text) < 1000
    return error


@pytest.fixture(autouse=True)
def goes_on(http: httpx.Client) -> Iterator[None]:
    yield
    assert generate(http, {"prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"[]", 400, "invalid_json", None),
        (b"null", 400, "invalid_json", None),
        (b"\xff\xfe\xfd", 400, "invalid_json", None),
        (b'{"prompt": NaN}', 400, "invalid_json", None),
        (b'{"prompt": "a", "guidance_scale": NaN}', 400, "invalid_json", None),
        (b'{"prompt": "a", "guidance_scale": 1e999}', 400, "invalid_value", "guidance_scale"),
        (b'{"prompt": "a", "seed": 1e999}', 400, "invalid_value", "seed"),
        (b'{"prompt": "a", "seed": 1e30}', 400, "invalid_value", "seed"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "invalid_json", None),
        (b'{"prompt": "\\ud800"}', 400, "invalid_value", "prompt"),
        (b'{"prompt": "a", "model": "\\udfff"}', 400, "invalid_value", "model"),
        (b'{"prompt": "a", "\\ud800": 1}', 400, "unknown_parameter", "\\ud800"),
        (b'{"prompt": false}', 400, "invalid_value", "prompt"),
        (b'{"prompt": "a", "n": false}', 400, "invalid_value", "n"),
        (b'{"prompt": "a", "num_inference_steps": false}', 400, "invalid_value", "num_inference_steps"),
        (b'{"prompt": "a", "num_inference_steps": 0}', 400, "invalid_value", "num_inference_steps"),
        (b'{"prompt": "a", "size": "33x32"}', 400, "invalid_value", "size"),
        (b'{"prompt": "a", "model": "nope"}', 404, "model_not_found", "model"),
        (b'{"prompt": "a", "model": "../../etc/passwd"}', 404, "model_not_found", "model"),
        (DEEP, 400, "invalid_json", None),
        (b'{"prompt": ' + DEEP + b"}", 400, None, None),
        (b"[" * 5000, 413, "body_too_large", None),
        (b'{"prompt": "a", "user": [' + b"[]," * 4096 + b"0]}", 413, "body_too_large", None),
        (b'{"prompt": "a", "grid": {' + b'"a":0,' * 4096 + b'"b":0}}', 413, "body_too_large", None),
        (b'{"prompt": "a", "user": [' + b'"",' * 9000 + b'""]}', 413, "body_too_large", None),
        (b'{"prompt": "' + b'[{\\"\\\\,' * 20 + b'", "n": 0}', 400, "invalid_value", "n"),
        (b'{"prompt": "a", "user": "' + b'[{\\"\\\\,' * 99_999 + b'", "n": 0}', 400, "invalid_value", "n"),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, "body_too_large", None),
        (b'{"prompt": "' + b"a" * 100_000 + b'"}', 400, "invalid_value", "prompt"),
    ],
    ids=lambda value: str(value[:40]) if isinstance(value, bytes) else None,
)
def test_bad_bodies(http: httpx.Client, body: bytes, status: int, code: str | None, param: str | None) -> None:
    reply = http.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status
    error = checked(reply)
    if code:
        assert (error["code"], error["param"]) == (code, param)


def test_a_body_that_is_too_large_in_chunks(http: httpx.Client) -> None:
    chunks = (b"a" * 65536 for _ in range(2 * BODY_LIMIT // 65536))
    reply = http.post(PATH, content=chunks)
    assert (reply.status_code, checked(reply)["code"]) == (413, "body_too_large")


def test_a_body_announced_too_large_is_refused_before_it_is_sent(url: str) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\nExpect: 100-continue\r\n\r\n"
    assert talk(url, head.encode()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("POST", "/v1/images/nothing", 404, "not_found"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_wrong_routes_and_methods(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    reply = http.request(method, path)
    assert (reply.status_code, checked(reply)["code"]) == (status, code)
    assert ("allow" in reply.headers) == (status == 405)


@pytest.mark.parametrize(
    "data",
    [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"\x16\x03\x01\x02"],
)
def test_what_is_not_http_is_refused(url: str, data: bytes) -> None:
    assert talk(url, data + b"\r\n\r\n").startswith(b"HTTP/1.1 4")


def test_a_client_that_leaves_in_the_middle_of_its_body(url: str) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with connected(url) as sock:
        sock.sendall(head.encode() + b'{"prompt": ')


PLAIN = b'{"prompt": "a"}'
GZIP = gzip.compress(PLAIN, mtime=0)


@pytest.mark.parametrize("path", [PATH, "/v1/images/compare"])
@pytest.mark.parametrize(
    ("coding", "content", "named"),
    [
        ("gzip", GZIP, "gzip"),
        ("x-gzip", GZIP, "x-gzip"),
        ("GZIP", GZIP, "GZIP"),
        ("br", b"\x0b\x07\x80", "br"),
        ("zstd", b"(\xb5/\xfd", "zstd"),
        ("deflate", zlib.compress(PLAIN), "deflate"),
        ("identity, gzip", GZIP, "gzip"),
        ("aws-chunked", PLAIN, "aws-chunked"),
        ("gzip", b"", "gzip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_encoded_body_is_415_and_named(
    http: httpx.Client, path: str, coding: str, content: bytes, named: str
) -> None:
    reply = http.post(path, content=content, headers={"Content-Encoding": coding})
    error = checked(reply)
    assert (reply.status_code, error["code"], reply.headers["accept-encoding"]) == (
        415,
        "unsupported_encoding",
        "identity",
    )
    assert f'"{named}"' in error["message"]


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity, identity"])
def test_a_body_that_is_as_it_is(http: httpx.Client, coding: str) -> None:
    assert http.post(PATH, content=PLAIN, headers={"Content-Encoding": coding}).status_code == 200


def test_form_data_is_not_json(http: httpx.Client) -> None:
    assert checked(http.post(PATH, data={"prompt": "a"}))["code"] == "invalid_json"


def test_json_needs_no_content_type(http: httpx.Client) -> None:
    """curl -d sends a form's."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert http.post(PATH, content=json.dumps({"prompt": "a"}), headers=headers).status_code == 200


def connected(url: str) -> socket.socket:
    where = urlsplit(url)
    assert where.hostname and where.port
    return socket.create_connection((where.hostname, where.port), timeout=10)


def talk(url: str, data: bytes) -> bytes:
    """Everything the server says to these bytes until it closes."""
    with connected(url) as sock:
        sock.sendall(data)
        said = b""
        try:
            while chunk := sock.recv(65536):
                said += chunk
                if b"\r\n\r\n" in said:
                    break
        except ConnectionResetError:
            pass
        return said
